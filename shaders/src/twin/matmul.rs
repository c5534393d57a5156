//! Matrix products of block floating point operands.
//!
//! `out[m, n] = sat( sum over blocks of flush( sum of 32 products, -(EA + EB + F) ) )` in `FX(F)`.
//! A term larger than `LIM / blocks` in magnitude is counted, and so is one at `LIM` itself, where
//! it may have been clamped: with none of them no term was changed and no sum can leave its range,
//! so a count of zero proves the result exact.

use super::{SHARE_FRACTION, Saturations, Segment, Site};
use crate::bfp::{ACTIVATION_BITS, BLOCK, Bfp, WEIGHT_BITS, padded};
use crate::x1::{LIM, flush, sat};

/// Largest magnitude of a block term that was not clamped and cannot take a sum of `blocks` terms
/// out of range.
pub const fn term_limit(blocks: usize) -> i32 {
    if blocks <= 1 { LIM - 1 } else { LIM / blocks as i32 }
}

/// One output: row `m` of `a` (M, K) times row `n` of `b` (N, K), in `FX(f)`.
pub fn dot(a: &Bfp, m: usize, b: &Bfp, n: usize, f: i32, saturations: &mut Saturations) -> i32 {
    let blocks = a.cols / BLOCK;
    let mut acc = 0_u32;
    for block in 0..blocks {
        let d: i32 = a
            .block(m, block)
            .iter()
            .zip(b.block(n, block))
            .map(|(&x, &y)| i32::from(x) * i32::from(y))
            .sum();
        let t = flush(d, -(a.exponent(m, block) + b.exponent(n, block) + f));
        saturations.add(Site::Matmul, u64::from(t.abs() > term_limit(blocks)));
        acc = acc.wrapping_add(t.cast_unsigned());
    }
    sat(i64::from(acc.cast_signed()))
}

/// `a` (M, K) times the transpose of `b` (N, K): (M, `cols`) in `FX(f)`, the first `cols` of N.
pub fn matmul(a: &Bfp, b: &Bfp, cols: usize, f: i32, saturations: &mut Saturations) -> Vec<i32> {
    assert_eq!(a.cols, b.cols, "operands differ in the contraction");
    let mut out = Vec::with_capacity(a.rows * cols);
    for m in 0..a.rows {
        for n in 0..cols {
            out.push(dot(a, m, b, n, f, saturations));
        }
    }
    out
}

/// Weight gradient, `grad (O, C) += dy^T x` in `FX(16)`, sequence by sequence: both operands are
/// requantised in blocks of 32 tokens that start at each segment's first row and never span two
/// segments, so shares are additive and do not depend on how sequences were batched.
///
/// `dy` (N, O) in `FX(20)` becomes 10-bit; `x` (N, C) is the stored 11-bit linear input.
pub fn weight_gradient(
    dy: &[i32],
    x: &Bfp,
    segments: &[Segment],
    rows: usize,
    cols: usize,
    grad: &mut [i64],
    saturations: &mut Saturations,
) {
    for segment in segments {
        let row = |t: usize| segment.first_row + t;
        let g = Bfp::from_fn(rows, segment.rows, WEIGHT_BITS, |o, t| {
            (dy[row(t) * rows + o], -super::GRADIENT_FRACTION)
        });
        let x = Bfp::from_fn(cols, segment.rows, ACTIVATION_BITS, |c, t| {
            let m = x.mantissas[row(t) * x.cols + c];
            (i32::from(m), x.exponent(row(t), c / BLOCK))
        });
        debug_assert_eq!(g.cols, padded(segment.rows));
        for o in 0..rows {
            for c in 0..cols {
                grad[o * cols + c] += i64::from(dot(&g, o, &x, c, SHARE_FRACTION, saturations));
            }
        }
    }
}
