//! Which weights there were, and which blobs make them.

use std::collections::BTreeMap;

use super::ids::Hash;
use super::ledger::Entry;

/// Every so many versions a blob makes the weights from nothing.
pub(super) const FULL_EVERY: u64 = 32;

#[derive(Clone, Copy, Debug)]
struct Published {
    base: Hash,
    delta: Hash,
    full: Option<Hash>,
}

/// All versions of a run.
#[derive(Debug, Default)]
pub(super) struct Versions {
    by_hash: BTreeMap<Hash, Published>,
    by_ordinal: BTreeMap<u64, Hash>,
    /// Versions since the last full blob.
    pub since_full: u64,
}

impl Versions {
    /// Takes the next entry of a ledger.
    pub(super) fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Open { weights, full, .. } => {
                if let Some((imported, blob)) = entry.imported() {
                    self.insert(None, imported, Hash([0; 32]), blob, Some(blob));
                }
                self.insert(Some(0), *weights, Hash([0; 32]), *full, Some(*full));
            }
            Entry::Version { ordinal, update, weights, delta, base, full, .. } => {
                self.insert((*update == 0).then_some(*ordinal), *weights, *base, *delta, *full);
            }
            Entry::RolledBack { ordinal } => self.roll_back(*ordinal),
            _ => {}
        }
    }

    /// Adds a version; the first one has a full blob and no base.
    pub(super) fn insert(
        &mut self,
        ordinal: Option<u64>,
        weights: Hash,
        base: Hash,
        delta: Hash,
        full: Option<Hash>,
    ) {
        // The same weights again, after a roll-back or a step without effect, change nothing.
        self.by_hash.entry(weights).or_insert(Published { base, delta, full });
        self.since_full = if full.is_some() { 0 } else { self.since_full + 1 };
        if let Some(ordinal) = ordinal {
            self.by_ordinal.insert(ordinal, weights);
        }
    }

    /// Forgets which weights stand after a step that was rolled back.
    fn roll_back(&mut self, ordinal: u64) {
        self.by_ordinal.split_off(&(ordinal + 1));
    }

    /// The weights after `ordinal` steps.
    pub(super) fn at(&self, ordinal: u64) -> Option<Hash> {
        self.by_ordinal.get(&ordinal).copied()
    }

    /// Blobs that make `want` from one of `have`, or from nothing.
    pub(super) fn plan(&self, want: Hash, have: &[Hash]) -> Option<(Option<Hash>, Vec<Hash>)> {
        let (mut at, mut blobs) = (want, Vec::new());
        // A walk towards the first version; a chain of bases has no loop, but peers wrote it.
        for _ in 0..=self.by_hash.len() {
            if have.contains(&at) {
                blobs.reverse();
                return Some((Some(at), blobs));
            }
            let version = self.by_hash.get(&at)?;
            if let Some(full) = version.full {
                blobs.push(full);
                blobs.reverse();
                return Some((None, blobs));
            }
            blobs.push(version.delta);
            at = version.base;
        }
        None
    }
}
