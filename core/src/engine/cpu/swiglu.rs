//! SwiGLU, forward into blocks and backward: `twin::swiglu`.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK};
use manyhands_shaders::twin::{ACTIVATION_FRACTION, Site};

use super::kernel::{PANEL, PANEL_BLOCK, PANEL_EXPONENTS};
use super::operands::Panels;
use super::path::simd;
use super::quantize::{self, put, whole};
use super::scalar::{add_pair, could_clamp, mulsh, mulsh_pair, pairs, unpairs};
use super::tables::sigmoid;
use super::workers::Shared;
use super::{Cpu, Tensor};

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
            let gate = gate[i * cols..(i + 1) * cols].chunks(BLOCK);
            let up = up[i * cols..(i + 1) * cols].chunks(BLOCK);
            for (b, (gate, up)) in gate.zip(up).enumerate() {
                let (gate, up) = (whole(gate), whole(up));
                let (g, u) = (pairs(&gate), pairs(&up));
                let sig = pairs(&sigmoids(&gate));
                let (mut y, mut flags) = ([0; BLOCK / 2], 0);
                for j in 0..BLOCK / 2 {
                    let silu = mulsh_pair(g[j], sig[j], 16, &mut flags);
                    y[j] = mulsh_pair(silu, u[j], 16, &mut flags);
                }
                let mut out = unpairs(&y);
                if could_clamp(flags) {
                    for j in 0..BLOCK {
                        let silu = mulsh(gate[j], sigmoid(gate[j]), 16, &mut count);
                        out[j] = mulsh(silu, up[j], 16, &mut count);
                    }
                }
                let m = &mut mantissas[b * PANEL_BLOCK + i * BLOCK..][..BLOCK];
                if let Ok(m) = m.try_into() {
                    let e = quantize::block(&out, -ACTIVATION_FRACTION, ACTIVATION_BITS, m);
                    exponents[b * PANEL_EXPONENTS + i] = e;
                }
            }
        }
        quantize::finish(exponents, rows);
        count.cast_unsigned()
    }
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
        let mut count = 0;
        let blocks = da.chunks(BLOCK).zip(gate.chunks(BLOCK)).zip(up.chunks(BLOCK));
        let outs = d_gate.chunks_mut(BLOCK).zip(d_up.chunks_mut(BLOCK));
        for (((da, gate), up), (d_gate, d_up)) in blocks.zip(outs) {
            let (da, gate, up) = (whole(da), whole(gate), whole(up));
            let sig = sigmoids(&gate);
            let mut rest = [0; BLOCK];
            for j in 0..BLOCK {
                rest[j] = 65536 - sig[j];
            }
            let (d, g, u) = (pairs(&da), pairs(&gate), pairs(&up));
            let (sig_pairs, rest) = (pairs(&sig), pairs(&rest));
            let (mut x, mut y, mut flags) = ([0; BLOCK / 2], [0; BLOCK / 2], 0);
            for j in 0..BLOCK / 2 {
                let silu = mulsh_pair(g[j], sig_pairs[j], 16, &mut flags);
                // silu'(g) = sig + silu * (1 - sig); neither half overflows below 2^29.
                let part = mulsh_pair(silu, rest[j], 16, &mut flags);
                let slope = add_pair(sig_pairs[j], part);
                let du = mulsh_pair(d[j], u[j], 16, &mut flags);
                x[j] = mulsh_pair(du, slope, 16, &mut flags);
                y[j] = mulsh_pair(d[j], silu, 16, &mut flags);
            }
            let (mut x, mut y) = (unpairs(&x), unpairs(&y));
            if could_clamp(flags) {
                for j in 0..BLOCK {
                    let silu = mulsh(gate[j], sig[j], 16, &mut count);
                    let slope = sig[j] + mulsh(silu, 65536 - sig[j], 16, &mut count);
                    let du = mulsh(da[j], up[j], 16, &mut count);
                    x[j] = mulsh(du, slope, 16, &mut count);
                    y[j] = mulsh(da[j], silu, 16, &mut count);
                }
            }
            put(d_gate, &x);
            put(d_up, &y);
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
