//! f32 values as the bytes of a tensor.

use super::ExportError;
use crate::import::dequantize::{Encoding, half};

/// How values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Single precision.
    F32,
    /// Half precision, which rounds.
    F16,
    /// Half precision for tensors that it holds exactly, single precision for the others.
    Exact,
}

/// Values as bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// F32 or F16.
    pub encoding: Encoding,
    /// Little-endian.
    pub bytes: Vec<u8>,
    /// How many values were rounded.
    pub rounded: u64,
}

impl Numbers {
    /// Writes the values of one tensor.
    pub fn new(name: &str, values: &[f32], precision: Precision) -> Result<Self, ExportError> {
        let single = || Self {
            encoding: Encoding::F32,
            bytes: values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            rounded: 0,
        };
        if precision == Precision::F32 {
            return Ok(single());
        }
        let mut bytes = Vec::with_capacity(values.len() * 2);
        let mut rounded = 0;
        for &value in values {
            let written = to_half(value);
            rounded += u64::from(written.is_none_or(|h| half(h) != value));
            match (precision, written) {
                (Precision::F16, None) => {
                    return Err(ExportError::Half { tensor: name.into(), value });
                }
                (Precision::Exact, _) if rounded > 0 => return Ok(single()),
                _ => bytes.extend(written.unwrap_or_default()),
            }
        }
        Ok(Self { encoding: Encoding::F16, bytes, rounded })
    }
}

/// The nearest number of half precision, the even one of two; `None` beyond them all.
fn to_half(x: f32) -> Option<[u8; 2]> {
    let (sign, magnitude) = (x.to_bits() >> 16 & 0x8000, x.abs());
    // Below 2^-14 halves count in units of 2^-24.
    let half = if magnitude < 1.0 / 16_384.0 {
        (magnitude * 16_777_216.0).round_ties_even() as u32
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0x0fff + (bits >> 13 & 1)) >> 13) - (112 << 10)
    };
    (half < 0x7c00).then(|| ((sign | half) as u16).to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every finite half comes back, and what lies between two goes to the nearer, ties to even.
    #[test]
    fn halves_are_rounded_to_the_nearest() {
        for h in 0..0x7c00_u16 {
            let x = half(h.to_le_bytes());
            assert_eq!(to_half(x), Some(h.to_le_bytes()));
            assert_eq!(to_half(-x), Some((h | 0x8000).to_le_bytes()));
            if h + 1 < 0x7c00 {
                let middle = f32::midpoint(x, half((h + 1).to_le_bytes()));
                let even = h + h % 2;
                assert_eq!(to_half(middle), Some(even.to_le_bytes()), "{h:#06x}");
                assert_eq!(to_half(middle.next_down()), Some(h.to_le_bytes()), "{h:#06x}");
                assert_eq!(to_half(middle.next_up()), Some((h + 1).to_le_bytes()), "{h:#06x}");
            }
        }
        assert_eq!((to_half(65_519.9), to_half(65_520.0)), (Some([0xff, 0x7b]), None));
        assert_eq!((to_half(f32::INFINITY), to_half(f32::NAN)), (None, None));
    }

    /// Half precision is taken where it is exact, and says how much it rounds where it is asked for.
    #[test]
    fn precision_is_chosen_by_what_is_exact() {
        let tensor = |values: &[f32], precision| Numbers::new("t", values, precision);
        let kind = |values: &[f32], precision| {
            let n = tensor(values, precision).unwrap();
            (n.encoding, n.rounded, n.bytes.len())
        };
        assert_eq!(kind(&[0.5, 511.0], Precision::Exact), (Encoding::F16, 0, 4));
        assert_eq!(kind(&[0.5, 4097.0], Precision::Exact), (Encoding::F32, 0, 8));
        assert_eq!(kind(&[0.5, 1e6], Precision::Exact), (Encoding::F32, 0, 8));
        assert_eq!(kind(&[0.5, 4097.0], Precision::F16), (Encoding::F16, 1, 4));
        assert_eq!(kind(&[0.5, 511.0], Precision::F32), (Encoding::F32, 0, 8));
        let error = tensor(&[1e6], Precision::F16).unwrap_err().to_string();
        assert!(error.contains("1000000") && error.starts_with("t:"), "{error}");
    }
}
