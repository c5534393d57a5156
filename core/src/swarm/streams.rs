//! What the streams between peers begin with. The streams themselves belong to `node` and `web`.
//!
//! ```text
//! message  length u32; so many bytes
//! upload   unit 32 bytes, length u64; so many bytes; back: one byte
//! blob     hash 32 bytes, whether the chunk list is wanted u8; back: one byte, 1 where the blob is
//!          here, then the list if it was wanted: length u64, 32 bytes a chunk; from then on each
//!          chunk index u32 is answered by the chunk
//! ```

use super::chunks::{BLOB_BYTES_MAX, CHUNK_BYTES, ChunkList};
use super::ids::Hash;

/// Bytes of an [`UploadHeader`].
pub const UPLOAD_HEADER_BYTES: usize = 40;
/// Bytes of a [`BlobHeader`].
pub const BLOB_HEADER_BYTES: usize = 33;
/// Bytes of one value of a chunk list.
const VALUE_BYTES: usize = 32;

/// The length that begins a message, if it is at most `bytes_max`.
pub fn message_bytes(prefix: [u8; 4], bytes_max: usize) -> Option<usize> {
    let length = usize::try_from(u32::from_le_bytes(prefix)).ok()?;
    (length <= bytes_max).then_some(length)
}

/// Begins the upload of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UploadHeader {
    /// Hash of the unit.
    pub unit: Hash,
    /// Bytes that follow.
    pub length: u64,
}

impl UploadHeader {
    /// The bytes on the stream.
    pub fn encode(&self) -> [u8; UPLOAD_HEADER_BYTES] {
        let mut bytes = [0; UPLOAD_HEADER_BYTES];
        bytes[..32].copy_from_slice(&self.unit.0);
        bytes[32..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// What the bytes say. Whether so much is expected is for the caller to check.
    pub fn decode(bytes: &[u8; UPLOAD_HEADER_BYTES]) -> Self {
        let (mut unit, mut length) = ([0; 32], [0; 8]);
        unit.copy_from_slice(&bytes[..32]);
        length.copy_from_slice(&bytes[32..]);
        Self { unit: Hash(unit), length: u64::from_le_bytes(length) }
    }
}

/// Begins a stream of chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobHeader {
    /// Hash of the blob.
    pub blob: Hash,
    /// Whether the chunk list comes first.
    pub wants_list: bool,
}

impl BlobHeader {
    /// The bytes on the stream.
    pub fn encode(&self) -> [u8; BLOB_HEADER_BYTES] {
        let mut bytes = [u8::from(self.wants_list); BLOB_HEADER_BYTES];
        bytes[..32].copy_from_slice(&self.blob.0);
        bytes
    }

    /// What the bytes say, unless no peer writes them.
    pub fn decode(bytes: &[u8; BLOB_HEADER_BYTES]) -> Option<Self> {
        let mut blob = [0; 32];
        blob.copy_from_slice(&bytes[..32]);
        let wants_list = match bytes[32] {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self { blob: Hash(blob), wants_list })
    }
}

/// How many bytes of values follow the length of a chunk list, if there can be such a blob.
pub fn list_bytes(blob_bytes: u64) -> Option<usize> {
    if blob_bytes > BLOB_BYTES_MAX {
        return None;
    }
    let chunks = blob_bytes.div_ceil(CHUNK_BYTES as u64).max(1);
    usize::try_from(chunks).ok().map(|chunks| chunks * VALUE_BYTES)
}

/// The list of the blob of this hash and length, if these are its values.
pub fn read_list(blob: &Hash, length: u64, values: &[u8]) -> Option<ChunkList> {
    if list_bytes(length) != Some(values.len()) {
        return None;
    }
    let list = ChunkList { length, values: values.as_chunks().0.to_vec() };
    list.verify(blob).then_some(list)
}

/// The bytes of a list: length and values.
pub fn write_list(list: &ChunkList, out: &mut Vec<u8>) {
    out.extend_from_slice(&list.length.to_le_bytes());
    list.values.iter().for_each(|value| out.extend_from_slice(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_and_nonsense_is_refused() {
        let upload = UploadHeader { unit: Hash::of(b"unit"), length: 0x0102_0304_0506_0708 };
        assert_eq!(UploadHeader::decode(&upload.encode()), upload);
        assert_eq!(upload.encode()[32..], [8, 7, 6, 5, 4, 3, 2, 1]);
        for wants_list in [false, true] {
            let blob = BlobHeader { blob: Hash::of(b"blob"), wants_list };
            assert_eq!(BlobHeader::decode(&blob.encode()), Some(blob));
        }
        assert_eq!(BlobHeader::decode(&[2; BLOB_HEADER_BYTES]), None);
        assert_eq!(message_bytes([1, 2, 0, 0], 513), Some(513));
        assert_eq!(message_bytes([1, 2, 0, 0], 512), None);
    }

    #[test]
    fn list_of_another_blob_or_length_is_refused() {
        let blob = vec![7; 2 * CHUNK_BYTES + 9];
        let (hash, list) = (Hash::of(&blob), ChunkList::of(&blob));
        let mut bytes = Vec::new();
        write_list(&list, &mut bytes);
        let (length, values) = (list.length, &bytes[8..]);
        assert_eq!(list_bytes(length), Some(values.len()));
        assert_eq!(read_list(&hash, length, values), Some(list));
        assert_eq!(read_list(&hash, length, &values[1..]), None);
        assert_eq!(read_list(&hash, length + CHUNK_BYTES as u64, values), None);
        assert_eq!(read_list(&Hash::of(b"other"), length, values), None);
        assert_eq!(list_bytes(BLOB_BYTES_MAX + 1), None);
    }
}
