//! The twins: each operation of the decoder as obvious loops over integers.
//!
//! They define what is right and are never tuned. Shapes use N rows (tokens of all sequences, one
//! after the other), C channels, H heads, K key-value heads, D head size, V vocabulary.
//! Everything between matrix products is `FX(16)` (`i32`), gradients are `FX(20)`, gradient
//! shares `FX(16)` summed in `i64`. Each function returns or adds to a [`Saturations`].

pub mod attention;
pub mod attention_backward;
pub mod embedding;
pub mod logits;
pub mod matmul;
pub mod rmsnorm;
pub mod rope;
pub mod swiglu;

use crate::x1::{clamps, mulsh_wide, sat};

/// Fraction bits of activations.
pub const ACTIVATION_FRACTION: i32 = 16;
/// Fraction bits of gradients inside the backward pass.
pub const GRADIENT_FRACTION: i32 = 20;
/// Fraction bits of the gradient of a parameter.
pub const SHARE_FRACTION: i32 = 16;

/// Where a value can leave its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// A block term of any matrix product that could make its sum overflow.
    Matmul,
    /// RMSNorm, forward or backward.
    Norm,
    /// Rotary embedding, forward or backward.
    Rope,
    /// Attention backward: the softmax gradient and the sum over a group's heads.
    Attention,
    /// SwiGLU, forward or backward.
    Swiglu,
    /// Residual additions, and sums of gradients from several branches.
    Residual,
    /// Gradient seeds at the logits.
    Seed,
    /// Embedding rows that do not fit `FX(16)`.
    Embedding,
}

/// Number of [`Site`]s.
pub const SITE_COUNT: usize = 8;

/// How many values were clamped, or could have overflowed, by [`Site`]. Part of every result:
/// zero everywhere means that no value anywhere left its range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saturations(pub [u64; SITE_COUNT]);

impl Saturations {
    /// Names in the order of the counts.
    pub const NAMES: [&str; SITE_COUNT] =
        ["matmul", "norm", "rope", "attention", "swiglu", "residual", "seed", "embedding"];

    /// Adds `count` events.
    pub fn add(&mut self, site: Site, count: u64) {
        self.0[site as usize] += count;
    }

    /// Adds another tally.
    pub fn merge(&mut self, other: &Self) {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a += b;
        }
    }

    /// Sum over all sites.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// [`sat`] with the clamp counted.
    pub fn sat(&mut self, site: Site, x: i64) -> i32 {
        self.add(site, clamps(x));
        sat(x)
    }

    /// `mulsh` with the clamp counted.
    pub fn mulsh(&mut self, site: Site, a: i32, b: i32, s: i32) -> i32 {
        self.sat(site, mulsh_wide(a, b, s))
    }
}

/// `a = sat(a + b)`, element by element: residual additions and sums of gradients.
pub fn add(a: &mut [i32], b: &[i32], saturations: &mut Saturations) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a = saturations.sat(Site::Residual, i64::from(*a) + i64::from(b));
    }
}

/// Rows of one sequence in a batch: `rows` consecutive rows that begin at row `first_row`, tokens
/// at positions `position..position + rows` of cache slot `slot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row in the batch.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Slot of the key-value cache.
    pub slot: usize,
    /// Position of the first row in its sequence.
    pub position: usize,
}
