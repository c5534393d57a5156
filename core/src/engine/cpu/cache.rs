//! The key-value cache, in the layouts of the products that read it: keys are packed as columns of
//! the scores' product, values as its next contraction.
#![expect(unsafe_code, reason = "tiles are written by several threads")]

use manyhands_shaders::bfp::{BLOCK, padded};
use manyhands_shaders::twin::attention::AttentionConstants;

use super::Cpu;
use super::buffer::Buffer;
use super::heads::head_blocks;
use super::kernel::{TILE, TILE_BLOCK, ZERO_EXPONENT};
use super::workers::Shared;
use crate::engine::copy_part;

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

/// An empty cache.
pub(super) fn empty(cpu: &Cpu, slots: usize, capacity: usize) -> Cache {
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

/// Writes vectors to their places in a cache.
pub(super) struct CacheWriter<'a> {
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
    pub(super) fn new(cache: &'a mut Cache, c: &AttentionConstants) -> Self {
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
    pub(super) unsafe fn key(
        &self,
        slot: usize,
        g: usize,
        at: usize,
        m: &[i16],
        canonical: i32,
        e: i32,
    ) {
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
    pub(super) unsafe fn value(&self, slot: usize, g: usize, at: usize, m: &[i16], canonical: i32) {
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
    pub(super) unsafe fn finish(&self, slot: usize, g: usize, tile: usize) {
        let head = slot * self.heads + g;
        // SAFETY: forwarded to the caller.
        unsafe {
            let e = self.key_columns.part(head * self.capacity + tile * TILE, TILE);
            let max = e.iter().copied().max().unwrap_or(ZERO_EXPONENT);
            self.key_max.part(head * (self.capacity / TILE) + tile, 1)[0] = max;
        }
    }
}
