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

/// A block as pairs of neighbours: 64-bit products need no widening of their operands then.
#[inline(always)]
pub(super) fn pairs(x: &[i32; 32]) -> [u64; 16] {
    let mut out = [0; 16];
    for i in 0..16 {
        out[i] = join(x[2 * i], x[2 * i + 1]);
    }
    out
}

/// The inverse of [`pairs`].
#[inline(always)]
pub(super) fn unpairs(x: &[u64; 16]) -> [i32; 32] {
    let mut out = [0; 32];
    for i in 0..16 {
        out[2 * i] = x[i] as i32;
        out[2 * i + 1] = (x[i] >> 32) as i32;
    }
    out
}

#[inline(always)]
fn join(low: i32, high: i32) -> u64 {
    u64::from(low.cast_unsigned()) | u64::from(high.cast_unsigned()) << 32
}

/// What [`could_clamp`] needs of a result.
#[inline(always)]
pub(super) fn flag(x: i64) -> u64 {
    const HALF: i64 = 1 << 29;
    x.wrapping_add(HALF).cast_unsigned()
}

/// [`mulsh_wide`] of two pairs, and into `flags` what [`could_clamp`] needs.
#[inline(always)]
pub(super) fn mulsh_pair(a: u64, b: u64, s: u32, flags: &mut u64) -> u64 {
    let low = |x: u64| i64::from(x as i32);
    let high = |x: u64| x.cast_signed() >> 32;
    let x = rne64(low(a) * low(b), s);
    let y = rne64(high(a) * high(b), s);
    *flags |= flag(x) | flag(y);
    (x.cast_unsigned() & 0xffff_ffff) | (y.cast_unsigned() << 32)
}

/// Whether any result of which `flags` is the union was 2^29 or more in magnitude.
#[inline(always)]
pub(super) fn could_clamp(flags: u64) -> bool {
    flags >> 30 != 0
}

/// Sums of the halves of two pairs, wrapping.
#[inline(always)]
pub(super) fn add_pair(a: u64, b: u64) -> u64 {
    let high = (a >> 32).wrapping_add(b >> 32) << 32;
    high | u64::from((a as u32).wrapping_add(b as u32))
}
