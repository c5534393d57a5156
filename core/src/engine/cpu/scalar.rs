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

/// Rounding of f64 by addition: to multiples of `2^s`, ties to even.
///
/// Vector units multiply and round f64 in two instructions where 64-bit integers take six. It is
/// exact: integer operands of at most 31 bits have a product that f64 holds if it is below 2^53,
/// and one that is not, times `2^-s` with `s <= 24`, is at least 2^29, which [`could_clamp`] tells.
/// What is rounded must be below `2^(50 + s)` in magnitude: for `s >= 10` every such product is.
#[derive(Clone, Copy)]
pub(super) struct Rounding(f64);

impl Rounding {
    /// `1.5 * 2^(52 + s)`: the last place of sums with it is `2^s`. And 2^29 last places, with
    /// which a result that is far from every clamp is one of 30 bits.
    #[inline(always)]
    pub(super) const fn new(s: u32) -> Self {
        Self(f64::from_bits((1075 + s as u64) << 52 | 1 << 51 | 1 << 29))
    }

    /// The sum that rounds `x`, and into `flags` what [`could_clamp`] needs of it.
    #[inline(always)]
    pub(super) fn sum(self, x: f64, flags: &mut u64) -> f64 {
        let sum = x + self.0;
        *flags |= sum.to_bits();
        sum
    }

    /// [`Self::sum`] of `a * b`. `FUSED` leaves out the rounding of the product, which is one only
    /// where [`could_clamp`] tells so either way.
    #[inline(always)]
    pub(super) fn product<const FUSED: bool>(self, a: f64, b: f64, flags: &mut u64) -> f64 {
        let sum = if FUSED { a.mul_add(b, self.0) } else { a * b + self.0 };
        *flags |= sum.to_bits();
        sum
    }

    /// What was rounded, as a multiple of `2^s`.
    #[inline(always)]
    pub(super) fn rounded(self, sum: f64) -> f64 {
        sum - self.0
    }

    /// What was rounded, times `2^-s`.
    #[inline(always)]
    pub(super) fn integer(self, sum: f64) -> i64 {
        sum.to_bits().wrapping_sub(self.0.to_bits()).cast_signed()
    }
}

/// What was rounded, times `2^-s`, if it is of 32 bits.
#[inline(always)]
pub(super) fn integer(sum: f64) -> i32 {
    (sum.to_bits() as i32).wrapping_sub(1 << 29)
}

/// [`integer`] of a block, in two loops: the second has nothing of 64 bits and fills vectors, which
/// whoever reads them next needs whole.
#[inline(always)]
pub(super) fn integers<const N: usize>(sums: &[f64; N]) -> [i32; N] {
    let mut out = [0; N];
    for i in 0..N {
        out[i] = sums[i].to_bits() as i32;
    }
    for i in 0..N {
        out[i] = out[i].wrapping_sub(1 << 29);
    }
    out
}

/// Whether any result of which `flags` is the union of sums was 2^29 or more in magnitude.
#[inline(always)]
pub(super) fn could_clamp(flags: u64) -> bool {
    // The offset in these bits is all below them, unless a result carries or borrows.
    const HIGH: u64 = (1 << 51) - (1 << 30);
    flags & HIGH != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Either the result is that of integers, or it is told that it could clamp; where it does
    /// clamp, it is told. Magnitudes of all sizes, ties included, with and without fusion.
    #[test]
    fn rounding_in_f64_equals_integers_or_tells() {
        let mut state = 1_u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = (state >> 32) as i32 >> (state >> 27 & 31);
            // Few bits set make ties.
            if state >> 26 & 1 == 0 { bits } else { bits & !0 << (state >> 21 & 31) }
        };
        let (mut told, mut clamped, mut ties) = (0, 0, 0);
        for _ in 0..200_000 {
            let (a, b) = (random().clamp(-LIM, LIM), random().clamp(-LIM, LIM));
            let s = 10 + random().unsigned_abs() % 15;
            let exact = rne64(i64::from(a) * i64::from(b), s);
            let by = Rounding::new(s);
            for fused in [false, true] {
                let (a, b, mut flags) = (f64::from(a), f64::from(b), 0);
                let sum = if fused {
                    by.product::<true>(a, b, &mut flags)
                } else {
                    by.product::<false>(a, b, &mut flags)
                };
                if could_clamp(flags) {
                    told += 1;
                    clamped += i32::from(exact.abs() > LIM.into());
                    continue;
                }
                assert!(exact.abs() <= 1 << 29, "{a} {b} {s}: {exact} is not told");
                assert_eq!(i64::from(integer(sum)), exact, "{a} {b} {s}");
                assert_eq!(by.integer(sum), exact, "{a} {b} {s}");
                assert_eq!(by.rounded(sum), exact as f64 * f64::from(1 << s), "{a} {b} {s}");
            }
            let half = (i64::from(a) * i64::from(b)) & ((1 << s) - 1);
            ties += i32::from(half == 1 << (s - 1));
        }
        assert!(told > 1000 && clamped > 1000 && ties > 1000, "{told} {clamped} {ties}");
    }
}
