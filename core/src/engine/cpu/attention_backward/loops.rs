//! Vectorised loops between the products.

use manyhands_shaders::bfp::{BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::GRADIENT_FRACTION;

use super::super::kernel::{EXPONENT_SHIFT, PANEL, TILE, ZERO_EXPONENT};
use super::super::pack::{GROUP, Strip, magnitudes, scatter, strip, strip_folded};
use super::super::path::simd;
use super::super::rotation;
use super::super::scalar::{Rounding, integer, mulsh_wide, sat};

simd! {
    /// Up to 6 rows of `dS` from `dP`, in place, over `width` values (whole blocks); rows of both
    /// are `stride` apart. `p` is zero beyond the diagonal. Returns the number of clamps.
    ///
    /// Each step is taken for all rows: the steps of one row wait for each other.
    pub(super) fn softmax_gradient(
        dp: &mut [i32],
        p: &[i32],
        stride: usize,
        width: usize,
        rows: usize,
    ) -> u64 {
        const BY: Rounding = Rounding::new(24);
        let (mut means, mut largest) = ([0_i64; PANEL], [0_u32; PANEL]);
        for r in 0..rows {
            let row = r * stride..r * stride + width;
            let (dp, p) = (dp[row.clone()].as_chunks::<BLOCK>().0, p[row].as_chunks::<BLOCK>().0);
            let (mut mean, mut any) = (0, 0);
            for (dp, p) in dp.iter().zip(p) {
                for i in 0..BLOCK {
                    any |= dp[i].unsigned_abs();
                    let product = BY.product::<FUSED>(f64::from(dp[i]), f64::from(p[i]), &mut 0);
                    mean += BY.integer(product);
                }
            }
            (means[r], largest[r]) = (mean, any);
        }
        let mut count = 0;
        for r in 0..rows {
            let row = r * stride..r * stride + width;
            let (dp, p) = (&mut dp[row.clone()], &p[row]);
            // A probability is at most 2^24: f64 holds these products and those with differences,
            // which no clamp is near.
            if largest[r] < 1 << 28 && means[r].unsigned_abs() < 1 << 28 {
                let mean = means[r] as f64;
                for (dp, p) in dp.as_chunks_mut::<BLOCK>().0.iter_mut().zip(p.as_chunks::<BLOCK>().0) {
                    for i in 0..BLOCK {
                        let d = f64::from(dp[i]) - mean;
                        dp[i] = integer(BY.product::<FUSED>(d, f64::from(p[i]), &mut 0));
                    }
                }
            } else {
                count += gradient_counted(dp, p);
            }
        }
        count.cast_unsigned()
    }
}

/// A row of [`softmax_gradient`] of any magnitudes; the number of clamps.
#[cold]
fn gradient_counted(dp: &mut [i32], p: &[i32]) -> i64 {
    let (mut count, mut mean) = (0, 0);
    for (&d, &p) in dp.iter().zip(p) {
        mean += mulsh_wide(d, p, 24);
    }
    let mean = sat(mean, &mut count);
    for (d, &p) in dp.iter_mut().zip(p) {
        *d = sat(mulsh_wide(d.wrapping_sub(mean), p, 24), &mut count);
    }
    count
}

simd! {
    /// A block of 32 rows of up to 96 columns of `x` (rows, columns) as panels in pairs, with one
    /// exponent. Strips above the diagonal (column tile after `row_tile`) are zeros.
    pub(super) fn pack_square(
        x: &[i32],
        stride: usize,
        rows: usize,
        first: usize,
        row_tile: usize,
        columns: usize,
        mantissas: &mut [i16],
        mantissa_stride: usize,
        exponents: &mut [i32],
        exponent_stride: usize,
        folded: Option<&[i32]>,
        e: i32,
        bits: u32,
    ) {
        let mut strips: [Strip; GROUP / TILE] = [[[0; TILE]; BLOCK / 2]; GROUP / TILE];
        let mut es = [[ZERO_EXPONENT; TILE]; GROUP / TILE];
        for (i, (strips, es)) in strips.iter_mut().zip(&mut es).enumerate() {
            let from = first + i * TILE;
            if from < first + columns && from / TILE <= row_tile {
                let x = &x[from..];
                match folded {
                    None => {
                        let any = magnitudes(x, stride, rows, TILE);
                        strip(x, stride, rows, TILE, &any, e, bits, strips, es);
                    }
                    Some(f) => {
                        strip_folded(x, stride, f, TILE, bits, strips, es);
                        for es in es.iter_mut() {
                            if *es != ZERO_EXPONENT {
                                *es += e << EXPONENT_SHIFT;
                            }
                        }
                    }
                }
            }
        }
        scatter(&strips, &es, columns, mantissas, mantissa_stride, exponents, exponent_stride);
    }
}

simd! {
    /// 32 columns of up to 32 rows as a tile's block; returns its largest exponent.
    pub(super) fn pack_columns(
        x: &[i32],
        stride: usize,
        rows: usize,
        width: usize,
        to: &mut [i16],
        exponents: &mut [i32; TILE],
    ) -> i32 {
        let mut out: Strip = [[0; TILE]; BLOCK / 2];
        let any = magnitudes(x, stride, rows, width);
        let out_ref = &mut out;
        strip(x, stride, rows, width, &any, -GRADIENT_FRACTION, WEIGHT_BITS, out_ref, exponents);
        for (to, x) in to.as_chunks_mut::<2>().0.iter_mut().zip(out.as_flattened()) {
            *to = [*x as i16, (*x >> 16) as i16];
        }
        exponents.iter().copied().max().unwrap_or(ZERO_EXPONENT)
    }
}

simd! {
    /// `x = mulsh(x, inverse_root, 24)`: no clamp is possible.
    pub(super) fn scale(x: &mut [i32], inverse_root: i32) {
        for x in x {
            *x = mulsh_wide(*x, inverse_root, 24) as i32;
        }
    }
}

simd! {
    /// Rotates `x` (D) back, in place; the number of clamps.
    pub(super) fn rotate_back(x: &mut [i32], cos: &[i32], sin: &[i32]) -> u64 {
        rotation::rotate_back(x, cos, sin).cast_unsigned()
    }
}

/// Swaps the roles of keys and channels in a 32x32 tile of pairs: a transposition of 2x2 squares,
/// and of each square.
pub(super) fn transpose(from: &[i16], to: &mut [i16]) {
    let (from, to) = (from.as_chunks::<4>().0, to.as_chunks_mut::<4>().0);
    for i in 0..TILE / 2 {
        for j in 0..TILE / 2 {
            let [a, b, c, d] = from[j * (TILE / 2) + i];
            to[i * (TILE / 2) + j] = [a, c, b, d];
        }
    }
}

simd! {
    /// Interleaves two lines.
    pub(super) fn interleave(low: &[i16; BLOCK], high: &[i16; BLOCK], to: &mut [i16]) {
        let (to, _) = to.as_chunks_mut::<2>();
        for i in 0..BLOCK {
            to[i] = [low[i], high[i]];
        }
    }
}
