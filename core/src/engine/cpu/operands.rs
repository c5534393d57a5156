//! Operands of products in the layouts of [`super::kernel`].
#![expect(unsafe_code, reason = "tiles are packed by several threads")]

use std::sync::{Arc, OnceLock};

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

/// A weight matrix (O, C), packed for the forward direction, and for the other one once somebody
/// asks: who samples never does.
pub struct Weight {
    /// O.
    pub(super) rows: usize,
    /// C.
    pub(super) cols: usize,
    /// Contraction along C; also read as the embedding.
    pub(super) forward: Packed,
    backward: OnceLock<Packed>,
}

/// A tile as `[16 pairs of the contraction][32]`.
type TilePairs = [[i16; 2]; TILE_BLOCK / 2];

impl Weight {
    /// Packs tiles.
    pub(super) fn new(cpu: &Cpu, t: &Tiles) -> Self {
        let (row_tiles, col_tiles) = (t.rows.div_ceil(BLOCK), t.cols.div_ceil(BLOCK));
        let stride = padded(t.cols);
        let forward = Packed::fill(cpu, row_tiles, col_tiles, |r, tiles, exponents| {
            let mut any = vec![0; stride];
            let strip = &t.mantissas[r * BLOCK * stride..][..BLOCK * stride];
            pack_strip(cpu.path, strip, tiles, &mut any);
            let from = &t.exponents[r * col_tiles..][..col_tiles];
            for ((to, e), any) in exponents.iter_mut().zip(from).zip(any.chunks_exact(BLOCK)) {
                let is_zero = any.iter().all(|x| *x == 0);
                *to = if is_zero { ZERO_EXPONENT } else { i32::from(*e) << EXPONENT_SHIFT };
            }
        });
        Self { rows: t.rows, cols: t.cols, forward, backward: OnceLock::new() }
    }

    /// Contraction along O.
    pub(super) fn backward(&self, cpu: &Cpu) -> &Packed {
        self.backward.get_or_init(|| {
            let f = &self.forward;
            Packed::fill(cpu, f.blocks, f.tiles, |c, tiles, exponents| {
                for (r, (to, e)) in tiles.iter_mut().zip(exponents).enumerate() {
                    let at = r * f.blocks + c;
                    let from = f.mantissas[at * TILE_BLOCK..].as_chunks().0.first_chunk();
                    if let Some(from) = from {
                        transpose_tile(cpu.path, from, to);
                    }
                    *e = f.exponents[at];
                }
            })
        })
    }
}

impl Packed {
    /// Packs tiles on all threads: `pack` writes the blocks of one tile of columns, and their
    /// exponents as kernels store them.
    fn fill(
        cpu: &Cpu,
        tiles: usize,
        blocks: usize,
        pack: impl Fn(usize, &mut [TilePairs], &mut [i32]) + Sync,
    ) -> Self {
        let mut out = Self {
            tiles,
            blocks,
            mantissas: cpu.pool.take(tiles * blocks * TILE_BLOCK),
            exponents: cpu.pool.take(tiles * blocks),
        };
        let (m, e) = (Shared::new(&mut out.mantissas), Shared::new(&mut out.exponents));
        cpu.workers.ranges(tiles, 1, tiles * blocks * TILE_BLOCK / 2, |range| {
            for i in range {
                let len = blocks * TILE_BLOCK;
                // SAFETY: each tile is visited once.
                let (m, e) = unsafe { (m.part(i * len, len), e.part(i * blocks, blocks)) };
                pack(i, m.as_chunks_mut().0.as_chunks_mut().0, e);
            }
        });
        out
    }
}

simd! {
    /// Packs a row of tiles along their columns. `strip` are its 32 rows; `any` becomes the union
    /// of the bits in each of their columns.
    fn pack_strip(strip: &[i16], tiles: &mut [TilePairs], any: &mut [i16]) {
        // One pass in the order of memory brings the rows near.
        any.fill(0);
        for row in strip.chunks_exact(any.len()) {
            for (any, x) in any.iter_mut().zip(row) {
                *any |= x;
            }
        }
        for (t, to) in tiles.iter_mut().enumerate() {
            for (i, row) in strip.chunks_exact(any.len()).enumerate() {
                for (j, pair) in row[t * BLOCK..][..BLOCK].as_chunks::<2>().0.iter().enumerate() {
                    to[j * TILE + i] = *pair;
                }
            }
        }
    }
}

simd! {
    /// A packed tile, packed along its rows instead.
    fn transpose_tile(from: &TilePairs, to: &mut TilePairs) {
        for p in 0..BLOCK / 2 {
            for j in 0..BLOCK {
                let pair = &from[j / 2 * TILE + 2 * p..][..2];
                to[p * TILE + j] = [pair[0][j % 2], pair[1][j % 2]];
            }
        }
    }
}
