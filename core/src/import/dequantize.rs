//! Number formats of open weights, to f32.
//!
//! The block formats are those of ggml: a row is cut into blocks with scales of their own. What a
//! block's fields mean is in its function; scales are half precision, and every product below is
//! exact in f32 but for the last addition.

use super::{ImportError, error};

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Encoding {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
    /// 8 bits and a scale for 32 numbers.
    Q8_0,
    /// 4 bits and a scale for 32 numbers.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32 numbers.
    Q4_1,
    /// 5 bits and a scale for 32 numbers.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32 numbers.
    Q5_1,
    /// 4 bits, 8 scales and minima of 6 bits for 256 numbers.
    Q4K,
    /// 5 bits, 8 scales and minima of 6 bits for 256 numbers.
    Q5K,
    /// 6 bits, 16 scales of 8 bits for 256 numbers.
    Q6K,
}

impl Encoding {
    /// All of them, with their names and their numbers in GGUF.
    const ALL: [(Self, &'static str, u32); 11] = [
        (Self::F32, "F32", 0),
        (Self::F16, "F16", 1),
        (Self::Bf16, "BF16", 30),
        (Self::Q8_0, "Q8_0", 8),
        (Self::Q4_0, "Q4_0", 2),
        (Self::Q4_1, "Q4_1", 3),
        (Self::Q5_0, "Q5_0", 6),
        (Self::Q5_1, "Q5_1", 7),
        (Self::Q4K, "Q4_K", 12),
        (Self::Q5K, "Q5_K", 13),
        (Self::Q6K, "Q6_K", 14),
    ];

    /// The encoding of that number in GGUF.
    pub fn from_ggml(number: u32) -> Option<Self> {
        Self::ALL.iter().find(|e| e.2 == number).map(|e| e.0)
    }

    /// Its number in GGUF.
    pub fn ggml(self) -> u32 {
        Self::ALL.iter().find(|e| e.0 == self).map_or(0, |e| e.2)
    }

    /// As GGUF files and their makers call it.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|e| e.0 == self).map_or("", |e| e.1)
    }

    /// Names of all encodings, for errors.
    pub fn names() -> String {
        Self::ALL.map(|e| e.1).join(", ")
    }

    /// Numbers and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of a tensor whose rows have `row` numbers, or `None` if its blocks do not fill the
    /// rows or the number is beyond all memory.
    pub fn bytes(self, dims: &[usize]) -> Option<usize> {
        let (numbers, bytes) = self.block();
        let row = dims.last().copied().unwrap_or(1);
        let count = dims.iter().try_fold(1_usize, |n, d| n.checked_mul(*d))?;
        if row % numbers != 0 {
            return None;
        }
        (count / numbers).checked_mul(bytes)
    }
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// Number format.
    pub encoding: Encoding,
    /// Dimensions, the contiguous one last.
    pub dims: Vec<usize>,
    /// What [`Encoding::bytes`] says, exactly.
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// The numbers, row after row. All must be finite.
    pub fn read(&self, name: &str) -> Result<Vec<f32>, ImportError> {
        let out = dequantize(self.encoding, self.bytes);
        match out.iter().position(|x| !x.is_finite()) {
            None => Ok(out),
            Some(at) => {
                Err(error(name, format!("element {at} is not finite; the file is damaged")))
            }
        }
    }
}

/// Half precision to single, exactly.
pub fn half(bytes: [u8; 2]) -> f32 {
    let h = u32::from(u16::from_le_bytes(bytes));
    let (sign, exponent, fraction) = (h >> 15 << 31, h >> 10 & 31, h & 1023);
    if exponent == 31 {
        return f32::from_bits(sign | 0x7f80_0000 | fraction << 13);
    }
    // Subnormals count in units of 2^-24, which single precision holds as normal numbers.
    let magnitude = if exponent == 0 {
        fraction as f32 * (1.0 / 16_777_216.0)
    } else {
        f32::from_bits((exponent + 112) << 23 | fraction << 13)
    };
    f32::from_bits(sign | magnitude.to_bits())
}

/// All numbers of whole blocks; a rest of less than a block is left out.
pub fn dequantize(encoding: Encoding, bytes: &[u8]) -> Vec<f32> {
    let (numbers, size) = encoding.block();
    let mut out = Vec::with_capacity(bytes.len() / size * numbers);
    let read: fn(&[u8], &mut Vec<f32>) = match encoding {
        Encoding::F32 => |b, out| out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        Encoding::F16 => |b, out| out.push(half([b[0], b[1]])),
        Encoding::Bf16 => |b, out| out.push(f32::from_le_bytes([0, 0, b[0], b[1]])),
        Encoding::Q8_0 => |b, out| {
            let d = at(b, 0);
            out.extend(b[2..].iter().map(|q| d * f32::from(q.cast_signed())));
        },
        Encoding::Q4_0 => |b, out| nibbles(&b[2..], None, out, at(b, 0), -8.0, 0.0),
        Encoding::Q4_1 => |b, out| nibbles(&b[4..], None, out, at(b, 0), 0.0, at(b, 2)),
        Encoding::Q5_0 => |b, out| nibbles(&b[6..], Some(&b[2..6]), out, at(b, 0), -16.0, 0.0),
        Encoding::Q5_1 => |b, out| nibbles(&b[8..], Some(&b[4..8]), out, at(b, 0), 0.0, at(b, 2)),
        Encoding::Q4K => |b, out| k_minima(b, None, &b[16..], out),
        Encoding::Q5K => |b, out| k_minima(b, Some(&b[16..48]), &b[48..], out),
        Encoding::Q6K => q6_k,
    };
    for block in bytes.chunks_exact(size) {
        read(block, &mut out);
    }
    out
}

/// The half-precision number at a byte offset.
fn at(block: &[u8], offset: usize) -> f32 {
    half([block[offset], block[offset + 1]])
}

/// 32 numbers `d (q + bias) + minimum`: the low nibbles of 16 bytes, then the high ones; a fifth
/// bit of number `i` is bit `i` of `fifth`.
fn nibbles(q: &[u8], fifth: Option<&[u8]>, out: &mut Vec<f32>, d: f32, bias: f32, minimum: f32) {
    let high = fifth.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    for i in 0..32 {
        let low = (q[i % 16] >> (i / 16 * 4)) & 15;
        let value = u32::from(low) | (high >> i & 1) << 4;
        out.push(d * (value as f32 + bias) + minimum);
    }
}

/// Eight groups of 32 numbers `d s q - m t` with 6-bit scales `s` and `t`: halves `d` and `m`,
/// 12 bytes of scales, 32 bytes of fifth bits (one bit a group) or none, 128 bytes of nibbles.
fn k_minima(block: &[u8], fifth: Option<&[u8]>, q: &[u8], out: &mut Vec<f32>) {
    let (d, m, s) = (at(block, 0), at(block, 2), &block[4..16]);
    for group in 0..8 {
        // Groups 4 to 7 keep their low four bits in the last bytes, their high two in the first.
        let (scale, minimum) = if group < 4 {
            (s[group] & 63, s[group + 4] & 63)
        } else {
            let low = s[group + 4];
            (low & 15 | s[group - 4] >> 6 << 4, low >> 4 | s[group] >> 6 << 4)
        };
        let (scale, minimum) = (d * f32::from(scale), m * f32::from(minimum));
        for i in 0..32 {
            let low = (q[group / 2 * 32 + i] >> (group % 2 * 4)) & 15;
            let high = fifth.map_or(0, |h| (h[i] >> group & 1) << 4);
            out.push(scale * f32::from(low | high) - minimum);
        }
    }
}

/// Sixteen groups of 16 numbers `d s (q - 32)`: 128 bytes of low nibbles, 64 bytes of high pairs of
/// bits, 16 signed scales, and the half `d`.
fn q6_k(block: &[u8], out: &mut Vec<f32>) {
    let d = at(block, 208);
    for i in 0..256 {
        let (half, quarter, l) = (i / 128, i / 32 % 4, i % 32);
        let low = (block[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4)) & 15;
        let high = block[128 + half * 32 + l] >> (quarter * 2) & 3;
        let scale = block[192 + i / 16].cast_signed();
        out.push(d * f32::from(scale) * (f32::from(low | high << 4) - 32.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every finite half is what its definition says.
    #[test]
    fn half_is_exact() {
        for h in 0..=u16::MAX {
            let (exponent, fraction) = (i32::from(h >> 10 & 31), f64::from(h & 1023));
            let got = half(h.to_le_bytes());
            if exponent == 31 {
                assert!(!got.is_finite());
                continue;
            }
            let magnitude = match exponent {
                0 => fraction * 2_f64.powi(-24),
                e => (1024.0 + fraction) * 2_f64.powi(e - 25),
            };
            let expected = if h >> 15 == 1 { -magnitude } else { magnitude };
            assert_eq!(f64::from(got).to_bits(), expected.to_bits(), "{h:#06x}");
        }
    }

    #[test]
    fn bytes_of_partial_blocks_and_of_overflowing_counts_are_refused() {
        assert_eq!(Encoding::Q4_1.bytes(&[3, 64]), Some(120));
        assert_eq!(Encoding::Q4_1.bytes(&[2, 48]), None);
        assert_eq!(Encoding::F32.bytes(&[usize::MAX, 2]), None);
        assert_eq!(Encoding::F32.bytes(&[usize::MAX / 2, 1]), None);
    }
}
