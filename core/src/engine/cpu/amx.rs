//! Large products on the tile unit: digits of the operands, and the loops over them.
//!
//! Same bits as [`super::gemm`] and [`super::weight_gradient`]. Here no term can be counted or
//! clamped: exponents prove it first, and those do the rest.
#![expect(unsafe_code, reason = "calls of functions compiled for detected instructions")]

use manyhands_shaders::bfp::{BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::{GRADIENT_FRACTION, SHARE_FRACTION, Site};

use super::buffer::Buffer;
use super::gemm::{Output, Product};
use super::kernel::amx::{DIGITS, SIDE, Sums, Unit, transpose};
use super::kernel::{
    EXPONENT_SHIFT, PANEL, PANEL_EXPONENTS, TILE_BLOCK, ZERO_EXPONENT, bias, fast_limit,
};
use super::operands::{Packed, Panels};
use super::pack::{Strip, magnitudes, strip};
use super::weight_gradient::{AlongTokens, TokenBlocks, terms_that_fit};
use super::workers::Shared;
use super::{Cpu, Path, Tensor};

/// Fewer rows are not worth the digits.
const ROWS_MIN: usize = 64;
/// Rows that are whole panels of both kinds.
const PART: usize = 96;
/// Bytes of left digits that stay in L2 while right ones stream by.
const LEFT_BYTES: usize = 512 << 10;

/// Whether products of so many rows go to the tile unit.
pub(super) fn pays(path: Path, rows: usize) -> bool {
    path == Path::Avx512Amx && rows >= ROWS_MIN
}

/// Splits a line of mantissas times powers of two into its digits: row `row` of a half of a block.
#[inline(always)]
fn split(line: &[i16; 32], scales: &[f32; 32], to: &mut [u16], row: usize) {
    let (high, low) = to.split_at_mut(DIGITS / 2);
    let (high, low) = (&mut high[row * 32..][..32], &mut low[row * 32..][..32]);
    for i in 0..32 {
        let x = f32::from(line[i]) * scales[i];
        let top = x.to_bits() & 0xffff_0000;
        high[i] = (top >> 16) as u16;
        low[i] = ((x - f32::from_bits(top)).to_bits() >> 16) as u16;
    }
}

/// `2^e` of an exponent as kernels store it.
#[inline(always)]
fn power(e: i32) -> f32 {
    f32::from_bits(((127 << EXPONENT_SHIFT) + e).cast_unsigned())
}

/// Digits of a tile's block `[16 pairs][32 columns][2]`, with an exponent for each column or one.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn right_block(pairs: &[i16], exponents: &[i32], to: &mut [u16]) {
    for half in 0..2 {
        let mut scales = [0.0; 32];
        for i in 0..32 {
            scales[i] = power(exponents[(half * 16 + i / 2) % exponents.len()]);
        }
        for (p, line) in pairs.as_chunks::<32>().0.iter().skip(half).step_by(2).enumerate() {
            split(line, &scales, to, half * 16 + p);
        }
    }
}

/// Digits of right operands `[tile][block]`, whose exponents are `step` a block.
pub(super) fn right(cpu: &Cpu, mantissas: &[i16], exponents: &[i32], step: usize) -> Buffer<u16> {
    let n = mantissas.len() / TILE_BLOCK;
    let mut out = cpu.pool.take(n * DIGITS);
    let shared = Shared::new(&mut out);
    cpu.workers.ranges(n, 1, n * TILE_BLOCK / 8, |range| {
        for i in range {
            // SAFETY: each block is visited once; the path's instructions are there.
            unsafe {
                let to = shared.part(i * DIGITS, DIGITS);
                right_block(
                    &mantissas[i * TILE_BLOCK..][..TILE_BLOCK],
                    &exponents[i * step..][..step],
                    to,
                );
            }
        }
    });
    out
}

/// Digits of rows `first..first + rows` of panels times `2^f`: `[side of 32 rows][block]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn left_rows(x: &Panels, first: usize, rows: usize, f: i32, to: &mut [u16]) {
    let sides = to.chunks_exact_mut(x.blocks * DIGITS);
    for (first, to) in (first..first + rows).step_by(SIDE).zip(sides) {
        for (block, to) in to.chunks_exact_mut(DIGITS).enumerate() {
            for i in 0..SIDE {
                let row = first + i;
                if row >= x.rows {
                    split(&[0; 32], &[1.0; 32], to, i);
                } else if let Some(line) = x.mantissas[x.line(row, block)..].first_chunk() {
                    let e = x.exponents[x.exponent(row, block)] + (f << EXPONENT_SHIFT);
                    split(line, &[power(e); 32], to, i);
                }
            }
        }
    }
}

/// As [`super::gemm::matmul`], for many rows.
pub(super) fn matmul(cpu: &Cpu, product: &Product<'_>, b: &Packed, f: i32) {
    let (a, cols) = (product.a, product.cols);
    let right = b.digits(cpu);
    let group = (LEFT_BYTES / (a.blocks * DIGITS / SIDE * 2) / PART * PART).max(PART);
    let groups = a.rows.div_ceil(group);
    let limit = fast_limit(cpu.path, a.blocks) - bias(f);
    cpu.workers.each(groups, product.cost(), |i| {
        // SAFETY: the path is available.
        let unit = unsafe { Unit::new() };
        let mut sums = Sums::new();
        let mut events = (0, 0);
        let (first, rows) = (i * group, group.min(a.rows - i * group));
        let sides = rows.div_ceil(SIDE);
        let mut left = cpu.pool.take::<u16>(sides * a.blocks * DIGITS);
        // SAFETY: the path is available.
        unsafe { left_rows(a, first, rows, f, &mut left) };
        // The largest exponent of each block in the rows of a part.
        let parts = (first..first + rows).step_by(PART);
        let tops: Vec<i32> = parts
            .clone()
            .flat_map(|first| {
                let panels = first / PANEL..(first + PART).min(a.rows).div_ceil(PANEL);
                (0..a.blocks).map(move |block| {
                    let e = |p| a.exponents[(p * a.blocks + block) * PANEL_EXPONENTS + PANEL];
                    panels.clone().map(e).max().unwrap_or(ZERO_EXPONENT)
                })
            })
            .collect();
        for tile in 0..b.tiles {
            let width = SIDE.min(cols - tile * SIDE);
            let exponents = &b.exponents[tile * b.blocks..][..b.blocks];
            for (part, tops) in parts.clone().zip(tops.chunks_exact(a.blocks)) {
                let end = (part + PART).min(a.rows);
                if tops.iter().zip(exponents).any(|(a, b)| a + b > limit) {
                    for panel in part / PANEL..end.div_ceil(PANEL) {
                        product.panel(panel, tile, &mut events);
                    }
                    continue;
                }
                for row in (part..end).step_by(SIDE) {
                    let rows = SIDE.min(end - row);
                    let from = (row - first) / SIDE * a.blocks * DIGITS;
                    let at = row * cols + tile * SIDE;
                    sums.clear();
                    // SAFETY: both operands have `blocks` blocks; each (part, tile) of the output
                    // is written by one index only.
                    unsafe {
                        let b = right[tile * a.blocks * DIGITS..].as_ptr();
                        sums.add(&unit, left[from..].as_ptr(), b, a.blocks);
                        let out = product.out.pointer(at, (rows - 1) * cols + width);
                        events.1 +=
                            sums.store(out, cols, rows, width, product.output == Output::Add);
                    }
                }
            }
        }
        cpu.tally.add(Site::Matmul, events.0);
        cpu.tally.add(Site::Residual, events.1);
    });
}

/// Digits of 32 channels of `dy` (N, O) from `channel` along tokens, as 10-bit left operand in
/// `FX(SHARE_FRACTION)`: `[block]`. Returns the largest exponent.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
fn left_channels(dy: &Tensor, channel: usize, tokens: &TokenBlocks, to: &mut [u16]) -> i32 {
    let width = SIDE.min(dy.cols - channel);
    let mut top = ZERO_EXPONENT;
    for (token, to) in tokens.blocks.iter().zip(to.chunks_exact_mut(DIGITS)) {
        let x = &dy.data[token.first_row * dy.cols + channel..];
        let any = magnitudes(x, dy.cols, token.rows, width);
        let mut pairs: Strip = [[0; SIDE]; BLOCK / 2];
        let mut e = [0; SIDE];
        strip(
            x,
            dy.cols,
            token.rows,
            width,
            &any,
            -GRADIENT_FRACTION,
            WEIGHT_BITS,
            &mut pairs,
            &mut e,
        );
        for (i, (line, e)) in transpose(&pairs).iter().zip(e).enumerate() {
            let mut terms = [0; 32];
            for (to, x) in terms.as_chunks_mut::<2>().0.iter_mut().zip(line) {
                *to = [*x as i16, (*x >> 16) as i16];
            }
            split(&terms, &[power(e + (SHARE_FRACTION << EXPONENT_SHIFT)); 32], to, i);
            top = top.max(e);
        }
    }
    top
}

/// `grad` (O, C) `+= dy^T x`, for many rows; false if exponents do not prove that no term is
/// counted, with nothing done.
pub(super) fn weight_gradient(
    cpu: &Cpu,
    dy: &Tensor,
    x: &AlongTokens,
    tokens: &TokenBlocks,
    cols: usize,
    grad: &mut [i64],
) -> bool {
    let (blocks, rows) = (tokens.blocks.len(), dy.cols);
    let tiles = cols.div_ceil(SIDE);
    let sides = rows.div_ceil(SIDE);
    let mut left = cpu.pool.take::<u16>(sides * blocks * DIGITS);
    let mut tops = vec![ZERO_EXPONENT; sides];
    let (digits, shared_tops) = (Shared::new(&mut left), Shared::new(&mut tops));
    cpu.workers.ranges(sides, 1, dy.data.len() / 2, |range| {
        for side in range {
            // SAFETY: each is visited once; the path is available.
            unsafe {
                let to = digits.part(side * blocks * DIGITS, blocks * DIGITS);
                shared_tops.part(side, 1)[0] = left_channels(dy, side * SIDE, tokens, to);
            }
        }
    });
    let top = tops.iter().chain(std::iter::once(&ZERO_EXPONENT)).max().copied().unwrap_or(0);
    let x_top = x.block_max.iter().max().copied().unwrap_or(0);
    if top + x_top + bias(SHARE_FRACTION) > fast_limit(cpu.path, tokens.longest) {
        return false;
    }
    let fit = terms_that_fit(top + x_top);
    let right = x.digits(cpu);
    let shared = Shared::new(grad);
    let group = (LEFT_BYTES / (blocks * DIGITS * 2)).max(1);
    let groups = sides.div_ceil(group);
    cpu.workers.each(groups * tiles, usize::MAX, |i| {
        let (first, tile) = (i / tiles * group, i % tiles);
        // SAFETY: the path is available.
        let unit = unsafe { Unit::new() };
        let mut sums = Sums::new();
        let width = SIDE.min(cols - tile * SIDE);
        for side in first..sides.min(first + group) {
            let rows = SIDE.min(rows - side * SIDE);
            let at = side * SIDE * cols + tile * SIDE;
            for from in (0..blocks).step_by(fit) {
                let n = fit.min(blocks - from);
                sums.clear();
                // SAFETY: both operands have these blocks; each (side, tile) of the gradient is
                // written by one index only.
                unsafe {
                    let a = left[(side * blocks + from) * DIGITS..].as_ptr();
                    let b = right[(tile * blocks + from) * DIGITS..].as_ptr();
                    sums.add(&unit, a, b, n);
                    let out = shared.pointer(at, (rows - 1) * cols + width);
                    sums.spill(out, cols, rows, width);
                }
            }
        }
    });
    true
}
