//! The exact product of one panel with one column tile, for every path.
//!
//! Operands, in cache lines of 32 mantissas, blocks of 32 along the contraction:
//! - A, a panel of up to 6 rows: [`Job::a`] is `[block][6 rows][32]` ("lines") or
//!   `[block][16 pairs][6 rows][2]` ("pairs"); exponents `[block][8]`: one a row, then the largest.
//! - B, a tile of 32 columns: `[block][16 pairs][32 columns][2]`; exponents one a block, or 32 a
//!   block and their largest.
//!
//! Exponents are stored times 2^23, so that adding them gives the bits of an f32 power of two.
//! A block's sum of products `d` is below 2^24: exact in i32 and in f32. Its term is `d * 2^-s`
//! rounded to nearest even, which the conversion instruction does in one rounding. While the
//! exponents prove every term below the limit that is counted, nothing can clamp and this is all
//! there is; other blocks take a general flush that clamps and counts.
#![expect(unsafe_code, reason = "SIMD kernels over raw panels")]

#[cfg(target_arch = "x86_64")]
#[macro_use] // before `amx`, which uses it
mod amx_block;
#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
mod lanes;

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod wasm;

use super::path::Path;
use lanes::{Lanes, Plain, micro};
use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::matmul::term_limit;

/// Rows of a panel.
pub(crate) const PANEL: usize = 6;
/// Columns of a tile.
pub(crate) const TILE: usize = 32;
/// Mantissas of a panel's block.
pub(crate) const PANEL_BLOCK: usize = PANEL * BLOCK;
/// Mantissas of a tile's block.
pub(crate) const TILE_BLOCK: usize = TILE * BLOCK;
/// Exponents of a panel's block: a row each, then the largest of the valid rows.
pub(crate) const PANEL_EXPONENTS: usize = 8;
/// Position of exponents in an f32.
pub(crate) const EXPONENT_SHIFT: u32 = 23;
/// Exponent of an all-zero block: any is right for it, and this one forbids nothing.
pub(crate) const ZERO_EXPONENT: i32 = -60 << EXPONENT_SHIFT;
/// Largest sum of 32 products of 11-bit by 10-bit mantissas.
const SUM_MAX: i64 = 32 * 1023 * 511;

/// One product: out (rows, 32) = sum over blocks of flushed sums.
pub(crate) struct Job {
    /// The panel.
    pub a: *const i16,
    /// Its exponents.
    pub a_exponents: *const i32,
    /// The tile.
    pub b: *const i16,
    /// Its exponents: one a block, or 32 a block.
    pub b_exponents: *const i32,
    /// Distance of the blocks' exponents: 0 if all blocks have the same.
    pub b_stride: usize,
    /// Largest exponent of a block's columns.
    pub b_max: *const i32,
    /// Distance of the blocks' largest exponents.
    pub b_max_stride: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// `(127 + F) * 2^23`, from [`bias`].
    pub bias: i32,
    /// From [`fast_limit`]: blocks above it take the general flush.
    pub limit: i32,
    /// Counting rules of the general flush.
    pub count: *const Count,
    /// Output, 32 columns a row.
    pub out: *mut i32,
    /// Distance of output rows.
    pub stride: usize,
}

/// What the general flush counts.
#[derive(Clone, Copy)]
pub(crate) struct Count {
    /// A term of row `r` larger than `limit[r]` in magnitude is counted,
    pub limit: [i32; PANEL],
    /// if it is in the first `columns[r]` columns.
    pub columns: [usize; PANEL],
}

impl Count {
    /// Every term of a product of `blocks` blocks.
    pub(crate) fn all(blocks: usize) -> Self {
        Self { limit: [term_limit(blocks); PANEL], columns: [TILE; PANEL] }
    }
}

/// Layout of the left operand, kind of right exponents, and what to do with the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A in lines, one B exponent a block.
    Lines,
    /// A in lines, B exponents by column.
    LinesColumns,
    /// A in pairs, one B exponent a block.
    Pairs,
    /// A in pairs, B exponents by column.
    PairsColumns,
    /// As [`Self::PairsColumns`], but `out +=` (wrapping), with neither clamps nor checks.
    PairsColumnsAdd,
}

/// `(127 + f) * 2^23`.
pub(crate) const fn bias(f: i32) -> i32 {
    (127 + f) << EXPONENT_SHIFT
}

/// The largest sum of biased exponents for which no term of `blocks` blocks can be counted.
pub(crate) const fn fast_limit(path: Path, blocks: usize) -> i32 {
    let limit = term_limit(blocks) as i64;
    // The least shift s with |d| 2^-s <= limit, rounding included.
    let mut s = -6;
    while s < 2 && SUM_MAX << (2 - s) > limit << 2 {
        s += 1;
    }
    while s > 1 && (SUM_MAX >> s) + 1 > limit {
        s += 1;
    }
    if matches!(path, Path::Portable) && s < 2 {
        s = 2;
    }
    (127 - s) << EXPONENT_SHIFT
}

/// Runs a job on `rows` rows (1 to 6; kinds in pairs compute all 6) and returns the number of
/// counted terms.
///
/// # Safety
/// The path is available; the job's pointers cover its blocks, and `out` covers `rows` rows of 32
/// (6 rows for pairs). `b` is aligned to 64 bytes.
#[inline]
pub(crate) unsafe fn run(path: Path, kind: Kind, rows: usize, job: &Job) -> u64 {
    // SAFETY: forwarded to the caller.
    unsafe {
        match path {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Amx | Path::Avx512Vnni => x86::run_avx512(kind, rows, job),
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => x86::run_avx2(kind, rows, job),
            #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
            Path::Simd128 => wasm::run(kind, rows, job),
            _ => select::<Plain>(kind, rows, job),
        }
    }
}

/// The instance of [`micro`] for a kind and a number of rows.
///
/// # Safety
/// As [`run`], compiled for `L`'s instructions.
#[inline(always)]
unsafe fn select<L: Lanes>(kind: Kind, rows: usize, job: &Job) -> u64 {
    // SAFETY: forwarded to the caller.
    unsafe {
        match (kind, rows) {
            (Kind::PairsColumnsAdd, _) => micro::<L, 6, true, true, true>(job),
            (Kind::PairsColumns, _) => micro::<L, 6, true, true, false>(job),
            (Kind::Pairs, _) => micro::<L, 6, true, false, false>(job),
            (Kind::Lines, 6) => micro::<L, 6, false, false, false>(job),
            (Kind::Lines, 5) => micro::<L, 5, false, false, false>(job),
            (Kind::Lines, 4) => micro::<L, 4, false, false, false>(job),
            (Kind::Lines, 3) => micro::<L, 3, false, false, false>(job),
            (Kind::Lines, 2) => micro::<L, 2, false, false, false>(job),
            (Kind::Lines, _) => micro::<L, 1, false, false, false>(job),
            (Kind::LinesColumns, 6) => micro::<L, 6, false, true, false>(job),
            (Kind::LinesColumns, 5) => micro::<L, 5, false, true, false>(job),
            (Kind::LinesColumns, 4) => micro::<L, 4, false, true, false>(job),
            (Kind::LinesColumns, 3) => micro::<L, 3, false, true, false>(job),
            (Kind::LinesColumns, 2) => micro::<L, 2, false, true, false>(job),
            (Kind::LinesColumns, _) => micro::<L, 1, false, true, false>(job),
        }
    }
}
