//! Token embedding and its gradient: `twin::embedding`.
#![expect(unsafe_code, reason = "rows and columns are written by several threads")]

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::{ACTIVATION_FRACTION, GRADIENT_FRACTION, SHARE_FRACTION, Site};
use manyhands_shaders::x1::{LIM, flush};

use super::kernel::{EXPONENT_SHIFT, TILE, TILE_BLOCK};
use super::operands::Weight;
use super::path::simd;
use super::scalar::rne64;
use super::workers::Shared;
use super::{Cpu, Tensor};

simd! {
    /// Values of one token in one tile: `pairs` begins with its first pair of channels.
    fn values(pairs: &[[i16; 2]], e: i32, out: &mut [i32]) -> u64 {
        let up = e + ACTIVATION_FRACTION;
        let mut count = 0;
        for (pair, out) in pairs.iter().step_by(TILE).zip(out.chunks_mut(2)) {
            for (m, o) in pair.iter().zip(out) {
                *o = flush(i32::from(*m), -up);
                count += u64::from(up > 20 && o.abs() == LIM);
            }
        }
        count
    }
}

simd! {
    /// `grad += rne(d, 4)`.
    fn add_rounded(grad: &mut [i64], d: &[i32]) {
        for (g, &d) in grad.iter_mut().zip(d) {
            *g += rne64(i64::from(d), (GRADIENT_FRACTION - SHARE_FRACTION) as u32);
        }
    }
}

/// Rows of the embedding (V, C): (N, C).
pub(super) fn forward(cpu: &Cpu, w: &Weight, tokens: &[u32]) -> Tensor {
    let mut out = cpu.tensor_of(tokens.len(), w.cols);
    let shared = Shared::new(&mut out.data);
    let packed = &w.forward;
    cpu.workers.ranges(tokens.len(), 1, tokens.len() * w.cols / 4, |range| {
        let mut count = 0;
        for r in range {
            let token = tokens[r] as usize;
            assert!(token < w.rows, "token {token} is outside the vocabulary");
            // SAFETY: each row is visited once.
            let out = unsafe { shared.part(r * w.cols, w.cols) };
            for (tile, out) in out.chunks_mut(TILE).enumerate() {
                let at = token / BLOCK * packed.blocks + tile;
                let pairs = packed.mantissas[at * TILE_BLOCK..].as_chunks().0;
                let e = packed.exponents[at] >> EXPONENT_SHIFT;
                count += values(cpu.path, &pairs[token % BLOCK..], e, out);
            }
        }
        cpu.tally.add(Site::Embedding, count);
    });
    out
}

/// `grad` (V, C) `+=` the rows of `dh` (N, C) in `FX(16)`.
pub(super) fn backward(cpu: &Cpu, dh: &Tensor, tokens: &[u32], grad: &mut [i64]) {
    let cols = dh.cols;
    let shared = Shared::new(grad);
    // Threads take columns: two rows may have the same token.
    cpu.workers.ranges(cols, 16, dh.data.len(), |range| {
        for (&token, row) in tokens.iter().zip(dh.data.chunks_exact(cols)) {
            let at = token as usize * cols + range.start;
            // SAFETY: ranges of columns are disjoint, rows of one range come one after another.
            let grad = unsafe { shared.part(at, range.len()) };
            add_rounded(cpu.path, grad, &row[range.clone()]);
        }
    });
}
