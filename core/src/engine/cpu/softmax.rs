//! Exact softmax of a row of scores, and probabilities as left operands.

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK};
use manyhands_shaders::twin::attention::reciprocal;

use super::kernel::{EXPONENT_SHIFT, PANEL_BLOCK, PANEL_EXPONENTS, ZERO_EXPONENT};
use super::pack::ZERO_FIELD;
use super::path::simd;
use super::scalar::{length_field, mulsh_wide, shift};
use super::tables::{distance, exp2n};

/// The largest of a block, by halves: a chain of 32 comparisons would not vectorise.
#[inline(always)]
fn largest(x: &[i32; BLOCK]) -> i32 {
    let mut x = *x;
    let mut n = BLOCK / 2;
    while n > 0 {
        for i in 0..n {
            x[i] = x[i].max(x[i + n]);
        }
        n /= 2;
    }
    x[0]
}

simd! {
    /// Scores of the first `n` keys to probabilities in Q24, in place; zeros after them.
    /// `s` is of whole blocks of 32.
    pub(super) fn probabilities(s: &mut [i32], n: usize, scale: i32) {
        let mut max = i32::MIN;
        for &s in &s[..n] {
            max = max.max(s);
        }
        // Scores that are masked can be anything: their weights are computed and dropped.
        for s in s.iter_mut() {
            *s = exp2n(distance(max, *s, scale).max(0), 30 - 24);
        }
        s[n..].fill(0);
        let mut total = 0_u32;
        for s in s.as_chunks::<BLOCK>().0 {
            let mut sum = 0;
            for &s in s {
                sum += s;
            }
            total += sum.cast_unsigned() >> 8;
        }
        let (reciprocal, down) = reciprocal(total);
        for s in s.iter_mut() {
            *s = mulsh_wide(*s, reciprocal, down.cast_unsigned()) as i32;
        }
    }
}

simd! {
    /// Probabilities (Q24, whole blocks) times `2^e` of their keys, to lines of 11 bits.
    pub(super) fn fold_probabilities(
        p: &[i32],
        e: &[i32],
        at: usize,
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) {
        // Rounds by an addition: a probability is at most 2^24, exact in f32.
        const MAGIC: f32 = 12_582_912.0;
        const BITS: i32 = ACTIVATION_BITS as i32;
        const MAX: i32 = (1 << (BITS - 1)) - 1;
        for (b, (p, e)) in p.as_chunks::<BLOCK>().0.iter().zip(e.as_chunks::<BLOCK>().0).enumerate() {
            let mut fields = [0; BLOCK];
            for i in 0..BLOCK {
                fields[i] = ((p[i] as f32).to_bits().cast_signed() >> 23) + e[i];
            }
            let top = largest(&fields);
            let m = &mut mantissas[b * PANEL_BLOCK + at * BLOCK..][..BLOCK];
            let to = &mut exponents[b * PANEL_EXPONENTS + at];
            if top < ZERO_FIELD {
                m.fill(0);
                *to = ZERO_EXPONENT;
                continue;
            }
            let exponent = top - 126 - (BITS - 1);
            for i in 0..BLOCK {
                let scale = f32::from_bits(((127 + e[i] - exponent) << 23).cast_unsigned());
                let t = (p[i] as f32 * scale + MAGIC).to_bits().cast_signed();
                m[i] = (t - MAGIC.to_bits().cast_signed()).clamp(-MAX, MAX) as i16;
            }
            *to = (exponent - 24) << EXPONENT_SHIFT;
        }
    }
}

simd! {
    /// Integers (whole blocks) times `2^(e + base)`, to lines of `bits` bits.
    pub(super) fn fold(
        x: &[i32],
        e: &[i32],
        base: i32,
        bits: u32,
        at: usize,
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) {
        let max = (1 << (bits - 1)) - 1;
        for (b, (x, e)) in x.as_chunks::<BLOCK>().0.iter().zip(e.as_chunks::<BLOCK>().0).enumerate() {
            let mut fields = [0; BLOCK];
            for i in 0..BLOCK {
                fields[i] = length_field(x[i]) + e[i];
            }
            let top = largest(&fields);
            let m = &mut mantissas[b * PANEL_BLOCK + at * BLOCK..][..BLOCK];
            let to = &mut exponents[b * PANEL_EXPONENTS + at];
            if top < ZERO_FIELD {
                m.fill(0);
                *to = ZERO_EXPONENT;
                continue;
            }
            let exponent = top - 126 - (bits.cast_signed() - 1);
            for i in 0..BLOCK {
                m[i] = shift(x[i], exponent - e[i]).clamp(-max, max) as i16;
            }
            *to = (exponent + base) << EXPONENT_SHIFT;
        }
    }
}
