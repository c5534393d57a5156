//! The exponential and the logistic function for vectorised loops: one load an element brings a
//! table's value and its difference to the next.

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::tables::{EXP2, SIGMOID};
use manyhands_shaders::twin::logits::T_MAX;

/// `SIGMOID[i] << 10 | SIGMOID[i + 1] - SIGMOID[i]`.
static LOGISTIC: [u32; 1024] = {
    let mut table = [0; 1024];
    let mut i = 0;
    while i < 1024 {
        table[i] = (SIGMOID[i] << 10 | (SIGMOID[i + 1] - SIGMOID[i])).cast_unsigned();
        i += 1;
    }
    table
};

/// `(EXP2[i] - EXP2[i + 1]) << 32 | EXP2[i]`.
static POWERS: [u64; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        table[i] = ((EXP2[i] - EXP2[i + 1]) as u64) << 32 | EXP2[i] as u64;
        i += 1;
    }
    table
};

/// `x1::sigmoid`.
#[inline(always)]
pub(super) fn sigmoid(x: i32) -> i32 {
    let a = x.unsigned_abs().min((16 << 16) - 1);
    let pair = LOGISTIC[(a >> 10) as usize & 1023];
    let y = ((pair >> 10) + (((pair & 1023) * (a & 1023)) >> 10)).cast_signed();
    if x < 0 { 65536 - y } else { y }
}

/// The entry of [`POWERS`] at or before `t`.
#[inline(always)]
fn part(t: i32) -> usize {
    (t >> 8) as usize & 255
}

/// `2^-t` between an entry's `value` and the next, which is `step` less.
#[inline(always)]
fn between(value: u32, step: u32, t: i32, down: u32) -> i32 {
    let t = t.cast_unsigned();
    let y = value - ((step * (t & 255)) >> 8);
    // From a shift of 31 on the result is 0: also where the definition says 0 (t = 40 and more).
    let s = down + (t >> 16).min(31 - down);
    let half = (1_u32 << (s - 1)) - 1;
    ((y + half + ((y >> s) & 1)) >> s).cast_signed()
}

/// `x1::exp2n(t, fo)` for `0 <= t <= T_MAX` and `down = 30 - fo`; anything for another `t`.
#[inline(always)]
pub(super) fn exp2n(t: i32, down: u32) -> i32 {
    let pair = POWERS[part(t)];
    between(pair as u32, (pair >> 32) as u32, t, down)
}

/// [`exp2n`] of a block: pairs are loaded first, which leaves whole vectors of 32 bits.
#[inline(always)]
pub(super) fn exp2n_block(t: &[i32; BLOCK], down: u32) -> [i32; BLOCK] {
    let (mut values, mut steps) = ([0; BLOCK], [0; BLOCK]);
    for i in 0..BLOCK {
        let pair = POWERS[part(t[i])];
        (values[i], steps[i]) = (pair as u32, (pair >> 32) as u32);
    }
    let mut out = [0; BLOCK];
    for i in 0..BLOCK {
        out[i] = between(values[i], steps[i], t[i], down);
    }
    out
}

/// `min(mulsh(max - x, scale, 24), T_MAX)` for `x <= max`; anything for another `x`.
#[inline(always)]
pub(super) fn distance(max: i32, x: i32, scale: i32) -> i32 {
    // Rounds by an addition: a product that is not beyond the limit is exact in f64.
    const MAGIC: f64 = (3_u128 << (51 + 24)) as f64;
    const LIMIT: f64 = ((T_MAX as u64) << 24) as f64;
    let product = f64::from(max.wrapping_sub(x)) * f64::from(scale);
    let product = if product < LIMIT { product } else { LIMIT };
    (product + MAGIC).to_bits() as i32
}
