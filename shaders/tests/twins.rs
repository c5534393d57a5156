//! Every twin against a straightforward f64 reference, within stated tolerances.
//!
//! The references see the same quantised operands as the twins, so that a tolerance measures the
//! integer arithmetic alone. Clamps are in `saturation.rs`.

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, Bfp, Tiles, WEIGHT_BITS};
use manyhands_shaders::twin::attention::{self, AttentionConstants, Cache, HeadVectors};
use manyhands_shaders::twin::logits::{self, SeedRow, temperature_scale};
use manyhands_shaders::twin::rmsnorm::{self, NormConstants};
use manyhands_shaders::twin::rope::{RopeTable, rotate};
use manyhands_shaders::twin::{
    Saturations, Segment, attention_backward, embedding, matmul, swiglu,
};
use manyhands_shaders::x1::philox;

/// Relative error of the reciprocal root of RMSNorm: three floors at 15 bits.
const NORM_ERROR: f64 = 2e-4;
/// Relative error (Frobenius) of SwiGLU: the sigmoid's 2^-15 against values of order 1.
const SWIGLU_ERROR: f64 = 1e-4;
/// Cosines are Q14 and results FX(16): relative to the largest channel.
const ROPE_ERROR: f64 = 1e-4;
/// Probabilities keep 11 bits relative to the largest of 32 keys, values' outliers included.
const ATTENTION_ERROR: f64 = 3e-3;
/// Gradients enter products with 10 bits, twice in a row for queries and keys; an outlier of 20
/// deviations costs its block 4 of them.
const ATTENTION_GRADIENT_ERROR: f64 = 3e-2;
/// Both operands are requantised along tokens, to 10 and 11 bits: with an outlier of 20 deviations
/// in a block the unit is 20 / 512 of a deviation, its rounding error 0.011.
const WEIGHT_GRADIENT_ERROR: f64 = 8e-3;
/// Probabilities at the logits: a 16-bit reciprocal and weights in Q23.
const PROBABILITY_ERROR: f64 = 4e-5;

/// A repeatable stream of draws.
struct Draws(u32, u32);

impl Draws {
    fn new(seed: u32) -> Self {
        Self(seed, 0)
    }

    fn next(&mut self) -> [u32; 4] {
        self.1 += 1;
        philox([self.1, self.0, 0, 0x7e57], [3, 4])
    }

    /// Uniform in [0, n).
    fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next()[0]) * n as u64) >> 32) as usize
    }

    /// About normal: the sum of four uniforms, deviation 1.
    fn normal(&mut self) -> f64 {
        let sum: f64 = self.next().iter().map(|&x| f64::from(x) / 4_294_967_296.0 - 0.5).sum();
        sum * 3.0_f64.sqrt()
    }

    /// `n` values in `FX(f)` of the given deviation, one in 50 an outlier 20 times as large.
    fn fixed(&mut self, n: usize, deviation: f64, f: i32) -> Vec<i32> {
        let mut value = || {
            let x = self.normal() * deviation * if self.below(50) == 0 { 20.0 } else { 1.0 };
            (x * libm::ldexp(1.0, f)).round() as i32
        };
        (0..n).map(|_| value()).collect()
    }
}

fn floats(x: &[i32], f: i32) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x) * libm::ldexp(1.0, -f)).collect()
}

/// `|got - want| / |want|` in the Frobenius norm.
fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied())
}

/// Close as a whole, and no element off by more than 8 times the share of the largest.
fn assert_close(name: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let error = relative_error(got, want);
    assert!(error < tolerance, "{name}: relative error {error}, over {tolerance}");
    let largest = want.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    assert!(largest > 0.0, "{name}: the reference is trivially zero");
    let bad = |i: &usize| (got[*i] - want[*i]).abs() > 8.0 * tolerance * largest;
    let count = (0..got.len()).filter(bad).count();
    if let Some(i) = (0..got.len()).find(bad) {
        panic!("{name}: index {i}: {} instead of {}, {count} differ", got[i], want[i]);
    }
}

/// Realistic inputs must not clamp anywhere.
fn assert_unsaturated(name: &str, s: &Saturations) {
    assert_eq!(s.total(), 0, "{name}: {s:?}");
}

/// Mantissas times powers of two, as (rows, cols).
fn dequantized(b: &Bfp) -> Vec<f64> {
    let value =
        |i: usize| f64::from(b.mantissas[i]) * libm::ldexp(1.0, i32::from(b.exponents[i / BLOCK]));
    (0..b.mantissas.len()).map(value).collect()
}

/// Widths that are no power of two, tiny rows, rows with outliers, rows below epsilon.
#[test]
fn rmsnorm_forward_equals_f64() {
    for (seed, width) in [16_usize, 96, 100, 576, 1000, 8192].into_iter().enumerate() {
        let mut draws = Draws::new(seed as u32);
        let c = NormConstants::new(width, 1e-5);
        let gain: Vec<i32> =
            (0..width).map(|_| (4096.0 * (1.0 + draws.normal() * 0.5)) as i32).collect();
        for deviation in [1e-3, 0.01, 1.0, 30.0, 500.0] {
            let h = draws.fixed(3 * width, deviation, 16);
            let mut s = Saturations::default();
            let (unit, out, _) = rmsnorm::forward(&h, &gain, &c, &mut s);
            assert_unsaturated("rmsnorm", &s);
            let (h, gain) = (floats(&h, 16), floats(&gain, 12));
            let (mut want_unit, mut want) = (Vec::new(), Vec::new());
            for row in h.chunks(width) {
                let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
                let rms = (mean + 1e-5).sqrt();
                want_unit.extend(row.iter().map(|x| x / rms));
                want.extend(row.iter().zip(&gain).map(|(x, g)| x / rms * g));
            }
            let name = format!("width {width}, deviation {deviation}");
            assert_close(&name, &floats(&unit, 16), &want_unit, NORM_ERROR);
            assert_close(&name, &floats(&out, 16), &want, NORM_ERROR);
        }
    }
    let c = NormConstants::new(96, 1e-5);
    let (unit, out, _) = rmsnorm::forward(&[0; 96], &[4096; 96], &c, &mut Saturations::default());
    assert!(unit.iter().chain(&out).all(|&x| x == 0), "a zero row stays zero");
}

/// The derivative of the formula, without the projection's shortcuts.
#[test]
fn rmsnorm_backward_equals_f64() {
    for (seed, width) in [32_usize, 96, 100, 576].into_iter().enumerate() {
        let mut draws = Draws::new(100 + seed as u32);
        let c = NormConstants::new(width, 1e-5);
        let gain: Vec<i32> =
            (0..width).map(|_| (4096.0 * (1.0 + draws.normal() * 0.5)) as i32).collect();
        for deviation in [0.05, 1.0, 30.0] {
            let rows = 5;
            let h = draws.fixed(rows * width, deviation, 16);
            let dn = draws.fixed(rows * width, 0.5, 20);
            let mut s = Saturations::default();
            let (unit, _, scales) = rmsnorm::forward(&h, &gain, &c, &mut s);
            let mut gain_grad = vec![7; width];
            let dh = rmsnorm::backward(&dn, &unit, &scales, &gain, &c, &mut gain_grad, &mut s);
            assert_unsaturated("rmsnorm", &s);

            let (h, dn, gain) = (floats(&h, 16), floats(&dn, 20), floats(&gain, 12));
            let (mut want, mut want_gain) = (Vec::new(), vec![7.0 / 65536.0; width]);
            for (h, dn) in h.chunks(width).zip(dn.chunks(width)) {
                let mean = h.iter().map(|x| x * x).sum::<f64>() / width as f64;
                let rms = (mean + 1e-5).sqrt();
                let du: Vec<f64> = dn.iter().zip(&gain).map(|(d, g)| d * g).collect();
                let projection: f64 = du.iter().zip(h).map(|(d, x)| d * x).sum();
                for i in 0..width {
                    want_gain[i] += dn[i] * h[i] / rms;
                    want.push(du[i] / rms - h[i] * projection / (width as f64 * rms.powi(3)));
                }
            }
            let name = format!("width {width}, deviation {deviation}");
            assert_close(&name, &floats(&dh, 20), &want, NORM_ERROR);
            let got: Vec<f64> = gain_grad.iter().map(|&g| g as f64 / 65536.0).collect();
            assert_close(&name, &got, &want_gain, NORM_ERROR);
        }
    }
}

fn rope_table(context: usize, half: usize) -> RopeTable {
    let angles: Vec<f64> = (0..context * half)
        .map(|i| (i / half) as f64 * libm::pow(10_000.0, -((i % half) as f64) / half as f64))
        .collect();
    let q14 = |f: fn(f64) -> f64| angles.iter().map(|&a| (f(a) * 16384.0).round() as i32).collect();
    RopeTable { half, cos: q14(libm::cos), sin: q14(libm::sin) }
}

/// `x` rotated by the angles of `position`, in f64; a negative position rotates back.
fn rotated(x: &[f64], position: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = x.to_vec();
    for i in 0..half {
        let angle = position * libm::pow(10_000.0, -(i as f64) / half as f64);
        let (sin, cos) = libm::sincos(angle);
        out[i] = x[i] * cos - x[i + half] * sin;
        out[i + half] = x[i + half] * cos + x[i] * sin;
    }
    out
}

#[test]
fn rope_rotates_and_its_inverse_undoes_it() {
    for dim in [2, 20, 32, 64] {
        let table = rope_table(300, dim / 2);
        let mut draws = Draws::new(dim as u32);
        for position in [0, 1, 2, 17, 299] {
            let x = draws.fixed(dim, 3.0, 16);
            let mut s = Saturations::default();
            let mut y = x.clone();
            rotate(&mut y, &table, position, false, &mut s);
            let want = rotated(&floats(&x, 16), position as f64);
            assert_close("forward", &floats(&y, 16), &want, ROPE_ERROR);
            assert_eq!(position == 0, x == y, "position 0, and only it, changes nothing");
            rotate(&mut y, &table, position, true, &mut s);
            assert_close("inverse", &floats(&y, 16), &floats(&x, 16), 2.0 * ROPE_ERROR);
            assert_unsaturated("rope", &s);
        }
    }
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-x))
}

#[test]
fn swiglu_equals_f64() {
    for (seed, deviation) in [0.2, 1.0, 4.0].into_iter().enumerate() {
        let mut draws = Draws::new(200 + seed as u32);
        let (gate, up) = (draws.fixed(2000, deviation, 16), draws.fixed(2000, deviation, 16));
        let da = draws.fixed(2000, 0.3, 20);
        let mut s = Saturations::default();
        let out = swiglu::forward(&gate, &up, &mut s);
        let (dgate, dup) = swiglu::backward(&da, &gate, &up, &mut s);
        assert_unsaturated("swiglu", &s);
        let (gate, up, da) = (floats(&gate, 16), floats(&up, 16), floats(&da, 20));
        let map = |f: &dyn Fn(usize) -> f64| (0..2000).map(f).collect::<Vec<f64>>();
        let want = map(&|i| gate[i] * logistic(gate[i]) * up[i]);
        assert_close("forward", &floats(&out, 16), &want, SWIGLU_ERROR);
        let want = map(&|i| da[i] * gate[i] * logistic(gate[i]));
        assert_close("up", &floats(&dup, 20), &want, SWIGLU_ERROR);
        let slope = |g: f64| logistic(g) * (1.0 + g * (1.0 - logistic(g)));
        let want = map(&|i| da[i] * up[i] * slope(gate[i]));
        assert_close("gate", &floats(&dgate, 20), &want, SWIGLU_ERROR);
    }
}

/// A product of quantised operands is exact up to one rounding a block.
#[test]
fn matmul_equals_f64_to_half_a_unit_a_block() {
    let mut draws = Draws::new(300);
    for (m, k, n) in [(1, 1, 1), (3, 31, 5), (4, 32, 33), (2, 33, 7), (3, 700, 40)] {
        let x = Bfp::from_rows(&draws.fixed(m * k, 1.0, 16), k, 16, ACTIVATION_BITS);
        let w: Vec<f32> = (0..n * k).map(|_| (draws.normal() * 0.1) as f32).collect();
        let w = Tiles::quantize(&w, n, k);
        let mut s = Saturations::default();
        let got = matmul::matmul(&x, &w.forward(), n, 16, &mut s);
        assert_unsaturated("matmul", &s);
        let a = dequantized(&x);
        let half_units = x.cols.div_ceil(BLOCK) as f64 * 0.5;
        let mut nonzero = 0;
        for i in 0..m * n {
            let (row, col) = (i / n, i % n);
            let want: f64 = (0..k).map(|c| a[row * x.cols + c] * w.value(col, c)).sum();
            let error = (f64::from(got[i]) - want * 65536.0).abs();
            assert!(error <= half_units, "({m}, {k}, {n}) index {i}: {} for {want}", got[i]);
            nonzero += usize::from(got[i] != 0);
        }
        assert!(nonzero * 2 >= m * n, "trivially zero");
    }
}

/// Sequences of every length round a block; a share is the sum of its sequences' shares.
#[test]
fn weight_gradient_equals_f64_and_is_additive() {
    let (rows, cols) = (19, 45);
    let lengths = [1, 31, 32, 33, 65, 7];
    let mut segments = Vec::new();
    for (slot, &n) in lengths.iter().enumerate() {
        let first_row = lengths[..slot].iter().sum();
        segments.push(Segment { first_row, rows: n, slot, position: 0 });
    }
    let n: usize = lengths.iter().sum();
    let mut draws = Draws::new(400);
    let dy = draws.fixed(n * rows, 0.2, 20);
    let x = Bfp::from_rows(&draws.fixed(n * cols, 1.5, 16), cols, 16, ACTIVATION_BITS);
    let mut s = Saturations::default();
    let mut grad = vec![0; rows * cols];
    matmul::weight_gradient(&dy, &x, &segments, rows, cols, &mut grad, &mut s);
    assert_unsaturated("weight_gradient", &s);
    let (dy_f, x_f) = (floats(&dy, 20), dequantized(&x));
    let want: Vec<f64> = (0..rows * cols)
        .map(|i| (0..n).map(|t| dy_f[t * rows + i / cols] * x_f[t * x.cols + i % cols]).sum())
        .collect();
    let got: Vec<f64> = grad.iter().map(|&g| g as f64 / 65536.0).collect();
    assert_close("weight_gradient", &got, &want, WEIGHT_GRADIENT_ERROR);
    let mut singly = vec![0; rows * cols];
    for segment in segments.into_iter().rev() {
        matmul::weight_gradient(&dy, &x, &[segment], rows, cols, &mut singly, &mut s);
    }
    assert_eq!(singly, grad);
}

#[test]
fn embedding_reads_rows_and_adds_gradients_of_repeated_tokens() {
    let (v, c) = (37, 40);
    let mut draws = Draws::new(500);
    let w: Vec<f32> = (0..v * c).map(|_| draws.normal() as f32).collect();
    let tiles = Tiles::quantize(&w, v, c);
    let tokens = [3, 36, 3, 0, 3];
    let mut s = Saturations::default();
    let out = embedding::forward(&tiles, &tokens, &mut s);
    assert_unsaturated("embedding", &s);
    for (i, &x) in out.iter().enumerate() {
        let want = tiles.value(tokens[i / c] as usize, i % c) * 65536.0;
        assert_eq!(f64::from(x), want.round_ties_even(), "index {i}");
    }
    let dh = draws.fixed(tokens.len() * c, 0.1, 20);
    let mut grad = vec![5; v * c];
    embedding::backward(&dh, &tokens, c, &mut grad);
    for (i, &g) in grad.iter().enumerate() {
        let rows = (0..tokens.len()).filter(|&r| tokens[r] as usize == i / c);
        let want: f64 = rows.map(|r| (f64::from(dh[r * c + i % c]) / 16.0).round_ties_even()).sum();
        assert_eq!(g as f64, 5.0 + want, "index {i}");
    }
}

/// A batch of sequences with rotated, quantised heads.
struct Heads {
    c: AttentionConstants,
    rope: RopeTable,
    segments: Vec<Segment>,
    rows: usize,
    queries: HeadVectors,
    cache: Cache,
}

fn attention_case(heads: usize, kv_heads: usize, dim: usize, lengths: &[usize]) -> Heads {
    let c = AttentionConstants::new(heads, kv_heads, dim);
    let capacity = lengths.iter().copied().max().unwrap_or(0) + 3;
    let rope = rope_table(capacity, dim / 2);
    let rows: usize = lengths.iter().sum();
    let segments: Vec<Segment> = lengths
        .iter()
        .enumerate()
        .map(|(slot, &n)| Segment {
            first_row: lengths[..slot].iter().sum(),
            rows: n,
            slot,
            position: 0,
        })
        .collect();
    let mut draws = Draws::new((heads * 1000 + dim) as u32);
    let q = draws.fixed(rows * heads * dim, 1.0, 16);
    let k = draws.fixed(rows * kv_heads * dim, 1.0, 16);
    let v = draws.fixed(rows * kv_heads * dim, 1.0, 16);
    let mut cache = Cache::new(lengths.len(), capacity, &c);
    let mut s = Saturations::default();
    let queries = attention::heads(&q, &k, &v, &segments, &c, &rope, &mut cache, &mut s);
    assert_unsaturated("heads", &s);
    // Rotation, rounding and layout: within half a unit of the mantissas.
    for segment in &segments {
        for t in 0..segment.rows {
            let row = segment.first_row + t;
            let at = segment.slot * capacity + t;
            let check = |name, x: &[i32], to: &HeadVectors, to_row, h, angle, bits: u32| {
                let want = rotated(&floats(x, 16), angle);
                let bound = libm::ldexp(1.0, 1 - bits as i32) + ROPE_ERROR;
                let largest = want.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
                let got = head(to, to_row, h);
                let bad = (0..dim).find(|&i| (got[i] - want[i]).abs() > bound * largest);
                assert_eq!(bad, None, "{name} row {row} head {h}: {got:?} for {want:?}");
            };
            for h in 0..heads {
                let x = &q[(row * heads + h) * dim..][..dim];
                check("query", x, &queries, row, h, t as f64, ACTIVATION_BITS);
            }
            for h in 0..kv_heads {
                let from = (row * kv_heads + h) * dim;
                check("key", &k[from..][..dim], &cache.keys, at, h, t as f64, WEIGHT_BITS);
                check("value", &v[from..][..dim], &cache.values, at, h, 0.0, WEIGHT_BITS);
            }
        }
    }
    Heads { c, rope, segments, rows, queries, cache }
}

/// One head vector, dequantised.
fn head(x: &HeadVectors, row: usize, h: usize) -> Vec<f64> {
    let scale = libm::ldexp(1.0, x.exponent(row, h));
    x.vector(row, h).iter().map(|&m| f64::from(m) * scale).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    let e: Vec<f64> = x.iter().map(|x| libm::exp(x - max)).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|e| e / total).collect()
}

impl Heads {
    fn key(&self, s: &Segment, j: usize, h: usize) -> Vec<f64> {
        head(&self.cache.keys, s.slot * self.cache.capacity + j, self.c.kv_head(h))
    }

    fn value(&self, s: &Segment, j: usize, h: usize) -> Vec<f64> {
        head(&self.cache.values, s.slot * self.cache.capacity + j, self.c.kv_head(h))
    }

    /// Probabilities of query `i` of `s` over keys 0 to `i`.
    fn probabilities(&self, s: &Segment, i: usize, h: usize) -> Vec<f64> {
        let q = head(&self.queries, s.first_row + i, h);
        let root = (self.c.head_dim as f64).sqrt();
        let scores: Vec<f64> = (0..=i).map(|j| dot(&q, &self.key(s, j, h)) / root).collect();
        softmax(&scores)
    }
}

const ATTENTION_CASES: [(usize, usize, usize, &[usize]); 4] =
    [(4, 2, 32, &[33, 1, 70]), (6, 2, 20, &[40, 5]), (3, 3, 64, &[32, 31]), (2, 1, 40, &[100])];

/// Grouped queries, ragged head sizes, sequences shorter and longer than a block of keys.
#[test]
fn attention_forward_equals_f64() {
    for (heads, kv_heads, dim, lengths) in ATTENTION_CASES {
        let x = attention_case(heads, kv_heads, dim, lengths);
        let mut s = Saturations::default();
        let out = attention::forward(&x.queries, &x.cache, &x.segments, &x.c, &mut s);
        let mut want = vec![0.0; x.rows * heads * dim];
        for segment in &x.segments {
            for i in 0..segment.rows {
                for h in 0..heads {
                    let p = x.probabilities(segment, i, h);
                    let row = segment.first_row + i;
                    let got = attention::probabilities(
                        &x.queries,
                        row,
                        h,
                        &x.cache,
                        segment.slot,
                        i,
                        &x.c,
                        &mut s,
                    );
                    let sum: i64 = got.iter().map(|&p| i64::from(p)).sum();
                    assert!((sum - (1 << 24)).abs() < 1 << 10, "probabilities sum to {sum} 2^-24");
                    let at = (row * heads + h) * dim;
                    for (j, p) in p.iter().enumerate() {
                        let error = (f64::from(got[j]) / 16_777_216.0 - p).abs();
                        assert!(error < 1e-4, "row {row} head {h} key {j}: {} for {p}", got[j]);
                        for (o, v) in want[at..at + dim].iter_mut().zip(x.value(segment, j, h)) {
                            *o += p * v;
                        }
                    }
                }
            }
        }
        assert_unsaturated("attention", &s);
        assert_close("attention", &floats(&out, 16), &want, ATTENTION_ERROR);
    }
}

/// The textbook formulas, one head at a time, the rotations undone at the end.
#[test]
fn attention_backward_equals_f64() {
    for (heads, kv_heads, dim, lengths) in ATTENTION_CASES {
        let x = attention_case(heads, kv_heads, dim, lengths);
        let d_out = Draws::new(9).fixed(x.rows * heads * dim, 0.02, 20);
        let mut s = Saturations::default();
        let got = attention_backward::backward(
            &d_out,
            &x.queries,
            &x.cache,
            &x.segments,
            &x.c,
            &x.rope,
            &mut s,
        );
        assert_unsaturated("attention_backward", &s);
        let d_out = floats(&d_out, 20);
        let root = (dim as f64).sqrt();
        let mut dq = vec![0.0; x.rows * heads * dim];
        let mut dk = vec![0.0; x.rows * kv_heads * dim];
        let mut dv = dk.clone();
        let add = |to: &mut [f64], x: &[f64], by: f64| {
            to.iter_mut().zip(x).for_each(|(t, x)| *t += x * by);
        };
        for segment in &x.segments {
            let row = |i: usize| segment.first_row + i;
            for h in 0..heads {
                let g = x.c.kv_head(h);
                for i in 0..segment.rows {
                    let p = x.probabilities(segment, i, h);
                    let q = head(&x.queries, row(i), h);
                    let o = &d_out[(row(i) * heads + h) * dim..][..dim];
                    let dp: Vec<f64> = (0..=i).map(|j| dot(o, &x.value(segment, j, h))).collect();
                    let mean = dot(&dp, &p);
                    for j in 0..=i {
                        let ds = p[j] * (dp[j] - mean) / root;
                        let kv = (row(j) * kv_heads + g) * dim;
                        add(&mut dv[kv..kv + dim], o, p[j]);
                        add(&mut dk[kv..kv + dim], &q, ds);
                        let at = (row(i) * heads + h) * dim;
                        add(&mut dq[at..at + dim], &x.key(segment, j, h), ds);
                    }
                }
            }
        }
        let unrotate = |d: &mut Vec<f64>, heads: usize| {
            for segment in &x.segments {
                for i in 0..segment.rows {
                    for h in 0..heads {
                        let at = ((segment.first_row + i) * heads + h) * dim;
                        let back = rotated(&d[at..at + dim], -(i as f64));
                        d[at..at + dim].copy_from_slice(&back);
                    }
                }
            }
        };
        unrotate(&mut dq, heads);
        unrotate(&mut dk, kv_heads);
        let name = |part: &str| format!("{part} of {heads} heads, {kv_heads} kv, size {dim}");
        assert_close(&name("dv"), &floats(&got.dv, 20), &dv, ATTENTION_GRADIENT_ERROR);
        assert_close(&name("dq"), &floats(&got.dq, 20), &dq, ATTENTION_GRADIENT_ERROR);
        assert_close(&name("dk"), &floats(&got.dk, 20), &dk, ATTENTION_GRADIENT_ERROR);
    }
}

/// Rows of logits: peaked, flat, all equal, with tokens that are out of the question.
fn logit_rows(v: usize) -> Vec<Vec<i32>> {
    let mut draws = Draws::new(600);
    let mut rows: Vec<Vec<i32>> = [0.01, 1.0, 3.0].iter().map(|&d| draws.fixed(v, d, 16)).collect();
    rows.push(vec![-77 << 16; v]);
    let mut masked = draws.fixed(v, 1.0, 16);
    for x in masked.iter_mut().step_by(3) {
        *x = -100 << 16;
    }
    rows.push(masked);
    rows
}

/// `(probabilities, entropy)` of logits at a temperature.
fn distribution(row: &[f64], temperature: f64) -> (Vec<f64>, f64) {
    let p = softmax(&row.iter().map(|x| x / temperature).collect::<Vec<_>>());
    let entropy = -p.iter().filter(|p| **p > 0.0).map(|p| p * libm::log(*p)).sum::<f64>();
    (p, entropy)
}

/// Log-probability and entropy as the learner computes them from the integers.
#[test]
fn stats_equal_f64() {
    // Distances are FX(16), weights Q23: near 2^-17 a token each.
    const NATS_ERROR: f64 = 3e-5;
    for temperature in [0.4, 1.0, 1.6] {
        let scale = temperature_scale(temperature);
        for (r, row) in logit_rows(130).iter().enumerate() {
            let (p, entropy) = distribution(&floats(row, 16), temperature);
            for target in [0, 1, 64, 129] {
                let s = logits::stats(row, target, scale);
                let ln2 = std::f64::consts::LN_2;
                let log2_total = libm::log2(s.total as f64 / 8_388_608.0);
                let got_entropy = (s.moment as f64 / s.total as f64 / 65536.0 + log2_total) * ln2;
                let at = format!("row {r} at temperature {temperature}");
                assert!((got_entropy - entropy).abs() < NATS_ERROR * 4.0, "{at}: {got_entropy}");
                let best = (0..130).rev().max_by_key(|&i| row[i]);
                assert_eq!(Some(s.greedy as usize), best, "{at}");
                let want = libm::log(p[target as usize]);
                if want > -25.0 {
                    let got = -(f64::from(s.t) / 65536.0 + log2_total) * ln2;
                    assert!((got - want).abs() < NATS_ERROR, "{at}: {got} for {want}");
                } else {
                    assert!(s.t > 30 << 16, "{at}: t {}", s.t);
                }
            }
        }
    }
}

/// A fixed grid of draws covers the distribution like its cumulative sums: no draw is lost.
#[test]
fn sample_frequencies_match_the_softmax() {
    const GRID: u64 = 1 << 16;
    // A token's share of an even grid is off by less than two draws.
    const FREQUENCY_ERROR: f64 = 2.0 / GRID as f64 + PROBABILITY_ERROR;
    for (row_index, row) in logit_rows(24).iter().enumerate() {
        for temperature in [0.5, 1.0] {
            let scale = temperature_scale(temperature);
            let mut counts = vec![0_u32; row.len()];
            let mut previous = 0;
            for i in 0..GRID {
                let token = logits::sample(row, scale, (i << 48) + (1 << 47));
                assert!(token >= previous, "the inverse of a cumulative sum is monotone");
                previous = token;
                counts[token as usize] += 1;
            }
            let (p, _) = distribution(&floats(row, 16), temperature);
            let e: Vec<i32> = logits::weights(row, scale).map(|(_, e)| e).collect();
            for i in 0..row.len() {
                let frequency = f64::from(counts[i]) / GRID as f64;
                let error = (frequency - p[i]).abs();
                let at = format!("row {row_index} token {i}");
                assert!(error < FREQUENCY_ERROR, "{at}: {frequency} for {}", p[i]);
                assert!(e[i] > 0 || counts[i] == 0, "{at} has no weight");
            }
        }
    }
}

/// The first and the last draw, and weights of zero at both ends.
#[test]
fn sample_extreme_draws_hit_the_first_and_last_token_of_weight() {
    let scale = temperature_scale(1.0);
    let low = -200 << 16;
    for (row, first, last) in [
        (vec![low, low, 0, 5 << 16, 0, low], 2, 4),
        (vec![0, low, low], 0, 0),
        (vec![low, low, 9], 2, 2),
        (vec![1, 1, 1], 0, 2),
        (vec![-3], 0, 0),
    ] {
        let token = |draw| logits::sample(&row, scale, draw);
        assert_eq!([token(0), token(1), token(u64::MAX)], [first, first, last], "{row:?}");
    }
}

/// `weight * -log p(target) - alpha * H` of logits that are already divided by the temperature.
fn loss(x: &[f64], target: usize, weight: f64, alpha: f64) -> f64 {
    let (p, entropy) = distribution(x, 1.0);
    -weight * libm::log(p[target]) - alpha * entropy
}

/// Central differences of the loss itself: sign errors and a missing entropy term show.
#[test]
fn seed_equals_finite_differences_of_the_loss() {
    const STEP: f64 = 1e-5;
    for temperature in [0.7, 1.0] {
        let scale = temperature_scale(temperature);
        for (r, row) in logit_rows(40).iter().enumerate() {
            let x: Vec<f64> = floats(row, 16).iter().map(|x| x / temperature).collect();
            let base = logits::stats(row, 0, scale);
            for (target, weight, alpha) in
                [(0, 1.0, 0.0), (1, -0.7, 0.05), (5, 0.0, 0.3), (39, 2.5, -0.1)]
            {
                let seed = SeedRow {
                    target: target as u32,
                    weight: (weight * 65536.0) as i32,
                    entropy_weight: (alpha * std::f64::consts::LN_2 * 65536.0) as i32,
                    entropy_center: (base.moment / base.total) as i32,
                };
                let mut s = Saturations::default();
                let got = floats(&logits::seed(row, &seed, scale, &mut s), 20);
                assert_unsaturated("seed", &s);
                // Errors of p and of the weights themselves, in Q16.
                let bound = (f64::abs(weight) + f64::abs(alpha)) * PROBABILITY_ERROR + 2e-5;
                for i in 0..row.len() {
                    let mut y = x.clone();
                    y[i] += STEP;
                    let up = loss(&y, target, weight, alpha);
                    y[i] -= 2.0 * STEP;
                    let want = (up - loss(&y, target, weight, alpha)) / (2.0 * STEP);
                    let error = (got[i] - want).abs();
                    assert!(error < bound, "row {r} logit {i}: {} for {want}", got[i]);
                }
            }
            let none = SeedRow { target: 3, entropy_center: 9, ..SeedRow::default() };
            let zero = logits::seed(row, &none, scale, &mut Saturations::default());
            assert!(zero.iter().all(|&d| d == 0), "a masked row seeds nothing");
        }
    }
}

/// What is trained sums to nothing: probabilities to 1, seeds to 0.
#[test]
fn seed_probabilities_sum_to_one() {
    let scale = temperature_scale(1.0);
    for (r, row) in logit_rows(500).iter().enumerate() {
        // With weight 1 and a target outside the vocabulary, the seed is p itself.
        let seed = SeedRow { target: u32::MAX, weight: 1 << 16, ..SeedRow::default() };
        let p = logits::seed(row, &seed, scale, &mut Saturations::default());
        let sum: i64 = p.iter().map(|&p| i64::from(p)).sum();
        let error = (sum as f64 / 1_048_576.0 - 1.0).abs();
        // A seed is FX(20): half a unit a token.
        assert!(error < PROBABILITY_ERROR + 250.0 / 1_048_576.0, "row {r}: off by {error}");
    }
}
