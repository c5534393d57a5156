//! Rotary position embedding (Su et al. 2021), halves rotated: pairs `(i, i + D/2)`.

use super::{Saturations, Site};
use crate::x1::rne;

/// Cosines and sines (T, D/2) in Q14.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RopeTable {
    /// D / 2.
    pub half: usize,
    /// (T, D/2) cosines.
    pub cos: Vec<i32>,
    /// (T, D/2) sines.
    pub sin: Vec<i32>,
}

/// Rotates one head's vector `x` (D) in place by the angle of `position`; `inverse` undoes it.
pub fn rotate(
    x: &mut [i32],
    table: &RopeTable,
    position: usize,
    inverse: bool,
    saturations: &mut Saturations,
) {
    let half = table.half;
    for i in 0..half {
        let cos = i64::from(table.cos[position * half + i]);
        let sin = i64::from(table.sin[position * half + i]) * if inverse { -1 } else { 1 };
        let (a, b) = (i64::from(x[i]), i64::from(x[i + half]));
        x[i] = saturations.sat(Site::Rope, rne(a * cos - b * sin, 14));
        x[i + half] = saturations.sat(Site::Rope, rne(b * cos + a * sin, 14));
    }
}
