//! SwiGLU (Shazeer 2020): `a = gate * sigmoid(gate) * up`, and its gradient.

use super::{Saturations, Site};
use crate::x1::sigmoid;

/// Forward: `gate`, `up` (N, F) in `FX(16)` to `a` (N, F) in `FX(16)`.
pub fn forward(gate: &[i32], up: &[i32], saturations: &mut Saturations) -> Vec<i32> {
    let mut out = Vec::with_capacity(gate.len());
    for (&g, &u) in gate.iter().zip(up) {
        let silu = saturations.mulsh(Site::Swiglu, g, sigmoid(g), 16);
        out.push(saturations.mulsh(Site::Swiglu, silu, u, 16));
    }
    out
}

/// Backward: `da` (N, F) in `FX(20)`. Returns the gradients of `gate` and `up`, in `FX(20)`.
pub fn backward(
    da: &[i32],
    gate: &[i32],
    up: &[i32],
    saturations: &mut Saturations,
) -> (Vec<i32>, Vec<i32>) {
    const S: Site = Site::Swiglu;
    let (mut dgate, mut dup) = (Vec::with_capacity(da.len()), Vec::with_capacity(da.len()));
    for ((&d, &g), &u) in da.iter().zip(gate).zip(up) {
        let sig = sigmoid(g);
        let silu = saturations.mulsh(S, g, sig, 16);
        // silu'(g) = sig + silu * (1 - sig)
        let slope = sig + saturations.mulsh(S, silu, 65536 - sig, 16);
        let du = saturations.mulsh(S, d, u, 16);
        dgate.push(saturations.mulsh(S, du, slope, 16));
        dup.push(saturations.mulsh(S, d, silu, 16));
    }
    (dgate, dup)
}
