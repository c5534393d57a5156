//! The first reading: is the ledger one chain, and do its entries agree with each other?

use std::collections::{BTreeMap, BTreeSet};

use super::FirstWrong;
use crate::conformance::suite::DIGEST;
use crate::run::config::RunConfig;
use crate::swarm::chain::Verifier;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Record, Verdict, receipt_message};
use crate::swarm::past::Past;

/// A version that the ledger names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Published {
    pub sequence: u64,
    pub weights: Hash,
    pub base: Hash,
    pub delta: Hash,
    pub full: Option<Hash>,
}

/// What the ledger opens with.
#[derive(Debug)]
pub(super) struct Opened {
    pub config: RunConfig,
    pub files: Vec<(String, Hash)>,
    pub weights: Hash,
    pub full: Hash,
}

/// What stands after all entries.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub entries: u64,
    pub opened: Option<Opened>,
    pub past: Past,
    /// By steps of all phases, and updates within the next.
    pub versions: BTreeMap<(u64, u32), Published>,
    /// Roll-backs: where, and to which step.
    pub rolled_back: Vec<(u64, u64)>,
    pub closed: Option<(u64, Hash)>,
    run: Option<Hash>,
    signer: Option<PeerKey>,
    /// Receipts of units that entered.
    receipts: BTreeMap<(Hash, PeerKey), Hash>,
    /// Results that an audit found false.
    invalid: BTreeSet<(Hash, PeerKey)>,
    expelled: BTreeSet<PeerKey>,
}

impl Reading {
    /// Reads until the end, or until the chain breaks.
    pub(super) fn of(
        records: &mut dyn Iterator<Item = Vec<u8>>,
        first_wrong: &mut FirstWrong,
    ) -> Self {
        let (mut reading, mut verifier) = (Self::default(), Verifier::default());
        for bytes in records {
            let record = match verifier.push(&bytes) {
                Ok(record) => record,
                Err(broken) => {
                    first_wrong.note(broken.sequence, broken.error.to_string());
                    break;
                }
            };
            reading.run = verifier.run();
            if let Err(why) = reading.take(&record) {
                first_wrong.note(record.sequence, why);
            }
            reading.signer = verifier.signer();
            reading.past.take(record.sequence, &record.entry);
            reading.entries += 1;
        }
        reading
    }

    /// Whether the run must ask for the unit of `ordinal` that entered at `sequence`: nothing that
    /// it rests on was rolled back.
    pub(super) fn is_firm(&self, sequence: u64, ordinal: u64) -> bool {
        self.rolled_back.iter().all(|(at, to)| *at < sequence || ordinal < *to)
    }

    fn take(&mut self, record: &Record) -> Result<(), String> {
        let sequence = record.sequence;
        match &record.entry {
            Entry::Open { config, files, digest, weights, full, .. } => {
                if digest != DIGEST {
                    return Err(format!(
                        "the run is of arithmetic {digest}, this program's is {DIGEST}"
                    ));
                }
                let config: RunConfig = serde_json::from_str(config)
                    .map_err(|e| format!("the run file cannot be read: {e}"))?;
                config.validate().map_err(|e| format!("the run file cannot work: {e}"))?;
                let (files, weights, full) = (files.clone(), *weights, *full);
                self.opened = Some(Opened { config, files, weights, full });
                let base = Hash([0; 32]);
                let opening = Published { sequence, weights, base, delta: full, full: Some(full) };
                self.versions.insert((0, 0), opening);
            }
            Entry::Unit(unit) => {
                let run = self.run.unwrap_or(Hash([0; 32]));
                let message = receipt_message(&run, &unit.unit, &unit.receipt, unit.result_bytes);
                require(
                    unit.volunteer.verifies(&message, &unit.signature),
                    "the receipt is not signed by the volunteer",
                )?;
                require(
                    !self.expelled.contains(&unit.volunteer),
                    "the volunteer had been expelled",
                )?;
                self.receipts.insert((unit.unit, unit.volunteer), unit.receipt);
            }
            Entry::Audit { unit, volunteer, auditor, verdict, receipt, .. } => {
                let claimed = self.receipts.get(&(*unit, *volunteer));
                require(auditor != volunteer, "a volunteer audited itself")?;
                if *verdict == Verdict::Valid {
                    let claimed = claimed.ok_or("the audited unit never entered")?;
                    require(claimed == receipt, "a valid audit with another receipt")?;
                } else {
                    require(claimed != Some(receipt), "an invalid audit with the same receipt")?;
                    self.invalid.insert((*unit, *volunteer));
                }
            }
            Entry::Expelled { volunteer, .. } => {
                self.expelled.insert(*volunteer);
            }
            Entry::Voided { unit, volunteer } => {
                let key = (*unit, *volunteer);
                require(self.receipts.contains_key(&key), "the voided unit never entered")?;
                require(self.invalid.contains(&key), "no audit found the voided unit false")?;
            }
            Entry::Version { ordinal, update, weights, delta, base, full, .. } => {
                let (weights, base, delta, full) = (*weights, *base, *delta, *full);
                let published = Published { sequence, weights, base, delta, full };
                let known = self.versions.insert((*ordinal, *update), published);
                require(
                    known.is_none_or(|k| k.weights == weights),
                    "other weights of this step stand already",
                )?;
            }
            Entry::Final { ordinal } => {
                require(self.versions.contains_key(&(*ordinal, 0)), "no such version stands")?;
            }
            Entry::RolledBack { ordinal } => {
                require(self.versions.contains_key(&(*ordinal, 0)), "no such version stands")?;
                self.versions.split_off(&(*ordinal, 1));
                self.rolled_back.push((sequence, *ordinal));
            }
            Entry::Promoted { coordinator } => {
                let known = self.past.followers.contains(coordinator);
                require(
                    known || self.signer == Some(*coordinator),
                    "whoever goes on was never named as a follower",
                )?;
            }
            Entry::Closed { weights } => self.closed = Some((sequence, *weights)),
            Entry::Follower { .. } => {}
        }
        Ok(())
    }
}

fn require(holds: bool, problem: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(problem.into()) }
}
