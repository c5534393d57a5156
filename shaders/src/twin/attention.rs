//! Grouped-query causal attention, forward: the same code for a whole sequence and for decoding.
//!
//! Keys, values and queries carry one exponent a (token, head), which folds into the other
//! operand of each product. Probabilities are quantised in blocks of 32 keys counted from position
//! 0 of the sequence, so a later token never changes an earlier output.

use super::matmul::term_limit;
use super::rope::{RopeTable, rotate};
use super::{ACTIVATION_FRACTION, Saturations, Segment, Site};
use crate::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS, quantize};
use crate::x1::{bl, exp2n, flush, mulsh, sat};

/// Shape and constants of attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionConstants {
    /// H, a multiple of `kv_heads`.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// D, even.
    pub head_dim: usize,
    /// `round(2^24 log2(e) / sqrt(D))`: scores to powers of two.
    pub score_scale: i32,
    /// `round(2^24 / sqrt(D))`.
    pub inverse_root: i32,
}

impl AttentionConstants {
    /// Constants for the given heads.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim.is_multiple_of(2));
        let root = (head_dim as f64).sqrt();
        let scale = |x: f64| (x / root * 16_777_216.0).round_ties_even() as i32;
        Self {
            heads,
            kv_heads,
            head_dim,
            score_scale: scale(std::f64::consts::LOG2_E),
            inverse_root: scale(1.0),
        }
    }

    /// The key-value head that query head `h` reads.
    pub const fn kv_head(&self, h: usize) -> usize {
        h / (self.heads / self.kv_heads)
    }
}

/// Vectors of D mantissas with one exponent each: (rows, heads, D).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadVectors {
    /// Heads a row.
    pub heads: usize,
    /// D, unpadded.
    pub dim: usize,
    /// (rows, heads, D) mantissas.
    pub mantissas: Vec<i16>,
    /// (rows, heads) exponents.
    pub exponents: Vec<i8>,
}

impl HeadVectors {
    /// `rows` rows of zeros.
    pub fn zeros(rows: usize, heads: usize, dim: usize) -> Self {
        let n = rows * heads;
        Self { heads, dim, mantissas: vec![0; n * dim], exponents: vec![0; n] }
    }

    /// The mantissas of one vector.
    pub fn vector(&self, row: usize, head: usize) -> &[i16] {
        &self.mantissas[(row * self.heads + head) * self.dim..][..self.dim]
    }

    /// The exponent of one vector.
    pub fn exponent(&self, row: usize, head: usize) -> i32 {
        i32::from(self.exponents[row * self.heads + head])
    }

    /// Quantises `x` (D) in `FX(16)` into place.
    pub fn set(&mut self, row: usize, head: usize, x: &[i32], bits: u32) {
        let at = row * self.heads + head;
        let m = &mut self.mantissas[at * self.dim..][..self.dim];
        self.exponents[at] = quantize(x, &vec![-ACTIVATION_FRACTION; self.dim], bits, m) as i8;
    }
}

/// Keys and values of one layer: row `slot * capacity + position`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Positions a slot.
    pub capacity: usize,
    /// Rotated keys, 10 bits.
    pub keys: HeadVectors,
    /// Values, 10 bits.
    pub values: HeadVectors,
}

impl Cache {
    /// An empty cache.
    pub fn new(slots: usize, capacity: usize, c: &AttentionConstants) -> Self {
        let zeros = HeadVectors::zeros(slots * capacity, c.kv_heads, c.head_dim);
        Self { capacity, keys: zeros.clone(), values: zeros }
    }
}

/// Rotates and quantises queries (N, H, D), keys and values (N, K, D) in `FX(16)`; keys and values
/// go into the cache. Returns the queries.
pub fn heads(
    q: &[i32],
    k: &[i32],
    v: &[i32],
    segments: &[Segment],
    c: &AttentionConstants,
    rope: &RopeTable,
    cache: &mut Cache,
    saturations: &mut Saturations,
) -> HeadVectors {
    let d = c.head_dim;
    let mut queries = HeadVectors::zeros(q.len() / (c.heads * d), c.heads, d);
    for s in segments {
        for i in 0..s.rows {
            let (row, position) = (s.first_row + i, s.position + i);
            let at = s.slot * cache.capacity + position;
            for h in 0..c.heads {
                let mut x = q[(row * c.heads + h) * d..][..d].to_vec();
                rotate(&mut x, rope, position, false, saturations);
                queries.set(row, h, &x, ACTIVATION_BITS);
            }
            for h in 0..c.kv_heads {
                let from = (row * c.kv_heads + h) * d;
                let mut x = k[from..from + d].to_vec();
                rotate(&mut x, rope, position, false, saturations);
                cache.keys.set(at, h, &x, WEIGHT_BITS);
                cache.values.set(at, h, &v[from..from + d], WEIGHT_BITS);
            }
        }
    }
    queries
}

/// Product of two head vectors in `FX(f)`, blocks of 32 along D.
fn head_dot(q: &[i16], k: &[i16], exponent: i32, f: i32, saturations: &mut Saturations) -> i32 {
    let limit = term_limit(q.len().div_ceil(BLOCK));
    let mut acc = 0_u32;
    for (q, k) in q.chunks(BLOCK).zip(k.chunks(BLOCK)) {
        let d: i32 = q.iter().zip(k).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum();
        let t = flush(d, -(exponent + f));
        saturations.add(Site::Matmul, u64::from(t.abs() > limit));
        acc = acc.wrapping_add(t.cast_unsigned());
    }
    sat(i64::from(acc.cast_signed()))
}

/// Attention probabilities in Q24 of query `row` at `position`, over keys 0 to `position`.
pub fn probabilities(
    queries: &HeadVectors,
    row: usize,
    h: usize,
    cache: &Cache,
    slot: usize,
    position: usize,
    c: &AttentionConstants,
    saturations: &mut Saturations,
) -> Vec<i32> {
    let g = c.kv_head(h);
    let mut scores = Vec::with_capacity(position + 1);
    for j in 0..=position {
        let key = slot * cache.capacity + j;
        let exponent = queries.exponent(row, h) + cache.keys.exponent(key, g);
        let (q, k) = (queries.vector(row, h), cache.keys.vector(key, g));
        scores.push(head_dot(q, k, exponent, ACTIVATION_FRACTION, saturations));
    }
    let max = scores.iter().copied().max().unwrap_or(0);
    let e: Vec<i32> = scores
        .iter()
        .map(|&s| exp2n(mulsh(max - s, c.score_scale, 24).min(40 << 16), 24))
        .collect();
    let total: u32 = e.chunks(BLOCK).map(|x| x.iter().sum::<i32>().cast_unsigned() >> 8).sum();
    let (reciprocal, shift) = reciprocal(total);
    e.iter().map(|&e| mulsh(e, reciprocal, shift)).collect()
}

/// `(r, s)` such that `mulsh(e, r, s)` is `e / total` in Q24, for `e` in Q24 and `total` in Q16.
pub const fn reciprocal(total: u32) -> (i32, i32) {
    let bits = bl(total as i32);
    let top = if bits > 16 { total >> (bits - 16) } else { total << (16 - bits) };
    let r = (1_u32 << 31) / top;
    (if r > 65535 { 65535 } else { r as i32 }, bits - 1)
}

/// Forward: queries (N, H, D) against the cache: (N, H D) in `FX(16)`.
pub fn forward(
    queries: &HeadVectors,
    cache: &Cache,
    segments: &[Segment],
    c: &AttentionConstants,
    saturations: &mut Saturations,
) -> Vec<i32> {
    let d = c.head_dim;
    let mut out = vec![0; queries.exponents.len() * d];
    for s in segments {
        for i in 0..s.rows {
            let (row, position) = (s.first_row + i, s.position + i);
            for h in 0..c.heads {
                let p = probabilities(queries, row, h, cache, s.slot, position, c, saturations);
                let out = &mut out[(row * c.heads + h) * d..][..d];
                weighted_values(&p, cache, s.slot, c.kv_head(h), out, saturations);
            }
        }
    }
    out
}

/// `out (D) = sum over keys of p * v` in `FX(16)`: the values' exponents are folded into `p`,
/// which is quantised to 11 bits in blocks of 32 keys.
fn weighted_values(
    p: &[i32],
    cache: &Cache,
    slot: usize,
    g: usize,
    out: &mut [i32],
    saturations: &mut Saturations,
) {
    let blocks = p.len().div_ceil(BLOCK);
    let mut acc = vec![0_u32; out.len()];
    for b in 0..blocks {
        let keys = slot * cache.capacity + b * BLOCK;
        let x = &p[b * BLOCK..p.len().min((b + 1) * BLOCK)];
        let e: Vec<i32> = (0..x.len()).map(|j| cache.values.exponent(keys + j, g) - 24).collect();
        let mut m = [0; BLOCK];
        let exponent = quantize(x, &e, ACTIVATION_BITS, &mut m[..x.len()]);
        for (ch, acc) in acc.iter_mut().enumerate() {
            let value = |j: usize| i32::from(cache.values.vector(keys + j, g)[ch]);
            let d: i32 = (0..x.len()).map(|j| i32::from(m[j]) * value(j)).sum();
            let t = flush(d, -(exponent + ACTIVATION_FRACTION));
            saturations.add(Site::Matmul, u64::from(t.abs() > term_limit(blocks)));
            *acc = acc.wrapping_add(t.cast_unsigned());
        }
    }
    for (out, acc) in out.iter_mut().zip(acc) {
        *out = sat(i64::from(acc.cast_signed()));
    }
}
