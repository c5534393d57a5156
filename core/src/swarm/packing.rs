//! Lossless packing of unsigned integers: Rice codes with one parameter a block of [`BLOCK`].
//!
//! ```text
//! block   header (7 bits): 0 = all values are 0, else k + 1; then each value
//! value   q = value >> k as q ones and a zero, then the low k bits of the value
//! k       floor(log2(mean of the block)), and 0 for a mean below 1
//! end     zeros to a whole byte
//! ```
//!
//! Bits fill bytes from the lowest up. The parameter is a function of the values, and the decoder
//! derives it again: of every sequence there is exactly one encoding, and all else is refused.
//! With the floor of the mean's logarithm a block's ones number less than twice its values, which
//! bounds a block whatever it holds. How many values there are is not part of the bytes.
//!
//! Why Rice: see the numbers in [`super::share`]. Nothing here knows signs; [`zigzag`] folds them.

/// Values that share a parameter.
pub const BLOCK: usize = 128;
/// Bytes that a block takes at most, alone: header, values of 64 bits, zeros and ones.
pub const BLOCK_BYTES_MAX: usize = (HEADER_BITS as usize + BLOCK * (63 + 1 + 2)).div_ceil(8);

const HEADER_BITS: u32 = 7;
/// Bytes of the length in front of a part.
const LENGTH_BYTES: usize = 8;
/// Ones in a block are fewer than this: its parameter is at least the logarithm of half the mean.
const ONES_MAX: u64 = 2 * BLOCK as u64;
/// Bits that [`BitReader::peek`] always has.
const PEEK_BITS: u32 = 57;

/// Bytes that [`pack`] does not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackingError {
    /// Values are missing.
    #[error("the packed values end too early")]
    Truncated,
    /// Bytes follow the last value.
    #[error("{0} bytes follow the packed values")]
    Trailing(u64),
    /// The same values, or none, packed as nobody does.
    #[error("the packed values are not in their one encoding")]
    NotCanonical,
}

/// Small magnitudes to small numbers: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
pub fn zigzag(x: i64) -> u64 {
    ((x << 1) ^ (x >> 63)).cast_unsigned()
}

/// The inverse of [`zigzag`].
pub fn unzigzag(z: u64) -> i64 {
    (z >> 1).cast_signed() ^ -(z & 1).cast_signed()
}

/// Appends the packed values to `out`, in whole bytes.
pub fn pack(values: impl IntoIterator<Item = u64>, out: &mut Vec<u8>) {
    let mut writer = BitWriter { out, word: 0, used: 0 };
    let mut values = values.into_iter();
    let mut block = [0; BLOCK];
    loop {
        let mut n = 0;
        for (to, value) in block.iter_mut().zip(values.by_ref()) {
            *to = value;
            n += 1;
        }
        if n > 0 {
            pack_block(&block[..n], &mut writer);
        }
        if n < BLOCK {
            return writer.finish();
        }
    }
}

/// The header that a block of these values must have.
fn header(values: &[u64]) -> u64 {
    let sum: u128 = values.iter().map(|v| u128::from(*v)).sum();
    if sum == 0 {
        return 0;
    }
    u64::from((sum / values.len() as u128).max(1).ilog2()) + 1
}

fn pack_block(values: &[u64], writer: &mut BitWriter<'_>) {
    let header = header(values);
    writer.put(header, HEADER_BITS);
    if header == 0 {
        return;
    }
    let k = header as u32 - 1;
    let mask = (1 << k) - 1;
    for &value in values {
        let (q, low) = (value >> k, value & mask);
        if q + u64::from(k) < 63 {
            writer.put(((1 << q) - 1) | low << (q + 1), q as u32 + 1 + k);
            continue;
        }
        (0..q).for_each(|_| writer.put(1, 1));
        writer.put(0, 1);
        writer.put(low, k);
    }
}

/// Bits into bytes, lowest first.
struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    word: u64,
    used: u32,
}

impl BitWriter<'_> {
    /// Appends the `count` (below 64) low bits; the others must be 0.
    fn put(&mut self, bits: u64, count: u32) {
        self.word |= bits << self.used;
        self.used += count;
        if self.used >= 64 {
            self.out.extend_from_slice(&self.word.to_le_bytes());
            self.used -= 64;
            // The bits that did not fit; `count` is above `used` unless all of them did.
            self.word = bits >> (count - self.used);
        }
    }

    fn finish(self) {
        let bytes = self.used.div_ceil(8) as usize;
        self.out.extend_from_slice(&self.word.to_le_bytes()[..bytes]);
    }
}

/// Reads what [`pack`] wrote, block by block.
pub struct Unpacker<'a> {
    reader: BitReader<'a>,
}

impl<'a> Unpacker<'a> {
    /// At the first block of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { reader: BitReader { bytes, at: 0 } }
    }

    /// Reads the next block: [`BLOCK`] values, or fewer if they are the last. `values` are assigned.
    ///
    /// # Panics
    /// If more than a block is asked for.
    pub fn block(&mut self, values: &mut [u64]) -> Result<(), PackingError> {
        assert!(values.len() <= BLOCK, "a block holds {BLOCK} values");
        if values.is_empty() {
            return Ok(());
        }
        let read = self.reader.take(HEADER_BITS);
        match u32::try_from(read).unwrap_or(u32::MAX) {
            0 => values.fill(0),
            header @ 1..=64 => self.reader.values(header - 1, values)?,
            _ => return Err(PackingError::NotCanonical),
        }
        if self.reader.at > self.reader.bytes.len() as u64 * 8 {
            return Err(PackingError::Truncated);
        }
        if header(values) != read {
            return Err(PackingError::NotCanonical);
        }
        Ok(())
    }

    /// The bytes after the last block.
    pub fn rest(self) -> Result<&'a [u8], PackingError> {
        let BitReader { bytes, at } = self.reader;
        let end = usize::try_from(at.div_ceil(8)).unwrap_or(usize::MAX);
        let Some((_, rest)) = bytes.split_at_checked(end) else {
            return Err(PackingError::Truncated);
        };
        if at % 8 != 0 && bytes[end - 1] >> (at % 8) != 0 {
            return Err(PackingError::NotCanonical);
        }
        Ok(rest)
    }

    /// Checks that nothing follows the last block.
    pub fn finish(self) -> Result<(), PackingError> {
        match self.rest()?.len() {
            0 => Ok(()),
            rest => Err(PackingError::Trailing(rest as u64)),
        }
    }
}

/// Reads `count` values; returns them and the bytes that follow. Allocates eight bytes a value,
/// and nothing if so many values cannot be there; still, zeros are so short that the caller
/// bounds `count`.
pub fn unpack(bytes: &[u8], count: usize) -> Result<(Vec<u64>, &[u8]), PackingError> {
    let bits = count.div_ceil(BLOCK) as u64 * u64::from(HEADER_BITS);
    if bits > bytes.len() as u64 * 8 {
        return Err(PackingError::Truncated);
    }
    let mut values = vec![0; count];
    let mut unpacker = Unpacker::new(bytes);
    values.chunks_mut(BLOCK).try_for_each(|block| unpacker.block(block))?;
    Ok((values, unpacker.rest()?))
}

/// Parts with their lengths in front, so that they can be read all at once.
pub fn join(parts: &[Vec<u8>], out: &mut Vec<u8>) {
    out.reserve(parts.iter().map(|p| p.len() + LENGTH_BYTES).sum());
    parts.iter().for_each(|p| out.extend_from_slice(&(p.len() as u64).to_le_bytes()));
    parts.iter().for_each(|p| out.extend_from_slice(p));
}

/// The `count` parts that [`join`] put together, or `None` if lengths and bytes do not agree.
pub fn split(bytes: &[u8], count: usize) -> Option<Vec<&[u8]>> {
    let (lengths, mut rest) = bytes.split_at_checked(count.checked_mul(LENGTH_BYTES)?)?;
    let mut parts = Vec::with_capacity(count);
    for length in lengths.as_chunks().0 {
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let part;
        (part, rest) = rest.split_at_checked(length)?;
        parts.push(part);
    }
    rest.is_empty().then_some(parts)
}

/// Bits out of bytes. Past the end all bits are 0, so that no loop over ones can run on.
struct BitReader<'a> {
    bytes: &'a [u8],
    /// Position in bits; past the end if too much was taken.
    at: u64,
}

impl BitReader<'_> {
    /// At least [`PEEK_BITS`] bits from here on, lowest first.
    #[inline(always)] // the decoder's inner loop
    fn peek(&self) -> u64 {
        let from = usize::try_from(self.at / 8).unwrap_or(usize::MAX).min(self.bytes.len());
        let rest = &self.bytes[from..];
        let word = rest.first_chunk().copied().unwrap_or_else(|| {
            let mut padded = [0; 8];
            padded[..rest.len()].copy_from_slice(rest);
            padded
        });
        u64::from_le_bytes(word) >> (self.at % 8)
    }

    /// The next `count` (below 64) bits.
    fn take(&mut self, count: u32) -> u64 {
        let first = count.min(32);
        let low = self.peek() & ((1 << first) - 1);
        self.at += u64::from(first);
        let high = self.peek() & ((1 << (count - first)) - 1);
        self.at += u64::from(count - first);
        low | high << first
    }

    /// Reads values with parameter `k`; they are assigned.
    fn values(&mut self, k: u32, values: &mut [u64]) -> Result<(), PackingError> {
        let mask = (1 << k) - 1;
        for value in values {
            let word = self.peek();
            let ones = word.trailing_ones();
            if ones + k < PEEK_BITS {
                let low = (word >> ones >> 1) & mask;
                *value = u64::from(ones) << k | low;
                self.at += u64::from(ones + 1 + k);
            } else {
                *value = self.long_value(k)?;
            }
        }
        Ok(())
    }

    /// Reads a value that may not fit one [`Self::peek`].
    fn long_value(&mut self, k: u32) -> Result<u64, PackingError> {
        let mut ones = 0;
        loop {
            let next = self.peek().trailing_ones().min(PEEK_BITS);
            self.at += u64::from(next);
            ones += u64::from(next);
            if next < PEEK_BITS {
                break;
            }
            if ones > ONES_MAX {
                return Err(PackingError::NotCanonical);
            }
        }
        self.at += 1;
        if ones > u64::MAX >> k {
            return Err(PackingError::NotCanonical);
        }
        Ok(ones << k | self.take(k))
    }
}

#[cfg(test)]
mod tests;
