//! Exact softmax of a row of scores, and probabilities as left operands.

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK};
use manyhands_shaders::twin::attention::reciprocal;

use super::kernel::{EXPONENT_SHIFT, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, ZERO_EXPONENT};
use super::pack::ZERO_FIELD;
use super::path::simd;
use super::scalar::{Rounding, integer, length_field, shift};
use super::tables::{distance, exp2n_block};

/// Ones in the first lanes of a block of which `seen` values count: branches on indices would be
/// compiled to a branch a value.
#[inline(always)]
fn mask(seen: usize) -> &'static [i32] {
    static MASK: [i32; 2 * BLOCK] = {
        let mut mask = [0; 2 * BLOCK];
        let mut i = 0;
        while i < BLOCK {
            mask[i] = -1;
            i += 1;
        }
        mask
    };
    &MASK[BLOCK - seen.min(BLOCK)..][..BLOCK]
}

simd! {
    /// A panel's scores to probabilities in Q24, in place; zeros beyond each row's position.
    /// `width` is of whole blocks of 32, rows are `stride` apart.
    ///
    /// Each step is taken for all rows: the steps of one row wait for each other.
    pub(super) fn probabilities(
        s: &mut [i32],
        stride: usize,
        width: usize,
        positions: &[usize],
        scale: i32,
    ) {
        let mask = |position: usize, block: usize| mask((position + 1).saturating_sub(block * BLOCK));
        let mut maxima = [i32::MIN; PANEL];
        for ((s, position), max) in s.chunks(stride).zip(positions).zip(&mut maxima) {
            for (b, s) in s[..width].as_chunks::<BLOCK>().0.iter().enumerate() {
                let mask = mask(*position, b);
                for i in 0..BLOCK {
                    *max = (*max).max(s[i] & mask[i] | i32::MIN & !mask[i]);
                }
            }
        }
        let mut totals = [0_u32; PANEL];
        let rows = s.chunks_mut(stride).zip(positions).zip(&maxima).zip(&mut totals);
        for (((s, position), max), total) in rows {
            for (b, s) in s[..width].as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                let mut t = [0; BLOCK];
                for i in 0..BLOCK {
                    t[i] = distance(*max, s[i], scale);
                }
                // Scores that are masked can be anything: their weights are computed and dropped.
                let (weights, mask) = (exp2n_block(&t, 30 - 24), mask(*position, b));
                let mut sum = 0;
                for i in 0..BLOCK {
                    s[i] = weights[i] & mask[i];
                    sum += s[i];
                }
                *total += sum.cast_unsigned() >> 8;
            }
        }
        for ((s, _), total) in s.chunks_mut(stride).zip(positions).zip(totals) {
            let (reciprocal, down) = reciprocal(total);
            // A weight has 25 bits and a reciprocal 16.
            let by = Rounding::new(down.cast_unsigned());
            for s in s[..width].as_chunks_mut::<BLOCK>().0 {
                for s in s {
                    *s = integer(by.product::<FUSED>(f64::from(*s), f64::from(reciprocal), &mut 0));
                }
            }
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
            let mut top = i32::MIN;
            for i in 0..BLOCK {
                top = top.max(length_field(p[i]) + e[i]);
            }
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
            let mut top = i32::MIN;
            for i in 0..BLOCK {
                top = top.max(length_field(x[i]) + e[i]);
            }
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
