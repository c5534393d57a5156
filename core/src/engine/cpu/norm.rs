//! RMSNorm, forward into blocks and backward: `twin::rmsnorm`.
#![expect(unsafe_code, reason = "rows of the outputs are written by several threads")]

use std::sync::Mutex;
use std::sync::PoisonError;

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::rmsnorm::{NormConstants, RowScale};
use manyhands_shaders::twin::{GRADIENT_FRACTION, SHARE_FRACTION, Site};
use manyhands_shaders::x1::{bl, bl64, rne};

use super::buffer::Buffer;
use super::kernel::PANEL;
use super::operands::Panels;
use super::path::simd;
use super::quantize::{self, put, whole};
use super::scalar::{Rounding, could_clamp, integer, integers, mulsh, sat};
use super::workers::Shared;
use super::{Cpu, Tensor};

/// What RMSNorm keeps for its backward pass.
pub struct Norm {
    /// (N, C) rows divided by their root mean square.
    unit: Buffer<i32>,
    /// (N) scales as (mantissa, shift).
    scales: Buffer<i32>,
}

/// `twin::rmsnorm::row_scale`.
#[inline(always)]
fn row_scale(h: &[i32], c: &NormConstants) -> RowScale {
    let mut any = 0;
    for x in h {
        any |= x.unsigned_abs();
    }
    let prescale = (bl(any.cast_signed()) - 15).max(0).cast_unsigned();
    // Rounded values keep the factor of their shift, and their squares its square: sums of squares
    // of 16 bits are exact.
    let (by, squares) = (Rounding::new(prescale), Rounding::new(2 * prescale));
    let mut lanes = [0.0; BLOCK];
    for h in h.chunks(BLOCK) {
        let h = whole::<BLOCK>(h);
        for i in 0..BLOCK {
            let y = by.rounded(by.sum(f64::from(h[i]), &mut 0));
            lanes[i] += y * y;
        }
    }
    let mut sum = 0;
    for lane in lanes {
        sum += squares.integer(squares.sum(lane, &mut 0)).cast_unsigned();
    }
    sum += c.epsilon >> (2 * prescale);
    let up = (32 - bl64(sum)) & !1;
    let v = if up >= 0 { sum << up } else { sum >> -up } as u32;
    // Correctly rounded, with 20 bits to spare: below an integer if the exact root is.
    let root = f64::from(v).sqrt() as u32;
    let r = ((1 << 31) / root).min(65535);
    let scale = rne(i64::from(r * c.root), 16) as i32;
    RowScale { scale, shift: -(up / 2 - 31 - prescale.cast_signed() + 32 - c.root_shift) }
}

simd! {
    /// One panel of rows: unit rows, scales and quantised output; the number of clamps.
    fn forward_panel(
        h: &[i32],
        gain: &[i32],
        c: &NormConstants,
        unit: &mut [i32],
        scales: &mut [i32],
        mantissas: &mut [i16],
        exponents: &mut [i32],
    ) -> u64 {
        let width = c.width;
        let rows = h.len() / width;
        let mut count = 0;
        // All scales first: each is a long chain of dependent instructions.
        for i in 0..rows {
            let s = row_scale(&h[i * width..(i + 1) * width], c);
            scales[2 * i] = s.scale;
            scales[2 * i + 1] = s.shift;
        }
        for i in 0..rows {
            let h = &h[i * width..(i + 1) * width];
            let unit = &mut unit[i * width..(i + 1) * width];
            let s = RowScale { scale: scales[2 * i], shift: scales[2 * i + 1] };
            let shift = s.shift.cast_unsigned();
            // A scale has 16 bits: its products are exact in f64 whatever the shift.
            let (to_unit, to_out) = (Rounding::new(shift), Rounding::new(shift + 12));
            let mut redo = false;
            for (b, (h, unit)) in h.chunks(BLOCK).zip(unit.chunks_mut(BLOCK)).enumerate() {
                let (h, gain) = (whole::<BLOCK>(h), whole::<BLOCK>(&gain[b * BLOCK..]));
                let (mut u, mut y, mut flags) = ([0.0; BLOCK], [0.0; BLOCK], 0);
                for j in 0..BLOCK {
                    u[j] = to_unit.product::<FUSED>(f64::from(h[j]), f64::from(s.scale), &mut flags);
                    let x = to_unit.rounded(u[j]);
                    y[j] = to_out.product::<FUSED>(x, f64::from(gain[j]), &mut flags);
                }
                redo |= could_clamp(flags);
                put(unit, &integers(&u));
                quantize::line(&integers(&y), b, i, mantissas, exponents);
            }
            if redo {
                count += forward_counted(h, gain, s, unit, i, mantissas, exponents);
            }
        }
        quantize::finish(exponents, rows);
        count.cast_unsigned()
    }
}

/// Row `i` of a panel with clamps; their number. Apart, what the fast loop computes stays in
/// registers.
#[cold]
fn forward_counted(
    h: &[i32],
    gain: &[i32],
    s: RowScale,
    unit: &mut [i32],
    i: usize,
    mantissas: &mut [i16],
    exponents: &mut [i32],
) -> i64 {
    let mut count = 0;
    for b in 0..h.len().div_ceil(BLOCK) {
        let mut y = [0; BLOCK];
        for (j, y) in (b * BLOCK..h.len()).zip(&mut y) {
            unit[j] = mulsh(h[j], s.scale, s.shift.cast_unsigned(), &mut count);
            *y = mulsh(unit[j], gain[j], 12, &mut count);
        }
        quantize::line(&y, b, i, mantissas, exponents);
    }
    count
}

simd! {
    /// One row of the backward pass: adds to `gain_grad`, writes `dx`. `du` is scratch.
    /// Returns the number of clamps.
    fn backward_row(
        dn: &[i32],
        unit: &[i32],
        scale: i32,
        shift: u32,
        gain: &[i32],
        inverse_width: i32,
        gain_grad: &mut [i64],
        du: &mut [i32],
    ) -> u64 {
        const TO_SHARE: u32 = (16 + GRADIENT_FRACTION - SHARE_FRACTION) as u32;
        const SHARE: Rounding = Rounding::new(TO_SHARE);
        const GAIN: Rounding = Rounding::new(12);
        const ALONG: Rounding = Rounding::new(16);
        const GAIN_ALONG: Rounding = Rounding::new(12 + 16);
        let n = dn.len();
        let (unit, gain, gain_grad, du) =
            (&unit[..n], &gain[..n], &mut gain_grad[..n], &mut du[..n]);
        let mut count = 0;
        let (mut projection, mut flags) = (0_i64, 0);
        for i in 0..n {
            let (dn, unit) = (f64::from(dn[i]), f64::from(unit[i]));
            let share = SHARE.product::<FUSED>(dn, unit, &mut flags);
            let d = GAIN.product::<FUSED>(dn, f64::from(gain[i]), &mut flags);
            let along = GAIN_ALONG.product::<FUSED>(GAIN.rounded(d), unit, &mut flags);
            gain_grad[i] += SHARE.integer(share);
            du[i] = integer(d);
            // Wraps only where the sum is taken again.
            projection = projection.wrapping_add(GAIN_ALONG.integer(along));
        }
        if could_clamp(flags) {
            projection = 0;
            for i in 0..n {
                let share = SHARE.product::<FUSED>(f64::from(dn[i]), f64::from(unit[i]), &mut 0);
                gain_grad[i] -= SHARE.integer(share);
                gain_grad[i] += i64::from(mulsh(dn[i], unit[i], TO_SHARE, &mut count));
                du[i] = mulsh(dn[i], gain[i], 12, &mut count);
                projection += i64::from(mulsh(du[i], unit[i], 16, &mut count));
            }
        }
        let projection = sat(projection, &mut count);
        let mean = mulsh(projection, inverse_width, 20, &mut count);
        // Exact as in the forward pass: a difference has 32 bits.
        let (mut flags, to_out) = (0, Rounding::new(16 + shift));
        for i in 0..n {
            let along = ALONG.product::<FUSED>(f64::from(unit[i]), f64::from(mean), &mut flags);
            let d = f64::from(du[i]) * 65536.0 - ALONG.rounded(along);
            du[i] = integer(to_out.product::<FUSED>(d, f64::from(scale), &mut flags));
        }
        if could_clamp(flags) {
            for i in 0..n {
                // Counted above.
                let d = mulsh(dn[i], gain[i], 12, &mut 0);
                let along = mulsh(unit[i], mean, 16, &mut count);
                du[i] = mulsh(d - along, scale, shift, &mut count);
            }
        }
        count.cast_unsigned()
    }
}

/// Forward of `h` (N, C): blocks and what the backward pass needs.
pub(super) fn forward(cpu: &Cpu, h: &Tensor, gain: &[i32]) -> (Panels, Norm) {
    let c = &cpu.constants.norm;
    assert!(h.cols == c.width && gain.len() == c.width, "rows of another width");
    let rows = h.rows();
    let mut out = Panels::take(&cpu.pool, rows, c.width);
    let mut norm = Norm { unit: cpu.pool.take(h.data.len()), scales: cpu.pool.take(2 * rows) };
    let (panel_len, panel_exponents) = (out.panel_len(), out.panel_exponents());
    let (m, e) = (Shared::new(&mut out.mantissas), Shared::new(&mut out.exponents));
    let (unit, scales) = (Shared::new(&mut norm.unit), Shared::new(&mut norm.scales));
    cpu.workers.ranges(rows, PANEL, h.data.len() * 3 / 2, |range| {
        for first in range.clone().step_by(PANEL) {
            let (p, n) = (first / PANEL, PANEL.min(range.end - first));
            let at = first * c.width;
            // SAFETY: ranges are whole panels, each visited once.
            let (m, e, unit, scales) = unsafe {
                (
                    m.part(p * panel_len, panel_len),
                    e.part(p * panel_exponents, panel_exponents),
                    unit.part(at, n * c.width),
                    scales.part(2 * first, 2 * n),
                )
            };
            let h = &h.data[at..at + n * c.width];
            let count = forward_panel(cpu.path, h, gain, c, unit, scales, m, e);
            cpu.tally.add(Site::Norm, count);
        }
    });
    (out, norm)
}

/// Backward: adds to `grad` (C), returns `dh = sat(dh + dx)`, where `dh` of `None` is zero.
pub(super) fn backward(
    cpu: &Cpu,
    dn: &Tensor,
    norm: &Norm,
    gain: &[i32],
    grad: &mut [i64],
    dh: Option<Tensor>,
) -> Tensor {
    let width = cpu.constants.norm.width;
    let inverse_width = cpu.constants.norm.inverse_width;
    let add = dh.is_some();
    let mut out = dh.unwrap_or_else(|| cpu.tensor_of(dn.rows(), width));
    assert!(out.data.len() == dn.data.len() && grad.len() == width, "gradients of another shape");
    let shared = Shared::new(&mut out.data);
    let grad = Mutex::new(grad);
    cpu.workers.ranges(dn.rows(), 1, dn.data.len() * 5 / 2, |range| {
        let mut sum = vec![0_i64; width];
        let mut scratch = vec![0; width];
        let mut counts = (0, 0);
        for r in range {
            let at = r * width;
            let (scale, shift) = (norm.scales[2 * r], norm.scales[2 * r + 1] as u32);
            let (dn, unit) = (&dn.data[at..at + width], &norm.unit[at..at + width]);
            // SAFETY: each row is visited once.
            let out = unsafe { shared.part(at, width) };
            let to = if add { &mut scratch[..] } else { &mut *out };
            let (path, sum) = (cpu.path, &mut sum);
            counts.0 += backward_row(path, dn, unit, scale, shift, gain, inverse_width, sum, to);
            if add {
                counts.1 += super::gemm::add_saturating(cpu.path, out, &scratch);
            }
        }
        cpu.tally.add(Site::Norm, counts.0);
        cpu.tally.add(Site::Residual, counts.1);
        let mut grad = grad.lock().unwrap_or_else(PoisonError::into_inner);
        for (g, s) in grad.iter_mut().zip(sum) {
            *g += s;
        }
    });
    out
}
