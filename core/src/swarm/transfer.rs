//! What streams between peers carry, as bytes: requests, uploads of results, chunks of blobs.
//!
//! Only headers, bounds and answers are here; who reads and writes them, and how patiently, is
//! the caller's. Every stream begins with its protocol's name, which libp2p negotiates.
//!
//! ```text
//! request  u32 length, request; back: u32 length, response
//! result   unit's hash, u64 length, bytes; back: one byte, an `Ack`
//! blob     blob's hash, one byte: 1 if the list of its chunks is wanted; back: `FOUND` or another
//!          byte, then the list: u64 length of the blob, 32 bytes a chunk. From then on each
//!          u32 index is answered by that chunk, in order. An end of the stream is a refusal
//! ```
//!
//! Numbers are little-endian.

use super::chunks::{BLOB_BYTES_MAX, CHUNK_BYTES, ChunkList};
use super::ids::Hash;

/// Requests and their responses.
pub const REQUEST_PROTOCOL: &str = "/manyhands/request/1";
/// Uploads of results.
pub const RESULT_PROTOCOL: &str = "/manyhands/result/1";
/// Chunks of blobs.
pub const BLOB_PROTOCOL: &str = "/manyhands/blob/1";

/// Bytes before a request or a response.
pub const MESSAGE_HEADER_BYTES: usize = 4;
/// Bytes before a result: unit, then length.
pub const RESULT_HEADER_BYTES: usize = 40;
/// Bytes before the chunks of a blob: hash, then whether the list is wanted.
pub const BLOB_HEADER_BYTES: usize = 33;
/// Bytes before the list of chunks: the blob's length.
pub const LIST_HEADER_BYTES: usize = 8;
/// Bytes of a chunk in the list.
pub const LIST_VALUE_BYTES: usize = 32;
/// The blob is here.
pub const FOUND: u8 = 1;
/// The blob is not here.
pub const LACKING: u8 = 0;
/// Read and hashed, or written, at a time.
pub const PIECE_BYTES: usize = 256 << 10;
/// Chunks that one source is asked for ahead of what has arrived.
pub const CHUNKS_AHEAD_MAX: usize = 4;

/// A length beyond its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes are over {max}")]
pub struct TooLong {
    /// The length that a peer claims.
    pub length: u64,
    /// The bound.
    pub max: u64,
}

/// What comes before a request or a response; `None` if its length does not fit.
pub fn message_header(length: usize) -> Option<[u8; MESSAGE_HEADER_BYTES]> {
    u32::try_from(length).ok().map(u32::to_le_bytes)
}

/// The length of the message that follows.
pub fn message_length(header: [u8; MESSAGE_HEADER_BYTES], max: usize) -> Result<usize, TooLong> {
    let length = u32::from_le_bytes(header) as usize;
    let too_long = TooLong { length: length as u64, max: max as u64 };
    if length > max { Err(too_long) } else { Ok(length) }
}

/// What comes before a result.
pub fn result_header(unit: &Hash, length: u64) -> [u8; RESULT_HEADER_BYTES] {
    let mut header = [0; RESULT_HEADER_BYTES];
    header[..32].copy_from_slice(&unit.0);
    header[32..].copy_from_slice(&length.to_le_bytes());
    header
}

/// Unit and length of the result that follows. The length is only claimed.
pub fn read_result_header(header: &[u8; RESULT_HEADER_BYTES]) -> (Hash, u64) {
    let (mut unit, mut length) = ([0; 32], [0; 8]);
    unit.copy_from_slice(&header[..32]);
    length.copy_from_slice(&header[32..]);
    (Hash(unit), u64::from_le_bytes(length))
}

/// What asks for a blob.
pub fn blob_header(blob: &Hash, wants_list: bool) -> [u8; BLOB_HEADER_BYTES] {
    let mut header = [u8::from(wants_list); BLOB_HEADER_BYTES];
    header[..32].copy_from_slice(&blob.0);
    header
}

/// Which blob is asked for, and whether the list is wanted.
pub fn read_blob_header(header: &[u8; BLOB_HEADER_BYTES]) -> (Hash, bool) {
    let mut blob = [0; 32];
    blob.copy_from_slice(&header[..32]);
    (Hash(blob), header[32] != 0)
}

/// The list of a blob's chunks.
pub fn list(list: &ChunkList) -> Vec<u8> {
    let mut out = list.length.to_le_bytes().to_vec();
    list.values.iter().for_each(|v| out.extend_from_slice(v));
    out
}

/// Bytes of the values that follow, and of the blob.
pub fn read_list_header(header: [u8; LIST_HEADER_BYTES]) -> Result<(u64, u64), TooLong> {
    let length = u64::from_le_bytes(header);
    if length > BLOB_BYTES_MAX {
        return Err(TooLong { length, max: BLOB_BYTES_MAX });
    }
    Ok((length.div_ceil(CHUNK_BYTES as u64).max(1) * LIST_VALUE_BYTES as u64, length))
}

/// The list, if it is that of the blob.
pub fn read_list(blob: &Hash, length: u64, values: &[u8]) -> Option<ChunkList> {
    let values = values.as_chunks::<LIST_VALUE_BYTES>().0.to_vec();
    let list = ChunkList { length, values };
    list.verify(blob).then_some(list)
}

/// The byte that answers an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ack {
    /// All arrived, and has the receipt's hash.
    Taken = 0,
    /// Nobody expects it.
    Unexpected = 1,
    /// Too much is arriving already.
    Busy = 2,
    /// Not the receipt's bytes.
    Differs = 3,
    /// Slower than is of use.
    TooSlow = 4,
}

/// Why an upload was of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// [`Ack::Unexpected`].
    #[error("the peer does not expect it")]
    Unexpected,
    /// [`Ack::Busy`].
    #[error("the peer is busy; try again later")]
    Busy,
    /// [`Ack::Differs`].
    #[error("the bytes differ from the receipt")]
    Differs,
    /// [`Ack::TooSlow`].
    #[error("the upload is too slow")]
    TooSlow,
    /// A byte without a meaning.
    #[error("the peer answers {0}, which means nothing here")]
    Unknown(u8),
}

impl Ack {
    /// What the byte says about the upload.
    pub fn read(byte: u8) -> Result<(), NotTaken> {
        match byte {
            b if b == Self::Taken as u8 => Ok(()),
            b if b == Self::Unexpected as u8 => Err(NotTaken::Unexpected),
            b if b == Self::Busy as u8 => Err(NotTaken::Busy),
            b if b == Self::Differs as u8 => Err(NotTaken::Differs),
            b if b == Self::TooSlow as u8 => Err(NotTaken::TooSlow),
            b => Err(NotTaken::Unknown(b)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_and_lengths_are_bounded() {
        let hash = Hash::of(b"x");
        assert_eq!(read_result_header(&result_header(&hash, 77)), (hash, 77));
        for wants in [false, true] {
            assert_eq!(read_blob_header(&blob_header(&hash, wants)), (hash, wants));
        }
        let header = message_header(9).unwrap();
        assert_eq!(message_length(header, 9), Ok(9));
        assert_eq!(message_length(header, 8), Err(TooLong { length: 9, max: 8 }));
        let claimed = (BLOB_BYTES_MAX + 1).to_le_bytes();
        assert!(read_list_header(claimed).is_err());
    }

    #[test]
    fn list_of_another_blob_is_refused() {
        let blob = vec![7; CHUNK_BYTES + 1];
        let bytes = list(&ChunkList::of(&blob));
        let (header, values) = bytes.split_at(LIST_HEADER_BYTES);
        let (expected, length) = read_list_header(header.try_into().unwrap()).unwrap();
        assert_eq!((expected, length), (values.len() as u64, blob.len() as u64));
        assert_eq!(read_list(&Hash::of(&blob), length, values), Some(ChunkList::of(&blob)));
        assert_eq!(read_list(&Hash::of(b"other"), length, values), None);
        assert_eq!(read_list(&Hash::of(&blob), length, &values[..32]), None);
    }

    #[test]
    fn answer_without_a_meaning_is_no_success() {
        assert_eq!(Ack::read(Ack::Taken as u8), Ok(()));
        assert_eq!(Ack::read(Ack::Busy as u8), Err(NotTaken::Busy));
        assert_eq!(Ack::read(200), Err(NotTaken::Unknown(200)));
    }
}
