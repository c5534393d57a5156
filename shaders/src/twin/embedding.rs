//! Token embedding and its gradient.

use super::{GRADIENT_FRACTION, SHARE_FRACTION, Saturations, Site};
use crate::bfp::Tiles;
use crate::x1::{LIM, rne};

/// Forward: rows of the embedding (V, C) of `tokens` (N): (N, C) in `FX(16)`.
pub fn forward(embedding: &Tiles, tokens: &[u32], saturations: &mut Saturations) -> Vec<i32> {
    let mut out = Vec::with_capacity(tokens.len() * embedding.cols);
    for &token in tokens {
        for c in 0..embedding.cols {
            let v = embedding.fixed(token as usize, c);
            saturations.add(Site::Embedding, u64::from(v.abs() == LIM));
            out.push(v);
        }
    }
    out
}

/// Backward: `dh` (N, C) in `FX(20)`; the embedding's gradient (V, C) in `FX(16)` is `+=`.
pub fn backward(dh: &[i32], tokens: &[u32], width: usize, grad: &mut [i64]) {
    for (&token, row) in tokens.iter().zip(dh.chunks_exact(width)) {
        let grad = &mut grad[token as usize * width..][..width];
        for (g, &d) in grad.iter_mut().zip(row) {
            *g += rne(i64::from(d), GRADIENT_FRACTION - SHARE_FRACTION);
        }
    }
}
