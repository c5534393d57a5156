//! Rotation, quantisation and the key-value cache: `twin::attention::heads`.
//!
//! Queries become panels of the rows that share keys: the rows of a segment times the heads of a
//! group. Keys are packed as columns of the scores' product, values as its next contraction.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS, padded};
use manyhands_shaders::twin::attention::AttentionConstants;
use manyhands_shaders::twin::{ACTIVATION_FRACTION, Segment, Site};

use super::buffer::Buffer;
use super::kernel::{
    EXPONENT_SHIFT, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK, ZERO_EXPONENT,
};
use super::path::simd;
use super::quantize::{down, mantissas, put, whole};
use super::scalar::{Rounding, could_clamp, integers, rne64, sat};
use super::workers::Shared;
use super::{Cpu, Tensor};
use crate::engine::{Batch, copy_part};

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

/// Keys and values of one layer, `slots` sequences of `capacity` tokens (whole tiles).
pub struct Cache {
    /// Positions a slot, a multiple of 32.
    pub(super) capacity: usize,
    /// `[slot][head][key tile][D / 32][16 pairs of channels][32 keys]`.
    pub(super) keys: Buffer<i16>,
    /// `[slot][head][D / 32][key tile][16 pairs of keys][32 channels]`.
    pub(super) values: Buffer<i16>,
    /// `[slot][head][position]`, as kernels store them.
    pub(super) key_columns: Buffer<i32>,
    /// `[slot][head][key tile]` the largest.
    pub(super) key_max: Buffer<i32>,
    /// `[slot][head][position]` canonical.
    pub(super) key_exponents: Buffer<i32>,
    /// `[slot][head][position]` canonical.
    pub(super) value_exponents: Buffer<i32>,
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

/// An empty cache.
pub(super) fn cache(cpu: &Cpu, slots: usize, capacity: usize) -> Cache {
    let c = &cpu.constants.attention;
    let capacity = padded(capacity.max(1));
    let heads = slots * c.kv_heads;
    let mantissas = heads * capacity * padded(c.head_dim);
    let mut out = Cache {
        capacity,
        keys: cpu.pool.take(mantissas),
        values: cpu.pool.take(mantissas),
        key_columns: cpu.pool.take(heads * capacity),
        key_max: cpu.pool.take(heads * capacity / TILE),
        key_exponents: cpu.pool.take(heads * capacity),
        value_exponents: cpu.pool.take(heads * capacity),
    };
    // Mantissas of positions not yet written are never used: their scores are masked, their
    // probabilities are zero.
    out.key_columns.fill(ZERO_EXPONENT);
    out.key_max.fill(ZERO_EXPONENT);
    out.key_exponents.fill(0);
    out.value_exponents.fill(0);
    out
}

/// Slot `from` also becomes slot `to`: everything is kept slot after slot.
pub(super) fn copy_slot(c: &AttentionConstants, cache: &mut Cache, from: usize, to: usize) {
    let positions = c.kv_heads * cache.capacity;
    let mantissas = positions * padded(c.head_dim);
    copy_part(&mut cache.keys, mantissas, from, to);
    copy_part(&mut cache.values, mantissas, from, to);
    copy_part(&mut cache.key_columns, positions, from, to);
    copy_part(&mut cache.key_max, positions / TILE, from, to);
    copy_part(&mut cache.key_exponents, positions, from, to);
    copy_part(&mut cache.value_exponents, positions, from, to);
}

/// Pairs of channels that are rotated at once.
const TURN: usize = 16;

/// Rotates the first pairs of channels, as many as there are up to [`TURN`], by `cos` and `sin`,
/// `sign` -1 for the inverse. Sets `redo` if a clamp is possible: [`turn_counted`] is due.
#[inline(always)]
fn turn(
    [a, b]: [&[i32]; 2],
    cos: &[i32],
    sin: &[i32],
    sign: f64,
    redo: &mut bool,
) -> [[i32; TURN]; 2] {
    const BY: Rounding = Rounding::new(14);
    let (a, b, cos, sin) =
        (whole::<TURN>(a), whole::<TURN>(b), whole::<TURN>(cos), whole::<TURN>(sin));
    let (mut low, mut high, mut flags) = ([0.0; TURN], [0.0; TURN], 0);
    for i in 0..TURN {
        let (c, s) = (f64::from(cos[i]), f64::from(sin[i]) * sign);
        let (a, b) = (f64::from(a[i]), f64::from(b[i]));
        low[i] = BY.sum(a * c - b * s, &mut flags);
        high[i] = BY.sum(b * c + a * s, &mut flags);
    }
    *redo |= could_clamp(flags);
    [integers(&low), integers(&high)]
}

/// Rotates `x` (D) into `out` (D) by `cos` and `sin` (D / 2). Returns the number of clamps.
#[inline(always)]
fn rotate(x: &[i32], cos: &[i32], sin: &[i32], out: &mut [i32]) -> i64 {
    let (half, mut redo) = (cos.len(), false);
    let (a, b) = x[..2 * half].split_at(half);
    let (to_a, to_b) = out[..2 * half].split_at_mut(half);
    for i in (0..half).step_by(TURN) {
        let [low, high] = turn([&a[i..], &b[i..]], &cos[i..], &sin[i..], 1.0, &mut redo);
        put(&mut to_a[i..], &low);
        put(&mut to_b[i..], &high);
    }
    if !redo {
        return 0;
    }
    to_a.copy_from_slice(a);
    to_b.copy_from_slice(b);
    turn_counted([to_a, to_b], cos, sin, 1)
}

/// Rotates `x` (D) back, in place, by `cos` and `sin` (D / 2). Returns the number of clamps.
#[inline(always)]
pub(super) fn rotate_back(x: &mut [i32], cos: &[i32], sin: &[i32]) -> i64 {
    let (half, mut count) = (cos.len(), 0);
    let (a, b) = x[..2 * half].split_at_mut(half);
    for i in (0..half).step_by(TURN) {
        let (a, b, cos, sin) = (&mut a[i..], &mut b[i..], &cos[i..], &sin[i..]);
        let mut redo = false;
        let [low, high] = turn([a, b], cos, sin, -1.0, &mut redo);
        if redo {
            let n = TURN.min(half - i);
            count += turn_counted([&mut a[..n], &mut b[..n]], cos, sin, -1);
        } else {
            put(a, &low);
            put(b, &high);
        }
    }
    count
}

/// Rotates in place, clamped; returns the number of clamps. Apart, what the fast loops compute
/// stays in registers.
#[cold]
fn turn_counted([a, b]: [&mut [i32]; 2], cos: &[i32], sin: &[i32], sign: i32) -> i64 {
    let mut count = 0;
    for (i, (to_a, to_b)) in a.iter_mut().zip(b).enumerate() {
        let (c, s) = (i64::from(cos[i]), i64::from(sin[i] * sign));
        let (a, b) = (i64::from(*to_a), i64::from(*to_b));
        *to_a = sat(rne64(a * c - b * s, 14), &mut count);
        *to_b = sat(rne64(b * c + a * s, 14), &mut count);
    }
    count
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

/// Writes vectors to their places in a cache.
struct CacheWriter<'a> {
    capacity: usize,
    heads: usize,
    blocks: usize,
    keys: Shared<'a, i16>,
    values: Shared<'a, i16>,
    key_columns: Shared<'a, i32>,
    key_max: Shared<'a, i32>,
    key_exponents: Shared<'a, i32>,
    value_exponents: Shared<'a, i32>,
}

impl<'a> CacheWriter<'a> {
    fn new(cache: &'a mut Cache, c: &AttentionConstants) -> Self {
        Self {
            capacity: cache.capacity,
            heads: c.kv_heads,
            blocks: head_blocks(c),
            keys: Shared::new(&mut cache.keys),
            values: Shared::new(&mut cache.values),
            key_columns: Shared::new(&mut cache.key_columns),
            key_max: Shared::new(&mut cache.key_max),
            key_exponents: Shared::new(&mut cache.key_exponents),
            value_exponents: Shared::new(&mut cache.value_exponents),
        }
    }

    /// # Safety
    /// No other thread writes this tile of keys.
    unsafe fn key(&self, slot: usize, g: usize, at: usize, m: &[i16], canonical: i32, e: i32) {
        let head = slot * self.heads + g;
        let tile = head * (self.capacity / TILE) + at / TILE;
        let len = self.blocks * TILE_BLOCK;
        // SAFETY: forwarded to the caller.
        unsafe {
            let to = self.keys.part(tile * len, len);
            for (to, m) in to.chunks_exact_mut(2 * TILE).zip(m.as_chunks::<2>().0) {
                let to = &mut to[at % TILE * 2..at % TILE * 2 + 2];
                to.copy_from_slice(m);
            }
            self.key_columns.part(head * self.capacity + at, 1)[0] = e;
            self.key_exponents.part(head * self.capacity + at, 1)[0] = canonical;
        }
    }

    /// # Safety
    /// No other thread writes this tile of values.
    unsafe fn value(&self, slot: usize, g: usize, at: usize, m: &[i16], canonical: i32) {
        let head = slot * self.heads + g;
        let tiles = self.capacity / TILE;
        // SAFETY: forwarded to the caller.
        unsafe {
            for (b, m) in m.chunks_exact(BLOCK).enumerate() {
                let tile = (head * self.blocks + b) * tiles + at / TILE;
                let to = self.values.part(tile * TILE_BLOCK + at % TILE / 2 * 2 * TILE, 2 * TILE);
                for (to, m) in to.as_chunks_mut::<2>().0.iter_mut().zip(m) {
                    to[at % 2] = *m;
                }
            }
            self.value_exponents.part(head * self.capacity + at, 1)[0] = canonical;
        }
    }

    /// # Safety
    /// No other thread writes this tile.
    unsafe fn finish(&self, slot: usize, g: usize, tile: usize) {
        let head = slot * self.heads + g;
        // SAFETY: forwarded to the caller.
        unsafe {
            let e = self.key_columns.part(head * self.capacity + tile * TILE, TILE);
            let max = e.iter().copied().max().unwrap_or(ZERO_EXPONENT);
            self.key_max.part(head * (self.capacity / TILE) + tile, 1)[0] = max;
        }
    }
}
