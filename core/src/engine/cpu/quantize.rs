//! Quantisation into panels: rows of fixed point to lines of mantissas.
#![expect(unsafe_code, reason = "panels are written by several threads")]

use manyhands_shaders::bfp::BLOCK;

use super::kernel::{EXPONENT_SHIFT, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, ZERO_EXPONENT};
use super::operands::Panels;
use super::path::simd;
use super::workers::Shared;
use super::{Cpu, Tensor};

/// Quantises 32 integers with a common exponent `e` to `bits` bits; returns the block's exponent
/// as kernels store it.
#[inline(always)]
pub(super) fn block(x: &[i32; BLOCK], e: i32, bits: u32, m: &mut [i16; BLOCK]) -> i32 {
    let mut any = 0;
    for v in x {
        any |= v.unsigned_abs();
    }
    if any == 0 {
        *m = [0; BLOCK];
        return ZERO_EXPONENT;
    }
    let length = 32 - any.leading_zeros();
    let s = length.cast_signed() - (bits.cast_signed() - 1);
    if s <= 0 {
        for i in 0..BLOCK {
            m[i] = (x[i] << -s) as i16;
        }
    } else {
        let max = (1 << (bits - 1)) - 1;
        let half = (1 << (s - 1)) - 1;
        for i in 0..BLOCK {
            m[i] = ((x[i] + half + ((x[i] >> s) & 1)) >> s).clamp(-max, max) as i16;
        }
    }
    (e + s) << EXPONENT_SHIFT
}

/// The first 32 values, zeros where there are fewer: loops over whole blocks vectorise.
#[inline(always)]
pub(super) fn whole(x: &[i32]) -> [i32; BLOCK] {
    match x.first_chunk() {
        Some(x) => *x,
        None => {
            let mut out = [0; BLOCK];
            out[..x.len()].copy_from_slice(x);
            out
        }
    }
}

/// The first values of a block, as many as there is room for.
#[inline(always)]
pub(super) fn put(to: &mut [i32], x: &[i32; BLOCK]) {
    match to.first_chunk_mut() {
        Some(to) => *to = *x,
        None => to.copy_from_slice(&x[..to.len()]),
    }
}

/// Quantises one row into its place in a panel: `mantissas` and `exponents` start at the row.
#[inline(always)]
pub(super) fn row(
    x: &[i32],
    e: i32,
    bits: u32,
    at: usize,
    mantissas: &mut [i16],
    exponents: &mut [i32],
) {
    let mut blocks = x.chunks_exact(BLOCK);
    let mut b = 0;
    for x in &mut blocks {
        let m = &mut mantissas[b * PANEL_BLOCK + at * BLOCK..][..BLOCK];
        if let (Ok(x), Ok(m)) = (x.try_into(), m.try_into()) {
            exponents[b * PANEL_EXPONENTS + at] = block(x, e, bits, m);
        }
        b += 1;
    }
    let rest = blocks.remainder();
    if !rest.is_empty() {
        let mut last = [0; BLOCK];
        last[..rest.len()].copy_from_slice(rest);
        let m = &mut mantissas[b * PANEL_BLOCK + at * BLOCK..][..BLOCK];
        if let Ok(m) = m.try_into() {
            exponents[b * PANEL_EXPONENTS + at] = block(&last, e, bits, m);
        }
    }
}

/// Writes the largest exponent of each block of a panel, over its first `rows` rows.
#[inline(always)]
pub(super) fn finish(exponents: &mut [i32], rows: usize) {
    for e in exponents.chunks_exact_mut(PANEL_EXPONENTS) {
        let mut max = e[0];
        for i in 1..rows {
            max = max.max(e[i]);
        }
        e[PANEL] = max;
    }
}

simd! {
    /// Quantises up to 6 rows of `x` (rows, `cols`) in `FX(-e)` into a panel.
    pub(super) fn panel(
        x: &[i32],
        cols: usize,
        e: i32,
        bits: u32,
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) {
        let rows = x.len() / cols;
        for i in 0..rows {
            row(&x[i * cols..(i + 1) * cols], e, bits, i, mantissas, exponents);
        }
        finish(exponents, rows);
    }
}

/// Quantises the rows of `x` in `FX(-e)`.
pub(super) fn rows(cpu: &Cpu, x: &Tensor, e: i32, bits: u32) -> Panels {
    let (rows, cols) = (x.rows(), x.cols);
    let mut out = Panels::take(&cpu.pool, rows, cols);
    let (panel_len, panel_exponents) = (out.panel_len(), out.panel_exponents());
    let (m, es) = (Shared::new(&mut out.mantissas), Shared::new(&mut out.exponents));
    cpu.workers.ranges(rows, PANEL, x.data.len() / 3, |range| {
        for first in range.clone().step_by(PANEL) {
            let (p, n) = (first / PANEL, PANEL.min(range.end - first));
            // SAFETY: ranges are whole panels, each visited once.
            let (m, es) = unsafe {
                (m.part(p * panel_len, panel_len), es.part(p * panel_exponents, panel_exponents))
            };
            panel(cpu.path, &x.data[first * cols..(first + n) * cols], cols, e, bits, m, es);
        }
    });
    out
}
