//! Large products on the tile unit: digits of the operands, and the loops over them.
//!
//! Same bits as [`super::gemm`] and [`super::weight_gradient`]. Here no term can be counted or
//! clamped: exponents prove it first, and those do the rest.
#![expect(unsafe_code, reason = "calls of functions compiled for detected instructions")]

use std::arch::x86_64::*;
use std::sync::atomic::{AtomicI32, Ordering};

use manyhands_shaders::bfp::{BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::{GRADIENT_FRACTION, SHARE_FRACTION, Site};

use super::gemm::{Output, PANEL_BLOCK_NS, Product};
use super::gradient::Gradient;
use super::kernel::amx::{At, DIGITS, Products, SIDE, Sums, Unit, transpose};
use super::kernel::{
    EXPONENT_SHIFT, PANEL, PANEL_EXPONENTS, TILE_BLOCK, ZERO_EXPONENT, bias, fast_limit,
};
use super::operands::Panels;
use super::pack::{Strip, strip, union_of_rows};
use super::weight_gradient::{AlongTokens, TokenBlocks, largest_term, terms_that_fit};
use super::workers::Shared;
use super::{Cpu, Path, Tensor};

/// Fewer rows are not worth the digits.
const ROWS_MIN: usize = 128;
/// Rows that are whole panels of both kinds.
const PART: usize = 96;
/// Bytes of left digits, about, that stay in L2 while right ones stream by.
const LEFT_BYTES: usize = 1 << 20;

/// Whether products of so many rows go to the tile unit.
pub(super) fn pays(path: Path, rows: usize) -> bool {
    path == Path::Avx512Amx && rows >= ROWS_MIN
}

/// Splits 16 pairs of mantissas times powers of two, see [`power`], into their digits: row `row` of
/// a half of a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn split(pairs: __m512i, power: __m512, to: &mut [u16], row: usize) {
    let (high, low) = to.split_at_mut(DIGITS / 2);
    let (high, low) = (&mut high[row * 32..][..32], &mut low[row * 32..][..32]);
    // Words are the upper halves of these: nothing is shuffled.
    let upper = _mm512_set1_epi32(-65536);
    let join = |x: [__m512; 2]| {
        let [first, second] = x.map(|x| _mm512_castps_si512(x));
        _mm512_or_si512(_mm512_srli_epi32::<16>(first), second)
    };
    let x = [_mm512_slli_epi32::<16>(pairs), _mm512_and_si512(pairs, upper)];
    let x = x.map(|x| _mm512_mul_ps(_mm512_cvtepi32_ps(x), power));
    let first = x.map(|x| _mm512_and_ps(x, _mm512_castsi512_ps(upper)));
    let rest = [0, 1].map(|i| _mm512_sub_ps(x[i], first[i]));
    // SAFETY: 32 words each.
    unsafe {
        _mm512_storeu_si512(high.as_mut_ptr().cast(), join(first));
        _mm512_storeu_si512(low.as_mut_ptr().cast(), join(rest));
    }
}

/// `2^-15 2^e` of an exponent as kernels store it: mantissas are shifted by 16 bits.
#[inline]
fn power(e: i32) -> f32 {
    f32::from_bits(((111 << EXPONENT_SHIFT) + e).cast_unsigned())
}

/// Digits of a tile's block `[16 pairs][32 columns][2]`, with an exponent for each column or one.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn right_block(pairs: &[i16; TILE_BLOCK], exponents: &[i32], to: &mut [u16]) {
    let powers: [f32; SIDE] =
        std::array::from_fn(|i| power(exponents[if exponents.len() == 1 { 0 } else { i }]));
    for (p, pairs) in pairs.as_chunks::<32>().0.iter().enumerate() {
        let half = p % 2;
        // SAFETY: 16 values each.
        let (pairs, powers) = unsafe {
            let powers = powers[half * 16..].as_ptr();
            (_mm512_loadu_si512(pairs.as_ptr().cast()), _mm512_loadu_ps(powers))
        };
        split(pairs, powers, to, half * 16 + p / 2);
    }
}

/// Digits of a tile `[block]`, whose exponents are `step` a block.
fn right_tile(mantissas: &[i16], exponents: &[i32], step: usize, to: &mut [u16]) {
    let blocks = mantissas.as_chunks::<TILE_BLOCK>().0.iter().zip(exponents.chunks_exact(step));
    for ((pairs, exponents), to) in blocks.zip(to.as_chunks_mut::<DIGITS>().0) {
        // SAFETY: only paths with the instructions get here.
        unsafe { right_block(pairs, exponents, to) };
    }
}

/// Digits of rows `first..first + rows` of panels times `2^f`: `[side of 32 rows][block]`. In the
/// order of the panels, a line after the other.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn left_rows(x: &Panels, first: usize, rows: usize, f: i32, to: &mut [u16]) {
    let padded = first + rows.next_multiple_of(SIDE);
    for panel in (first..padded).step_by(PANEL) {
        for block in 0..x.blocks {
            for row in panel..padded.min(panel + PANEL) {
                let (side, i) = ((row - first) / SIDE, (row - first) % SIDE);
                let to = &mut to[(side * x.blocks + block) * DIGITS..][..DIGITS];
                if row >= x.rows {
                    split(_mm512_setzero_si512(), _mm512_setzero_ps(), to, i);
                } else {
                    let line = &x.mantissas[x.line(row, block)..][..32];
                    let e = x.exponents[x.exponent(row, block)] + (f << EXPONENT_SHIFT);
                    // SAFETY: 32 words.
                    let pairs = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
                    split(pairs, _mm512_set1_ps(power(e)), to, i);
                }
            }
        }
    }
}

/// Products of one left operand, as by [`super::gemm::matmul`], for many rows.
pub(super) fn matmul(products: &[Product<'_>]) {
    let Some(&Product { cpu, a, f, limit, .. }) = products.first() else { return };
    let blocks = a.blocks;
    let near = (a.rows * blocks * DIGITS / SIDE * 2 + LEFT_BYTES / 2) / LEFT_BYTES;
    let group = a.rows.div_ceil(near.max(cpu.workers.threads())).next_multiple_of(PART);
    let groups = a.rows.div_ceil(group);
    let limit = limit - bias(f);
    let cost = products.iter().map(Product::cost).sum();
    cpu.workers.each(groups, cost, |i| {
        // SAFETY: the path is available.
        let unit = unsafe { Unit::new() };
        let mut sums = Sums::new();
        let mut events = (0, 0);
        let (first, rows) = (i * group, group.min(a.rows - i * group));
        let sides = rows.div_ceil(SIDE);
        let mut left = cpu.pool.take::<u16>(sides * blocks * DIGITS);
        let mut right = cpu.pool.take::<u16>(blocks * DIGITS);
        let mut list = Vec::with_capacity(sides);
        let len = blocks * TILE_BLOCK;
        // SAFETY: the path is available.
        unsafe { left_rows(a, first, rows, f, &mut left) };
        // The largest exponent of each block in the rows of a part.
        let parts = (first..first + rows).step_by(PART);
        let tops: Vec<i32> = parts
            .clone()
            .flat_map(|first| {
                let panels = first / PANEL..(first + PART).min(a.rows).div_ceil(PANEL);
                (0..blocks).map(move |block| {
                    let e = |p| a.exponents[(p * blocks + block) * PANEL_EXPONENTS + PANEL];
                    panels.clone().map(e).max().unwrap_or(ZERO_EXPONENT)
                })
            })
            .collect();
        let tiles = products.iter().flat_map(|p| (0..p.b.tiles).map(move |tile| (p, tile)));
        for (product, tile) in tiles {
            let &Product { b, cols, .. } = product;
            let width = SIDE.min(cols - tile * SIDE);
            let exponents = &b.exponents[tile * blocks..][..blocks];
            let (mantissas, after) = b.mantissas[tile * len..].split_at(len);
            right_tile(mantissas, exponents, 1, &mut right);
            list.clear();
            for (part, tops) in parts.clone().zip(tops.chunks_exact(blocks)) {
                let end = (part + PART).min(a.rows);
                if tops.iter().zip(exponents).any(|(a, b)| a + b > limit) {
                    for panel in part / PANEL..end.div_ceil(PANEL) {
                        product.panel(panel, tile, &mut events);
                    }
                    continue;
                }
                for row in (part..end).step_by(SIDE) {
                    let (at, rows) = (row * cols + tile * SIDE, SIDE.min(end - row));
                    // SAFETY: each (part, tile) of the output is written by one index only.
                    let out = unsafe { product.out.pointer(at, (rows - 1) * cols + width) };
                    let a = left[(row - first) / SIDE * blocks * DIGITS..].as_ptr();
                    list.push(At { a, out, rows });
                }
            }
            let add = product.output == Output::Add;
            let (list, b, next) = (&list[..], right.as_ptr(), after.as_ptr());
            let products = Products { list, b, blocks, stride: cols, width, add, next };
            // SAFETY: all operands have `blocks` blocks.
            events.1 += unsafe { sums.run(&unit, &products) };
        }
        cpu.tally.add(Site::Matmul, events.0);
        cpu.tally.add(Site::Residual, events.1);
    });
}

/// Digits of one token block of `dy` (rows, O) along tokens, as 10-bit left operand in
/// `FX(SHARE_FRACTION)`, for every 32 channels. Returns the largest exponent. `any` is scratch.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
fn left_channels<'a>(
    dy: &[i32],
    cols: usize,
    any: &mut [u32],
    to: impl Iterator<Item = &'a mut [u16]>,
) -> i32 {
    let rows = dy.len() / cols;
    union_of_rows(dy, cols, any);
    let mut top = ZERO_EXPONENT;
    for ((side, any), to) in any.as_chunks::<SIDE>().0.iter().enumerate().zip(to) {
        let width = SIDE.min(cols - side * SIDE);
        let x = &dy[side * SIDE..];
        let mut pairs: Strip = [[0; SIDE]; BLOCK / 2];
        let mut e = [0; SIDE];
        strip(x, cols, rows, width, any, -GRADIENT_FRACTION, WEIGHT_BITS, &mut pairs, &mut e);
        for (i, (line, e)) in transpose(&pairs).iter().zip(e).enumerate() {
            let power = _mm512_set1_ps(power(e + (SHARE_FRACTION << EXPONENT_SHIFT)));
            // SAFETY: 16 values.
            let pairs = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
            split(pairs, power, to, i);
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
    grad: &mut Gradient,
) -> bool {
    let (blocks, rows) = (tokens.blocks.len(), dy.cols);
    let tiles = cols.div_ceil(SIDE);
    let sides = rows.div_ceil(SIDE);
    let mut left = cpu.pool.take::<u16>(sides * blocks * DIGITS);
    let top = AtomicI32::new(ZERO_EXPONENT);
    let digits = Shared::new(&mut left);
    cpu.workers.ranges(blocks, 1, dy.data.len() / 2, |range| {
        let mut any = vec![0; sides * SIDE];
        for block in range {
            let token = &tokens.blocks[block];
            let dy = &dy.data[token.first_row * rows..(token.first_row + token.rows) * rows];
            // SAFETY: each block is visited once; the path is available.
            unsafe {
                let to =
                    (0..sides).map(|side| digits.part((side * blocks + block) * DIGITS, DIGITS));
                top.fetch_max(left_channels(dy, rows, &mut any, to), Ordering::Relaxed);
            }
        }
    });
    let top = top.into_inner();
    let x_top = x.block_max.iter().max().copied().unwrap_or(0);
    if top + x_top + bias(SHARE_FRACTION) > fast_limit(cpu.path, tokens.longest) {
        return false;
    }
    let term = largest_term(top + x_top);
    let fit = terms_that_fit(term);
    let group = (LEFT_BYTES / (blocks * DIGITS * 2)).max(1);
    let groups = sides.div_ceil(group);
    for from in (0..blocks).step_by(fit) {
        let n = fit.min(blocks - from);
        let shared = Shared::new(grad.narrow(cpu.path, n as i64 * term));
        let cost = rows * tiles * n * PANEL_BLOCK_NS / PANEL;
        cpu.workers.each(groups * tiles, cost, |i| {
            let (first, tile) = (i / tiles * group, i % tiles);
            let width = SIDE.min(cols - tile * SIDE);
            let at = tile * blocks + from;
            let mut right = cpu.pool.take::<u16>(n * DIGITS);
            let (mantissas, after) = x.mantissas[at * TILE_BLOCK..].split_at(n * TILE_BLOCK);
            right_tile(mantissas, &x.exponents[at * SIDE..][..n * SIDE], SIDE, &mut right);
            let list: Vec<At> = (first..sides.min(first + group))
                .map(|side| {
                    let a = left[(side * blocks + from) * DIGITS..].as_ptr();
                    let rows = SIDE.min(rows - side * SIDE);
                    let at = side * SIDE * cols + tile * SIDE;
                    // SAFETY: each (side, tile) of the gradient is written by one index only.
                    let out = unsafe { shared.pointer(at, (rows - 1) * cols + width) };
                    At { a, out, rows }
                })
                .collect();
            let (list, b, next) = (&list[..], right.as_ptr(), after.as_ptr());
            let products = Products { list, b, blocks: n, stride: cols, width, add: true, next };
            // SAFETY: the path is available; all operands have these blocks. Nothing clamps.
            unsafe { Sums::new().run(&Unit::new(), &products) };
        });
    }
    true
}

#[cfg(test)]
mod tests {
    use manyhands_shaders::x1::flush;

    use super::*;

    /// The unit against sums of integers, block by block: at the ends of the range, where partial
    /// sums come nearest to 2^24, with ties, and with every digit.
    #[test]
    fn the_unit_adds_without_rounding() {
        if !Path::Avx512Amx.is_available() {
            return;
        }
        const BLOCKS: usize = 3;
        // SAFETY: the path is available.
        let unit = unsafe { Unit::new() };
        let mut state = 1_u32;
        let mut random = |max: i32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8).cast_signed() % (max + 1) * if state & 1 == 0 { 1 } else { -1 }
        };
        for case in 0..8 {
            let mut value = |max: i32| match case {
                0 => max,
                1 => random(1).signum() * max,
                2 => max - random(1).abs(),
                3 => random(7),
                _ => random(max),
            };
            let a: [[[i32; 32]; SIDE]; BLOCKS] = std::array::from_fn(|_| {
                std::array::from_fn(|_| std::array::from_fn(|_| value(1023)))
            });
            let b: [[[i32; SIDE]; 32]; BLOCKS] = std::array::from_fn(|_| {
                std::array::from_fn(|_| std::array::from_fn(|_| value(511)))
            });
            // A shift for each block: left ones, none, and right ones with ties.
            let shifts = [[-4, 0, 1], [2, 5, 9], [1, 3, 24]][case % 3];
            let mut left = [0; BLOCKS * DIGITS];
            let mut right = [0; BLOCKS * DIGITS];
            for (k, shift) in shifts.into_iter().enumerate() {
                let e = |s: i32| s << EXPONENT_SHIFT;
                for (i, row) in a[k].iter().enumerate() {
                    let to = &mut left[k * DIGITS..][..DIGITS];
                    // SAFETY: the path is available.
                    unsafe {
                        let pairs = _mm512_loadu_si512(row.map(|x| x as i16).as_ptr().cast());
                        split(pairs, _mm512_set1_ps(power(e(-30 - shift))), to, i);
                    }
                }
                let mut pairs = [0_i16; TILE_BLOCK];
                for (i, x) in b[k].iter().flatten().enumerate() {
                    let (term, column) = (i / SIDE, i % SIDE);
                    pairs[(term / 2 * SIDE + column) * 2 + term % 2] = *x as i16;
                }
                right_tile(&pairs, &[e(30)], 1, &mut right[k * DIGITS..][..DIGITS]);
            }
            let mut sums = Sums::new();
            let mut out = [0; SIDE * SIDE];
            // SAFETY: both have all blocks; the output has all rows.
            unsafe {
                let list = [At { a: left.as_ptr(), out: out.as_mut_ptr(), rows: SIDE }];
                let (list, b, next) = (&list[..], right.as_ptr(), std::ptr::null());
                let (blocks, stride, width) = (BLOCKS, SIDE, SIDE);
                sums.run(&unit, &Products { list, b, blocks, stride, width, add: false, next });
            }
            for r in 0..SIDE {
                for c in 0..SIDE {
                    let term = |k: usize| {
                        let d: i32 = (0..32).map(|i| a[k][r][i] * b[k][i][c]).sum();
                        flush(d, shifts[k])
                    };
                    let expected: i32 = (0..BLOCKS).map(term).sum();
                    assert_eq!(out[r * SIDE + c], expected, "case {case}, ({r}, {c})");
                }
            }
        }
    }
}
