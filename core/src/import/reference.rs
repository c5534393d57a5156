//! The original in f32: what an import is compared with, and where its residual stream is measured.
//!
//! Plain f32 in a fixed order of summation, without fused operations: it is the same on every
//! machine, and so is the scale that is chosen by it.

use super::ImportError;
use super::names::Source;
use crate::engine::cpu::{Path, simd};
use crate::model::config::ModelConfig;
use crate::model::weights::{bias_values, layer_tensors};
use crate::parallel;

/// Output features that one thread computes at a time.
const CHUNK: usize = 48;
/// Rows that share a pass over the weights.
const ROWS: usize = 4;
/// Partial sums of an inner product, side by side in vector registers.
const LANES: usize = 16;

/// A Llama-like decoder in f32.
pub struct Reference {
    /// Shape of the model.
    pub config: ModelConfig,
    /// In the order of [`crate::model::weights::shapes`].
    tensors: Vec<Vec<f32>>,
    path: Path,
}

/// What is left of a sequence before the output head.
#[derive(Clone, Debug, PartialEq)]
pub struct States {
    /// (N, C), normalised.
    pub rows: Vec<f32>,
    /// Largest magnitude in the residual stream after any layer.
    pub peak: f32,
}

impl Reference {
    /// Reads every tensor.
    pub fn read(source: &Source<'_>) -> Result<Self, ImportError> {
        let tensors = parallel::map(source.tensors.iter().collect(), super::names::Found::read);
        let tensors = tensors.into_iter().collect::<Result<_, _>>()?;
        Ok(Self::new(source.config.clone(), tensors))
    }

    /// Of tensors in the order of [`crate::model::weights::shapes`].
    pub fn new(config: ModelConfig, tensors: Vec<Vec<f32>>) -> Self {
        Self { config, tensors, path: Path::best() }
    }

    /// The states before the output head, for one sequence from its beginning.
    pub fn states(&self, tokens: &[u32]) -> States {
        let c = &self.config;
        let row = |t: &u32| self.tensors[0][*t as usize * c.width..][..c.width].iter().copied();
        let mut h: Vec<f32> = tokens.iter().flat_map(row).collect();
        let mut peak = 0.0;
        for layer in self.tensors[1..].chunks_exact(layer_tensors(c)).take(c.layers) {
            let [n1, q, k, v, o, biases @ .., n2, gate, up, down] = layer else {
                unreachable!("at least nine tensors")
            };
            let x = self.norm(&h, n1);
            let mut qkv = [q, k, v].map(|w| self.linear(&x, w, c.width));
            for (x, bias) in qkv.iter_mut().zip(biases) {
                let bias = bias_values(bias);
                x.iter_mut().zip(bias.iter().cycle()).for_each(|(x, b)| *x += b);
            }
            let [q, k, v] = qkv;
            let x = self.attention(q, k, &v, tokens.len());
            add(&mut h, &self.linear(&x, o, c.attention_width()), &mut peak);
            let x = self.norm(&h, n2);
            let [gate, up] = [gate, up].map(|w| self.linear(&x, w, c.width));
            let x: Vec<f32> =
                gate.iter().zip(&up).map(|(g, u)| g / (1.0 + libm::expf(-g)) * u).collect();
            add(&mut h, &self.linear(&x, down, c.ffn), &mut peak);
        }
        States { rows: self.norm(&h, &self.tensors[1 + c.layers * layer_tensors(c)]), peak }
    }

    /// (N, V) logits of states (N, C).
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        let head = if self.config.tied { self.tensors.first() } else { self.tensors.last() };
        self.linear(states, head.map_or(&[], Vec::as_slice), self.config.width)
    }

    fn norm(&self, h: &[f32], gain: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(h.len());
        for row in h.chunks_exact(self.config.width) {
            let squares: f64 = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let mean = squares / self.config.width as f64 + self.config.rms_epsilon;
            let scale = (1.0 / mean.sqrt()) as f32;
            out.extend(row.iter().zip(gain).map(|(x, g)| x * scale * g));
        }
        out
    }

    /// `x W^T`: (N, K) by (O, K) to (N, O).
    fn linear(&self, x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
        let (rows, outputs) = (x.len() / k, w.len() / k);
        let mut padded = x.to_vec();
        padded.resize(rows.next_multiple_of(ROWS) * k, 0.0);
        let chunks = w.chunks(CHUNK * k).collect();
        let chunks = parallel::map(chunks, |w| products(self.path, &padded, w, k));
        let mut out = vec![0.0; rows * outputs];
        for (i, chunk) in chunks.iter().enumerate() {
            let width = chunk.len() / (padded.len() / k);
            for (row, values) in chunk.chunks_exact(width).take(rows).enumerate() {
                out[row * outputs + i * CHUNK..][..width].copy_from_slice(values);
            }
        }
        out
    }

    /// Causal attention: q (N, H D), k and v (N, K D) to (N, H D).
    fn attention(&self, mut q: Vec<f32>, mut k: Vec<f32>, v: &[f32], n: usize) -> Vec<f32> {
        let c = &self.config;
        let (d, kv) = (c.head_dim, c.kv_width());
        self.rotate(&mut q, c.attention_width());
        self.rotate(&mut k, kv);
        let head = |h: usize| {
            let at = h / (c.heads / c.kv_heads) * d;
            let mut out = vec![0.0; n * d];
            for t in 0..n {
                let query = &q[t * c.attention_width() + h * d..][..d];
                let score = |s: usize| {
                    let key = &k[s * kv + at..][..d];
                    query.iter().zip(key).map(|(a, b)| a * b).sum::<f32>() / (d as f32).sqrt()
                };
                let mut p: Vec<f32> = (0..=t).map(score).collect();
                let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                p.iter_mut().for_each(|x| *x = libm::expf(*x - max));
                let sum: f32 = p.iter().sum();
                for (s, p) in p.iter().enumerate() {
                    let value = &v[s * kv + at..][..d];
                    let out = &mut out[t * d..][..d];
                    out.iter_mut().zip(value).for_each(|(o, v)| *o += p / sum * v);
                }
            }
            out
        };
        let heads = parallel::map((0..c.heads).collect(), head);
        (0..n)
            .flat_map(|t| heads.iter().flat_map(move |h| h[t * d..][..d].iter().copied()))
            .collect()
    }

    /// Rotary embedding of every head of (N, `width`), row `t` at position `t`.
    fn rotate(&self, x: &mut [f32], width: usize) {
        let half = self.config.head_dim / 2;
        for (t, row) in x.chunks_exact_mut(width).enumerate() {
            for i in 0..half {
                let frequency = libm::pow(self.config.rope_base, -(i as f64) / half as f64);
                let (sin, cos) = libm::sincos(t as f64 * frequency);
                let (sin, cos) = (sin as f32, cos as f32);
                for head in row.chunks_exact_mut(2 * half) {
                    let (a, b) = (head[i], head[i + half]);
                    (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
    }
}

/// `a += b`; `peak` grows to the largest magnitude.
fn add(a: &mut [f32], b: &[f32], peak: &mut f32) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
        *peak = peak.max(a.abs());
    }
}

simd! {
    /// `x W^T` on one thread: (N, K), N a multiple of [`ROWS`], by (O, K) to (N, O).
    fn products(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
        let outputs = w.len() / k;
        let mut out = vec![0.0; x.len() / k * outputs];
        for (group, x) in x.chunks_exact(ROWS * k).enumerate() {
            let (x0, x) = x.split_at(k);
            let (x1, x) = x.split_at(k);
            let (x2, x3) = x.split_at(k);
            let (a, b) = (x0.as_chunks::<LANES>(), x1.as_chunks::<LANES>());
            let (c, d) = (x2.as_chunks::<LANES>(), x3.as_chunks::<LANES>());
            for (o, w) in w.chunks_exact(k).enumerate() {
                let w = w.as_chunks::<LANES>();
                let mut sums = [[0.0_f32; LANES]; ROWS];
                let pairs = w.0.iter().zip(a.0).zip(b.0.iter().zip(c.0).zip(d.0));
                for ((w, a), ((b, c), d)) in pairs {
                    for i in 0..LANES {
                        sums[0][i] += a[i] * w[i];
                        sums[1][i] += b[i] * w[i];
                        sums[2][i] += c[i] * w[i];
                        sums[3][i] += d[i] * w[i];
                    }
                }
                for (row, rest) in [a.1, b.1, c.1, d.1].into_iter().enumerate() {
                    let rest = rest.iter().zip(w.1).map(|(x, w)| x * w);
                    out[(group * ROWS + row) * outputs + o] =
                        sums[row].iter().copied().chain(rest).sum();
                }
            }
        }
        out
    }
}
