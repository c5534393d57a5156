//! Chunks of a blob that can each be checked on arrival, though only the blob's hash is known.
//!
//! A blob is named by the BLAKE3 hash of its bytes, and BLAKE3 is a tree: the values of the
//! subtrees of [`CHUNK_BYTES`] each, merged, give the hash (section 2.1 of the BLAKE3 paper). So a
//! list of them that anybody sends can be checked against the name, and every chunk against the
//! list. A blob of one chunk has the hash itself in its list.
//!
//! A list that [`ChunkList::verify`] accepts may still be a lie about the length, or have values
//! of larger subtrees: no bytes pass [`ChunkList::check`] then. Bytes that pass are the blob's, and
//! a chunk that fails is the fault of whoever sent it, or of whoever sent the list.

use std::ops::Range;

use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use serde::{Deserialize, Serialize};

use super::ids::Hash;
use crate::parallel;

/// Bytes of every chunk but the last: a power of two, so that it is a subtree.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of the largest blob.
pub const BLOB_BYTES_MAX: u64 = 8 << 30;
/// Chunks of the largest blob.
pub const CHUNKS_MAX: usize = (BLOB_BYTES_MAX / STEP) as usize;

/// From chunk to chunk, in positions of the blob.
const STEP: u64 = CHUNK_BYTES as u64;

/// The tree of a blob, down to its chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkList {
    /// Bytes of the blob.
    pub length: u64,
    /// BLAKE3 chaining value of every chunk; of a single chunk, the hash.
    pub values: Vec<[u8; 32]>,
}

impl ChunkList {
    /// The list of a blob.
    ///
    /// # Panics
    /// If the blob is larger than [`BLOB_BYTES_MAX`].
    pub fn of(blob: &[u8]) -> Self {
        let length = blob.len() as u64;
        assert!(length <= BLOB_BYTES_MAX, "a blob of {length} bytes is over {BLOB_BYTES_MAX}");
        if blob.len() <= CHUNK_BYTES {
            return Self { length, values: vec![Hash::of(blob).0] };
        }
        let chunks = blob.chunks(CHUNK_BYTES).enumerate().collect();
        Self { length, values: parallel::map(chunks, |(i, chunk)| value(i, chunk)) }
    }

    /// Whether this is a list for the blob of that hash, and within bounds.
    pub fn verify(&self, blob: &Hash) -> bool {
        self.length <= BLOB_BYTES_MAX
            && self.values.len() == self.count()
            && match &self.values[..] {
                [] => false,
                [root] => *root == blob.0,
                values => {
                    let (left, right) = halves(values);
                    merge_subtrees_root(&left, &right, Mode::Hash) == blob.0
                }
            }
    }

    /// Number of chunks; an empty blob has one, of no bytes.
    pub fn count(&self) -> usize {
        // What does not fit is over every bound, and so is the largest number.
        usize::try_from(self.length.div_ceil(STEP).max(1)).unwrap_or(usize::MAX)
    }

    /// The bytes of chunk `i`; empty beyond the last.
    pub fn range(&self, i: usize) -> Range<u64> {
        let at = |i: u64| i.saturating_mul(STEP).min(self.length);
        at(i as u64)..at((i as u64).saturating_add(1))
    }

    /// Whether `bytes` are chunk `i` of the blob whose list was verified.
    pub fn check(&self, i: usize, bytes: &[u8]) -> bool {
        let range = self.range(i);
        if i >= self.count() || bytes.len() as u64 != range.end - range.start {
            return false;
        }
        match self.values.get(i) {
            Some(root) if self.count() == 1 => *root == Hash::of(bytes).0,
            Some(expected) => *expected == value(i, bytes),
            None => false,
        }
    }
}

/// The chaining value of chunk `i` of several; it has at least one byte.
fn value(i: usize, chunk: &[u8]) -> [u8; 32] {
    Hasher::new().set_input_offset(i as u64 * STEP).update(chunk).finalize_non_root()
}

/// The values of the two subtrees below a node with several chunks.
fn halves(values: &[[u8; 32]]) -> ([u8; 32], [u8; 32]) {
    // The left subtree is complete, and as large as it can be with something left over.
    let (left, right) = values.split_at(values.len().div_ceil(2).next_power_of_two());
    (subtree(left), subtree(right))
}

fn subtree(values: &[[u8; 32]]) -> [u8; 32] {
    if let [value] = values {
        return *value;
    }
    let (left, right) = halves(values);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: usize = CHUNK_BYTES;

    fn blob(length: usize) -> Vec<u8> {
        let mut out = vec![0; length];
        Hasher::new().update(b"chunks").finalize_xof().fill(&mut out);
        out
    }

    fn part<'a>(list: &ChunkList, blob: &'a [u8], i: usize) -> &'a [u8] {
        let range = list.range(i);
        &blob[range.start as usize..range.end as usize]
    }

    /// Sizes round every boundary of the tree; each chunk stands alone.
    #[test]
    fn chunks_of_any_length_verify_against_the_blob() {
        let whole = blob(7 * MIB + 5);
        for length in [
            0,
            1,
            1024,
            1025,
            MIB - 1,
            MIB,
            MIB + 1,
            2 * MIB,
            2 * MIB + 1,
            3 * MIB,
            5 * MIB,
            6 * MIB + 1025,
            7 * MIB + 5,
        ] {
            let blob = &whole[..length];
            let list = ChunkList::of(blob);
            assert!(list.verify(&Hash::of(blob)), "length {length}");
            assert!(!list.verify(&Hash::of(b"another")), "length {length}");
            assert_eq!(list.count(), length.div_ceil(MIB).max(1));
            let mut end = 0;
            for i in 0..list.count() {
                let range = list.range(i);
                assert_eq!(range.start, end, "length {length}, chunk {i}");
                end = range.end;
                assert!(list.check(i, part(&list, blob, i)), "length {length}, chunk {i}");
            }
            assert_eq!(end, length as u64);
            assert!(!list.check(list.count(), b""), "length {length}");
            assert!(list.range(usize::MAX).is_empty());
        }
    }

    #[test]
    fn chunks_changed_cut_or_swapped_fail() {
        let blob = blob(3 * MIB + 100);
        let list = ChunkList::of(&blob);
        for i in 0..4 {
            let good = part(&list, &blob, i);
            let mut changed = good.to_vec();
            changed[good.len() / 2] ^= 1;
            assert!(!list.check(i, &changed), "chunk {i}");
            assert!(!list.check(i, &good[1..]), "chunk {i}");
            assert!(!list.check((i + 1) % 3, good), "chunk {i}");
        }
    }

    #[test]
    fn list_changed_or_out_of_bounds_is_refused() {
        let blob = blob(3 * MIB + 100);
        let (hash, good) = (Hash::of(&blob), ChunkList::of(&blob));
        let refused = |change: fn(&mut ChunkList)| {
            let mut list = good.clone();
            change(&mut list);
            !list.verify(&hash)
        };
        assert!(refused(|l| l.values[2][5] ^= 1));
        assert!(refused(|l| l.values.swap(0, 1)));
        assert!(refused(|l| l.values.truncate(3)));
        assert!(refused(|l| l.values.clear()));
        assert!(refused(|l| l.length = 0));
        assert!(refused(|l| l.length = u64::MAX));
        assert!(refused(|l| l.values.push([0; 32])));
        let largest = ChunkList { length: BLOB_BYTES_MAX, values: vec![[1; 32]; CHUNKS_MAX] };
        let root = merge_subtrees_root(
            &subtree(&largest.values[..CHUNKS_MAX / 2]),
            &subtree(&largest.values[CHUNKS_MAX / 2..]),
            Mode::Hash,
        );
        assert!(largest.verify(&Hash::from(root)));
        let mut larger = largest;
        larger.length += 1;
        larger.values.push([1; 32]);
        let (left, right) = halves(&larger.values);
        let root = merge_subtrees_root(&left, &right, Mode::Hash);
        assert!(!larger.verify(&Hash::from(root)), "over the largest blob");
    }

    /// Values of larger subtrees pass as a list, but no bytes pass as their chunks.
    #[test]
    fn list_of_another_shape_accepts_no_chunk() {
        let blob = blob(4 * MIB);
        let good = ChunkList::of(&blob);
        let values = vec![subtree(&good.values[..2]), subtree(&good.values[2..])];
        let list = ChunkList { length: 2 * STEP, values };
        assert!(list.verify(&Hash::of(&blob)));
        assert!((0..4).all(|i| (0..2).all(|j| !list.check(j, part(&good, &blob, i)))));
        let longer = ChunkList { length: good.length - 1, ..good };
        assert!(longer.verify(&Hash::of(&blob)));
        assert!(!longer.check(3, &blob[3 * MIB..4 * MIB - 1]));
    }

    /// An empty subtree has no value: hashing one panics.
    #[test]
    fn list_with_more_values_than_bytes_accepts_nothing() {
        for length in [0, STEP] {
            let list = ChunkList { length, values: vec![[0; 32]; 3] };
            assert!((0..4).all(|i| !list.check(i, b"")), "length {length}");
        }
    }

    proptest! {
        #[test]
        fn list_of_any_content_never_panics(
            length in prop_oneof![Just(0), 0..5 * STEP, any::<u64>()],
            values in proptest::collection::vec(any::<[u8; 32]>(), 0..9),
            i in prop_oneof![0_usize..9, any::<usize>()],
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let list = ChunkList { length, values };
            prop_assert!(!list.verify(&Hash::of(&bytes)));
            prop_assert!(!list.check(i, &bytes));
            let range = list.range(i);
            prop_assert!(range.start <= range.end && range.end <= length);
        }
    }
}
