//! Blobs on disk, each in a file named by the BLAKE3 hash of its bytes.
//!
//! A blob is there whole or not at all: files are written beside their place, synced and renamed.
//! Every read is checked against the name. One process owns a store's directory.

mod partial;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::swarm::chunks::{BLOB_BYTES_MAX, ChunkList};
use manyhands_core::swarm::ids::Hash;

pub use partial::Partial;

/// Chunk lists kept in memory, so that serving does not hash whole blobs again.
const LISTS_MAX: usize = 64;
/// Where blobs that are still arriving are kept.
const PARTIAL_DIR: &str = "partial";

/// A directory of blobs with a bound on its bytes. Clones share it.
#[derive(Clone, Debug)]
pub struct BlobStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    bytes_max: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whole blobs and their bytes.
    blobs: BTreeMap<Hash, u64>,
    /// Blobs that have begun to arrive, and the bytes set aside for each.
    partials: BTreeMap<Hash, u64>,
    /// Those of `partials` that are being received now.
    open: BTreeSet<Hash>,
    /// Bytes set aside for blobs that are being written.
    writing_bytes: u64,
    /// Makes names of temporary files different.
    writes: u64,
    /// Chunk lists of blobs that were served or received.
    lists: BTreeMap<Hash, Arc<ChunkList>>,
}

impl State {
    fn total_bytes(&self) -> u64 {
        let sum = |m: &BTreeMap<Hash, u64>| m.values().sum::<u64>();
        sum(&self.blobs) + sum(&self.partials) + self.writing_bytes
    }
}

impl BlobStore {
    /// Opens or makes a store that never holds more than `bytes_max` bytes.
    pub fn open(dir: &Path, bytes_max: u64) -> Result<Self> {
        let partials = dir.join(PARTIAL_DIR);
        fs::create_dir_all(&partials)
            .with_context(|| format!("cannot make {}", partials.display()))?;
        let mut state = State::default();
        for path in files_below(dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let Some(hash) = Hash::parse(name) else {
                // What a kill left behind; other files are not ours to remove.
                if name.ends_with(".tmp") {
                    fs::remove_file(&path)
                        .with_context(|| format!("cannot remove {}", path.display()))?;
                }
                continue;
            };
            let bytes = path.metadata().with_context(|| format!("cannot read {name}"))?.len();
            let arriving = path.parent() == Some(&partials);
            if arriving { &mut state.partials } else { &mut state.blobs }.insert(hash, bytes);
        }
        let state = Mutex::new(state);
        Ok(Self { shared: Arc::new(Shared { root: dir.into(), bytes_max, state }) })
    }

    /// Stores a blob; returns its name.
    pub fn put(&self, bytes: &[u8]) -> Result<Hash> {
        let length = bytes.len() as u64;
        ensure!(length <= BLOB_BYTES_MAX, "a blob of {length} bytes is over {BLOB_BYTES_MAX}");
        let hash = Hash::of(bytes);
        let write_index = {
            let mut state = self.state();
            if state.blobs.contains_key(&hash) {
                return Ok(hash);
            }
            self.make_room(&mut state, length)?;
            state.writing_bytes += length;
            state.writes += 1;
            state.writes
        };
        let path = self.path(&hash);
        let temporary = path.with_extension(format!("{write_index}.tmp"));
        let written = write_whole(&temporary, &path, bytes);
        let mut state = self.state();
        state.writing_bytes -= length;
        if let Err(error) = written {
            // Gives the space back; the error itself is what matters.
            let _ = fs::remove_file(&temporary);
            return Err(self.explain(error)).with_context(|| format!("cannot store blob {hash}"));
        }
        state.blobs.insert(hash, length);
        Ok(hash)
    }

    /// A blob's bytes. One that is damaged is removed and missing from then on.
    pub fn get(&self, hash: &Hash) -> Option<Vec<u8>> {
        let length = *self.state().blobs.get(hash)?;
        let path = self.path(hash);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|f| f.take(length + 1).read_to_end(&mut bytes)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "cannot read a blob");
                return None;
            }
            Ok(_) if Hash::of(&bytes) == *hash => return Some(bytes),
            _ => {}
        }
        self.remove_damaged(hash);
        None
    }

    /// Where a whole blob's bytes are. They are not checked: whoever reads them does.
    pub fn file(&self, hash: &Hash) -> Option<PathBuf> {
        self.contains(hash).then(|| self.path(hash))
    }

    /// Whether the blob is here, whole.
    pub fn contains(&self, hash: &Hash) -> bool {
        self.state().blobs.contains_key(hash)
    }

    /// Removes a blob, or what has arrived of it. One that is not here is removed already.
    pub fn remove(&self, hash: &Hash) -> Result<()> {
        let mut state = self.state();
        ensure!(!state.open.contains(hash), "blob {hash} is being received");
        state.lists.remove(hash);
        if state.blobs.remove(hash).is_some() {
            remove_file(&self.path(hash))?;
        }
        if state.partials.remove(hash).is_some() {
            remove_file(&self.partial_path(hash))?;
        }
        Ok(())
    }

    /// Bytes in use, with those set aside for blobs that are arriving.
    pub fn total_bytes(&self) -> u64 {
        self.state().total_bytes()
    }

    /// The chunk list of a whole blob.
    pub fn chunk_list(&self, hash: &Hash) -> Option<Arc<ChunkList>> {
        if let Some(list) = self.state().lists.get(hash) {
            return Some(Arc::clone(list));
        }
        let list = Arc::new(ChunkList::of(&self.get(hash)?));
        let mut state = self.state();
        if state.lists.len() >= LISTS_MAX {
            state.lists.pop_first();
        }
        state.lists.insert(*hash, Arc::clone(&list));
        Some(list)
    }

    /// One chunk, checked, so that a damaged disk makes nobody a liar.
    pub fn chunk(&self, hash: &Hash, list: &ChunkList, i: usize) -> Option<Vec<u8>> {
        let range = list.range(i);
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.path(hash))?;
            file.seek(SeekFrom::Start(range.start))?;
            let length = range.end - range.start;
            let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
            file.take(length).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().inspect_err(|e| tracing::warn!(%hash, %e, "cannot read a blob")).ok()?;
        if !list.check(i, &bytes) {
            self.remove_damaged(hash);
            return None;
        }
        Some(bytes)
    }

    /// Begins or resumes receiving a blob of which the verified list is known.
    pub fn partial(&self, hash: &Hash, list: ChunkList) -> Result<Partial> {
        Partial::open(self, hash, list)
    }

    fn remove_damaged(&self, hash: &Hash) {
        tracing::warn!(path = %self.path(hash).display(), "a blob is damaged and is removed");
        if let Err(error) = self.remove(hash) {
            tracing::warn!(%error, "the damaged blob stays on disk");
        }
    }

    /// Makes sure that `bytes` more fit; what others left half received goes first.
    fn make_room(&self, state: &mut State, bytes: u64) -> Result<()> {
        while state.total_bytes().saturating_add(bytes) > self.shared.bytes_max {
            let idle = state.partials.keys().find(|hash| !state.open.contains(hash)).copied();
            let Some(hash) = idle else {
                bail!(
                    "{bytes} more bytes do not fit into {}, which holds {} of at most {}; allow \
                     more disk space, or remove what is no longer needed",
                    self.shared.root.display(),
                    state.total_bytes(),
                    self.shared.bytes_max
                );
            };
            state.partials.remove(&hash);
            remove_file(&self.partial_path(&hash))?;
        }
        Ok(())
    }

    fn explain(&self, error: io::Error) -> anyhow::Error {
        let full = error.kind() == io::ErrorKind::StorageFull;
        let error = anyhow::Error::from(error);
        if !full {
            return error;
        }
        let root = self.shared.root.display();
        error.context(format!("the disk of {root} is full; free some space and start again"))
    }

    fn path(&self, hash: &Hash) -> PathBuf {
        let name = hash.to_string();
        self.shared.root.join(&name[..2]).join(name)
    }

    fn partial_path(&self, hash: &Hash) -> PathBuf {
        self.shared.root.join(PARTIAL_DIR).join(hash.to_string())
    }

    /// A panic elsewhere leaves the state as it was: each change is a single step.
    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All files one directory below `dir`.
fn files_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            for inner in fs::read_dir(&path)? {
                files.push(inner?.path());
            }
        }
    }
    files.retain(|f| f.is_file());
    Ok(files)
}

fn write_whole(temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file = File::create(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    sync_parent(path)
}

/// Makes a rename survive a power cut.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if cfg!(unix) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use manyhands_core::swarm::chunks::CHUNK_BYTES;

    use super::*;

    fn bytes(length: usize, salt: u8) -> Vec<u8> {
        (0..length).map(|i| (i % 253) as u8 ^ salt).collect()
    }

    #[test]
    fn blob_put_is_found_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 1 << 20).unwrap();
        let hash = store.put(b"some bytes").unwrap();
        assert_eq!(store.put(b"some bytes").unwrap(), hash);
        assert_eq!(store.total_bytes(), 10);
        let again = BlobStore::open(dir.path(), 1 << 20).unwrap();
        assert_eq!(again.get(&hash).unwrap(), b"some bytes");
        assert_eq!(again.total_bytes(), 10);
        again.remove(&hash).unwrap();
        assert!(!again.contains(&hash) && again.get(&hash).is_none());
        assert_eq!(again.total_bytes(), 0);
    }

    #[test]
    fn blob_damaged_on_disk_is_missing_and_its_file_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 16 << 20).unwrap();
        let blob = bytes(2 * CHUNK_BYTES + 5, 0);
        let damage = |hash: &Hash| {
            let mut wrong = blob.clone();
            wrong[CHUNK_BYTES + 3] ^= 1;
            fs::write(store.path(hash), wrong).unwrap();
        };
        let hash = store.put(&blob).unwrap();
        let list = store.chunk_list(&hash).unwrap();
        damage(&hash);
        assert!(store.get(&hash).is_none());
        assert!(!store.path(&hash).exists());
        store.put(&blob).unwrap();
        damage(&hash);
        assert!(store.chunk(&hash, &list, 0).is_some());
        assert!(store.chunk(&hash, &list, 1).is_none());
        assert!(!store.contains(&hash));
    }

    #[test]
    fn put_over_the_bound_is_refused_and_takes_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 100).unwrap();
        store.put(&bytes(60, 0)).unwrap();
        let error = store.put(&bytes(41, 1)).unwrap_err().to_string();
        assert!(error.contains("do not fit"), "{error}");
        assert_eq!(store.total_bytes(), 60);
        store.put(&bytes(40, 1)).unwrap();
    }

    #[test]
    fn temporary_files_of_a_killed_process_are_cleared() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("ab")).unwrap();
        let left = dir.path().join("ab/x.3.tmp");
        fs::write(&left, b"half").unwrap();
        let store = BlobStore::open(dir.path(), 100).unwrap();
        assert!(!left.exists());
        assert_eq!(store.total_bytes(), 0);
    }

    #[test]
    fn chunk_lists_in_memory_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 1 << 20).unwrap();
        for i in 0..LISTS_MAX + 10 {
            let hash = store.put(&i.to_le_bytes()).unwrap();
            assert!(store.chunk_list(&hash).unwrap().verify(&hash));
        }
        assert_eq!(store.state().lists.len(), LISTS_MAX);
    }
}
