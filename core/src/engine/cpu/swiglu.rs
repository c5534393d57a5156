//! SwiGLU, forward into blocks and backward: `twin::swiglu`.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK};
use manyhands_shaders::twin::{ACTIVATION_FRACTION, Site};

use super::kernel::{PANEL, PANEL_BLOCK, PANEL_EXPONENTS};
use super::operands::Panels;
use super::path::simd;
use super::scalar::mulsh;
use super::tables::sigmoid;
use super::workers::Shared;
use super::quantize::{self, whole};
use super::{Cpu, Tensor};

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
                let mut out = [0; BLOCK];
                for j in 0..BLOCK {
                    let silu = mulsh(gate[j], sigmoid(gate[j]), 16, &mut count);
                    out[j] = mulsh(silu, up[j], 16, &mut count);
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
        let n = da.len();
        let (gate, up, d_gate, d_up) =
            (&gate[..n], &up[..n], &mut d_gate[..n], &mut d_up[..n]);
        let mut count = 0;
        for i in 0..n {
            let sig = sigmoid(gate[i]);
            let silu = mulsh(gate[i], sig, 16, &mut count);
            // silu'(g) = sig + silu * (1 - sig)
            let slope = sig + mulsh(silu, 65536 - sig, 16, &mut count);
            let du = mulsh(da[i], up[i], 16, &mut count);
            d_gate[i] = mulsh(du, slope, 16, &mut count);
            d_up[i] = mulsh(da[i], silu, 16, &mut count);
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
