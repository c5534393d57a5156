//! Verified chunks of a blob whose name is the BLAKE3 hash of its bytes.
//!
//! BLAKE3 is a tree: the chaining values of aligned 1 MiB subtrees merge into the blob's hash. A
//! list of them that does is proof of each chunk alone, so that a chunk is checked on arrival.

use std::ops::Range;

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use serde::{Deserialize, Serialize};

use super::ids::Hash;

/// Bytes of every chunk but the last.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Largest blob.
pub const BLOB_BYTES_MAX: u64 = 8 << 30;

/// The chaining values of a blob's chunks; of a blob of one chunk, its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkList {
    /// Bytes of the blob.
    pub length: u64,
    /// One value a chunk, in order.
    pub values: Vec<[u8; 32]>,
}

impl ChunkList {
    /// The list of a blob.
    pub fn of(bytes: &[u8]) -> Self {
        let length = bytes.len() as u64;
        if bytes.len() <= CHUNK_BYTES {
            return Self { length, values: vec![Hash::of(bytes).0] };
        }
        let value = |(i, chunk)| subtree(i, chunk);
        Self { length, values: bytes.chunks(CHUNK_BYTES).enumerate().map(value).collect() }
    }

    /// Whether this is the list of the blob of that name.
    pub fn verify(&self, blob: &Hash) -> bool {
        if self.length > BLOB_BYTES_MAX || self.values.len() != chunk_count(self.length) {
            return false;
        }
        match self.values.as_slice() {
            [one] => *one == blob.0,
            many => {
                let (left, right) = many.split_at(left_count(many.len()));
                *merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).as_bytes() == blob.0
            }
        }
    }

    /// How many chunks.
    pub fn count(&self) -> usize {
        self.values.len()
    }

    /// The bytes of the blob that are chunk `i`; empty where there is no such chunk.
    pub fn range(&self, i: usize) -> Range<u64> {
        let start = (i as u64).saturating_mul(CHUNK_BYTES as u64).min(self.length);
        start..start.saturating_add(CHUNK_BYTES as u64).min(self.length)
    }

    /// Whether `bytes` are chunk `i`.
    pub fn check(&self, i: usize, bytes: &[u8]) -> bool {
        let Some(value) = self.values.get(i) else { return false };
        let range = self.range(i);
        if bytes.len() as u64 != range.end - range.start {
            return false;
        }
        if self.values.len() == 1 {
            Hash::of(bytes).0 == *value
        } else {
            subtree(i, bytes) == *value
        }
    }
}

/// Chunks of a blob; an empty blob has one empty chunk.
fn chunk_count(length: u64) -> usize {
    usize::try_from(length.div_ceil(CHUNK_BYTES as u64)).unwrap_or(usize::MAX).max(1)
}

fn subtree(i: usize, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(i as u64 * CHUNK_BYTES as u64);
    hasher.update(bytes).finalize_non_root()
}

/// Chunks of the left subtree: the largest power of two below `count`.
fn left_count(count: usize) -> usize {
    count.next_power_of_two() / 2
}

fn merge(values: &[[u8; 32]]) -> [u8; 32] {
    if let [one] = values {
        return *one;
    }
    let (left, right) = values.split_at(left_count(values.len()));
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_list_of_any_length_verifies_and_wrong_chunks_do_not() {
        for length in [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 5 * CHUNK_BYTES + 77] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            let list = ChunkList::of(&bytes);
            assert!(list.verify(&Hash::of(&bytes)), "{length}");
            assert!(!list.verify(&Hash::of(b"other")), "{length}");
            for i in 0..list.count() {
                let range = list.range(i);
                let chunk = &bytes[range.start as usize..range.end as usize];
                assert!(list.check(i, chunk), "{length} {i}");
                assert!(!list.check(i + 1, chunk), "{length} {i}");
                let mut wrong = chunk.to_vec();
                if let Some(last) = wrong.last_mut() {
                    *last ^= 1;
                    assert!(!list.check(i, &wrong), "{length} {i}");
                }
            }
        }
    }
}
