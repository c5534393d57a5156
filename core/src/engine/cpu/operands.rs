//! Operands of products in the layouts of [`super::kernel`].
#![expect(unsafe_code, reason = "tiles are packed by several threads")]

use std::sync::Arc;

use manyhands_shaders::bfp::{BLOCK, Tiles, padded};

use super::Cpu;
use super::buffer::{Buffer, Pool};
use super::kernel::{
    EXPONENT_SHIFT, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK, ZERO_EXPONENT,
};
use super::path::simd;
use super::workers::Shared;

/// A left operand (R, K): panels of 6 rows, each `[block][6][32]`.
pub struct Panels {
    pub(super) rows: usize,
    /// K / 32, rounded up.
    pub(super) blocks: usize,
    /// `[panel][block][6 rows][32]`.
    pub(super) mantissas: Buffer<i16>,
    /// `[panel][block][8]`: a row each, then the largest of the rows that exist.
    pub(super) exponents: Buffer<i32>,
}

impl Panels {
    /// Room for (R, `cols`), of any content.
    pub(super) fn take(pool: &Arc<Pool>, rows: usize, cols: usize) -> Self {
        let (panels, blocks) = (rows.div_ceil(PANEL), cols.div_ceil(BLOCK));
        Self {
            rows,
            blocks,
            mantissas: pool.take(panels * blocks * PANEL_BLOCK),
            exponents: pool.take(panels * blocks * PANEL_EXPONENTS),
        }
    }

    /// Mantissas of a panel.
    pub(super) const fn panel_len(&self) -> usize {
        self.blocks * PANEL_BLOCK
    }

    /// Exponents of a panel.
    pub(super) const fn panel_exponents(&self) -> usize {
        self.blocks * PANEL_EXPONENTS
    }

    /// Index of the line of mantissas of (row, block).
    pub(super) const fn line(&self, row: usize, block: usize) -> usize {
        ((row / PANEL * self.blocks + block) * PANEL + row % PANEL) * BLOCK
    }

    /// Index of the exponent of (row, block).
    pub(super) const fn exponent(&self, row: usize, block: usize) -> usize {
        (row / PANEL * self.blocks + block) * PANEL_EXPONENTS + row % PANEL
    }
}

/// A right operand (K, N) with one exponent a 32x32 tile.
pub(super) struct Packed {
    /// N / 32, rounded up.
    pub(super) tiles: usize,
    /// K / 32.
    pub(super) blocks: usize,
    /// `[tile][block][16 pairs][32 columns][2]`.
    pub(super) mantissas: Buffer<i16>,
    /// `[tile][block]`.
    pub(super) exponents: Buffer<i32>,
}

/// A weight matrix (O, C), packed for both directions.
pub struct Weight {
    /// O.
    pub(super) rows: usize,
    /// C.
    pub(super) cols: usize,
    /// Contraction along C.
    pub(super) forward: Packed,
    /// Contraction along O; also read as the embedding.
    pub(super) backward: Packed,
}

impl Weight {
    /// Packs tiles.
    pub(super) fn new(cpu: &Cpu, t: &Tiles) -> Self {
        let (row_tiles, col_tiles) = (t.rows.div_ceil(BLOCK), t.cols.div_ceil(BLOCK));
        let packed = |tiles: usize, blocks: usize| Packed {
            tiles,
            blocks,
            mantissas: cpu.pool.take(tiles * blocks * TILE_BLOCK),
            exponents: cpu.pool.take(tiles * blocks),
        };
        let (mut forward, mut backward) =
            (packed(row_tiles, col_tiles), packed(col_tiles, row_tiles));
        let (f, fe) = (Shared::new(&mut forward.mantissas), Shared::new(&mut forward.exponents));
        let (b, be) = (Shared::new(&mut backward.mantissas), Shared::new(&mut backward.exponents));
        let stride = padded(t.cols);
        let tiles = row_tiles * col_tiles;
        cpu.workers.ranges(tiles, 1, tiles * BLOCK * BLOCK / 2, |range| {
            for i in range {
                let (r, c) = (i / col_tiles, i % col_tiles);
                let (at, back_at) = (i, c * row_tiles + r);
                // SAFETY: each tile is visited once.
                let (to, e, back, back_e) = unsafe {
                    (
                        f.part(at * TILE_BLOCK, TILE_BLOCK),
                        fe.part(at, 1),
                        b.part(back_at * TILE_BLOCK, TILE_BLOCK),
                        be.part(back_at, 1),
                    )
                };
                let from = &t.mantissas[r * BLOCK * stride + c * BLOCK..];
                let is_zero = pack_tile(cpu.path, from, stride, to, back);
                let exponent = i32::from(t.exponents[i]) << EXPONENT_SHIFT;
                e[0] = if is_zero { ZERO_EXPONENT } else { exponent };
                back_e[0] = e[0];
            }
        });
        Self { rows: t.rows, cols: t.cols, forward, backward }
    }
}

simd! {
    /// Packs a tile, whose rows are `stride` apart, for both directions; whether it is zero.
    fn pack_tile(from: &[i16], stride: usize, forward: &mut [i16], backward: &mut [i16]) -> bool {
        let (forward, backward) = (forward.as_chunks_mut::<2>().0, backward.as_chunks_mut::<2>().0);
        let mut any = 0;
        for (p, back) in backward.chunks_exact_mut(TILE).enumerate() {
            let [low, high] = [2 * p, 2 * p + 1].map(|i| &from[i * stride..][..BLOCK]);
            for j in 0..BLOCK {
                back[j] = [low[j], high[j]];
                any |= low[j] | high[j];
            }
        }
        for (i, row) in from.chunks(stride).take(BLOCK).enumerate() {
            for (j, pair) in row[..BLOCK].as_chunks::<2>().0.iter().enumerate() {
                forward[j * TILE + i] = *pair;
            }
        }
        any == 0
    }
}
