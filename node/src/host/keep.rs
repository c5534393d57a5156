//! What a coordination peer keeps: ledger and blobs in one database, versions as files that are
//! served, checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use manyhands_core::checkpoint::Manifest;
use manyhands_core::run::state::State;
use manyhands_core::swarm::chain;
use manyhands_core::swarm::coordinator::Blobs;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::Entry;
use manyhands_core::swarm::protocol::PeerAddress;
use manyhands_core::swarm::recovery::Snapshots;

use crate::blobs::BlobStore;
use crate::storage::{RECORDS_READ_MAX, Storage, VALUE_BYTES_MAX};
use crate::store::RunDir;

/// Key of the seed that chooses audits.
const AUDIT_SEED: &str = "audit-seed";
/// Key of who coordinates and who follows, as JSON.
const PEERS: &str = "peers";
/// Key of the steps whose results are dropped, and of the first record that was not looked at.
const FORGOTTEN: &str = "forgotten";
/// Records that are looked at in one go for results to drop.
const PRUNED_RECORDS_MAX: usize = 512;
/// Bytes of ledger in one answer.
const PAGE_BYTES_MAX: usize = 4 << 20;

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

    /// Who coordinates and who follows, as of the last time.
    pub(super) fn peers(&self) -> Result<Vec<PeerAddress>> {
        let bytes = self.storage.meta(PEERS)?;
        Ok(bytes.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default())
    }

    pub(super) fn set_peers(&self, peers: &[PeerAddress]) -> Result<()> {
        self.storage.set_meta(PEERS, &serde_json::to_vec(peers)?)
    }

    /// When the newest record was written, in milliseconds since 1970.
    pub(super) fn newest_ms(&self) -> Result<Option<u64>> {
        let newest = self.storage.records(self.next.saturating_sub(1), 1)?;
        newest.first().map(|bytes| Ok(chain::decode(bytes)?.time_ms)).transpose()
    }

    /// Records that fit one answer.
    pub(super) fn page(&self, from: u64, limit: u32) -> Result<Vec<Vec<u8>>> {
        let mut page = self.storage.records(from, limit as usize)?;
        let mut bytes = 0;
        let fits = page.iter().take_while(|r| {
            bytes += r.len();
            bytes <= PAGE_BYTES_MAX
        });
        let count = fits.count().max(1);
        page.truncate(count);
        Ok(page)
    }

    /// Steps before this one have no results any more, and the record to look at next.
    fn pruned(&self) -> Result<(u64, u64)> {
        let bytes = self.storage.meta(FORGOTTEN)?;
        Ok(bytes.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default())
    }

    /// Steps before this one have no results any more.
    pub(super) fn forgotten(&self) -> Result<u64> {
        Ok(self.pruned()?.0)
    }

    /// Whether more than `bytes_max` bytes of blobs are kept.
    pub(super) fn is_full(&self, bytes_max: u64) -> Result<bool> {
        Ok(self.storage.blob_bytes()? + self.served.total_bytes() > bytes_max)
    }

    /// Drops some of the oldest results of steps that are final and lie behind every state that is
    /// kept. Steps before the one that is returned have none any more, if any went.
    pub(super) fn prune(&self, final_ordinal: u64) -> Result<Option<u64>> {
        let ordinal = final_ordinal.min(self.run_dir.oldest()?.unwrap_or(0));
        let (mut forgotten, from) = self.pruned()?;
        let (mut dropped, mut next) = (BTreeSet::new(), from);
        for bytes in self.storage.records(from, PRUNED_RECORDS_MAX)? {
            let record = chain::decode(&bytes)?;
            if let Entry::Unit(unit) = record.entry {
                if unit.path.ordinal >= ordinal {
                    break;
                }
                dropped.extend([unit.unit, unit.receipt]);
                forgotten = forgotten.max(unit.path.ordinal + 1);
            }
            next = record.sequence + 1;
        }
        if next == from {
            return Ok(None);
        }
        self.keep_named(next, &mut dropped)?;
        let dropped: Vec<Hash> = dropped.into_iter().collect();
        let mark = serde_json::to_vec(&(forgotten, next))?;
        self.storage.remove_blobs(&dropped, FORGOTTEN, &mark)?;
        for hash in &dropped {
            self.served.remove(hash)?;
        }
        Ok(Some(forgotten))
    }

    /// Takes out what records from `from` on name: units of different steps may have one result.
    fn keep_named(&self, mut from: u64, dropped: &mut BTreeSet<Hash>) -> Result<()> {
        loop {
            let page = self.storage.records(from, RECORDS_READ_MAX)?;
            if page.is_empty() {
                return Ok(());
            }
            from += page.len() as u64;
            for bytes in page {
                for hash in chain::decode(&bytes)?.entry.blobs() {
                    dropped.remove(&hash);
                }
            }
        }
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
    pub(super) fn snapshots(&self) -> Result<Snapshots> {
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
        let decoded = records.iter().filter_map(|bytes| chain::decode(bytes).ok());
        let served: Vec<Hash> = decoded.flat_map(|record| record.entry.weight_blobs()).collect();
        self.put_files(&mut blobs, &served)?;
        let count = records.len() as u64;
        let numbered: Vec<(u64, Vec<u8>)> = (self.next..).zip(records).collect();
        self.storage.persist(&blobs, &numbered)?;
        self.next += count;
        Ok(())
    }

    /// Keeps blobs whose record is not checked yet.
    pub(super) fn keep_blobs(
        &self,
        mut blobs: Vec<(Hash, Vec<u8>)>,
        served: &[Hash],
    ) -> Result<()> {
        self.put_files(&mut blobs, served)?;
        self.storage.persist(&blobs, &[])
    }

    /// Blobs that volunteers will ask for, and large ones, become files; the others remain.
    fn put_files(&self, blobs: &mut Vec<(Hash, Vec<u8>)>, served: &[Hash]) -> Result<()> {
        for (hash, bytes) in blobs.iter() {
            if served.contains(hash) || bytes.len() > VALUE_BYTES_MAX {
                self.served.put(bytes)?;
            }
        }
        blobs.retain(|(_, bytes)| bytes.len() <= VALUE_BYTES_MAX);
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

#[cfg(test)]
mod tests {
    use manyhands_core::checkpoint::LAYOUT;
    use manyhands_core::run::job::{JobPath, Stage};
    use manyhands_core::swarm::chain::Writer;
    use manyhands_core::swarm::ids::{Secret, Signature};
    use manyhands_core::swarm::ledger::UnitEntry;

    use super::*;

    #[test]
    fn result_that_a_later_unit_shares_stays_until_that_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Arc::new(Storage::open(dir.path()).unwrap());
        let served = Arc::new(BlobStore::open(&dir.path().join("blobs"), u64::MAX).unwrap());
        let mut keep = Keep::open(dir.path(), storage, served).unwrap();
        let secret = Secret::from_seed(&[1; 32]);
        let (volunteer, mut chain) = (secret.key(), Writer::new(secret));
        let nothing = Hash([0; 32]);
        let open = Entry::Open {
            config: String::new(),
            files: Vec::new(),
            digest: String::new(),
            weights: nothing,
            full: nothing,
            coordinator: volunteer,
        };
        keep.persist(Vec::new(), vec![chain.append(0, open).1]).unwrap();
        // Steps 0 and 1 have one result, and each another.
        let results: [&[u8]; 4] = [b"both", b"first", b"both", b"second"];
        for (i, result) in results.into_iter().enumerate() {
            let unit = vec![i as u8];
            let entry = Entry::Unit(UnitEntry {
                path: JobPath { ordinal: i as u64 / 2, stage: Stage::Evaluate },
                first: 0,
                count: 1,
                unit: Hash::of(&unit),
                receipt: Hash::of(result),
                result_bytes: result.len() as u64,
                volunteer,
                signature: Signature([0; 64]),
                multiply_adds: 1,
            });
            let blobs = [unit, result.to_vec()].map(|bytes| (Hash::of(&bytes), bytes));
            keep.persist(blobs.to_vec(), vec![chain.append(0, entry).1]).unwrap();
        }
        let (format, weights, files) = (String::new(), String::new(), BTreeMap::new());
        let manifest = Manifest { layout: LAYOUT, format, step: 9, weights, files };
        keep.snapshot(9, &manifest, &BTreeMap::new(), 1).unwrap();

        let left = |keep: &Keep| results.map(|result| keep.get(&Hash::of(result)).is_some());
        assert_eq!(left(&keep), [true; 4]);
        assert_eq!(keep.prune(1).unwrap(), Some(1));
        assert_eq!(left(&keep), [true, false, true, true]);
        assert_eq!(keep.prune(2).unwrap(), Some(2));
        assert_eq!(left(&keep), [false; 4]);
        assert_eq!((keep.prune(2).unwrap(), keep.forgotten().unwrap()), (None, 2));
    }
}
