//! A follower of the simulated coordinator: what it has mirrored, some records behind.

use std::collections::BTreeMap;

use manyhands_core::swarm::chain;
use manyhands_core::swarm::coordinator::Files;
use manyhands_core::swarm::follower::{Effect, FollowError, Follower};
use manyhands_core::swarm::ids::{Hash, Secret};
use manyhands_core::swarm::ledger::Entry;

use super::lab::Lab;
use super::world::Store;

/// See the module.
pub struct Mirror {
    /// Who follows.
    pub secret: Secret,
    /// Records that it is behind.
    pub behind: usize,
    /// What it has.
    pub store: Store,
    /// What it makes of it.
    pub follower: Option<Follower>,
    /// Roll-backs that it went along with.
    pub restarts: u64,
}

impl Mirror {
    /// A follower that has nothing yet.
    pub fn new(behind: usize) -> Self {
        let secret = Secret::from_seed(&[78; 32]);
        Self { secret, behind, store: Store::default(), follower: None, restarts: 0 }
    }

    /// Takes what the coordinator has written.
    ///
    /// # Panics
    /// When the follower refuses a record.
    pub fn catch_up(&mut self, lab: &Lab, source: &Store) {
        let end = source.records.len().saturating_sub(self.behind);
        for i in self.store.records.len()..end {
            self.take(lab, &source.records[i], &source.blobs).expect("an honest ledger");
        }
    }

    /// Takes one record and the blobs that it names.
    pub fn take(
        &mut self,
        lab: &Lab,
        bytes: &[u8],
        blobs: &BTreeMap<Hash, Vec<u8>>,
    ) -> Result<(), FollowError> {
        let record = chain::decode(bytes).expect("a record");
        for hash in record.entry.blobs() {
            self.store.blobs.insert(hash, blobs[&hash].clone());
        }
        if matches!(record.entry, Entry::Open { .. }) {
            self.store.records.push(bytes.to_vec());
            self.start(lab);
            return Ok(());
        }
        let follower = self.follower.as_mut().expect("the first record opens the run");
        let effects = follower.push(bytes, &self.store.blobs)?;
        self.store.records.push(bytes.to_vec());
        for effect in effects {
            match effect {
                Effect::Snapshot { ordinal, files } => {
                    self.store.snapshots.insert(ordinal, *files);
                }
                Effect::Restart { ordinal } => {
                    drop(self.store.snapshots.split_off(&(ordinal + 1)));
                    self.restarts += 1;
                    self.start(lab);
                }
                Effect::Announce(_) => {}
            }
        }
        Ok(())
    }

    fn start(&mut self, lab: &Lab) {
        let of = |(o, files): (&u64, &Files)| (*o, files.1.clone());
        let snapshots = self.store.snapshots.iter().rev().map(of).collect();
        let follower = Follower::start(
            lab.config.clone(),
            lab.problems.clone(),
            &mut self.store.records.clone().into_iter(),
            &snapshots,
            &self.store.blobs,
        );
        self.follower = Some(follower.expect("an honest ledger"));
    }
}
