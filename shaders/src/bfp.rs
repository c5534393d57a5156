//! Block floating point: small signed mantissas that share a power-of-two exponent.
//!
//! The 11 x 10 rule: every matrix product multiplies 11-bit by 10-bit mantissas in blocks of
//! [`BLOCK`] along the contraction, so that a block's sum of products stays below 2^24, where f32
//! and i32 arithmetic are both exact. Mantissas are clamped to `+-(2^(bits-1) - 1)`.

use crate::x1::{bl, flush, rne};

/// Length of a block along the contraction, and side of a weight tile.
pub const BLOCK: usize = 32;
/// Mantissa bits of activations: linear inputs, queries, attention probabilities.
pub const ACTIVATION_BITS: u32 = 11;
/// Mantissa bits of weights, keys, values and gradients.
pub const WEIGHT_BITS: u32 = 10;
/// Exponents of weight tiles lie in this range; with it no sum of exponents can wrap or leave i8.
pub const WEIGHT_EXPONENT_RANGE: std::ops::RangeInclusive<i32> = -40..=11;

/// 1.5 * 2^23: adding it rounds to an integer, ties to even, in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `n` rounded up to a multiple of [`BLOCK`].
pub const fn padded(n: usize) -> usize {
    n.div_ceil(BLOCK) * BLOCK
}

/// A matrix (R, K) in block floating point, blocks along K, K padded with zeros to whole blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bfp {
    /// R.
    pub rows: usize,
    /// K, a multiple of [`BLOCK`].
    pub cols: usize,
    /// (R, K) mantissas.
    pub mantissas: Vec<i16>,
    /// (R, K / 32) exponents: value = mantissa * 2^exponent.
    pub exponents: Vec<i8>,
}

impl Bfp {
    /// A matrix of canonical zeros (mantissa 0, exponent 0).
    pub fn zeros(rows: usize, cols: usize) -> Self {
        let cols = padded(cols);
        Self {
            rows,
            cols,
            mantissas: vec![0; rows * cols],
            exponents: vec![0; rows * cols / BLOCK],
        }
    }

    /// Quantises the rows of `x`: `value(r, k)` gives the integer and its exponent.
    pub fn from_fn(
        rows: usize,
        cols: usize,
        bits: u32,
        mut value: impl FnMut(usize, usize) -> (i32, i32),
    ) -> Self {
        let mut out = Self::zeros(rows, cols);
        for r in 0..rows {
            for block in 0..out.cols / BLOCK {
                let mut x = [0; BLOCK];
                let mut e = [0; BLOCK];
                for i in 0..BLOCK.min(cols - block * BLOCK) {
                    (x[i], e[i]) = value(r, block * BLOCK + i);
                }
                let at = r * out.cols + block * BLOCK;
                out.exponents[at / BLOCK] =
                    quantize(&x, &e, bits, &mut out.mantissas[at..at + BLOCK]) as i8;
            }
        }
        out
    }

    /// Quantises rows of fixed-point integers (R, C) in `FX(f)`.
    pub fn from_rows(x: &[i32], cols: usize, f: i32, bits: u32) -> Self {
        Self::from_fn(x.len() / cols, cols, bits, |r, c| (x[r * cols + c], -f))
    }

    /// The mantissas of one block.
    pub fn block(&self, row: usize, block: usize) -> &[i16] {
        &self.mantissas[row * self.cols + block * BLOCK..][..BLOCK]
    }

    /// The exponent of one block.
    pub fn exponent(&self, row: usize, block: usize) -> i32 {
        i32::from(self.exponents[row * (self.cols / BLOCK) + block])
    }
}

/// Quantises one block: `x[i] * 2^e[i]` to mantissas of `bits` bits under the returned exponent.
/// An all-zero block is canonical: exponent 0.
pub fn quantize(x: &[i32], e: &[i32], bits: u32, mantissas: &mut [i16]) -> i32 {
    let top = x.iter().zip(e).filter(|(x, _)| **x != 0).map(|(&x, &e)| bl(x) + e).max();
    let Some(top) = top else {
        mantissas.fill(0);
        return 0;
    };
    let exponent = top - (bits as i32 - 1);
    let max = (1 << (bits - 1)) - 1;
    for i in 0..x.len() {
        mantissas[i] = rne(i64::from(x[i]), exponent - e[i]).clamp(-max, max) as i16;
    }
    exponent
}

/// Exponent of a weight tile whose largest magnitude has these bits.
#[inline(always)]
fn tile_exponent(top: u32) -> i32 {
    if top == 0 {
        return 0;
    }
    // The exponent field is floor(log2 |w|) + 127; subnormals end at the range's lower bound.
    let (low, high) = (*WEIGHT_EXPONENT_RANGE.start(), *WEIGHT_EXPONENT_RANGE.end());
    ((top >> 23) as i32 - 127 + 2 - WEIGHT_BITS as i32).clamp(low, high)
}

/// Mantissa of a weight whose tile has this scale, two to minus the exponent.
#[inline(always)]
fn mantissa(w: f32, scale: f32) -> i16 {
    const MAX: i32 = (1 << (WEIGHT_BITS - 1)) - 1;
    let rounded = (w * scale).clamp(-4096.0, 4096.0) + ROUND;
    (rounded.to_bits() as i32 - ROUND.to_bits() as i32).clamp(-MAX, MAX) as i16
}

/// A weight matrix (R, C) in [`WEIGHT_BITS`] with one exponent a 32x32 tile, so that the same
/// mantissas serve the matrix and its transpose. Rows and columns are padded with zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// R, unpadded: output features.
    pub rows: usize,
    /// C, unpadded: input features.
    pub cols: usize,
    /// (padded R, padded C) mantissas.
    pub mantissas: Vec<i16>,
    /// (padded R / 32, padded C / 32) exponents.
    pub exponents: Vec<i8>,
}

impl Tiles {
    /// Quantises f32 weights (R, C). A product by a power of two is exact in f32, or so small or
    /// large that its mantissa is zero or the largest anyway; then comes one rounding to nearest
    /// even, so the result is the same everywhere. Non-finite weights must have been refused before.
    #[inline(always)] // for callers compiled for wider vectors
    pub fn quantize(weights: &[f32], rows: usize, cols: usize) -> Self {
        assert_eq!(weights.len(), rows * cols, "weights do not have the shape ({rows}, {cols})");
        let stride = padded(cols);
        let len = padded(rows) * stride;
        let mut mantissas = Vec::with_capacity(len);
        let mut exponents = Vec::with_capacity(len / (BLOCK * BLOCK));
        let (mut tops, mut scales) = (vec![0; stride], vec![0.0; stride]);
        // Twice along whole rows, in the order of memory.
        for strip in weights.chunks((cols * BLOCK).max(1)) {
            tops.fill(0);
            for row in strip.chunks_exact(cols) {
                for (top, w) in tops.iter_mut().zip(row) {
                    *top = (*top).max(w.to_bits() & 0x7fff_ffff);
                }
            }
            for (tops, scales) in tops.chunks_exact(BLOCK).zip(scales.chunks_exact_mut(BLOCK)) {
                let exponent = tile_exponent(tops.iter().copied().fold(0, u32::max));
                exponents.push(exponent as i8);
                scales.fill(f32::from_bits(((127 - exponent) as u32) << 23));
            }
            for row in strip.chunks_exact(cols) {
                mantissas.extend(row.iter().zip(&scales).map(|(w, scale)| mantissa(*w, *scale)));
                mantissas.resize(mantissas.len().next_multiple_of(stride), 0);
            }
        }
        mantissas.resize(len, 0);
        Self { rows, cols, mantissas, exponents }
    }

    /// Exponent of the tile that holds (row, col).
    pub fn exponent(&self, row: usize, col: usize) -> i32 {
        i32::from(self.exponents[row / BLOCK * self.cols.div_ceil(BLOCK) + col / BLOCK])
    }

    /// Mantissa at (row, col).
    pub fn mantissa(&self, row: usize, col: usize) -> i16 {
        self.mantissas[row * padded(self.cols) + col]
    }

    /// The value at (row, col) in `FX(16)`, as an embedding row is read.
    pub fn fixed(&self, row: usize, col: usize) -> i32 {
        flush(i32::from(self.mantissa(row, col)), -(self.exponent(row, col) + 16))
    }

    /// The value at (row, col), exact.
    pub fn value(&self, row: usize, col: usize) -> f64 {
        let scale = f64::from_bits(((1023 + self.exponent(row, col)) as u64) << 52);
        f64::from(self.mantissa(row, col)) * scale
    }

    /// The matrix as the right operand of `x W^T`: (padded R, padded C), blocks along C.
    pub fn forward(&self) -> Bfp {
        let (r, c) = (padded(self.rows), padded(self.cols));
        let exponents = (0..r).flat_map(|row| {
            let tiles = c / BLOCK;
            self.exponents[row / BLOCK * tiles..][..tiles].iter().copied()
        });
        Bfp { rows: r, cols: c, mantissas: self.mantissas.clone(), exponents: exponents.collect() }
    }

    /// The transpose, the right operand of `dy W`: (padded C, padded R), blocks along R.
    pub fn backward(&self) -> Bfp {
        let (r, c) = (padded(self.rows), padded(self.cols));
        let mut out = Bfp::zeros(c, r);
        for row in 0..r {
            for col in 0..c {
                out.mantissas[col * r + row] = self.mantissas[row * c + col];
                out.exponents[(col * r + row) / BLOCK] =
                    self.exponents[row / BLOCK * (c / BLOCK) + col / BLOCK];
            }
        }
        out
    }
}
