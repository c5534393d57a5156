//! Quantisation down columns: blocks of 32 rows, straight into the layouts of the kernels.
//!
//! A column's block has its own exponent, so exponents are vectors over the columns. Two rows make
//! a pair; pairs lie side by side over the columns, which needs no transposition in either operand.

use manyhands_shaders::bfp::BLOCK;

use super::kernel::{EXPONENT_SHIFT, PANEL, PANEL_EXPONENTS, TILE, ZERO_EXPONENT};
use super::scalar::{length_field, shift};

/// Columns that are packed at once: whole panels, whole vectors.
pub(super) const GROUP: usize = 96;

/// Pairs of rows of 32 columns: `[16 pairs][32]`, each an i16 pair.
pub(super) type Strip = [[u32; TILE]; BLOCK / 2];

/// Joins two mantissas into a pair.
#[inline(always)]
pub(super) fn pair(low: i32, high: i32) -> u32 {
    (low & 0xffff | high << 16).cast_unsigned()
}

/// Quantises `width <= 32` columns of up to 32 rows of `x`, `stride` apart, with one exponent `e`
/// for all values. `any` is the union of each column's magnitudes, zero beyond the width. Writes pairs to `strip` and exponents, as kernels store them, to `exponents`;
/// both are zero beyond the width.
#[inline(always)]
pub(super) fn strip(
    x: &[i32],
    stride: usize,
    rows: usize,
    width: usize,
    any: &[u32; TILE],
    e: i32,
    bits: u32,
    strip: &mut Strip,
    exponents: &mut [i32; TILE],
) {
    let max = (1 << (bits - 1)) - 1;
    let (mut right, mut left) = ([0_u32; TILE], [0_u32; TILE]);
    let (mut half, mut odd) = ([0_i32; TILE], [0_i32; TILE]);
    for c in 0..TILE {
        let s = length_field(any[c].cast_signed()) - 126 - (bits.cast_signed() - 1);
        right[c] = s.clamp(0, 31).cast_unsigned();
        left[c] = (-s).clamp(0, 31).cast_unsigned();
        odd[c] = i32::from(s > 0);
        half[c] = (((1_u32 << right[c]) >> 1).cast_signed() - 1) * odd[c];
        exponents[c] = if any[c] == 0 { ZERO_EXPONENT } else { (e + s) << EXPONENT_SHIFT };
    }
    let quantize = |x: i32, c: usize| {
        let m = x.wrapping_add(half[c] + ((x >> right[c]) & odd[c]));
        ((m >> right[c]) << left[c]).clamp(-max, max)
    };
    let zeros = [0; TILE];
    for p in 0..BLOCK / 2 {
        let out = &mut strip[p];
        let (r0, r1) = (2 * p, 2 * p + 1);
        if width == TILE && r1 < rows {
            let x0 = &x[r0 * stride..r0 * stride + TILE];
            let x1 = &x[r1 * stride..r1 * stride + TILE];
            for c in 0..TILE {
                out[c] = pair(quantize(x0[c], c), quantize(x1[c], c));
            }
        } else {
            *out = [0; TILE];
            let line = |r: usize| {
                if r < rows { &x[r * stride..r * stride + width] } else { &zeros[..width] }
            };
            let (x0, x1) = (line(r0), line(r1));
            for c in 0..width {
                out[c] = pair(quantize(x0[c], c), quantize(x1[c], c));
            }
        }
    }
}

/// The union of the magnitudes in each column of `x` (rows, `cols`). One pass in the order of memory
/// brings the rows near for passes by columns.
#[inline(always)]
pub(super) fn union_of_rows(x: &[i32], cols: usize, any: &mut [u32]) {
    any.fill(0);
    for row in x.chunks_exact(cols) {
        for (any, x) in any.iter_mut().zip(row) {
            *any |= x.unsigned_abs();
        }
    }
}

/// The union of the magnitudes in each of `width <= 32` columns.
#[inline(always)]
pub(super) fn magnitudes(x: &[i32], stride: usize, rows: usize, width: usize) -> [u32; TILE] {
    let mut any = [0; TILE];
    for r in 0..rows {
        if width == TILE {
            for (any, x) in any.iter_mut().zip(&x[r * stride..r * stride + TILE]) {
                *any |= x.unsigned_abs();
            }
        } else {
            for (any, x) in any.iter_mut().zip(&x[r * stride..r * stride + width]) {
                *any |= x.unsigned_abs();
            }
        }
    }
    any
}

/// As [`strip`] with an exponent `e[r]` for each row.
#[inline(always)]
pub(super) fn strip_folded(
    x: &[i32],
    stride: usize,
    e: &[i32],
    width: usize,
    bits: u32,
    strip: &mut Strip,
    exponents: &mut [i32; TILE],
) {
    let rows = e.len();
    // The field of a zero is 0, and those of other values are 127 and more: no exponent that
    // occurs makes a zero win.
    let mut top = [0_i32; TILE];
    for r in 0..rows {
        for (top, &x) in top.iter_mut().zip(&x[r * stride..r * stride + width]) {
            *top = (*top).max(length_field(x) + e[r]);
        }
    }
    let max = (1 << (bits - 1)) - 1;
    let mut exponent = [0_i32; TILE];
    for c in 0..TILE {
        exponent[c] = top[c] - 126 - (bits.cast_signed() - 1);
        let zero = top[c] < ZERO_FIELD;
        exponents[c] = if zero { ZERO_EXPONENT } else { exponent[c] << EXPONENT_SHIFT };
    }
    for p in 0..BLOCK / 2 {
        let out = &mut strip[p];
        *out = [0; TILE];
        for (high, r) in [2 * p, 2 * p + 1].into_iter().enumerate() {
            if r >= rows {
                continue;
            }
            for (c, &x) in x[r * stride..r * stride + width].iter().enumerate() {
                let m = shift(x, exponent[c] - e[r]).clamp(-max, max);
                out[c] |= (m & 0xffff).cast_unsigned() << (16 * high);
            }
        }
    }
}

/// Below it a field plus an exponent belongs to a zero: exponents lie within [-60, 40].
pub(super) const ZERO_FIELD: i32 = 64;

/// Distributes the strips of a group of 96 columns to the 16 panels of the left operand whose
/// first panel's block starts at `mantissas` and `exponents`; `panels` of them exist.
#[inline(always)]
pub(super) fn scatter(
    strips: &[Strip; GROUP / TILE],
    strip_exponents: &[[i32; TILE]; GROUP / TILE],
    columns: usize,
    mantissas: &mut [i16],
    mantissa_stride: usize,
    exponents: &mut [i32],
    exponent_stride: usize,
) {
    let panels = columns.min(GROUP).div_ceil(PANEL);
    let mut row = [0_u32; GROUP];
    for p in 0..BLOCK / 2 {
        for (to, strip) in row.chunks_exact_mut(TILE).zip(strips) {
            to.copy_from_slice(&strip[p]);
        }
        for (panel, x) in row.chunks_exact(PANEL).take(panels).enumerate() {
            let at = panel * mantissa_stride + p * PANEL * 2;
            let to = &mut mantissas[at..at + PANEL * 2];
            for (to, x) in to.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                *to = [*x as i16, (*x >> 16) as i16];
            }
        }
    }
    let all = strip_exponents.as_flattened();
    for (panel, e) in all.chunks_exact(PANEL).take(panels).enumerate() {
        let to = &mut exponents[panel * exponent_stride..][..PANEL_EXPONENTS];
        to[..PANEL].copy_from_slice(e);
        to[PANEL] = e.iter().copied().max().unwrap_or(ZERO_EXPONENT);
    }
}
