//! A blob that is arriving chunk by chunk, in any order, across restarts.
//!
//! The file has its final length from the start. What is in it is found by checking every chunk
//! again on opening: no record of progress can disagree with the bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use manyhands_core::swarm::chunks::{CHUNK_BYTES, ChunkList};
use manyhands_core::swarm::ids::Hash;

use super::{BlobStore, remove_file, sync_parent};

/// A blob that is arriving. Dropping it keeps what has arrived.
#[derive(Debug)]
pub struct Partial {
    store: BlobStore,
    hash: Hash,
    list: ChunkList,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    /// Which chunks are on disk.
    kept: Vec<bool>,
}

impl Partial {
    pub(super) fn open(store: &BlobStore, hash: &Hash, list: ChunkList) -> Result<Self> {
        ensure!(list.verify(hash), "the chunk list is not that of blob {hash}");
        {
            let mut state = store.state();
            ensure!(!state.blobs.contains_key(hash), "blob {hash} is here already");
            ensure!(!state.open.contains(hash), "blob {hash} is being received already");
            // Its own space counts anew: a file of another length is of no use.
            let before = state.partials.remove(hash);
            if let Err(error) = store.make_room(&mut state, list.length) {
                before.map(|bytes| state.partials.insert(*hash, bytes));
                return Err(error);
            }
            state.partials.insert(*hash, list.length);
            state.open.insert(*hash);
        }
        let path = store.partial_path(hash);
        match open_file(&path, &list) {
            Ok((file, kept)) => {
                let inner = Mutex::new(Inner { file, kept });
                Ok(Self { store: store.clone(), hash: *hash, list, inner })
            }
            Err(error) => {
                store.state().open.remove(hash);
                Err(store.explain(error)).with_context(|| format!("cannot open {}", path.display()))
            }
        }
    }

    /// The blob's chunks.
    pub fn list(&self) -> &ChunkList {
        &self.list
    }

    /// Chunks that have not arrived, in order.
    pub fn missing(&self) -> Vec<usize> {
        let inner = self.lock();
        (0..self.list.count()).filter(|&i| !inner.kept[i]).collect()
    }

    /// Bytes that have arrived.
    pub fn received_bytes(&self) -> u64 {
        let inner = self.lock();
        let kept = (0..self.list.count()).filter(|&i| inner.kept[i]);
        kept.map(|i| self.list.range(i)).map(|r| r.end - r.start).sum()
    }

    /// Keeps a chunk; false where it is not the one that belongs there.
    pub fn keep(&self, i: usize, bytes: &[u8]) -> Result<bool> {
        if !self.list.check(i, bytes) {
            return Ok(false);
        }
        let mut inner = self.lock();
        let start = SeekFrom::Start(self.list.range(i).start);
        let written = inner.file.seek(start).and_then(|_| inner.file.write_all(bytes));
        written
            .map_err(|e| self.store.explain(e))
            .with_context(|| format!("cannot store blob {}", self.hash))?;
        inner.kept[i] = true;
        Ok(true)
    }

    /// Makes the blob whole. All chunks must have arrived.
    pub fn finish(self) -> Result<()> {
        let missing = self.missing().len();
        ensure!(missing == 0, "{missing} chunks of blob {} have not arrived", self.hash);
        let path = self.store.path(&self.hash);
        let from = self.store.partial_path(&self.hash);
        let place = || -> io::Result<()> {
            self.lock().file.sync_all()?;
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::rename(&from, &path)?;
            sync_parent(&path)
        };
        place()
            .map_err(|e| self.store.explain(e))
            .with_context(|| format!("cannot store blob {}", self.hash))?;
        let mut state = self.store.state();
        state.partials.remove(&self.hash);
        state.blobs.insert(self.hash, self.list.length);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.store.state().open.remove(&self.hash);
    }
}

/// Opens the file and finds the chunks that are in it.
fn open_file(path: &Path, list: &ChunkList) -> io::Result<(File, Vec<bool>)> {
    let mut kept = vec![false; list.count()];
    if path.metadata().is_ok_and(|m| m.len() != list.length) {
        remove_file(path).map_err(io::Error::other)?;
    }
    let mut options = OpenOptions::new();
    let mut file = options.read(true).write(true).create(true).truncate(false).open(path)?;
    if file.metadata()?.len() == list.length {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        for (i, kept) in kept.iter_mut().enumerate() {
            chunk.clear();
            (&mut file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
            *kept = list.check(i, &chunk);
        }
    } else {
        file.set_len(list.length)?;
    }
    Ok((file, kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob() -> (Vec<u8>, Hash, ChunkList) {
        let bytes: Vec<u8> = (0..3 * CHUNK_BYTES + 100).map(|i| (i * 7 % 255) as u8 + 1).collect();
        (bytes.clone(), Hash::of(&bytes), ChunkList::of(&bytes))
    }

    fn part<'a>(bytes: &'a [u8], list: &ChunkList, i: usize) -> &'a [u8] {
        let range = list.range(i);
        &bytes[range.start as usize..range.end as usize]
    }

    #[test]
    fn partial_reopened_after_a_kill_goes_on_where_it_was() {
        let (bytes, hash, list) = blob();
        let dir = tempfile::tempdir().unwrap();
        {
            let store = BlobStore::open(dir.path(), 8 << 20).unwrap();
            let partial = store.partial(&hash, list.clone()).unwrap();
            assert!(partial.keep(2, part(&bytes, &list, 2)).unwrap());
            assert!(partial.keep(3, part(&bytes, &list, 3)).unwrap());
            assert!(!partial.keep(1, part(&bytes, &list, 2)).unwrap());
            assert_eq!(partial.received_bytes(), CHUNK_BYTES as u64 + 100);
        }
        let store = BlobStore::open(dir.path(), 8 << 20).unwrap();
        assert_eq!(store.total_bytes(), bytes.len() as u64);
        let partial = store.partial(&hash, list.clone()).unwrap();
        assert_eq!(partial.missing(), [0, 1]);
        assert!(store.partial(&hash, list.clone()).is_err(), "received twice at once");
        for i in partial.missing() {
            assert!(partial.keep(i, part(&bytes, &list, i)).unwrap());
        }
        partial.finish().unwrap();
        assert_eq!(store.get(&hash).unwrap(), bytes);
        assert_eq!(store.total_bytes(), bytes.len() as u64);
    }

    #[test]
    fn partial_damaged_between_runs_asks_for_the_chunk_again() {
        let (bytes, hash, list) = blob();
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 8 << 20).unwrap();
        let partial = store.partial(&hash, list.clone()).unwrap();
        (0..4).for_each(|i| assert!(partial.keep(i, part(&bytes, &list, i)).unwrap()));
        drop(partial);
        let mut wrong = bytes.clone();
        wrong[CHUNK_BYTES] ^= 1;
        fs::write(store.partial_path(&hash), wrong).unwrap();
        let partial = store.partial(&hash, list).unwrap();
        assert_eq!(partial.missing(), [1]);
        assert!(partial.finish().is_err());
        assert!(!store.contains(&hash));
    }

    #[test]
    fn partial_over_the_bound_is_refused_and_idle_ones_give_way() {
        let (_, hash, list) = blob();
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), list.length + 50).unwrap();
        let other = store.put(&[1; 51]).unwrap();
        assert!(store.partial(&hash, list.clone()).is_err());
        store.remove(&other).unwrap();
        let partial = store.partial(&hash, list).unwrap();
        assert!(store.put(&[1; 51]).is_err());
        drop(partial);
        store.put(&[1; 51]).unwrap();
        assert_eq!(store.total_bytes(), 51);
    }

    #[test]
    fn partial_with_the_list_of_another_blob_is_refused() {
        let (_, _, list) = blob();
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 8 << 20).unwrap();
        assert!(store.partial(&Hash::of(b"other"), list).is_err());
    }
}
