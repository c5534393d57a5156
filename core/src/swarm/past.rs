//! What a ledger says, once read: which units stand, and how they enter a run again. A coordination
//! peer that starts again and whoever replays a ledger share it.

use std::collections::BTreeMap;

use super::coordinator::Blobs;
use super::ids::{Hash, PeerKey};
use super::ledger::{Entry, Offence, UnitEntry, Verdict};
use super::unit::{Unit, decode_output};
use crate::run::job::JobPath;
use crate::run::pipeline::Pipeline;
use crate::run::work::Output;

/// Units of the ledger by job, in order, with their sequence numbers.
pub(super) type ByPath = BTreeMap<JobPath, Vec<(u64, UnitEntry)>>;

/// An audit that was valid.
#[derive(Clone, Copy, Debug)]
pub(super) struct ValidAudit {
    pub sequence: u64,
    pub unit: Hash,
    pub of: PeerKey,
    pub auditor: PeerKey,
    pub cost: u64,
}

/// What was written so far.
#[derive(Debug, Default)]
pub(super) struct Past {
    pub units: Vec<(u64, UnitEntry)>,
    /// Results that count for nothing, and where it says so. The same unit may stand again, by
    /// somebody else.
    voided: BTreeMap<(Hash, PeerKey), u64>,
    pub audits: Vec<ValidAudit>,
    pub expelled: Vec<(PeerKey, Offence)>,
    pub followers: Vec<PeerKey>,
    pub final_ordinal: u64,
    pub closed: bool,
}

impl Past {
    /// Takes the next entry.
    pub(super) fn take(&mut self, sequence: u64, entry: &Entry) {
        match entry {
            Entry::Unit(unit) => self.units.push((sequence, *unit)),
            Entry::Audit { unit, volunteer, auditor, verdict, multiply_adds, .. } => {
                if *verdict == Verdict::Valid {
                    self.audits.push(ValidAudit {
                        sequence,
                        unit: *unit,
                        of: *volunteer,
                        auditor: *auditor,
                        cost: *multiply_adds,
                    });
                }
            }
            Entry::Expelled { volunteer, offence, .. } => {
                self.expelled.push((*volunteer, *offence));
            }
            Entry::Voided { unit, volunteer } => {
                self.voided.insert((*unit, *volunteer), sequence);
            }
            Entry::Final { ordinal } => self.final_ordinal = self.final_ordinal.max(*ordinal),
            Entry::RolledBack { ordinal } => {
                self.final_ordinal = self.final_ordinal.min(*ordinal);
            }
            Entry::Follower { coordinator } => self.followers.push(*coordinator),
            Entry::Closed { .. } => self.closed = true,
            Entry::Open { .. } | Entry::Version { .. } | Entry::Promoted { .. } => {}
        }
    }

    /// Units that were not voided, in order.
    pub(super) fn standing(&self) -> impl Iterator<Item = &(u64, UnitEntry)> {
        let voided = |(sequence, u): &&(u64, UnitEntry)| {
            self.voided.get(&(u.unit, u.volunteer)).is_some_and(|at| at > sequence)
        };
        self.units.iter().filter(move |unit| !voided(unit))
    }
}

/// The unit of an entry, if it is what the run asks for at that place. `None`: the job is not open,
/// or the entry belongs to steps that were rolled back, whose weights or inputs were others.
pub(super) fn unit_of(pipeline: &Pipeline, entry: &UnitEntry) -> Option<Unit> {
    let job = &pipeline.job(entry.path)?.job;
    let first = entry.first as usize;
    let end = first.checked_add(entry.count as usize).filter(|&end| end <= job.work.items())?;
    if first == end {
        return None;
    }
    let unit = Unit { weights: job.version.hash().into(), work: job.work.slice(first..end) };
    (Hash::of(&unit.encode()) == entry.unit).then_some(unit)
}

/// Whether no output of the entry's items is there yet.
pub(super) fn is_missing(pipeline: &Pipeline, entry: &UnitEntry) -> bool {
    let first = entry.first as usize;
    let mut items = first..first + entry.count as usize;
    pipeline.job(entry.path).is_some_and(|job| items.all(|i| job.is_missing(i)))
}

/// Why there is no output of an entry's unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoOutput {
    /// Its blob is not here: it can be computed again.
    Lost,
    /// Its blob is not what the entry says.
    Wrong(String),
}

/// The output of an entry's unit, from its blob.
pub(super) fn output_of(
    pipeline: &Pipeline,
    entry: &UnitEntry,
    unit: &Unit,
    blobs: &dyn Blobs,
) -> Result<Output, NoOutput> {
    let bytes = blobs.get(&entry.receipt).ok_or(NoOutput::Lost)?;
    read_output(pipeline, entry, unit, &bytes).map_err(NoOutput::Wrong)
}

/// The output of an entry's unit, from these bytes; or what is wrong with them.
pub(super) fn read_output(
    pipeline: &Pipeline,
    entry: &UnitEntry,
    unit: &Unit,
    bytes: &[u8],
) -> Result<Output, String> {
    if Hash::of(bytes) != entry.receipt {
        return Err(format!("the blob {} has other bytes", entry.receipt));
    }
    if bytes.len() as u64 != entry.result_bytes {
        return Err(format!("the result has {} bytes, not as it says", bytes.len()));
    }
    decode_output(bytes, &unit.work, pipeline.model()).map_err(|e| e.to_string())
}
