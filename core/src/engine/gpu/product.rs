//! Matrix products: which kernel, how it is cut into dispatches, and the weight gradient.

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::matmul::term_limit;
use manyhands_shaders::twin::{GRADIENT_FRACTION, SHARE_FRACTION};
use manyhands_shaders::wgsl::{BLOCKED_COLS, BLOCKED_ROWS, Id, TILE};

use super::batch::BatchTables;
use super::memory::Buf;
use super::{Blocks, Gpu, Gradient, Tensor};

/// A kernel for matrix products. All give the same bits; which is fastest depends on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum MatmulVariant {
    /// 8 x 2 outputs an invocation, integer products, no barriers: best on software adapters.
    #[default]
    BlockedI32,
    /// The same with f32 products.
    BlockedF32,
    /// 64 x 64 tiles in workgroup memory, integer products.
    TiledI32,
    /// The same with f32 products: for hardware that multiplies floats at a higher rate.
    TiledF32,
}

impl MatmulVariant {
    /// Every variant.
    pub const ALL: [Self; 4] = [Self::BlockedI32, Self::BlockedF32, Self::TiledI32, Self::TiledF32];

    const fn is_f32(self) -> bool {
        matches!(self, Self::BlockedF32 | Self::TiledF32)
    }

    const fn is_tiled(self) -> bool {
        matches!(self, Self::TiledI32 | Self::TiledF32)
    }
}

/// Up to this many rows a product is a set of dot products: its 8 x 2 blocks would be mostly empty.
const FEW_ROWS: usize = 2;

/// The right operand of a product: (N, K) with an exponent a block of a row, or of a tile.
pub(super) struct Right<'a> {
    pub(super) words: &'a Buf,
    pub(super) exponents: &'a Buf,
    /// N.
    pub(super) cols: usize,
    /// log2 of the rows that share an exponent.
    pub(super) tile: u32,
}

impl Gpu {
    /// `out (M, N) = a (M, K) b^T` in `FX(fraction)`, or `sat(out + ...)`.
    pub(super) fn product(
        &self,
        a: &Blocks,
        b: &Right<'_>,
        fraction: i32,
        out: &Tensor,
        accumulate: bool,
    ) {
        let variant = self.matmul_variant();
        let blocks = a.cols.div_ceil(BLOCK);
        let lanes = self.recorder.lanes;
        let (id, group_rows, group_cols) = if a.rows <= FEW_ROWS {
            (Id::MatmulProductRow, 1, lanes / self.recorder.split)
        } else if variant.is_tiled() {
            (Id::TiledProduct, TILE, TILE)
        } else {
            (Id::MatmulProduct, BLOCKED_ROWS, BLOCKED_COLS * lanes)
        };
        let f32_products = variant.is_f32() && id != Id::MatmulProductRow;
        let uniform = |first_row: usize| {
            [
                first_row as u32,
                a.rows as u32,
                b.cols as u32,
                blocks as u32,
                fraction.cast_unsigned(),
                b.tile,
                u32::from(accumulate),
                term_limit(blocks).cast_unsigned(),
            ]
        };
        let buffers = [&a.words, &a.exponents, b.words, b.exponents, &out.data];
        let row_work = b.cols * blocks * BLOCK;
        self.by_rows(
            id,
            a.rows,
            group_rows,
            group_cols,
            b.cols,
            row_work,
            |first, groups, work| {
                self.recorder.run_variant(
                    id,
                    f32_products,
                    &uniform(first),
                    &buffers,
                    groups,
                    work,
                );
            },
        );
    }

    /// `grad (O, C) += dy^T x`, both requantised along tokens.
    pub(super) fn weight_gradient(
        &self,
        dy: &Tensor,
        x: &Blocks,
        tables: &BatchTables,
        grad: &Gradient,
    ) {
        let blocks = tables.block_count;
        let (rows, cols) = (dy.cols, x.cols);
        let (g_words, g_exponents) = self.quantize_tokens(dy, tables);
        let x_words = self.recorder.alloc(cols * blocks * BLOCK / 2);
        let x_exponents = self.recorder.alloc(cols * blocks);
        let col_blocks = x.cols.div_ceil(BLOCK) as u32;
        let shape = [x.rows as u32, cols as u32, ACTIVATION_BITS, 0, col_blocks, blocks as u32];
        self.recorder.run(
            Id::QuantizeTokensBlocks,
            &shape,
            &[&x.words, &x.exponents, &tables.token_blocks, &x_words, &x_exponents],
            self.recorder.lanes_grid(cols * blocks),
            cols * blocks * BLOCK * 4,
        );

        let variant = self.matmul_variant();
        let (id, group_rows, group_cols) = if variant.is_tiled() {
            (Id::TiledWeightGradient, TILE, TILE)
        } else {
            (Id::MatmulWeightGradient, BLOCKED_ROWS, BLOCKED_COLS * self.recorder.lanes)
        };
        let fraction = SHARE_FRACTION.cast_unsigned();
        let uniform = |first_row: usize| {
            [first_row as u32, rows as u32, cols as u32, blocks as u32, fraction, 0, 0, 0]
        };
        let buffers = [
            &g_words,
            &g_exponents,
            &x_words,
            &x_exponents,
            &grad.low,
            &grad.high,
            &tables.segments,
        ];
        self.by_rows(
            id,
            rows,
            group_rows,
            group_cols,
            cols,
            cols * blocks * BLOCK,
            |first, groups, work| {
                self.recorder.run_variant(
                    id,
                    variant.is_f32(),
                    &uniform(first),
                    &buffers,
                    groups,
                    work,
                );
            },
        );
    }

    /// A gradient (N, C) in 10 bits along the tokens of each segment: (C, B) blocks.
    pub(super) fn quantize_tokens(&self, dy: &Tensor, tables: &BatchTables) -> (Buf, Buf) {
        let count = dy.cols * tables.block_count;
        let words = self.recorder.alloc(count * BLOCK / 2);
        let exponents = self.recorder.alloc(count);
        let fraction = GRADIENT_FRACTION.cast_unsigned();
        let blocks = tables.block_count as u32;
        self.recorder.run(
            Id::QuantizeTokens,
            &[dy.rows as u32, dy.cols as u32, WEIGHT_BITS, fraction, 0, blocks],
            &[&dy.data, &tables.token_blocks, &words, &exponents],
            self.recorder.lanes_grid(count),
            count * BLOCK * 4,
        );
        (words, exponents)
    }

    /// Cuts a product into dispatches that fit its kernel's budget, each of whole row groups.
    /// `run` gets the first row, the grid and the work.
    fn by_rows(
        &self,
        id: Id,
        rows: usize,
        group_rows: u32,
        group_cols: u32,
        cols: usize,
        row_work: usize,
        mut run: impl FnMut(usize, [u32; 3], usize),
    ) {
        let group_rows = group_rows as usize;
        let columns = super::recorder::Recorder::grid(cols.div_ceil(group_cols as usize));
        let mut first = 0;
        while first < rows {
            let groups = (self.recorder.budget(id) / (row_work * group_rows).max(1)).max(1);
            let groups = groups.min((rows - first).div_ceil(group_rows)).min(65_535);
            run(first, [columns[0], columns[1], groups as u32], groups * group_rows * row_work);
            first += groups * group_rows;
        }
    }
}
