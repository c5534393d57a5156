//! The exponential and the logistic function for vectorised loops: one load an element brings a
//! table's value and its difference to the next.

use manyhands_shaders::tables::{EXP2, SIGMOID};
use manyhands_shaders::twin::logits::T_MAX;

use super::scalar::mulsh_wide;

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

/// `x1::exp2n(t, fo)` for `0 <= t <= T_MAX` and `down = 30 - fo`.
#[inline(always)]
pub(super) fn exp2n(t: i32, down: i32) -> i32 {
    let pair = POWERS[(t >> 8) as usize & 255];
    let y = (pair as u32) - ((((pair >> 32) as u32) * (t & 255).cast_unsigned()) >> 8);
    // From a shift of 31 on the result is 0: also where the definition says 0 (t = 40 and more).
    let s = (down + (t >> 16)).min(31).cast_unsigned();
    let half = (1_u32 << (s - 1)) - 1;
    ((y + half + ((y >> s) & 1)) >> s).cast_signed()
}

/// `min(mulsh(max - x, scale, 24), T_MAX)`.
#[inline(always)]
pub(super) fn distance(max: i32, x: i32, scale: i32) -> i32 {
    mulsh_wide(max.wrapping_sub(x), scale, 24).min(i64::from(T_MAX)) as i32
}
