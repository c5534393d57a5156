//! Rotation and quantisation of queries, keys and values: `twin::attention::heads`.
//!
//! Queries become panels of the rows that share keys: the rows of a segment times the heads of a
//! group. Keys and values go to the cache.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::attention::AttentionConstants;
use manyhands_shaders::twin::{ACTIVATION_FRACTION, Segment, Site};

use super::buffer::Buffer;
use super::cache::{Cache, CacheWriter};
use super::kernel::{EXPONENT_SHIFT, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, ZERO_EXPONENT};
use super::path::simd;
use super::quantize::{down, mantissas, whole};
use super::rotation::rotate;
use super::workers::Shared;
use super::{Cpu, Tensor};
use crate::engine::Batch;

/// Largest head size.
pub(super) const HEAD_MAX: usize = 256;

/// Rotated queries (N, H, D).
pub struct Queries {
    /// First panel of each segment.
    pub(super) base: Vec<usize>,
    /// `[panel][D / 32][6][32]`; a segment has panels of each key-value head in turn, rows of a
    /// panel are (row, head of the group).
    pub(super) mantissas: Buffer<i16>,
    /// `[panel][D / 32][8]`.
    pub(super) exponents: Buffer<i32>,
    /// (N, H) canonical exponents.
    pub(super) canonical: Buffer<i32>,
}

/// Rows of a segment whose positions lie in one tile of keys.
struct Piece {
    segment: usize,
    first: usize,
    rows: usize,
}

/// D / 32, rounded up.
pub(super) const fn head_blocks(c: &AttentionConstants) -> usize {
    c.head_dim.div_ceil(BLOCK)
}

/// Panels of a segment and key-value head.
pub(super) const fn segment_panels(c: &AttentionConstants, rows: usize) -> usize {
    (rows * (c.heads / c.kv_heads)).div_ceil(PANEL)
}

/// Quantises a head's vector (D) with one exponent into `m` (padded D). Returns the canonical
/// exponent and the exponent as kernels store it.
#[inline(always)]
fn quantize(x: &[i32], bits: u32, m: &mut [i16]) -> (i32, i32) {
    let mut any = 0;
    for x in x.chunks(BLOCK) {
        for v in whole::<BLOCK>(x) {
            any |= v.unsigned_abs();
        }
    }
    let s = down(any, bits);
    for (x, m) in x.chunks(BLOCK).zip(m.as_chunks_mut().0) {
        mantissas(&whole(x), any, s, bits, m);
    }
    let e = s - ACTIVATION_FRACTION;
    if any == 0 { (0, ZERO_EXPONENT) } else { (e, e << EXPONENT_SHIFT) }
}

simd! {
    /// Rotates (unless `cos` is empty) and quantises one vector: its two exponents, the clamps.
    /// `rotated` (at least D) is scratch.
    fn vector(
        x: &[i32],
        cos: &[i32],
        sin: &[i32],
        bits: u32,
        rotated: &mut [i32],
        m: &mut [i16],
    ) -> (i32, i32, u64) {
        let mut count = 0;
        let x = if cos.is_empty() {
            x
        } else {
            let rotated = &mut rotated[..x.len()];
            count = rotate(x, cos, sin, rotated);
            &*rotated
        };
        let (canonical, stored) = quantize(x, bits, m);
        (canonical, stored, count.cast_unsigned())
    }
}

/// Rotates and quantises queries (N, H D), keys and values (N, K D); fills the cache.
pub(super) fn forward(
    cpu: &Cpu,
    [q, k, v]: &[Tensor; 3],
    batch: &Batch,
    cache: &mut Cache,
) -> Queries {
    let c = &cpu.constants.attention;
    let (d, blocks, group) = (c.head_dim, head_blocks(c), c.heads / c.kv_heads);
    assert!(d <= HEAD_MAX, "head size above {HEAD_MAX}");
    let rope = &cpu.constants.rope;
    let mut base = Vec::with_capacity(batch.segments.len());
    let mut pieces = Vec::with_capacity(batch.segments.len());
    let mut panels = 0;
    for (segment, s) in batch.segments.iter().enumerate() {
        base.push(panels);
        panels += c.kv_heads * segment_panels(c, s.rows);
        assert!(s.position + s.rows <= cache.capacity, "a sequence is longer than its cache");
        let mut first = 0;
        while first < s.rows {
            let rows = (TILE - (s.position + first) % TILE).min(s.rows - first);
            pieces.push(Piece { segment, first, rows });
            first += rows;
        }
    }
    let mut queries = Queries {
        base,
        mantissas: cpu.pool.take(panels * blocks * PANEL_BLOCK),
        exponents: cpu.pool.take(panels * blocks * PANEL_EXPONENTS),
        canonical: cpu.pool.take(batch.rows() * c.heads),
    };
    let base = &queries.base;
    let qm = Shared::new(&mut queries.mantissas);
    let qe = Shared::new(&mut queries.exponents);
    let qc = Shared::new(&mut queries.canonical);
    let writer = CacheWriter::new(cache, c);
    let cost = batch.rows() * (c.heads + 2 * c.kv_heads) * (d + 30);
    cpu.workers.ranges(pieces.len(), 1, cost, |range| {
        let mut count = 0;
        let mut m = [0_i16; HEAD_MAX];
        let m = &mut m[..blocks * BLOCK];
        let scratch = &mut [0; HEAD_MAX][..];
        for piece in &pieces[range] {
            let s: &Segment = &batch.segments[piece.segment];
            for i in piece.first..piece.first + piece.rows {
                let (row, position) = (s.first_row + i, s.position + i);
                let at = position * rope.half;
                let (cos, sin) = (&rope.cos[at..at + rope.half], &rope.sin[at..at + rope.half]);
                for h in 0..c.heads {
                    let x = &q.data[(row * c.heads + h) * d..][..d];
                    let (canonical, e, n) =
                        vector(cpu.path, x, cos, sin, ACTIVATION_BITS, scratch, m);
                    count += n;
                    let r = i * group + h % group;
                    let panel =
                        base[piece.segment] + h / group * segment_panels(c, s.rows) + r / PANEL;
                    // SAFETY: each (row, head) has lines and exponents of its own.
                    unsafe { qc.part(row * c.heads + h, 1)[0] = canonical };
                    for (b, m) in m.chunks_exact(BLOCK).enumerate() {
                        let at = panel * blocks + b;
                        let line = at * PANEL_BLOCK + r % PANEL * BLOCK;
                        // SAFETY: as above.
                        unsafe {
                            qm.part(line, BLOCK).copy_from_slice(m);
                            qe.part(at * PANEL_EXPONENTS + r % PANEL, 1)[0] = e;
                        }
                    }
                }
                for g in 0..c.kv_heads {
                    let from = (row * c.kv_heads + g) * d;
                    let x = &k.data[from..from + d];
                    let (canonical, e, n) = vector(cpu.path, x, cos, sin, WEIGHT_BITS, scratch, m);
                    count += n;
                    // SAFETY: a piece owns its tile of keys and values in its slot.
                    unsafe { writer.key(s.slot, g, position, m, canonical, e) };
                    let x = &v.data[from..from + d];
                    let (canonical, _, _) = vector(cpu.path, x, &[], &[], WEIGHT_BITS, scratch, m);
                    // SAFETY: as above.
                    unsafe { writer.value(s.slot, g, position, m, canonical) };
                }
            }
            for g in 0..c.kv_heads {
                // SAFETY: as above.
                unsafe { writer.finish(s.slot, g, (s.position + piece.first) / TILE) };
            }
        }
        cpu.tally.add(Site::Rope, count);
    });
    finish_panels(c, batch, base, &mut queries.exponents);
    queries
}

/// The largest exponents of the query panels.
fn finish_panels(c: &AttentionConstants, batch: &Batch, base: &[usize], exponents: &mut [i32]) {
    let (blocks, group) = (head_blocks(c), c.heads / c.kv_heads);
    for (s, &base) in batch.segments.iter().zip(base) {
        let panels = segment_panels(c, s.rows);
        for p in 0..c.kv_heads * panels {
            let rows = (s.rows * group - p % panels * PANEL).min(PANEL);
            let at = (base + p) * blocks * PANEL_EXPONENTS;
            super::quantize::finish(&mut exponents[at..at + blocks * PANEL_EXPONENTS], rows);
        }
    }
}
