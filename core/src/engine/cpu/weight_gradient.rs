//! Weight gradients: `twin::matmul::weight_gradient`.
//!
//! Each segment's share is an integer sum of block terms, and so is the sum of shares. As long as
//! exponents prove that no term is counted (then no segment's sum can clamp either), all blocks of
//! all segments form one long contraction, summed in i32 for as many blocks as cannot overflow,
//! then in i64. Pairs of a panel and a tile without that proof go segment by segment.
#![expect(unsafe_code, reason = "drives kernels over raw panels")]

use std::sync::Arc;

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::{GRADIENT_FRACTION, SHARE_FRACTION, Segment, Site};
use manyhands_shaders::x1::LIM;

use super::buffer::{Buffer, Pool};
use super::gemm::PANEL_BLOCK_NS;
use super::gradient::{Gradient, add_totals};
use super::kernel::{
    Count, EXPONENT_SHIFT, Job, Kind, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK,
    ZERO_EXPONENT, bias, fast_limit, run,
};
use super::operands::Panels;
use super::pack::{GROUP, Strip, ZERO_FIELD, scatter, strip, union_of_rows};
use super::path::simd;
use super::workers::Shared;
use super::{Cpu, Tensor};

/// Up to 32 consecutive rows of one segment.
#[derive(Clone, Copy)]
pub(super) struct TokenBlock {
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

/// The token blocks of a batch, and which of them make a segment.
pub(super) struct TokenBlocks {
    pub(super) blocks: Vec<TokenBlock>,
    segments: Vec<std::ops::Range<usize>>,
    /// Blocks of the longest segment.
    pub(super) longest: usize,
}

impl TokenBlocks {
    /// Blocks of 32 rows from each segment's first row.
    pub(super) fn new(segments: &[Segment]) -> Self {
        let mut out = Self { blocks: Vec::new(), segments: Vec::new(), longest: 0 };
        for s in segments {
            let first = out.blocks.len();
            for at in (0..s.rows).step_by(BLOCK) {
                let rows = BLOCK.min(s.rows - at);
                out.blocks.push(TokenBlock { first_row: s.first_row + at, rows });
            }
            out.segments.push(first..out.blocks.len());
            out.longest = out.longest.max(out.blocks.len() - first);
        }
        out
    }
}

/// An operand requantised along tokens.
pub(super) struct AlongTokens {
    pub(super) mantissas: Buffer<i16>,
    pub(super) exponents: Buffer<i32>,
    /// Largest exponent of each (panel or tile, block); unused for panels.
    pub(super) block_max: Buffer<i32>,
}

simd! {
    /// One token block of `dy` (rows, O) distributed to the panels of a chunk of blocks.
    /// `any` (O, whole groups) is scratch.
    fn pack_block(
        dy: &[i32],
        cols: usize,
        any: &mut [u32],
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) {
        let rows = dy.len() / cols;
        union_of_rows(dy, cols, any);
        for (group, any) in any.chunks_exact(GROUP).enumerate() {
            let columns = GROUP.min(cols - group * GROUP);
            let mut strips: [Strip; GROUP / TILE] = [[[0; TILE]; BLOCK / 2]; GROUP / TILE];
            let mut e = [[ZERO_EXPONENT; TILE]; GROUP / TILE];
            for (i, any) in any.as_chunks::<TILE>().0.iter().enumerate() {
                if i * TILE < columns {
                    let width = TILE.min(columns - i * TILE);
                    let x = &dy[group * GROUP + i * TILE..];
                    let (strips, e) = (&mut strips[i], &mut e[i]);
                    strip(x, cols, rows, width, any, -GRADIENT_FRACTION, WEIGHT_BITS, strips, e);
                }
            }
            let panel = group * GROUP / PANEL * CHUNK;
            scatter(
                &strips,
                &e,
                columns,
                &mut mantissas[panel * PANEL_BLOCK..],
                CHUNK * PANEL_BLOCK,
                &mut exponents[panel * PANEL_EXPONENTS..],
                CHUNK * PANEL_EXPONENTS,
            );
        }
    }
}

simd! {
    /// Requantises 32 channels of a token block of blocks: `lines` are mantissas of 32 channels,
    /// `e` their exponents as kernels store them. Returns the largest exponent.
    fn requantize(lines: &[&[i16; BLOCK]], e: &[i32], out: &mut [i16], exponents: &mut [i32]) -> i32 {
        // Rounds by an addition: the product by a power of two is exact and below 2^11.
        const MAGIC: f32 = 12_582_912.0;
        const BITS: i32 = ACTIVATION_BITS as i32;
        const MAX: i32 = (1 << (BITS - 1)) - 1;
        let mut top = [0_i32; TILE];
        for (line, &e) in lines.iter().zip(e) {
            let e = e >> EXPONENT_SHIFT;
            for c in 0..TILE {
                let field = (f32::from(line[c]).to_bits().cast_signed() & 0x7fff_ffff) >> 23;
                top[c] = top[c].max(field + e);
            }
        }
        let mut max = ZERO_EXPONENT;
        let mut base = [0_i32; TILE];
        for c in 0..TILE {
            let exponent = (top[c] - 126 - (BITS - 1)) << EXPONENT_SHIFT;
            let exponent = if top[c] < ZERO_FIELD { ZERO_EXPONENT } else { exponent };
            exponents[c] = exponent;
            base[c] = (127 << EXPONENT_SHIFT) - exponent;
            max = max.max(exponent);
        }
        let quantize = |m: i16, e: i32, c: usize| {
            let scale = f32::from_bits((base[c] + e).cast_unsigned());
            let t = (f32::from(m) * scale + MAGIC).to_bits().cast_signed();
            (t - MAGIC.to_bits().cast_signed()).clamp(-MAX, MAX)
        };
        let zeros = &[0; BLOCK];
        for (p, out) in out.as_chunks_mut::<2>().0.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            let line = |r: usize| if r < lines.len() { (lines[r], e[r]) } else { (zeros, ZERO_EXPONENT) };
            let ((x0, e0), (x1, e1)) = (line(2 * p), line(2 * p + 1));
            for c in 0..TILE {
                out[c] = [quantize(x0[c], e0, c) as i16, quantize(x1[c], e1, c) as i16];
            }
        }
        max
    }
}

/// `dy` (N, O) in `FX(20)` as 10-bit left operand: `[chunk][panel][8 blocks]`, pairs of tokens.
/// Chunks outermost: a token block is packed to places near one another.
fn pack_dy(cpu: &Cpu, dy: &Tensor, tokens: &TokenBlocks) -> AlongTokens {
    let cols = dy.cols;
    let chunks = tokens.blocks.len().div_ceil(CHUNK);
    let chunk_blocks = cols.div_ceil(PANEL) * CHUNK;
    let n = chunks * chunk_blocks;
    let mut out = take(&cpu.pool, n * PANEL_BLOCK, n * PANEL_EXPONENTS, 0);
    let (m, e) = (Shared::new(&mut out.mantissas), Shared::new(&mut out.exponents));
    cpu.workers.each(chunks, dy.data.len() / 2, |chunk| {
        let at = chunk * chunk_blocks;
        // SAFETY: each chunk is visited once.
        let (m, e) = unsafe {
            (
                m.part(at * PANEL_BLOCK, chunk_blocks * PANEL_BLOCK),
                e.part(at * PANEL_EXPONENTS, chunk_blocks * PANEL_EXPONENTS),
            )
        };
        // The exponents of the last chunk's missing blocks.
        e.fill(ZERO_EXPONENT);
        let mut any = vec![0; cols.next_multiple_of(GROUP)];
        for (b, token) in tokens.blocks.iter().skip(chunk * CHUNK).take(CHUNK).enumerate() {
            let dy = &dy.data[token.first_row * cols..(token.first_row + token.rows) * cols];
            let (m, e) = (&mut m[b * PANEL_BLOCK..], &mut e[b * PANEL_EXPONENTS..]);
            pack_block(cpu.path, dy, cols, &mut any, m, e);
        }
    });
    out
}

fn take(pool: &Arc<Pool>, mantissas: usize, exponents: usize, block_max: usize) -> AlongTokens {
    AlongTokens {
        mantissas: pool.take(mantissas),
        exponents: pool.take(exponents),
        block_max: pool.take(block_max),
    }
}

/// `x` (N, C) as 11-bit right operand: tiles of 32 channels, pairs of tokens.
pub(super) fn pack_x(cpu: &Cpu, x: &Panels, tokens: &TokenBlocks) -> AlongTokens {
    let blocks = tokens.blocks.len();
    let n = x.blocks * blocks;
    let mut out = take(&cpu.pool, n * TILE_BLOCK, n * TILE, n);
    let (m, e) = (Shared::new(&mut out.mantissas), Shared::new(&mut out.exponents));
    let max = Shared::new(&mut out.block_max);
    cpu.workers.ranges(n, 1, n * TILE_BLOCK / 2, |range| {
        for i in range {
            let (tile, token) = (i / blocks, tokens.blocks[i % blocks]);
            let mut lines = [&[0; BLOCK]; BLOCK];
            let mut exponents = [ZERO_EXPONENT; BLOCK];
            for r in 0..token.rows {
                let row = token.first_row + r;
                if let Ok(line) = x.mantissas[x.line(row, tile)..][..BLOCK].try_into() {
                    lines[r] = line;
                }
                exponents[r] = x.exponents[x.exponent(row, tile)];
            }
            // SAFETY: each (tile, block) is visited once.
            let (m, e, max) = unsafe {
                (m.part(i * TILE_BLOCK, TILE_BLOCK), e.part(i * TILE, TILE), max.part(i, 1))
            };
            let lines = &lines[..token.rows];
            max[0] = requantize(cpu.path, lines, &exponents[..token.rows], m, e);
        }
    });
    out
}

/// Blocks of a contraction that stay in L1 while panels go by.
const CHUNK: usize = 8;
/// Panels that one index computes.
const PANELS: usize = 32;

/// `grad` (O, C) `+= dy^T x`.
pub(super) fn add(
    cpu: &Cpu,
    dy: &Tensor,
    x: &AlongTokens,
    tokens: &TokenBlocks,
    cols: usize,
    grad: &mut Gradient,
) {
    let rows = dy.cols;
    let blocks = tokens.blocks.len();
    let (panels, tiles) = (rows.div_ceil(PANEL), cols.div_ceil(TILE));
    assert_eq!(grad.len(), rows * cols, "gradient of another shape");
    if blocks == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if super::amx::pays(cpu.path, dy.rows())
        && super::amx::weight_gradient(cpu, dy, x, tokens, cols, grad)
    {
        return;
    }
    let a = pack_dy(cpu, dy, tokens);
    let mut panel_max = vec![ZERO_EXPONENT; panels];
    for chunk in a.exponents.chunks_exact(panels * CHUNK * PANEL_EXPONENTS) {
        for (max, e) in panel_max.iter_mut().zip(chunk.chunks_exact(CHUNK * PANEL_EXPONENTS)) {
            *max = e.chunks_exact(PANEL_EXPONENTS).fold(*max, |max, e| max.max(e[PANEL]));
        }
    }
    let tile_max: Vec<i32> =
        x.block_max.chunks_exact(blocks).map(|e| e.iter().copied().max().unwrap_or(0)).collect();
    let shared = Shared::new(grad.wide());
    let groups = panels.div_ceil(PANELS);
    let cost = panels * tiles * blocks * PANEL_BLOCK_NS;
    cpu.workers.each(groups * tiles, cost, |i| {
        let (tile, group) = (i / groups, i % groups);
        let run = Run { cpu, a: &a, x, tokens, tile, panels, count: Count::all(0) };
        let width = TILE.min(cols - tile * TILE);
        let mut totals = cpu.pool.take::<i32>(PANELS * PANEL * TILE);
        let members = group * PANELS..panels.min((group + 1) * PANELS);
        let (safe, unsafe_): (Vec<usize>, Vec<usize>) =
            members.partition(|&p| run.is_safe(panel_max[p], tile_max[tile]));
        let spill = |panel: usize, from: &[i32]| {
            for r in 0..PANEL.min(rows - panel * PANEL) {
                let at = (panel * PANEL + r) * cols + tile * TILE;
                // SAFETY: each (panel, tile) belongs to one index.
                let grad = unsafe { shared.part(at, width) };
                add_totals(cpu.path, grad, &from[r * TILE..(r + 1) * TILE]);
            }
        };
        run.merged(&safe, &panel_max, tile_max[tile], &mut totals, &spill);
        let mut events = 0;
        for panel in unsafe_ {
            events += run.by_segment(panel, &spill);
        }
        cpu.tally.add(Site::Matmul, events);
    });
}

/// A bound on terms of operands with this sum of largest exponents.
pub(super) fn largest_term(exponents: i32) -> i64 {
    // Terms are at most 2^24 2^-s, rounded.
    let s = 127 - ((exponents + bias(SHARE_FRACTION)) >> EXPONENT_SHIFT);
    if s >= 24 { 2 } else { (1 << (24 - s)) + 1 }
}

/// How many terms of that bound always have a sum within [`LIM`], at least 1.
pub(super) fn terms_that_fit(bound: i64) -> usize {
    usize::try_from(i64::from(LIM) / bound).unwrap_or(0).max(1)
}

/// The products of one tile.
struct Run<'a> {
    cpu: &'a Cpu,
    a: &'a AlongTokens,
    x: &'a AlongTokens,
    tokens: &'a TokenBlocks,
    tile: usize,
    panels: usize,
    count: Count,
}

impl Run<'_> {
    /// Whether no term of a panel can be counted in any segment.
    fn is_safe(&self, a: i32, x: i32) -> bool {
        a + x + bias(SHARE_FRACTION) <= fast_limit(self.cpu.path, self.tokens.longest)
    }

    /// Where a panel's block is in the left operand.
    fn block(&self, panel: usize, block: usize) -> usize {
        (block / CHUNK * self.panels + panel) * CHUNK + block % CHUNK
    }

    /// Blocks `from..from + blocks`, which lie in one chunk.
    fn job(&self, panel: usize, from: usize, blocks: usize, out: &mut [i32]) -> Job {
        let all = self.tokens.blocks.len();
        let (a, x) = (self.block(panel, from), self.tile * all + from);
        assert!(out.len() >= PANEL * TILE && from + blocks <= all);
        Job {
            a: self.a.mantissas[a * PANEL_BLOCK..].as_ptr(),
            a_exponents: self.a.exponents[a * PANEL_EXPONENTS..].as_ptr(),
            b: self.x.mantissas[x * TILE_BLOCK..].as_ptr(),
            b_exponents: self.x.exponents[x * TILE..].as_ptr(),
            b_stride: TILE,
            b_max: self.x.block_max[x..].as_ptr(),
            b_max_stride: 1,
            blocks,
            bias: bias(SHARE_FRACTION),
            limit: fast_limit(self.cpu.path, blocks),
            count: &raw const self.count,
            out: out.as_mut_ptr(),
            stride: TILE,
        }
    }

    /// All blocks as one contraction.
    fn merged(
        &self,
        panels: &[usize],
        panel_max: &[i32],
        tile_max: i32,
        totals: &mut [i32],
        spill: &impl Fn(usize, &[i32]),
    ) {
        let Some(max) = panels.iter().map(|&p| panel_max[p]).max() else { return };
        let all = self.tokens.blocks.len();
        let room = terms_that_fit(largest_term(max + tile_max));
        let chunk = if room >= CHUNK { CHUNK } else { 1 };
        totals.fill(0);
        let mut held = 0;
        for from in (0..all).step_by(chunk) {
            let n = chunk.min(all - from);
            if held + n > room {
                for (&panel, t) in panels.iter().zip(totals.chunks_exact_mut(PANEL * TILE)) {
                    spill(panel, t);
                    t.fill(0);
                }
                held = 0;
            }
            held += n;
            for (&panel, t) in panels.iter().zip(totals.chunks_exact_mut(PANEL * TILE)) {
                let job = self.job(panel, from, n, t);
                // SAFETY: the job covers `n` blocks of operands and a whole total.
                unsafe { run(self.cpu.path, Kind::PairsColumnsAdd, PANEL, &job) };
            }
        }
        for (&panel, t) in panels.iter().zip(totals.chunks_exact(PANEL * TILE)) {
            spill(panel, t);
        }
    }

    /// Segment by segment, with the general flush where it is needed.
    fn by_segment(&self, panel: usize, spill: &impl Fn(usize, &[i32])) -> u64 {
        let mut events = 0;
        let mut out = [0; PANEL * TILE];
        let (mut m, mut e) = (Vec::new(), Vec::new());
        for segment in self.tokens.segments.iter().filter(|s| !s.is_empty()) {
            m.clear();
            e.clear();
            for block in segment.clone() {
                let at = self.block(panel, block);
                m.extend_from_slice(&self.a.mantissas[at * PANEL_BLOCK..][..PANEL_BLOCK]);
                let at = at * PANEL_EXPONENTS;
                e.extend_from_slice(&self.a.exponents[at..at + PANEL_EXPONENTS]);
            }
            let count = Count::all(segment.len());
            let mut job = self.job(panel, segment.start, segment.len(), &mut out);
            (job.a, job.a_exponents, job.count) = (m.as_ptr(), e.as_ptr(), &raw const count);
            // SAFETY: the job covers the segment's blocks of operands, and all of `out`.
            events += unsafe { run(self.cpu.path, Kind::PairsColumns, PANEL, &job) };
            spill(panel, &out);
        }
        events
    }
}
