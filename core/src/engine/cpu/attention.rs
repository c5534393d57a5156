//! Grouped-query causal attention, forward: `twin::attention::forward`.
//!
//! A panel is 6 rows of the same keys: its scores stay in L1 between the two products. Tiles of
//! keys beyond the panel's last position are skipped.
#![expect(unsafe_code, reason = "drives kernels over raw panels")]

use std::cell::RefCell;

use manyhands_shaders::bfp::ACTIVATION_BITS;
use manyhands_shaders::twin::matmul::term_limit;
use manyhands_shaders::twin::{ACTIVATION_FRACTION, Segment, Site};

use super::Cpu;
use super::buffer::Buffer;
use super::cache::Cache;
use super::heads::{Queries, head_blocks, segment_panels};
use super::kernel::{
    Count, Job, Kind, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK, bias, fast_limit, run,
};
use super::operands::Panels;
use super::quantize::{self, put};
use super::softmax::{fold_probabilities, probabilities};
use super::workers::Shared;
use crate::engine::Batch;

/// Panels that one index computes.
const PANELS: usize = 8;

/// The exponent of a right operand whose exponents were folded into the left one.
pub(super) static NO_EXPONENT: i32 = 0;

/// A thread's working memory.
struct Scratch {
    scores: Buffer<i32>,
    mantissas: Buffer<i16>,
    exponents: Buffer<i32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        scores: Buffer::zeros(0),
        mantissas: Buffer::zeros(0),
        exponents: Buffer::zeros(0),
    });
}

/// The columns of tile `tile` that rows at `positions` see.
pub(super) fn causal(positions: [usize; PANEL], tile: usize, blocks: usize) -> Count {
    let columns = positions.map(|p| (p + 1).saturating_sub(tile * TILE).min(TILE));
    Count { limit: [term_limit(blocks); PANEL], columns }
}

/// Queries against the cache: (N, H D) quantised to blocks.
pub(super) fn forward(cpu: &Cpu, q: &Queries, cache: &Cache, batch: &Batch) -> Panels {
    let c = &cpu.constants.attention;
    let (group, width) = (c.heads / c.kv_heads, c.heads * c.head_dim);
    let mut out = cpu.tensor_of(batch.rows(), width);
    let mut work = Vec::with_capacity(batch.segments.len() * c.kv_heads);
    let mut cost = 0;
    for (i, s) in batch.segments.iter().enumerate() {
        let panels = segment_panels(c, s.rows);
        for g in 0..c.kv_heads {
            work.extend((0..panels).step_by(PANELS).map(|p| (i, g, p..panels.min(p + PANELS))));
        }
        let products = s.rows * c.heads * (s.position + s.rows / 2 + 16);
        cost += products * (2 + c.head_dim / 32);
    }
    let shared = Shared::new(&mut out.data);
    let one = |scratch: &mut Scratch, (i, g, panels): &(usize, usize, std::ops::Range<usize>)| {
        let s = &batch.segments[*i];
        let head = Head { cpu, q, cache, s, g: *g, group, base: q.base[*i] };
        let mut events = 0;
        for panel in panels.clone() {
            events += head.panel(panel, scratch, &shared);
        }
        cpu.tally.add(Site::Matmul, events);
    };
    cpu.workers.ranges(work.len(), 1, cost, |range| {
        SCRATCH.with_borrow_mut(|scratch| {
            for item in &work[range] {
                one(scratch, item);
            }
        });
    });
    drop(work);
    quantize::rows(cpu, &out, -ACTIVATION_FRACTION, ACTIVATION_BITS)
}

/// The rows of one segment that share a key-value head.
struct Head<'a> {
    cpu: &'a Cpu,
    q: &'a Queries,
    cache: &'a Cache,
    s: &'a Segment,
    g: usize,
    group: usize,
    base: usize,
}

impl Head<'_> {
    /// One panel: returns the counted terms.
    fn panel(&self, panel: usize, scratch: &mut Scratch, out: &Shared<'_, i32>) -> u64 {
        let c = &self.cpu.constants.attention;
        let (path, blocks) = (self.cpu.path, head_blocks(c));
        let first = panel * PANEL;
        let rows = PANEL.min(self.s.rows * self.group - first);
        let positions: [usize; PANEL] =
            std::array::from_fn(|r| self.s.position + (first + r.min(rows - 1)) / self.group);
        let tiles = positions[rows - 1] / TILE + 1;
        let capacity_tiles = self.cache.capacity / TILE;
        let head = self.s.slot * c.kv_heads + self.g;
        let at = self.base + self.g * segment_panels(c, self.s.rows) + panel;
        let scores = scratch.scores.at_least(PANEL * tiles * TILE);
        let mut events = 0;
        for tile in 0..tiles {
            let count = causal(positions, tile, blocks);
            let key_tile = head * capacity_tiles + tile;
            let job = Job {
                a: self.q.mantissas[at * blocks * PANEL_BLOCK..].as_ptr(),
                a_exponents: self.q.exponents[at * blocks * PANEL_EXPONENTS..].as_ptr(),
                b: self.cache.keys[key_tile * blocks * TILE_BLOCK..].as_ptr(),
                b_exponents: self.cache.key_columns[key_tile * TILE..].as_ptr(),
                b_stride: 0,
                b_max: &raw const self.cache.key_max[key_tile],
                b_max_stride: 0,
                blocks,
                bias: bias(ACTIVATION_FRACTION),
                limit: fast_limit(path, blocks),
                count: &raw const count,
                out: scores[tile * TILE..].as_mut_ptr(),
                stride: tiles * TILE,
            };
            // SAFETY: a query panel and a key tile hold `blocks` blocks; the scores hold 6 rows.
            events += unsafe { run(path, Kind::LinesColumns, rows, &job) };
        }
        let mantissas = scratch.mantissas.at_least(tiles * PANEL_BLOCK);
        let exponents = scratch.exponents.at_least(tiles * PANEL_EXPONENTS);
        let e = &self.cache.value_exponents[head * self.cache.capacity..][..tiles * TILE];
        let width = tiles * TILE;
        probabilities(path, scores, width, width, &positions[..rows], c.score_scale);
        for (r, s) in scores.chunks_exact(width).take(rows).enumerate() {
            fold_probabilities(path, s, e, r, mantissas, exponents);
        }
        quantize::finish(exponents, rows);
        let mut y = [0; PANEL * TILE];
        for block in 0..blocks {
            let width = TILE.min(c.head_dim - block * TILE);
            let limit = positions.map(|p| term_limit(p / TILE + 1));
            let count = Count { limit, columns: [width; PANEL] };
            let value_tile = (head * blocks + block) * capacity_tiles;
            let job = Job {
                a: mantissas.as_ptr(),
                a_exponents: exponents.as_ptr(),
                b: self.cache.values[value_tile * TILE_BLOCK..].as_ptr(),
                b_exponents: &raw const NO_EXPONENT,
                b_stride: 0,
                b_max: std::ptr::null(),
                b_max_stride: 0,
                blocks: tiles,
                bias: bias(ACTIVATION_FRACTION),
                limit: fast_limit(path, tiles),
                count: &raw const count,
                out: y.as_mut_ptr(),
                stride: TILE,
            };
            // SAFETY: the panel and the values hold `tiles` blocks; `y` holds 6 rows.
            events += unsafe { run(path, Kind::Lines, rows, &job) };
            for r in 0..rows {
                let (i, h) = ((first + r) / self.group, (first + r) % self.group);
                let vector = (self.s.first_row + i) * c.heads + self.g * self.group + h;
                // SAFETY: each (row, head) is computed by one index.
                let to = unsafe { out.part(vector * c.head_dim + block * TILE, width) };
                put(to, &y.as_chunks::<TILE>().0[r]);
            }
        }
        events
    }
}
