//! Products of panels with packed weights.
#![expect(unsafe_code, reason = "drives kernels over raw panels")]

use manyhands_shaders::twin::{ACTIVATION_FRACTION, GRADIENT_FRACTION, Site};
use manyhands_shaders::x1::LIM;

use super::kernel::{Count, Job, Kind, PANEL, TILE, bias, fast_limit, run};
use super::operands::{Packed, Panels};
use super::path::simd;
use super::workers::Shared;
use super::{Cpu, Tensor};

/// What to do with a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// `out = product`.
    Store,
    /// `out = sat(out + product)`, counted as residual.
    Add,
}

/// A left operand's bytes that stay in L1 while tiles stream by from L2,
const NEAR_BYTES: usize = 20 << 10;
/// or in L2 while they come from further away: right operands above [`FAR`] bytes.
const FAR_BYTES: usize = 256 << 10;
/// See [`FAR_BYTES`].
const FAR: usize = 640 << 10;

simd! {
    /// `to = sat(to + from)`: the number of clamps.
    pub(super) fn add_saturating(to: &mut [i32], from: &[i32]) -> u64 {
        let mut count = 0_u32;
        for (a, &b) in to.iter_mut().zip(from) {
            // Both are within the limit: the sum cannot wrap.
            let sum = *a + b;
            *a = sum.clamp(-LIM, LIM);
            count += u32::from(*a != sum);
        }
        count.into()
    }
}

/// Nanoseconds, about, of 6 rows by 32 columns by 32 terms on the fastest path.
pub(super) const PANEL_BLOCK_NS: usize = 60;

/// A product in the making.
pub(super) struct Product<'a> {
    pub(super) cpu: &'a Cpu,
    /// (R, K).
    pub(super) a: &'a Panels,
    /// (K, N).
    pub(super) b: &'a Packed,
    /// Columns of the output.
    pub(super) cols: usize,
    /// Fraction of the output.
    pub(super) f: i32,
    count: Count,
    /// From [`fast_limit`].
    pub(super) limit: i32,
    /// (R, `cols`).
    pub(super) out: Shared<'a, i32>,
    pub(super) output: Output,
}

impl Product<'_> {
    /// Nanoseconds, about.
    pub(super) fn cost(&self) -> usize {
        self.a.rows * self.b.tiles * self.a.blocks * PANEL_BLOCK_NS / PANEL
    }

    /// All of it.
    fn run(&self) {
        let Self { cpu, a, b, .. } = *self;
        let panels = a.rows.div_ceil(PANEL);
        let near = b.mantissas.len() * 2 <= FAR;
        let bytes = if near { NEAR_BYTES } else { FAR_BYTES };
        let group = (bytes / (a.panel_len() * 2).max(1)).clamp(2, 64);
        let groups = panels.div_ceil(group);
        // With few groups the tiles are split as well, so that every thread finds work.
        let threads = cpu.workers.threads();
        let splits =
            if threads == 1 { 1 } else { (threads * 4).div_ceil(groups.max(1)).min(b.tiles) };
        let span = b.tiles.div_ceil(splits.max(1)).max(1);
        let splits = b.tiles.div_ceil(span);
        cpu.workers.each(groups * splits, self.cost(), |i| {
            let (first, tile) = (i / splits * group, i % splits * span);
            let mut events = (0, 0);
            for tile in tile..b.tiles.min(tile + span) {
                for panel in first..panels.min(first + group) {
                    self.panel(panel, tile, &mut events);
                }
            }
            cpu.tally.add(Site::Matmul, events.0);
            cpu.tally.add(Site::Residual, events.1);
        });
    }

    /// One panel of rows by one tile of columns; `events` counts terms and residuals.
    pub(super) fn panel(&self, panel: usize, tile: usize, events: &mut (u64, u64)) {
        let Self { cpu, a, b, cols, .. } = *self;
        let mut scratch = [0_i32; PANEL * TILE];
        let width = TILE.min(cols - tile * TILE);
        let rows = PANEL.min(a.rows - panel * PANEL);
        let direct = self.output == Output::Store && width == TILE;
        let to = panel * PANEL * cols + tile * TILE;
        // SAFETY: each (panel, tile) is written by one index only. Only its own 32 columns
        // are touched of the rows that the part spans, and no reference to it is kept.
        let (out, stride) = if direct {
            (unsafe { self.out.pointer(to, (rows - 1) * cols + TILE) }, cols)
        } else {
            (scratch.as_mut_ptr(), TILE)
        };
        let job = Job {
            a: a.mantissas[panel * a.panel_len()..].as_ptr(),
            a_exponents: a.exponents[panel * a.panel_exponents()..].as_ptr(),
            b: b.mantissas[tile * b.blocks * TILE * 32..].as_ptr(),
            b_exponents: b.exponents[tile * b.blocks..].as_ptr(),
            b_stride: 1,
            b_max: std::ptr::null(),
            b_max_stride: 0,
            blocks: a.blocks,
            bias: bias(self.f),
            limit: self.limit,
            count: &raw const self.count,
            out,
            stride,
        };
        // SAFETY: operands hold `blocks` blocks of this panel and tile; `out` as above.
        events.0 += unsafe { run(cpu.path, Kind::Lines, rows, &job) };
        if direct {
            return;
        }
        for r in 0..rows {
            // SAFETY: as above; the parts of a row are this tile's columns only.
            let row = unsafe { self.out.part(to + r * cols, width) };
            let from = &scratch[r * TILE..r * TILE + width];
            match self.output {
                Output::Store => row.copy_from_slice(from),
                Output::Add => events.1 += add_saturating(cpu.path, row, from),
            }
        }
    }
}

/// Each `out` (R, N) from `a` (R, K) and its `b` (K, N), in `FX(f)`.
pub(super) fn matmul<const K: usize>(
    cpu: &Cpu,
    a: &Panels,
    b: [&Packed; K],
    out: [&mut Tensor; K],
    f: i32,
    output: Output,
) {
    debug_assert!(f == ACTIVATION_FRACTION || f == GRADIENT_FRACTION);
    let (count, limit) = (Count::all(a.blocks), fast_limit(cpu.path, a.blocks));
    let products = b.into_iter().zip(out).map(|(b, out)| {
        assert_eq!(a.blocks, b.blocks, "operands differ in the contraction");
        let fits = out.rows() == a.rows && out.cols <= b.tiles * TILE;
        assert!(fits, "output of another shape");
        let (cols, out) = (out.cols, Shared::new(&mut out.data));
        Product { cpu, a, b, cols, f, count, limit, out, output }
    });
    let products: Vec<Product<'_>> = products.collect();
    #[cfg(target_arch = "x86_64")]
    if super::amx::pays(cpu.path, a.rows) {
        return super::amx::matmul(&products);
    }
    products.iter().for_each(Product::run);
}
