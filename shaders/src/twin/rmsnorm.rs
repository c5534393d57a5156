//! RMSNorm (Zhang and Sennrich 2019): `n = h / rms(h) * gain`, and its gradient.

use super::{GRADIENT_FRACTION, SHARE_FRACTION, Saturations, Site};
use crate::x1::{bl, bl64, isqrt, mulsh_wide, rne};

/// Integer constants of an RMSNorm over C channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormConstants {
    /// C.
    pub width: usize,
    /// `floor(eps * C * 2^32)`: eps in the units of a sum of squares of `FX(16)` values.
    pub epsilon: u64,
    /// `round(sqrt(C) * 2^root_shift)`, at most 2^15.
    pub root: u32,
    /// `15 - ceil(log2(sqrt(C)))`.
    pub root_shift: i32,
    /// `round(2^20 / C)`.
    pub inverse_width: i32,
}

impl NormConstants {
    /// Constants for `width` channels. `epsilon` (about 1e-5) must be at least 1e-7, which keeps
    /// every shift of the normalisation positive.
    pub fn new(width: usize, epsilon: f64) -> Self {
        assert!((1e-7..=1.0).contains(&epsilon), "rms epsilon {epsilon} is outside [1e-7, 1]");
        // ceil(log2(sqrt(C))) is the least k with 4^k >= C.
        let ceil_log2_root = (0..16).find(|k| 1_usize << (2 * k) >= width).unwrap_or(16);
        let root_shift = 15 - ceil_log2_root;
        let root = ((width as f64).sqrt() * f64::from(1 << root_shift)).round_ties_even();
        Self {
            width,
            epsilon: (epsilon * width as f64 * 4_294_967_296.0) as u64,
            root: root as u32,
            root_shift,
            inverse_width: ((65536.0 / width as f64) * 16.0).round_ties_even() as i32,
        }
    }
}

/// What the backward pass needs of a normalised row: `h / rms = (h * scale) >> shift`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowScale {
    /// Mantissa of `1 / rms`, at most 2^15.
    pub scale: i32,
    /// Right shift, positive.
    pub shift: i32,
}

/// `1 / sqrt(mean(h^2) + eps)` of one row of `FX(16)` values.
///
/// The row is prescaled to 15 bits, its squares summed exactly in 64 bits, the sum brought to
/// [2^30, 2^32) by an even shift, and the root and its reciprocal taken in integers.
pub fn row_scale(h: &[i32], c: &NormConstants) -> RowScale {
    let max = h.iter().map(|x| x.unsigned_abs()).max().unwrap_or(0);
    let prescale = (bl(max.cast_signed()) - 15).max(0);
    let mut sum = c.epsilon >> (2 * prescale);
    for &x in h {
        let y = rne(i64::from(x), prescale);
        sum += (y * y) as u64;
    }
    let up = (32 - bl64(sum)) & !1;
    let v = if up >= 0 { sum << up } else { sum >> -up } as u32;
    let r = ((1 << 31) / isqrt(v)).min(65535);
    let scale = rne(i64::from(r * c.root), 16) as i32;
    RowScale { scale, shift: -(up / 2 - 31 - prescale + 32 - c.root_shift) }
}

/// Forward: `h` (N, C) in `FX(16)`, `gain` (C) in Q3.12. Returns the unscaled rows `h / rms`, the
/// scaled rows, both (N, C) in `FX(16)`, and (N) row scales.
pub fn forward(
    h: &[i32],
    gain: &[i32],
    c: &NormConstants,
    saturations: &mut Saturations,
) -> (Vec<i32>, Vec<i32>, Vec<RowScale>) {
    let (mut unit, mut out, mut scales) = (Vec::new(), Vec::new(), Vec::new());
    for row in h.chunks_exact(c.width) {
        let s = row_scale(row, c);
        for (&x, &g) in row.iter().zip(gain) {
            let u = saturations.mulsh(Site::Norm, x, s.scale, s.shift);
            unit.push(u);
            out.push(saturations.mulsh(Site::Norm, u, g, 12));
        }
        scales.push(s);
    }
    (unit, out, scales)
}

/// Backward: `dn` (N, C) in `FX(20)`, `unit` and `scales` from [`forward`].
/// Returns the gradient of `h` (N, C) in `FX(20)`; `gain_grad` (C) in `FX(16)` is `+=`.
pub fn backward(
    dn: &[i32],
    unit: &[i32],
    scales: &[RowScale],
    gain: &[i32],
    c: &NormConstants,
    gain_grad: &mut [i64],
    saturations: &mut Saturations,
) -> Vec<i32> {
    const TO_SHARE: i32 = 16 + GRADIENT_FRACTION - SHARE_FRACTION;
    let mut out = Vec::with_capacity(dn.len());
    for (row, s) in scales.iter().enumerate() {
        let at = row * c.width..(row + 1) * c.width;
        let (dn, unit) = (&dn[at.clone()], &unit[at]);
        let mut projection = 0_i64;
        let mut du = Vec::with_capacity(c.width);
        for i in 0..c.width {
            gain_grad[i] += i64::from(saturations.mulsh(Site::Norm, dn[i], unit[i], TO_SHARE));
            du.push(saturations.mulsh(Site::Norm, dn[i], gain[i], 12));
            projection += i64::from(saturations.mulsh(Site::Norm, du[i], unit[i], 16));
        }
        let projection = saturations.sat(Site::Norm, projection);
        let mean = saturations.mulsh(Site::Norm, projection, c.inverse_width, 20);
        for i in 0..c.width {
            let along = saturations.mulsh(Site::Norm, unit[i], mean, 16);
            // Two clamped values differ by at most 2^31 - 2: no overflow.
            let dx = mulsh_wide(du[i] - along, s.scale, s.shift);
            out.push(saturations.sat(Site::Norm, dx));
        }
    }
    out
}
