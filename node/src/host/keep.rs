//! What a coordination peer keeps: ledger and blobs in one database, versions as files that are
//! served, checkpoints.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use manyhands_core::checkpoint::Manifest;
use manyhands_core::run::state::State;
use manyhands_core::swarm::chain;
use manyhands_core::swarm::coordinator::Blobs;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::Entry;

use crate::blobs::BlobStore;
use crate::storage::{RECORDS_READ_MAX, Storage, VALUE_BYTES_MAX};
use crate::store::RunDir;

/// Key of the seed that chooses audits.
const AUDIT_SEED: &str = "audit-seed";

/// Files of a checkpoint by name.
type StateFiles = BTreeMap<String, Vec<u8>>;

/// Everything on disk.
pub(super) struct Keep {
    pub(super) storage: Arc<Storage>,
    pub(super) served: Arc<BlobStore>,
    pub(super) run_dir: RunDir,
    next: u64,
}

impl Keep {
    pub(super) fn open(dir: &Path, storage: Arc<Storage>, served: Arc<BlobStore>) -> Result<Self> {
        let next = storage.len()?;
        Ok(Self { storage, served, run_dir: RunDir::open(dir)?, next })
    }

    /// The secret seed of the choice of audits, made on first use.
    pub(super) fn audit_seed(&self) -> Result<[u8; 32]> {
        if let Some(Ok(seed)) = self.storage.meta(AUDIT_SEED)?.map(<[u8; 32]>::try_from) {
            return Ok(seed);
        }
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(std::io::Error::from)?;
        self.storage.set_meta(AUDIT_SEED, &seed)?;
        Ok(seed)
    }

    /// All records, page by page.
    pub(super) fn ledger(&self) -> impl Iterator<Item = Vec<u8>> {
        let storage = self.storage.clone();
        let mut from = 0;
        std::iter::from_fn(move || {
            let page = storage.records(from, RECORDS_READ_MAX).unwrap_or_default();
            from += page.len() as u64;
            (!page.is_empty()).then_some(page)
        })
        .flatten()
    }

    /// Checkpoints that are whole, newest first.
    pub(super) fn snapshots(&self) -> Result<Vec<(u64, StateFiles)>> {
        let mut out = Vec::new();
        for files in self.run_dir.load_files()? {
            let (config, state) = State::load(&files)?;
            out.push((state.ordinal(&config), files));
        }
        Ok(out)
    }

    pub(super) fn persist(
        &mut self,
        mut blobs: Vec<(Hash, Vec<u8>)>,
        records: Vec<Vec<u8>>,
    ) -> Result<()> {
        let served = records.iter().filter_map(|bytes| chain::decode(bytes).ok());
        let served: Vec<Hash> = served.flat_map(|record| published(&record.entry)).collect();
        for (hash, bytes) in &blobs {
            if served.contains(hash) || bytes.len() > VALUE_BYTES_MAX {
                self.served.put(bytes)?;
            }
        }
        blobs.retain(|(_, bytes)| bytes.len() <= VALUE_BYTES_MAX);
        let count = records.len() as u64;
        let numbered: Vec<(u64, Vec<u8>)> = (self.next..).zip(records).collect();
        self.storage.persist(&blobs, &numbered)?;
        self.next += count;
        Ok(())
    }

    pub(super) fn snapshot(
        &self,
        ordinal: u64,
        manifest: &Manifest,
        files: &BTreeMap<String, Vec<u8>>,
        keep: usize,
    ) -> Result<()> {
        self.run_dir.save(ordinal, manifest, files, keep)?;
        Ok(())
    }
}

impl Blobs for Keep {
    fn get(&self, hash: &Hash) -> Option<Vec<u8>> {
        find(&self.storage, &self.served, hash)
    }
}

/// A blob, wherever it is.
pub(super) fn find(storage: &Storage, served: &BlobStore, hash: &Hash) -> Option<Vec<u8>> {
    storage.blob(hash).ok().flatten().or_else(|| served.get(hash))
}

/// Blobs that volunteers will ask for.
fn published(entry: &Entry) -> Vec<Hash> {
    match entry {
        Entry::Open { full, .. } => vec![*full],
        Entry::Version { delta, full, .. } => std::iter::once(*delta).chain(*full).collect(),
        _ => Vec::new(),
    }
}
