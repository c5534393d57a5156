//! SwiGLU, forward into blocks and backward: `twin::swiglu`.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::Site;

use super::kernel::PANEL;
use super::operands::Panels;
use super::path::simd;
use super::quantize::{self, put, whole};
use super::scalar::{Rounding, could_clamp, integer, integers, mulsh};
use super::tables::sigmoid;
use super::workers::Shared;
use super::{Cpu, Tensor};

/// 1 in `FX(16)`.
const ONE: f64 = 65536.0;

// Values that were rounded keep the factor 2^16 that their division would take away; these round
// what has one such factor more.
const ONCE: Rounding = Rounding::new(16);
const TWICE: Rounding = Rounding::new(32);
const FOUR_TIMES: Rounding = Rounding::new(64);

/// [`sigmoid`] of a block, as a loop: `map` would be compiled apart, without SIMD.
#[inline(always)]
fn sigmoids(x: &[i32; BLOCK]) -> [i32; BLOCK] {
    let mut out = [0; BLOCK];
    for j in 0..BLOCK {
        out[j] = sigmoid(x[j]);
    }
    out
}

simd! {
    /// One panel of rows (rows, F): quantised output; the number of clamps.
    fn forward_panel(
        gate: &[i32],
        up: &[i32],
        cols: usize,
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) -> u64 {
        let rows = gate.len() / cols;
        let mut count = 0;
        for i in 0..rows {
            let (gate, up) = (&gate[i * cols..(i + 1) * cols], &up[i * cols..(i + 1) * cols]);
            let mut redo = false;
            for (b, (gate, up)) in gate.chunks(BLOCK).zip(up.chunks(BLOCK)).enumerate() {
                let (gate, up) = (whole::<BLOCK>(gate), whole::<BLOCK>(up));
                let sig = sigmoids(&gate);
                let (mut y, mut flags) = ([0.0; BLOCK], 0);
                for j in 0..BLOCK {
                    let silu = ONCE.product::<FUSED>(f64::from(gate[j]), f64::from(sig[j]), &mut flags);
                    y[j] = TWICE.product::<FUSED>(ONCE.rounded(silu), f64::from(up[j]), &mut flags);
                }
                redo |= could_clamp(flags);
                quantize::line(&integers(&y), b, i, mantissas, exponents);
            }
            if redo {
                count += forward_counted(gate, up, i, mantissas, exponents);
            }
        }
        quantize::finish(exponents, rows);
        count.cast_unsigned()
    }
}

/// Row `i` of a panel with clamps; their number. Apart, what the fast loop computes stays in
/// registers.
#[cold]
fn forward_counted(
    gate: &[i32],
    up: &[i32],
    i: usize,
    mantissas: &mut [i16],
    exponents: &mut [i32],
) -> i64 {
    let mut count = 0;
    for (b, (gate, up)) in gate.chunks(BLOCK).zip(up.chunks(BLOCK)).enumerate() {
        let mut y = [0; BLOCK];
        for (y, (&gate, &up)) in y.iter_mut().zip(gate.iter().zip(up)) {
            let silu = mulsh(gate, sigmoid(gate), 16, &mut count);
            *y = mulsh(silu, up, 16, &mut count);
        }
        quantize::line(&y, b, i, mantissas, exponents);
    }
    count
}

/// Backward of one block; the number of clamps.
#[inline(always)]
fn backward_block<const FUSED: bool>(
    [da, gate, up]: [&[i32; BLOCK]; 3],
    d_gate: &mut [i32; BLOCK],
    d_up: &mut [i32; BLOCK],
) -> i64 {
    let sig = sigmoids(gate);
    let (mut count, mut flags) = (0, 0);
    for j in 0..BLOCK {
        let (d, sig) = (f64::from(da[j]), f64::from(sig[j]));
        let silu = ONCE.product::<FUSED>(f64::from(gate[j]), sig, &mut flags);
        let silu = ONCE.rounded(silu);
        // silu'(g) = sig + silu * (1 - sig)
        let part = TWICE.product::<FUSED>(silu, ONE - sig, &mut flags);
        let slope = sig * (ONE * ONE) + TWICE.rounded(part);
        let du = ONCE.product::<FUSED>(d, f64::from(up[j]), &mut flags);
        d_gate[j] = integer(FOUR_TIMES.product::<FUSED>(ONCE.rounded(du), slope, &mut flags));
        d_up[j] = integer(TWICE.product::<FUSED>(d, silu, &mut flags));
    }
    if could_clamp(flags) {
        for j in 0..BLOCK {
            let silu = mulsh(gate[j], sig[j], 16, &mut count);
            let slope = sig[j] + mulsh(silu, 65536 - sig[j], 16, &mut count);
            let du = mulsh(da[j], up[j], 16, &mut count);
            d_gate[j] = mulsh(du, slope, 16, &mut count);
            d_up[j] = mulsh(da[j], silu, 16, &mut count);
        }
    }
    count
}

simd! {
    /// Backward of a run of elements; the number of clamps.
    fn backward_run(
        da: &[i32],
        gate: &[i32],
        up: &[i32],
        d_gate: &mut [i32],
        d_up: &mut [i32],
    ) -> u64 {
        let ((da, da_end), (gate, gate_end)) = (da.as_chunks(), gate.as_chunks());
        let (up, up_end) = up.as_chunks();
        let (d_gate, d_gate_end) = d_gate.as_chunks_mut();
        let (d_up, d_up_end) = d_up.as_chunks_mut();
        let mut count = 0;
        let ins = da.iter().zip(gate).zip(up);
        for (((da, gate), up), (d_gate, d_up)) in ins.zip(d_gate.iter_mut().zip(d_up)) {
            count += backward_block::<FUSED>([da, gate, up], d_gate, d_up);
        }
        if !da_end.is_empty() {
            let (mut x, mut y) = ([0; BLOCK], [0; BLOCK]);
            let ins = [&whole(da_end), &whole(gate_end), &whole(up_end)];
            count += backward_block::<FUSED>(ins, &mut x, &mut y);
            put(d_gate_end, &x);
            put(d_up_end, &y);
        }
        count.cast_unsigned()
    }
}

/// Forward of `gate` and `up` (N, F): blocks.
pub(super) fn forward(cpu: &Cpu, gate: &Tensor, up: &Tensor) -> Panels {
    let (rows, cols) = (gate.rows(), gate.cols);
    assert_eq!(gate.data.len(), up.data.len(), "gate and up differ in shape");
    let mut out = Panels::take(&cpu.pool, rows, cols);
    let (panel_len, panel_exponents) = (out.panel_len(), out.panel_exponents());
    let (m, e) = (Shared::new(&mut out.mantissas), Shared::new(&mut out.exponents));
    cpu.workers.ranges(rows, PANEL, gate.data.len() * 2, |range| {
        for first in range.clone().step_by(PANEL) {
            let (p, n) = (first / PANEL, PANEL.min(range.end - first));
            let at = first * cols..(first + n) * cols;
            // SAFETY: ranges are whole panels, each visited once.
            let (m, e) = unsafe {
                (m.part(p * panel_len, panel_len), e.part(p * panel_exponents, panel_exponents))
            };
            let count = forward_panel(cpu.path, &gate.data[at.clone()], &up.data[at], cols, m, e);
            cpu.tally.add(Site::Swiglu, count);
        }
    });
    out
}

/// Backward of `da` (N, F): gradients of (gate, up).
pub(super) fn backward(cpu: &Cpu, da: &Tensor, gate: &Tensor, up: &Tensor) -> [Tensor; 2] {
    let mut out = [(); 2].map(|()| cpu.tensor_of(da.rows(), da.cols));
    let [d_gate, d_up] = &mut out;
    let (d_gate, d_up) = (Shared::new(&mut d_gate.data), Shared::new(&mut d_up.data));
    cpu.workers.ranges(da.data.len(), 1024, da.data.len() * 3, |range| {
        let (at, n) = (range.start, range.len());
        // SAFETY: ranges are disjoint.
        let (d_gate, d_up) = unsafe { (d_gate.part(at, n), d_up.part(at, n)) };
        let (da, gate, up) = (&da.data[range.clone()], &gate.data[range.clone()], &up.data[range]);
        cpu.tally.add(Site::Swiglu, backward_run(cpu.path, da, gate, up, d_gate, d_up));
    });
    out
}
