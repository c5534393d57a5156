//! Operands of products in the layouts of [`super::kernel`].

use std::sync::Arc;

use manyhands_shaders::bfp::{BLOCK, Tiles, padded};

use super::buffer::{Buffer, Pool};
use super::kernel::{
    EXPONENT_SHIFT, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK, ZERO_EXPONENT,
};

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
    pub(super) fn new(pool: &Arc<Pool>, t: &Tiles) -> Self {
        let (row_tiles, col_tiles) = (t.rows.div_ceil(BLOCK), t.cols.div_ceil(BLOCK));
        let packed = |tiles: usize, blocks: usize| Packed {
            tiles,
            blocks,
            mantissas: pool.take(tiles * blocks * TILE_BLOCK),
            exponents: pool.take(tiles * blocks),
        };
        let (mut forward, mut backward) =
            (packed(row_tiles, col_tiles), packed(col_tiles, row_tiles));
        let stride = padded(t.cols);
        for r in 0..row_tiles {
            for c in 0..col_tiles {
                let (f, b) = (r * col_tiles + c, c * row_tiles + r);
                let from = &t.mantissas[r * BLOCK * stride + c * BLOCK..];
                let to = &mut forward.mantissas[f * TILE_BLOCK..][..TILE_BLOCK];
                let back = &mut backward.mantissas[b * TILE_BLOCK..][..TILE_BLOCK];
                let mut any = 0;
                for i in 0..BLOCK {
                    for j in 0..BLOCK {
                        let m = from[i * stride + j];
                        any |= m;
                        to[(j / 2 * TILE + i) * 2 + j % 2] = m;
                        back[(i / 2 * TILE + j) * 2 + i % 2] = m;
                    }
                }
                let e = i32::from(t.exponents[f]);
                let e = if any == 0 { ZERO_EXPONENT } else { e << EXPONENT_SHIFT };
                forward.exponents[f] = e;
                backward.exponents[b] = e;
            }
        }
        Self { rows: t.rows, cols: t.cols, forward, backward }
    }
}
