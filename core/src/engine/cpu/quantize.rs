//! Quantisation into panels: rows of fixed point to lines of mantissas.
#![expect(unsafe_code, reason = "panels are written by several threads")]

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK};
use manyhands_shaders::twin::ACTIVATION_FRACTION;

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
    let s = down(any, bits);
    mantissas(x, any, s, bits, m);
    if any == 0 { ZERO_EXPONENT } else { (e + s) << EXPONENT_SHIFT }
}

/// The power of two that quantising to `bits` bits takes away from values whose magnitudes have
/// the union `any`.
#[inline(always)]
pub(super) fn down(any: u32, bits: u32) -> i32 {
    (32 - any.leading_zeros()).cast_signed() - (bits.cast_signed() - 1)
}

/// `x * 2^-s`, to nearest even, clamped to `bits` bits: `s` is what [`down`] says of `any`.
#[inline(always)]
pub(super) fn mantissas(x: &[i32; BLOCK], any: u32, s: i32, bits: u32, m: &mut [i16; BLOCK]) {
    let max = (1 << (bits - 1)) - 1;
    if any < 1 << 24 {
        // Exact in f32, which rounds by an addition; mantissas are then the low bits.
        const MAGIC: f32 = 12_582_912.0;
        const ZERO: i32 = MAGIC.to_bits().cast_signed();
        let scale = f32::from_bits(((127 - s) << 23).cast_unsigned());
        for i in 0..BLOCK {
            let sum = (x[i] as f32 * scale + MAGIC).to_bits().cast_signed();
            m[i] = sum.max(ZERO - max).min(ZERO + max) as i16;
        }
    } else {
        // Wraps only for values beyond every clamp, which are computed again.
        let half = (1 << (s - 1)) - 1;
        for i in 0..BLOCK {
            let sum = x[i].wrapping_add(half + ((x[i] >> s) & 1));
            m[i] = (sum >> s).max(-max).min(max) as i16;
        }
    }
}

/// The first values, zeros where there are fewer: loops over whole blocks vectorise.
#[inline(always)]
pub(super) fn whole<const N: usize>(x: &[i32]) -> [i32; N] {
    match x.first_chunk() {
        Some(x) => *x,
        None => {
            let mut out = [0; N];
            copy_part(&mut out[..x.len()], x);
            out
        }
    }
}

/// The first values of a block, as many as there is room for.
#[inline(always)]
pub(super) fn put<const N: usize>(to: &mut [i32], x: &[i32; N]) {
    match to.first_chunk_mut() {
        Some(to) => *to = *x,
        None => copy_part(to, x),
    }
}

/// A function apart: inlined, it would be joined with the copies of whole blocks to calls of
/// `memcpy`.
#[cold]
#[inline(never)]
fn copy_part(to: &mut [i32], x: &[i32]) {
    to.copy_from_slice(&x[..to.len()]);
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
    for (b, x) in x.chunks(BLOCK).enumerate() {
        let m = &mut mantissas[b * PANEL_BLOCK + at * BLOCK..];
        if let Some(m) = m.first_chunk_mut() {
            exponents[b * PANEL_EXPONENTS + at] = block(&whole(x), e, bits, m);
        }
    }
}

/// Quantises activations, block `b` of a panel's row `at`.
#[inline(always)]
pub(super) fn line(
    x: &[i32; BLOCK],
    b: usize,
    at: usize,
    mantissas: &mut [i16],
    exponents: &mut [i32],
) {
    if let Some(m) = mantissas[b * PANEL_BLOCK + at * BLOCK..].first_chunk_mut() {
        let e = block(x, -ACTIVATION_FRACTION, ACTIVATION_BITS, m);
        exponents[b * PANEL_EXPONENTS + at] = e;
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
    /// Quantises up to 6 rows of `cols` values, `stride` apart in `x`, in `FX(-e)` into a panel.
    pub(super) fn panel(
        x: &[i32],
        rows: usize,
        cols: usize,
        stride: usize,
        e: i32,
        bits: u32,
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) {
        for i in 0..rows {
            row(&x[i * stride..i * stride + cols], e, bits, i, mantissas, exponents);
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
            panel(cpu.path, &x.data[first * cols..], n, cols, cols, e, bits, m, es);
        }
    });
    out
}
