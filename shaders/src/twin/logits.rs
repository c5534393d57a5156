//! Everything that happens at the logits: log-probability, entropy, sampling, gradient seeds.
//!
//! One exact distribution serves all four: weights `e_i = 2^-t_i` in Q23 with
//! `t_i = (max - logit_i) log2(e) / temperature` in `FX(16)`, and their total `Z`. The distribution
//! that is trained is therefore bit for bit the one that was sampled.

use super::{GRADIENT_FRACTION, Saturations, Site};
use crate::x1::{bl64, exp2n, mulsh, mulsh_wide, sat};

/// Largest `t` that is kept: beyond it the weight is 0.
pub const T_MAX: i32 = 40 << 16;

/// Largest entropy weight for which no slope `(center - t) u` can be clamped: `40 * 2^23 < LIM`.
pub const ENTROPY_WEIGHT_MAX: i32 = 1 << 23;

/// The softmax statistics of one row, all integers: what scalars the learner needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowStats {
    /// `t` of the row's target token: `-log2 p` in `FX(16)`, up to `log2 Z`.
    pub t: i32,
    /// `Z = sum e_i`, Q23.
    pub total: u64,
    /// `sum e_i t_i`, Q39.
    pub moment: u64,
    /// Lowest token of largest logit.
    pub greedy: u32,
}

/// What to seed the backward pass with at one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeedRow {
    /// The token whose log-probability is trained.
    pub target: u32,
    /// Weight of `-log p(target)` in the loss, Q16 times the loss scale.
    pub weight: i32,
    /// Weight of the entropy bonus, `alpha ln 2` in Q16 times the loss scale; 0 for none. At most
    /// [`ENTROPY_WEIGHT_MAX`] in magnitude.
    pub entropy_weight: i32,
    /// `H / ln 2 - log2(Z 2^-23)` in `FX(16)`: the row's entropy relative to its largest logit.
    pub entropy_center: i32,
}

/// `round(2^24 log2(e) / temperature)`: logits to powers of two. A manifest constant.
pub fn temperature_scale(temperature: f64) -> i32 {
    assert!(
        (0.05..=20.0).contains(&temperature),
        "temperature {temperature} is outside [0.05, 20]"
    );
    (std::f64::consts::LOG2_E / temperature * 16_777_216.0).round_ties_even() as i32
}

/// `(t, e)` of every logit of a row: distance from the largest, and sampling weight in Q23.
pub fn weights(logits: &[i32], scale: i32) -> impl Iterator<Item = (i32, i32)> {
    let max = logits.iter().copied().max().unwrap_or(0);
    logits.iter().map(move |&x| {
        let t = mulsh(max - x, scale, 24).min(T_MAX);
        (t, exp2n(t, 23))
    })
}

/// Statistics of one row of logits (V) in `FX(16)`.
pub fn stats(logits: &[i32], target: u32, scale: i32) -> RowStats {
    let mut out = RowStats::default();
    for (i, (t, e)) in weights(logits, scale).enumerate() {
        out.total += e as u64;
        out.moment += e as u64 * t as u64;
        if i == target as usize {
            out.t = t;
        }
        if logits[i] > logits[out.greedy as usize] {
            out.greedy = i as u32;
        }
    }
    out
}

/// Inverse-CDF sampling: the first token whose cumulative weight exceeds `floor(draw Z / 2^64)`.
pub fn sample(logits: &[i32], scale: i32, draw: u64) -> u32 {
    let total: u64 = weights(logits, scale).map(|(_, e)| e as u64).sum();
    let threshold = ((u128::from(draw) * u128::from(total)) >> 64) as u64;
    let mut cumulative = 0;
    for (i, (_, e)) in weights(logits, scale).enumerate() {
        cumulative += e as u64;
        if cumulative > threshold {
            return i as u32;
        }
    }
    unreachable!("the threshold is below the total")
}

/// Gradient of `weight * -log p(target) - alpha * H` with respect to the logits / temperature:
/// (V) in `FX(20)`. The caller folds `1 / temperature` into the weights.
///
/// `dL/dlogit_i = w (p_i - [i = target]) + alpha p_i (ln p_i + H)`.
pub fn seed(logits: &[i32], row: &SeedRow, scale: i32, saturations: &mut Saturations) -> Vec<i32> {
    if row.weight == 0 && row.entropy_weight == 0 {
        return vec![0; logits.len()];
    }
    let total: u64 = weights(logits, scale).map(|(_, e)| e as u64).sum();
    let (reciprocal, shift) = reciprocal(total);
    let mut out = Vec::with_capacity(logits.len());
    for (i, (t, e)) in weights(logits, scale).enumerate() {
        let p = mulsh(e, reciprocal, shift);
        let hot = if i == row.target as usize { 1 << 24 } else { 0 };
        let policy = mulsh_wide(p - hot, row.weight, 16 + 24 - GRADIENT_FRACTION);
        let slope = mulsh(row.entropy_center - t, row.entropy_weight, 16);
        let entropy = mulsh_wide(p, slope, 16 + 24 - GRADIENT_FRACTION);
        saturations.add(Site::Seed, crate::x1::clamps(policy + entropy));
        out.push(sat(policy + entropy));
    }
    out
}

/// `(r, s)` such that `mulsh(e, r, s)` is `e / Z` in Q24, by a 16-bit reciprocal.
pub const fn reciprocal(total: u64) -> (i32, i32) {
    let bits = bl64(total);
    let top = (total >> (bits - 16)) as u32;
    let r = (1_u32 << 31) / top;
    (if r > 65535 { 65535 } else { r as i32 }, bits - 9)
}
