//! The four products of a head's backward pass.
#![expect(unsafe_code, reason = "drives kernels over raw panels")]

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS};
use manyhands_shaders::twin::GRADIENT_FRACTION;

use super::super::attention::{NO_EXPONENT, causal};
use super::super::buffer::Buffer;
use super::super::gemm::add_saturating;
use super::super::kernel::{
    Count, Job, Kind, PANEL, PANEL_BLOCK, PANEL_EXPONENTS, TILE, TILE_BLOCK, ZERO_EXPONENT, bias,
    fast_limit, run,
};
use super::super::pack::GROUP;
use super::super::quantize::{self, put};
use super::super::softmax::fold;
use super::loops::{pack_columns, pack_square, scale, softmax_gradient};
use super::{Counts, Head, Scratch};

/// A right operand along rows: `[D / 32][tile]`.
struct Right<'a> {
    mantissas: &'a [i16],
    /// Of columns, and the largest of each tile, unless they were folded into the left operand.
    exponents: Option<(&'a [i32], &'a [i32])>,
}

impl Head<'_> {
    /// The operand for a product over rows: `x` (T, T) below the diagonal as panels in pairs.
    fn pack(
        &self,
        x: &[i32],
        folded: Option<&[i32]>,
        e: i32,
        bits: u32,
        pairs: &mut Buffer<i16>,
        exponents: &mut Buffer<i32>,
    ) {
        let (_, tiles) = self.shape();
        let t = self.s.rows;
        let panels = t.div_ceil(PANEL);
        let pairs = pairs.at_least(panels * tiles * PANEL_BLOCK);
        let exponents = exponents.at_least(panels * tiles * PANEL_EXPONENTS);
        for first in (0..t).step_by(GROUP) {
            for tile in first / TILE..tiles {
                let rows = TILE.min(t - tile * TILE);
                let at = first / PANEL * tiles + tile;
                pack_square(
                    self.path(),
                    &x[tile * TILE * tiles * TILE..],
                    tiles * TILE,
                    rows,
                    first,
                    tile,
                    GROUP.min(t - first),
                    &mut pairs[at * PANEL_BLOCK..],
                    tiles * PANEL_BLOCK,
                    &mut exponents[at * PANEL_EXPONENTS..],
                    tiles * PANEL_EXPONENTS,
                    folded.map(|f| &f[tile * TILE..tile * TILE + rows]),
                    e,
                    bits,
                );
            }
        }
    }

    /// `dV += P^T dO`.
    pub(super) fn values_gradient(&self, h: usize, scratch: &mut Scratch, counts: &mut Counts) {
        let c = &self.cpu.constants.attention;
        let (blocks, tiles) = self.shape();
        let (d, group) = (c.head_dim, c.heads / c.kv_heads);
        let Scratch { p, pairs, pair_exponents, lines, row_exponents, row_max, .. } = scratch;
        self.pack(p, None, -24, ACTIVATION_BITS, pairs, pair_exponents);
        let along = lines.at_least(blocks * tiles * TILE_BLOCK);
        let exponents = row_exponents.at_least(blocks * tiles * TILE);
        let max = row_max.at_least(blocks * tiles);
        for b in 0..blocks {
            for t in 0..tiles {
                let row = self.s.first_row + t * TILE;
                let from = (row * c.heads + self.g * group + h) * d + b * TILE;
                let i = b * tiles + t;
                let Some(e) = exponents[i * TILE..].first_chunk_mut() else { continue };
                max[i] = pack_columns(
                    self.path(),
                    &self.d_out.data[from..],
                    c.heads * d,
                    TILE.min(self.s.rows - t * TILE),
                    TILE.min(d - b * TILE),
                    &mut along[i * TILE_BLOCK..][..TILE_BLOCK],
                    e,
                );
            }
        }
        let right = Right { mantissas: along, exponents: Some((exponents, max)) };
        self.along_rows(2, h, (pairs, pair_exponents), &right, counts, |_| ());
    }

    /// Adds products over rows, finished by `finish`, to `dK` or `dV`: a left operand in pairs with a
    /// right one `[D / 32][tile]`, both zeros above the diagonal.
    fn along_rows(
        &self,
        which: usize,
        h: usize,
        (pairs, pair_exponents): (&[i16], &[i32]),
        right: &Right<'_>,
        counts: &mut Counts,
        finish: impl Fn(&mut [i32; PANEL * TILE]),
    ) {
        let (blocks, tiles) = self.shape();
        let count = Count::all(tiles);
        for panel in 0..self.s.rows.div_ceil(PANEL) {
            let (rows, from) = (self.positions(panel).0, panel * PANEL / TILE);
            for b in 0..blocks {
                let mut y = [0; PANEL * TILE];
                let (at, tile) = (panel * tiles + from, b * tiles + from);
                let (kind, exponents, max, step) = match right.exponents {
                    None => (Kind::Pairs, &raw const NO_EXPONENT, std::ptr::null(), 0),
                    Some((e, max)) => {
                        (Kind::PairsColumns, e[tile * TILE..].as_ptr(), max[tile..].as_ptr(), 1)
                    }
                };
                let job = Job {
                    a: pairs[at * PANEL_BLOCK..].as_ptr(),
                    a_exponents: pair_exponents[at * PANEL_EXPONENTS..].as_ptr(),
                    b: right.mantissas[tile * TILE_BLOCK..].as_ptr(),
                    b_exponents: exponents,
                    b_stride: step * TILE,
                    b_max: max,
                    b_max_stride: step,
                    blocks: tiles - from,
                    bias: bias(GRADIENT_FRACTION),
                    limit: fast_limit(self.path(), tiles),
                    count: &raw const count,
                    out: y.as_mut_ptr(),
                    stride: TILE,
                };
                // SAFETY: both operands hold the blocks from the diagonal on; `y` holds 6 rows.
                counts.matmul += unsafe { run(self.path(), kind, PANEL, &job) };
                finish(&mut y);
                counts.attention += self.accumulate(which, h, panel, rows, b, &y);
            }
        }
    }

    /// Adds (or, for the first head of the group, assigns) a panel's tile to `dK` or `dV`.
    fn accumulate(
        &self,
        which: usize,
        h: usize,
        panel: usize,
        rows: usize,
        block: usize,
        y: &[i32; PANEL * TILE],
    ) -> u64 {
        let c = &self.cpu.constants.attention;
        let width = TILE.min(c.head_dim - block * TILE);
        let mut count = 0;
        for r in 0..rows {
            let row = self.s.first_row + panel * PANEL + r;
            let at = (row * c.kv_heads + self.g) * c.head_dim + block * TILE;
            // SAFETY: (row, key-value head) belongs to this index.
            let to = unsafe { self.out[which].part(at, width) };
            let from = &y.as_chunks::<TILE>().0[r];
            if h == 0 {
                put(to, from);
            } else {
                count += add_saturating(self.path(), to, &from[..width]);
            }
        }
        count
    }

    /// `dS = P (dP - rowsum(dP P))` with `dP = dO V^T`.
    pub(super) fn scores_gradient(&self, h: usize, scratch: &mut Scratch, counts: &mut Counts) {
        let c = &self.cpu.constants.attention;
        let (blocks, tiles) = self.shape();
        let (d, group, stride) = (c.head_dim, c.heads / c.kv_heads, tiles * TILE);
        let Scratch { p, ds, lines, line_exponents, values, value_columns, value_max, .. } =
            scratch;
        let ds = ds.at_least(self.s.rows.next_multiple_of(PANEL) * stride);
        let lines = lines.at_least(blocks * PANEL_BLOCK);
        let exponents = line_exponents.at_least(blocks * PANEL_EXPONENTS);
        for panel in 0..self.s.rows.div_ceil(PANEL) {
            let (rows, positions) = self.positions(panel);
            let row = self.s.first_row + panel * PANEL;
            let x = &self.d_out.data[(row * c.heads + self.g * group + h) * d..];
            quantize::panel(
                self.path(),
                x,
                rows,
                d,
                c.heads * d,
                -GRADIENT_FRACTION,
                WEIGHT_BITS,
                lines,
                exponents,
            );
            for tile in 0..=positions[rows - 1] / TILE {
                let count = causal(positions, tile, blocks);
                let job = Job {
                    a: lines.as_ptr(),
                    a_exponents: exponents.as_ptr(),
                    b: values[tile * blocks * TILE_BLOCK..].as_ptr(),
                    b_exponents: value_columns[tile * TILE..].as_ptr(),
                    b_stride: 0,
                    b_max: value_max[tile..].as_ptr(),
                    b_max_stride: 0,
                    blocks,
                    bias: bias(GRADIENT_FRACTION),
                    limit: fast_limit(self.path(), blocks),
                    count: &raw const count,
                    out: ds[panel * PANEL * stride + tile * TILE..].as_mut_ptr(),
                    stride,
                };
                // SAFETY: the panel and a value tile hold `blocks` blocks; `ds` holds 6 rows.
                counts.matmul += unsafe { run(self.path(), Kind::LinesColumns, rows, &job) };
            }
            let width = (positions[rows - 1] / TILE + 1) * TILE;
            let (ds, p) = (&mut ds[panel * PANEL * stride..], &p[panel * PANEL * stride..]);
            counts.attention += softmax_gradient(self.path(), ds, p, stride, width, rows);
        }
    }

    /// `dQ = dS K / sqrt(D)`, rotated back.
    pub(super) fn queries_gradient(&self, h: usize, scratch: &mut Scratch, counts: &mut Counts) {
        let c = &self.cpu.constants.attention;
        let (blocks, tiles) = self.shape();
        let (d, group, stride) = (c.head_dim, c.heads / c.kv_heads, tiles * TILE);
        let Scratch { ds, lines, line_exponents, keys, .. } = scratch;
        let lines = lines.at_least(tiles * PANEL_BLOCK);
        let exponents = line_exponents.at_least(tiles * PANEL_EXPONENTS);
        let key_exponents = &self.cache.key_exponents[self.cached() * self.cache.capacity..];
        let count = Count::all(tiles);
        for panel in 0..self.s.rows.div_ceil(PANEL) {
            let (rows, positions) = self.positions(panel);
            let seen = positions[rows - 1] / TILE + 1;
            for (r, position) in positions.iter().take(rows).enumerate() {
                let n = (position / TILE + 1) * TILE;
                let row = &ds[(panel * PANEL + r) * stride..][..n];
                let (m, e) = (&mut *lines, &mut *exponents);
                fold(
                    self.path(),
                    row,
                    &key_exponents[..n],
                    -GRADIENT_FRACTION,
                    WEIGHT_BITS,
                    r,
                    m,
                    e,
                );
                for b in n / TILE..seen {
                    m[b * PANEL_BLOCK + r * BLOCK..][..BLOCK].fill(0);
                    e[b * PANEL_EXPONENTS + r] = ZERO_EXPONENT;
                }
            }
            quantize::finish(&mut exponents[..seen * PANEL_EXPONENTS], rows);
            let mut y = [0; PANEL * TILE];
            // SAFETY: (row, head) belongs to this index.
            let to = |r: usize| unsafe {
                let row = self.s.first_row + panel * PANEL + r;
                self.out[0].part((row * c.heads + self.g * group + h) * d, d)
            };
            for b in 0..blocks {
                let job = Job {
                    a: lines.as_ptr(),
                    a_exponents: exponents.as_ptr(),
                    b: keys[b * tiles * TILE_BLOCK..].as_ptr(),
                    b_exponents: &raw const NO_EXPONENT,
                    b_stride: 0,
                    b_max: std::ptr::null(),
                    b_max_stride: 0,
                    blocks: seen,
                    bias: bias(GRADIENT_FRACTION),
                    limit: fast_limit(self.path(), tiles),
                    count: &raw const count,
                    out: y.as_mut_ptr(),
                    stride: TILE,
                };
                // SAFETY: the panel and the keys hold `seen` blocks; `y` holds 6 rows.
                counts.matmul += unsafe { run(self.path(), Kind::Lines, rows, &job) };
                let width = TILE.min(d - b * TILE);
                scale(self.path(), &mut y, c.inverse_root);
                for (r, y) in y.as_chunks::<TILE>().0.iter().take(rows).enumerate() {
                    put(&mut to(r)[b * TILE..][..width], y);
                }
            }
            for (r, &position) in positions.iter().take(rows).enumerate() {
                counts.rope += self.rotate_back(to(r), position);
            }
        }
    }

    /// `dK += dS^T Q / sqrt(D)`.
    pub(super) fn keys_gradient(&self, h: usize, scratch: &mut Scratch, counts: &mut Counts) {
        let c = &self.cpu.constants.attention;
        let Scratch { ds, q_canonical, pairs, pair_exponents, rows: along, .. } = scratch;
        let folded = Some(&q_canonical[..self.s.rows]);
        self.pack(ds, folded, -GRADIENT_FRACTION, WEIGHT_BITS, pairs, pair_exponents);
        let right = Right { mantissas: along, exponents: None };
        let scale = |y: &mut [i32; PANEL * TILE]| scale(self.path(), y, c.inverse_root);
        self.along_rows(1, h, (pairs, pair_exponents), &right, counts, scale);
    }
}
