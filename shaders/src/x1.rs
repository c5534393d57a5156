//! Scalar primitives of format X1: everything that is not a matrix product.
//!
//! Fixed point `FX(F)` is an `i32` of value `v * 2^-F` with `|v| <= LIM`. There is one rounding
//! rule, nearest with ties to even, and one clamp, [`sat`]. Shifts of negative numbers are
//! arithmetic. Each function here has a WGSL twin of the same name in `wgsl/shared/x1.wgsl`.

use crate::tables::{EXP2, SIGMOID};

/// Name of the number system: part of every manifest and of the conformance digest.
pub const FORMAT: &str = "X1";
/// Largest magnitude of a fixed-point value.
pub const LIM: i32 = (1 << 30) - 1;

/// Clamps to `[-LIM, LIM]`.
#[inline(always)]
pub const fn sat(x: i64) -> i32 {
    if x > LIM as i64 {
        LIM
    } else if x < -(LIM as i64) {
        -LIM
    } else {
        x as i32
    }
}

/// Whether [`sat`] changes `x`: 1 or 0, to be summed into a saturation count.
#[inline(always)]
pub const fn clamps(x: i64) -> u64 {
    (x > LIM as i64 || x < -(LIM as i64)) as u64
}

/// `x * 2^-s` to the nearest integer, ties to even. `s <= 0` shifts left; the caller guarantees
/// room (`|s| <= 31` is then enough). `s >= 62` gives 0.
#[inline(always)]
pub const fn rne(x: i64, s: i32) -> i64 {
    if s <= 0 {
        return x << (if s < -31 { 31 } else { -s });
    }
    if s >= 62 {
        return 0;
    }
    (x + (1 << (s - 1)) - 1 + ((x >> s) & 1)) >> s
}

/// The exact product `a * b`, times `2^-s`, to nearest even; not yet clamped. `0 <= s <= 63`.
#[inline(always)]
pub const fn mulsh_wide(a: i32, b: i32, s: i32) -> i64 {
    rne(a as i64 * b as i64, s)
}

/// [`mulsh_wide`], clamped. Count with [`clamps`] where a clamp is possible.
#[inline(always)]
pub const fn mulsh(a: i32, b: i32, s: i32) -> i32 {
    sat(mulsh_wide(a, b, s))
}

/// Bit length of `|x|`; 0 for 0.
#[inline(always)]
pub const fn bl(x: i32) -> i32 {
    32 - x.unsigned_abs().leading_zeros() as i32
}

/// Bit length of an unsigned 64-bit value; 0 for 0.
#[inline(always)]
pub const fn bl64(x: u64) -> i32 {
    64 - x.leading_zeros() as i32
}

/// `floor(sqrt(v))` by 16 binary digits.
#[inline(always)]
pub const fn isqrt(v: u32) -> u32 {
    let mut q = 0;
    let mut bit = 0x8000;
    while bit != 0 {
        let c: u32 = q | bit;
        if c * c <= v {
            q = c;
        }
        bit >>= 1;
    }
    q
}

/// One block's exact sum `d` (`|d| <= 2^24`) times `2^-s`, nearest even, clamped to `LIM` on the
/// unbounded value.
#[inline(always)]
pub const fn flush(d: i32, s: i32) -> i32 {
    if s > 0 {
        return if s >= 26 { 0 } else { rne(d as i64, s) as i32 };
    }
    let l = if s < -31 { 31 } else { -s };
    sat((d as i64) << l)
}

/// `2^-(t/65536)` in `FX(fo)`, for `t >= 0` in `FX(16)` and `fo <= 24`; 0 from `t = 40` on.
/// Error below 1e-6, monotone.
#[inline(always)]
pub const fn exp2n(t: i32, fo: i32) -> i32 {
    let n = t >> 16;
    if n >= 40 {
        return 0;
    }
    let i = ((t >> 8) & 255) as usize;
    let r = t & 255;
    let y = EXP2[i] - (((EXP2[i] - EXP2[i + 1]) * r) >> 8);
    rne(y as i64, 30 - fo + n) as i32
}

/// Logistic function of an `FX(16)` value, in `FX(16)`: 0 to 65536.
#[inline(always)]
pub const fn sigmoid(x: i32) -> i32 {
    let u = x.unsigned_abs();
    let a = if u > (16 << 16) - 1 { (16 << 16) - 1 } else { u as i32 };
    let (i, r) = ((a >> 10) as usize, a & 1023);
    let y = SIGMOID[i] + (((SIGMOID[i + 1] - SIGMOID[i]) * r) >> 10);
    if x < 0 { 65536 - y } else { y }
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
pub const fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    let mut round = 0;
    while round < 10 {
        let p = 0xD251_1F53_u64 * c[0] as u64;
        let q = 0xCD9E_8D57_u64 * c[2] as u64;
        c = [(q >> 32) as u32 ^ c[1] ^ k[0], q as u32, (p >> 32) as u32 ^ c[3] ^ k[1], p as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        round += 1;
    }
    c
}
