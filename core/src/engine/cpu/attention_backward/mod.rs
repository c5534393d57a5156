//! Gradient of attention: `twin::attention_backward`.
//!
//! One index is a segment and a key-value head: the heads of a group add to the same gradients of
//! keys and values, in ascending order. Blocks above the diagonal are zeros and are skipped.
#![expect(unsafe_code, reason = "drives kernels over raw panels")]

mod loops;
mod products;

use std::cell::RefCell;

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::{ACTIVATION_FRACTION, Segment, Site};

use self::loops::{interleave, rotate_back, transpose};
use super::attention::causal;
use super::buffer::Buffer;
use super::cache::Cache;
use super::heads::{Queries, head_blocks, segment_panels};
use super::kernel::{
    EXPONENT_SHIFT, Job, Kind, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK,
    ZERO_EXPONENT, bias, fast_limit, run,
};
use super::path::Path;
use super::quantize;
use super::softmax::probabilities;
use super::workers::Shared;
use super::{Cpu, Tensor};
use crate::engine::Batch;

/// A thread's working memory, for T rows padded to whole tiles, and one head.
struct Scratch {
    /// (T, T) probabilities, then nothing.
    p: Buffer<i32>,
    /// (T, T) gradients of probabilities, then of scores.
    ds: Buffer<i32>,
    /// Query lines of the head.
    q: Buffer<i16>,
    q_exponents: Buffer<i32>,
    q_canonical: Buffer<i32>,
    /// Lines of up to 6 rows.
    lines: Buffer<i16>,
    line_exponents: Buffer<i32>,
    /// A left operand in pairs.
    pairs: Buffer<i16>,
    pair_exponents: Buffer<i32>,
    /// `d_out`, then queries, as right operand along rows.
    rows: Buffer<i16>,
    row_exponents: Buffer<i32>,
    row_max: Buffer<i32>,
    /// Keys as right operand along keys.
    keys: Buffer<i16>,
    /// Values as columns.
    values: Buffer<i16>,
    value_columns: Buffer<i32>,
    value_max: Buffer<i32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        p: Buffer::zeros(0),
        ds: Buffer::zeros(0),
        q: Buffer::zeros(0),
        q_exponents: Buffer::zeros(0),
        q_canonical: Buffer::zeros(0),
        lines: Buffer::zeros(0),
        line_exponents: Buffer::zeros(0),
        pairs: Buffer::zeros(0),
        pair_exponents: Buffer::zeros(0),
        rows: Buffer::zeros(0),
        row_exponents: Buffer::zeros(0),
        row_max: Buffer::zeros(0),
        keys: Buffer::zeros(0),
        values: Buffer::zeros(0),
        value_columns: Buffer::zeros(0),
        value_max: Buffer::zeros(0),
    });
}

/// Counts of one index.
#[derive(Default)]
struct Counts {
    matmul: u64,
    attention: u64,
    rope: u64,
}

/// Gradients of queries (N, H D), keys and values (N, K D) before rotation.
pub(super) fn backward(
    cpu: &Cpu,
    d_out: &Tensor,
    q: &Queries,
    cache: &Cache,
    batch: &Batch,
) -> [Tensor; 3] {
    let c = &cpu.constants.attention;
    let rows = batch.rows();
    let kv = c.kv_heads * c.head_dim;
    let mut out = [d_out.cols, kv, kv].map(|cols| cpu.tensor_of(rows, cols));
    let [dq, dk, dv] = &mut out;
    let shared = [&mut dq.data, &mut dk.data, &mut dv.data].map(|x| Shared::new(x));
    let mut cost = 0;
    for s in &batch.segments {
        assert_eq!(s.position, 0, "a gradient needs whole sequences");
        cost += s.rows * s.rows * c.heads * (6 + c.head_dim / 16);
    }
    cpu.workers.each(batch.segments.len() * c.kv_heads, cost, |i| {
        let (segment, g) = (i / c.kv_heads, i % c.kv_heads);
        let s = &batch.segments[segment];
        if s.rows == 0 {
            return;
        }
        let head = Head { cpu, d_out, q, cache, s, g, base: q.base[segment], out: &shared };
        let counts = SCRATCH.with_borrow_mut(|scratch| head.backward(scratch));
        cpu.tally.add(Site::Matmul, counts.matmul);
        cpu.tally.add(Site::Attention, counts.attention);
        cpu.tally.add(Site::Rope, counts.rope);
    });
    out
}

/// A segment and a key-value head.
struct Head<'a> {
    cpu: &'a Cpu,
    d_out: &'a Tensor,
    q: &'a Queries,
    cache: &'a Cache,
    s: &'a Segment,
    g: usize,
    base: usize,
    out: &'a [Shared<'a, i32>; 3],
}

impl Head<'_> {
    fn path(&self) -> Path {
        self.cpu.path
    }

    /// D / 32 and the number of tiles of the segment.
    fn shape(&self) -> (usize, usize) {
        (head_blocks(&self.cpu.constants.attention), self.s.rows.div_ceil(TILE))
    }

    fn cached(&self) -> usize {
        self.s.slot * self.cpu.constants.attention.kv_heads + self.g
    }

    fn backward(&self, scratch: &mut Scratch) -> Counts {
        let c = &self.cpu.constants.attention;
        let mut counts = Counts::default();
        self.unpack_cache(scratch);
        let group = c.heads / c.kv_heads;
        for h in 0..group {
            self.gather_queries(h, scratch);
            self.probabilities(scratch);
            self.values_gradient(h, scratch, &mut counts);
            self.scores_gradient(h, scratch, &mut counts);
            self.queries_gradient(h, scratch, &mut counts);
            self.keys_gradient(h, scratch, &mut counts);
        }
        for i in 0..self.s.rows {
            let at = ((self.s.first_row + i) * c.kv_heads + self.g) * c.head_dim;
            // SAFETY: (row, key-value head) belongs to this index.
            let dk = unsafe { self.out[1].part(at, c.head_dim) };
            counts.rope += self.rotate_back(dk, i);
        }
        counts
    }

    fn rotate_back(&self, x: &mut [i32], position: usize) -> u64 {
        let rope = &self.cpu.constants.rope;
        let at = position * rope.half..(position + 1) * rope.half;
        rotate_back(self.path(), x, &rope.cos[at.clone()], &rope.sin[at])
    }

    /// Keys along keys, values as columns.
    fn unpack_cache(&self, scratch: &mut Scratch) {
        let (blocks, tiles) = self.shape();
        let (head, capacity) = (self.cached(), self.cache.capacity);
        let all = capacity / TILE;
        let keys = scratch.keys.at_least(blocks * tiles * TILE_BLOCK);
        let values = scratch.values.at_least(blocks * tiles * TILE_BLOCK);
        for b in 0..blocks {
            for t in 0..tiles {
                let key = ((head * all + t) * blocks + b) * TILE_BLOCK;
                let value = ((head * blocks + b) * all + t) * TILE_BLOCK;
                let to = &mut keys[(b * tiles + t) * TILE_BLOCK..][..TILE_BLOCK];
                transpose(&self.cache.keys[key..key + TILE_BLOCK], to);
                let to = &mut values[(t * blocks + b) * TILE_BLOCK..][..TILE_BLOCK];
                transpose(&self.cache.values[value..value + TILE_BLOCK], to);
            }
        }
        // Positions beyond the sequence meet zeros of the other operand, but stale mantissas
        // there must not be read as more than that.
        let columns = scratch.value_columns.at_least(tiles * TILE);
        let e = &self.cache.value_exponents[head * capacity..][..tiles * TILE];
        for (to, e) in columns.iter_mut().zip(e) {
            *to = e << EXPONENT_SHIFT;
        }
        let max = scratch.value_max.at_least(tiles);
        for (max, e) in max.iter_mut().zip(columns.chunks_exact(TILE)) {
            *max = e.iter().copied().max().unwrap_or(ZERO_EXPONENT);
        }
    }

    /// The queries of one head as panels of consecutive rows, and along rows.
    fn gather_queries(&self, h: usize, scratch: &mut Scratch) {
        let c = &self.cpu.constants.attention;
        let (blocks, tiles) = self.shape();
        let group = c.heads / c.kv_heads;
        let panels = self.s.rows.div_ceil(PANEL);
        let first = self.base + self.g * segment_panels(c, self.s.rows);
        let q = scratch.q.at_least(panels * blocks * PANEL_BLOCK);
        let exponents = scratch.q_exponents.at_least(panels * blocks * PANEL_EXPONENTS);
        let canonical = scratch.q_canonical.at_least(self.s.rows);
        let along = scratch.rows.at_least(blocks * tiles * TILE_BLOCK);
        for i in 0..self.s.rows {
            let r = i * group + h;
            let head = (self.s.first_row + i) * c.heads + self.g * group + h;
            canonical[i] = self.q.canonical[head];
            for b in 0..blocks {
                let from = (first + r / PANEL) * blocks + b;
                let to = i / PANEL * blocks + b;
                let line = &self.q.mantissas[from * PANEL_BLOCK + r % PANEL * BLOCK..][..BLOCK];
                q[to * PANEL_BLOCK + i % PANEL * BLOCK..][..BLOCK].copy_from_slice(line);
                exponents[to * PANEL_EXPONENTS + i % PANEL] =
                    self.q.exponents[from * PANEL_EXPONENTS + r % PANEL];
            }
        }
        for i in (0..self.s.rows).step_by(2) {
            for b in 0..blocks {
                let line = |i: usize| {
                    let at = (i / PANEL * blocks + b) * PANEL_BLOCK + i % PANEL * BLOCK;
                    q[at..].first_chunk().filter(|_| i < self.s.rows).unwrap_or(&[0; BLOCK])
                };
                let tile = (b * tiles + i / TILE) * TILE_BLOCK + i % TILE * TILE;
                let to = &mut along[tile..tile + 2 * TILE];
                interleave(self.path(), line(i), line(i + 1), to);
            }
        }
        for (p, e) in exponents.chunks_exact_mut(blocks * PANEL_EXPONENTS).enumerate() {
            quantize::finish(e, PANEL.min(self.s.rows - p * PANEL));
        }
    }

    /// The rows of panel `p`, and their positions.
    fn positions(&self, p: usize) -> (usize, [usize; PANEL]) {
        let rows = PANEL.min(self.s.rows - p * PANEL);
        (rows, std::array::from_fn(|r| p * PANEL + r.min(rows - 1)))
    }

    /// (T, T) probabilities. Clamps of the scores were counted by the forward pass.
    fn probabilities(&self, scratch: &mut Scratch) {
        let c = &self.cpu.constants.attention;
        let (blocks, tiles) = self.shape();
        let stride = tiles * TILE;
        let all = self.cache.capacity / TILE;
        let p = scratch.p.at_least(self.s.rows.next_multiple_of(PANEL) * stride);
        for panel in 0..self.s.rows.div_ceil(PANEL) {
            let (rows, positions) = self.positions(panel);
            for tile in 0..=positions[rows - 1] / TILE {
                let count = causal(positions, tile, blocks);
                let key_tile = self.cached() * all + tile;
                let job = Job {
                    a: scratch.q[panel * blocks * PANEL_BLOCK..].as_ptr(),
                    a_exponents: scratch.q_exponents[panel * blocks * PANEL_EXPONENTS..].as_ptr(),
                    b: self.cache.keys[key_tile * blocks * TILE_BLOCK..].as_ptr(),
                    b_exponents: self.cache.key_columns[key_tile * TILE..].as_ptr(),
                    b_stride: 0,
                    b_max: &raw const self.cache.key_max[key_tile],
                    b_max_stride: 0,
                    blocks,
                    bias: bias(ACTIVATION_FRACTION),
                    limit: fast_limit(self.path(), blocks),
                    count: &raw const count,
                    out: p[panel * PANEL * stride + tile * TILE..].as_mut_ptr(),
                    stride,
                };
                // SAFETY: a query panel and a key tile hold `blocks` blocks; `p` holds 6 rows.
                unsafe { run(self.path(), Kind::LinesColumns, rows, &job) };
            }
            let width = (positions[rows - 1] / TILE + 1) * TILE;
            let p = &mut p[panel * PANEL * stride..];
            probabilities(self.path(), p, stride, width, &positions[..rows], c.score_scale);
        }
    }
}
