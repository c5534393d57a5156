//! Gradient of grouped-query causal attention, one whole sequence (positions from 0) at a time.
//!
//! With `P` the probabilities: `dV = P^T dO`, `dP = dO V^T`, `dS = P (dP - rowsum(dP P))`,
//! `dQ = dS K / sqrt(D)`, `dK = dS^T Q / sqrt(D)`; then the rotations are undone. Gradients of keys
//! and values are summed over the heads of a group in ascending order.

use super::attention::{AttentionConstants, Cache, HeadVectors, probabilities};
use super::matmul::dot;
use super::rope::{RopeTable, rotate};
use super::{GRADIENT_FRACTION, Saturations, Segment, Site};
use crate::bfp::{ACTIVATION_BITS, BLOCK, Bfp, WEIGHT_BITS};
use crate::x1::{mulsh, mulsh_wide};

const FG: i32 = GRADIENT_FRACTION;

/// Gradients of queries (N, H, D), keys and values (N, K, D) before rotation, all in `FX(20)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadGradients {
    /// (N, H D).
    pub dq: Vec<i32>,
    /// (N, K D).
    pub dk: Vec<i32>,
    /// (N, K D).
    pub dv: Vec<i32>,
}

/// Backward: `d_out` (N, H D) in `FX(20)`. Every segment must start at position 0.
pub fn backward(
    d_out: &[i32],
    queries: &HeadVectors,
    cache: &Cache,
    segments: &[Segment],
    c: &AttentionConstants,
    rope: &RopeTable,
    saturations: &mut Saturations,
) -> HeadGradients {
    let rows = queries.exponents.len() / c.heads;
    let kv = vec![0; rows * c.kv_heads * c.head_dim];
    let mut out = HeadGradients { dq: vec![0; d_out.len()], dk: kv.clone(), dv: kv };
    for segment in segments {
        assert_eq!(segment.position, 0, "a gradient needs whole sequences");
        for h in 0..c.heads {
            head(d_out, queries, cache, segment, h, c, rope, &mut out, saturations);
        }
        for g in 0..c.kv_heads {
            for i in 0..segment.rows {
                let at = ((segment.first_row + i) * c.kv_heads + g) * c.head_dim;
                rotate(&mut out.dk[at..at + c.head_dim], rope, i, true, saturations);
            }
        }
    }
    out
}

fn head(
    d_out: &[i32],
    queries: &HeadVectors,
    cache: &Cache,
    segment: &Segment,
    h: usize,
    c: &AttentionConstants,
    rope: &RopeTable,
    out: &mut HeadGradients,
    saturations: &mut Saturations,
) {
    let (t, d, g) = (segment.rows, c.head_dim, c.kv_head(h));
    let row = |i: usize| segment.first_row + i;
    let key = |j: usize| segment.slot * cache.capacity + j;
    let d_out = |i: usize, ch: usize| d_out[(row(i) * c.heads + h) * d + ch];

    let mut p = vec![0; t * t];
    for i in 0..t {
        // The clamps of the scores were counted by the forward pass.
        let ignored = &mut Saturations::default();
        let pi = probabilities(queries, row(i), h, cache, segment.slot, i, c, ignored);
        p[i * t..][..i + 1].copy_from_slice(&pi);
    }

    let p_by_key = Bfp::from_fn(t, t, ACTIVATION_BITS, |j, i| (p[i * t + j], -24));
    let d_out_by_channel = Bfp::from_fn(d, t, WEIGHT_BITS, |ch, i| (d_out(i, ch), -FG));
    for j in 0..t {
        for ch in 0..d {
            let x = dot(&p_by_key, j, &d_out_by_channel, ch, FG, saturations);
            let dv = &mut out.dv[(row(j) * c.kv_heads + g) * d + ch];
            *dv = saturations.sat(Site::Attention, i64::from(*dv) + i64::from(x));
        }
    }

    let d_out_rows = Bfp::from_fn(t, d, WEIGHT_BITS, |i, ch| (d_out(i, ch), -FG));
    let mut values = Bfp::zeros(t, d);
    let (value_blocks, value_cols) = (values.cols / BLOCK, values.cols);
    for j in 0..t {
        values.mantissas[j * value_cols..][..d].copy_from_slice(cache.values.vector(key(j), g));
        values.exponents[j * value_blocks..][..value_blocks]
            .fill(cache.values.exponent(key(j), g) as i8);
    }
    let mut ds = vec![0; t * t];
    for i in 0..t {
        let dp: Vec<i32> =
            (0..=i).map(|j| dot(&d_out_rows, i, &values, j, FG, saturations)).collect();
        let pi = &p[i * t..][..i + 1];
        let mean = dp.iter().zip(pi).map(|(&a, &b)| i64::from(mulsh(a, b, 24))).sum();
        let mean = saturations.sat(Site::Attention, mean);
        for j in 0..=i {
            let x = mulsh_wide(dp[j] - mean, pi[j], 24);
            ds[i * t + j] = saturations.sat(Site::Attention, x);
        }
    }

    let key_exponent = |j: usize| cache.keys.exponent(key(j), g);
    let query_exponent = |i: usize| queries.exponent(row(i), h);
    let by_query = Bfp::from_fn(t, t, WEIGHT_BITS, |i, j| (ds[i * t + j], key_exponent(j) - FG));
    let by_key = Bfp::from_fn(t, t, WEIGHT_BITS, |j, i| (ds[i * t + j], query_exponent(i) - FG));
    let (mut keys, mut query_rows) = (Bfp::zeros(d, t), Bfp::zeros(d, t));
    for x in 0..t {
        for ch in 0..d {
            keys.mantissas[ch * keys.cols + x] = cache.keys.vector(key(x), g)[ch];
            query_rows.mantissas[ch * query_rows.cols + x] = queries.vector(row(x), h)[ch];
        }
    }
    for x in 0..t {
        for ch in 0..d {
            let dq = dot(&by_query, x, &keys, ch, FG, saturations);
            out.dq[(row(x) * c.heads + h) * d + ch] = mulsh(dq, c.inverse_root, 24);
            let dk = mulsh(dot(&by_key, x, &query_rows, ch, FG, saturations), c.inverse_root, 24);
            let sum = &mut out.dk[(row(x) * c.kv_heads + g) * d + ch];
            *sum = saturations.sat(Site::Attention, i64::from(*sum) + i64::from(dk));
        }
        let at = (row(x) * c.heads + h) * d;
        rotate(&mut out.dq[at..at + d], rope, x, true, saturations);
    }
}
