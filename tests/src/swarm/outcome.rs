//! What the ledger of a finished simulation says, checked.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_core::run::job::JobPath;
use manyhands_core::swarm::chain::Verifier;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::ledger::{Entry, Offence, Record, UnitEntry, Verdict};

use super::world::World;

/// The ledger, read.
pub struct Outcome {
    /// All records; their chain is verified.
    pub records: Vec<Record>,
    /// Units that were accepted, with their positions.
    pub units: Vec<(u64, UnitEntry)>,
    /// Who was expelled, and why.
    pub expelled: BTreeMap<PeerKey, Offence>,
    /// Roll-backs.
    pub rolled_back: u64,
    /// Units that were found false after they had entered.
    pub voided: u64,
}

impl Outcome {
    /// Reads and verifies the ledger.
    pub fn of(world: &World<'_>) -> Self {
        let mut verifier = Verifier::default();
        let push = |bytes: &Vec<u8>| verifier.push(bytes).expect("the chain is unbroken");
        let records: Vec<Record> = world.store.records.iter().map(push).collect();
        let mut outcome = Self {
            units: Vec::new(),
            expelled: BTreeMap::new(),
            rolled_back: 0,
            voided: 0,
            records: Vec::new(),
        };
        let mut newest = 0;
        for record in &records {
            match &record.entry {
                Entry::Unit(unit) => outcome.units.push((record.sequence, *unit)),
                Entry::Expelled { volunteer, offence, .. } => {
                    let again = outcome.expelled.insert(*volunteer, *offence);
                    assert_eq!(again, None, "{volunteer:?} is expelled twice");
                }
                Entry::RolledBack { ordinal } => {
                    outcome.rolled_back += 1;
                    newest = *ordinal;
                }
                Entry::Version { ordinal, update: 0, .. } => newest = *ordinal,
                Entry::Final { ordinal } => {
                    assert!(*ordinal <= newest, "final before it is there: {ordinal} > {newest}");
                }
                Entry::Voided { .. } => outcome.voided += 1,
                _ => {}
            }
        }
        Self { records, ..outcome }
    }

    /// Checks that no item of a job entered twice. Holds for runs that were never rolled back.
    pub fn assert_no_item_twice(&self) {
        let mut items: BTreeSet<(JobPath, u32)> = BTreeSet::new();
        for (sequence, unit) in &self.units {
            for item in unit.first..unit.first + unit.count {
                let new = items.insert((unit.path, item));
                assert!(new, "record {sequence}: item {item} of {:?} again", unit.path);
            }
        }
    }

    /// Checks that the coordinator credits what the ledger says, no more and no less.
    pub fn assert_credits(&self, world: &World<'_>) {
        let own = World::secret().key();
        let mut owed: BTreeMap<PeerKey, u64> = BTreeMap::new();
        for record in &self.records {
            match &record.entry {
                Entry::Unit(u) => *owed.entry(u.volunteer).or_default() += u.multiply_adds,
                Entry::Audit { auditor, multiply_adds, verdict: Verdict::Valid, .. }
                    if *auditor != own =>
                {
                    *owed.entry(*auditor).or_default() += multiply_adds;
                }
                _ => {}
            }
        }
        let coordinator = world.coordinator.as_ref().expect("the coordinator runs");
        let mut credited: BTreeMap<PeerKey, u64> = BTreeMap::new();
        for (peer, volunteer) in coordinator.scheduler().volunteers() {
            let s = &volunteer.standing;
            if s.credit + s.provisional_credit > 0 {
                credited.insert(*peer, s.credit + s.provisional_credit);
            }
        }
        assert_eq!(credited, owed);
    }

    /// Weights that the ledger is closed with.
    pub fn closed(&self) -> Option<Hash> {
        match self.records.last()?.entry {
            Entry::Closed { weights } => Some(weights),
            _ => None,
        }
    }
}
