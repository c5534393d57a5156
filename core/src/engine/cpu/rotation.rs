//! Rotary embeddings: pairs of channels turned by their position's angle, and back.

use super::quantize::{put, whole};
use super::scalar::{Rounding, could_clamp, integers, rne64, sat};

/// Pairs of channels that are rotated at once.
const TURN: usize = 16;

/// Rotates the first pairs of channels, as many as there are up to [`TURN`], by `cos` and `sin`,
/// `sign` -1 for the inverse. Sets `redo` if a clamp is possible: [`turn_counted`] is due.
#[inline(always)]
fn turn(
    [a, b]: [&[i32]; 2],
    cos: &[i32],
    sin: &[i32],
    sign: f64,
    redo: &mut bool,
) -> [[i32; TURN]; 2] {
    const BY: Rounding = Rounding::new(14);
    let (a, b, cos, sin) =
        (whole::<TURN>(a), whole::<TURN>(b), whole::<TURN>(cos), whole::<TURN>(sin));
    let (mut low, mut high, mut flags) = ([0.0; TURN], [0.0; TURN], 0);
    for i in 0..TURN {
        let (c, s) = (f64::from(cos[i]), f64::from(sin[i]) * sign);
        let (a, b) = (f64::from(a[i]), f64::from(b[i]));
        low[i] = BY.sum(a * c - b * s, &mut flags);
        high[i] = BY.sum(b * c + a * s, &mut flags);
    }
    *redo |= could_clamp(flags);
    [integers(&low), integers(&high)]
}

/// Rotates `x` (D) into `out` (D) by `cos` and `sin` (D / 2). Returns the number of clamps.
#[inline(always)]
pub(super) fn rotate(x: &[i32], cos: &[i32], sin: &[i32], out: &mut [i32]) -> i64 {
    let (half, mut redo) = (cos.len(), false);
    let (a, b) = x[..2 * half].split_at(half);
    let (to_a, to_b) = out[..2 * half].split_at_mut(half);
    for i in (0..half).step_by(TURN) {
        let [low, high] = turn([&a[i..], &b[i..]], &cos[i..], &sin[i..], 1.0, &mut redo);
        put(&mut to_a[i..], &low);
        put(&mut to_b[i..], &high);
    }
    if !redo {
        return 0;
    }
    to_a.copy_from_slice(a);
    to_b.copy_from_slice(b);
    turn_counted([to_a, to_b], cos, sin, 1)
}

/// Rotates `x` (D) back, in place, by `cos` and `sin` (D / 2). Returns the number of clamps.
#[inline(always)]
pub(super) fn rotate_back(x: &mut [i32], cos: &[i32], sin: &[i32]) -> i64 {
    let (half, mut count) = (cos.len(), 0);
    let (a, b) = x[..2 * half].split_at_mut(half);
    for i in (0..half).step_by(TURN) {
        let (a, b, cos, sin) = (&mut a[i..], &mut b[i..], &cos[i..], &sin[i..]);
        let mut redo = false;
        let [low, high] = turn([a, b], cos, sin, -1.0, &mut redo);
        if redo {
            let n = TURN.min(half - i);
            count += turn_counted([&mut a[..n], &mut b[..n]], cos, sin, -1);
        } else {
            put(a, &low);
            put(b, &high);
        }
    }
    count
}

/// Rotates in place, clamped; returns the number of clamps. Apart, what the fast loops compute
/// stays in registers.
#[cold]
fn turn_counted([a, b]: [&mut [i32]; 2], cos: &[i32], sin: &[i32], sign: i32) -> i64 {
    let mut count = 0;
    for (i, (to_a, to_b)) in a.iter_mut().zip(b).enumerate() {
        let (c, s) = (i64::from(cos[i]), i64::from(sin[i] * sign));
        let (a, b) = (i64::from(*to_a), i64::from(*to_b));
        *to_a = sat(rne64(a * c - b * s, 14), &mut count);
        *to_b = sat(rne64(b * c + a * s, 14), &mut count);
    }
    count
}
