//! Arithmetic for vectorised loops: the primitives of `x1` without their branches.

use manyhands_shaders::x1::LIM;

/// `a * b * 2^-s` to nearest even, for `1 <= s <= 62`.
#[inline(always)]
pub(super) fn mulsh_wide(a: i32, b: i32, s: u32) -> i64 {
    rne64(i64::from(a) * i64::from(b), s)
}

/// `x * 2^-s` to nearest even, for `1 <= s <= 62` and `x` that leaves room for the half.
#[inline(always)]
pub(super) fn rne64(x: i64, s: u32) -> i64 {
    (x + ((1_i64 << (s - 1)) - 1) + ((x >> s) & 1)) >> s
}

/// `x * 2^-s` to nearest even for `|x| <= LIM` and any `s` above -31; a left shift has room.
#[inline(always)]
pub(super) fn shift(x: i32, s: i32) -> i32 {
    let right = s.clamp(0, 31).cast_unsigned();
    let left = (-s).clamp(0, 31).cast_unsigned();
    let half = (1_u32 << right) >> 1;
    let down = -i32::from(s > 0);
    let bias = (half.cast_signed() - 1 + ((x >> right) & 1)) & down;
    (x.wrapping_add(bias) >> right) << left
}

/// Clamps to `[-LIM, LIM]` and adds 1 to `count` if that changes `x`.
#[inline(always)]
pub(super) fn sat(x: i64, count: &mut i64) -> i32 {
    let lim = i64::from(LIM);
    let y = x.clamp(-lim, lim);
    *count += i64::from(x != y);
    y as i32
}

/// [`mulsh_wide`], clamped and counted.
#[inline(always)]
pub(super) fn mulsh(a: i32, b: i32, s: u32, count: &mut i64) -> i32 {
    sat(mulsh_wide(a, b, s), count)
}

/// Bit length of `|x|` plus 126, or 0 for 0: the exponent field of the nearest f32 that does not
/// round up to the next power of two.
#[inline(always)]
pub(super) fn length_field(x: i32) -> i32 {
    let x = x.unsigned_abs();
    // Clearing the bits below each set bit's neighbour keeps the length and forbids the carry.
    ((x & !(x >> 1)).cast_signed() as f32).to_bits().cast_signed() >> 23
}
