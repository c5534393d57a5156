//! The ledger: what happened, in order, chained by hash and signed by the coordination peer.
//!
//! It names every accepted unit, audit, expulsion and version. Together with the blobs it names
//! it determines the weights: `replay` derives them again.

use serde::{Deserialize, Serialize};

use super::ids::{Hash, PeerKey, Signature};
use crate::run::config::{IMPORTED_WEIGHTS, RunConfig};
use crate::run::job::JobPath;

/// The accepted result of a unit of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitEntry {
    /// Which job it is a part of.
    pub path: JobPath,
    /// First item of the job.
    pub first: u32,
    /// Number of items.
    pub count: u32,
    /// Hash of the unit's bytes: weights, inputs and seed.
    pub unit: Hash,
    /// Hash of the result's bytes.
    pub receipt: Hash,
    /// Size of the result.
    pub result_bytes: u64,
    /// Who computed it.
    pub volunteer: PeerKey,
    /// The volunteer's signature of [`receipt_message`].
    pub signature: Signature,
    /// Counted multiply-adds: the credit.
    pub multiply_adds: u64,
}

/// What an audit found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The auditor's receipt is the volunteer's.
    Valid,
    /// It is not, and the coordination peer's own execution agrees with the auditor.
    Invalid,
}

/// Why a volunteer was expelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offence {
    /// The result is not what the unit computes.
    WrongResult,
    /// The bytes do not match the receipt that announced them.
    BytesDifferFromReceipt,
    /// Bytes that no correct program sends.
    Malformed,
    /// A signature that is not the sender's.
    BadSignature,
    /// Took units and let them lapse, again and again.
    LeaseHoarding,
    /// More messages or bytes than the protocol allows.
    Flooding,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// The run begins. Always the first entry, never another.
    Open {
        /// The run file, as canonical JSON.
        config: String,
        /// Files that the run file names, of problems and of an imported model: path and content
        /// hash.
        files: Vec<(String, Hash)>,
        /// Digest of the arithmetic: `conformance::suite::DIGEST`.
        digest: String,
        /// Hash of the weights before the first step.
        weights: Hash,
        /// Blob that makes them.
        full: Hash,
        /// Whose signature the entries that follow bear.
        coordinator: PeerKey,
    },
    /// A result entered the run.
    Unit(UnitEntry),
    /// A result was computed again.
    Audit {
        /// Hash of the unit's bytes.
        unit: Hash,
        /// Whose result was checked.
        volunteer: PeerKey,
        /// Who checked: the coordination peer, or another volunteer.
        auditor: PeerKey,
        /// What came out.
        verdict: Verdict,
        /// The auditor's receipt.
        receipt: Hash,
        /// Counted multiply-adds: the auditor's credit, if it is a volunteer.
        multiply_adds: u64,
    },
    /// A volunteer is no longer served. Its unaudited units are redone.
    Expelled {
        /// Who.
        volunteer: PeerKey,
        /// Why.
        offence: Offence,
        /// The unit that showed it, if one did.
        unit: Option<Hash>,
    },
    /// A unit that had entered was found false: it counts for nothing.
    Voided {
        /// Hash of the unit's bytes.
        unit: Hash,
        /// Whose it was.
        volunteer: PeerKey,
    },
    /// New weights.
    Version {
        /// Steps of all phases behind these weights.
        ordinal: u64,
        /// 0 after a step; within one, the number of its updates so far.
        update: u32,
        /// Hash of the weights.
        weights: Hash,
        /// Blob that makes them from `base`.
        delta: Hash,
        /// Size of that blob.
        delta_bytes: u64,
        /// Hash of the weights that the blob changes.
        base: Hash,
        /// Blob that makes them from nothing, now and then.
        full: Option<Hash>,
    },
    /// Every contributor to versions up to here has passed a later audit.
    Final {
        /// Steps of all phases.
        ordinal: u64,
    },
    /// False units had entered: the run goes on from this earlier version.
    RolledBack {
        /// Steps of all phases that still stand.
        ordinal: u64,
    },
    /// This coordination peer may go on with the run if this one is lost.
    Follower {
        /// Who.
        coordinator: PeerKey,
    },
    /// The run is complete.
    Closed {
        /// Hash of the final weights.
        weights: Hash,
    },
    /// Another coordination peer goes on; the entries that follow bear its signature.
    Promoted {
        /// The new coordination peer.
        coordinator: PeerKey,
    },
}

impl Entry {
    /// The imported weights of a run that adapts them, and the blob that makes them from nothing.
    pub fn imported(&self) -> Option<(Hash, Hash)> {
        let Self::Open { config, files, .. } = self else { return None };
        let config: RunConfig = serde_json::from_str(config).ok()?;
        let path = config.model.import_file(IMPORTED_WEIGHTS)?;
        let (_, blob) = files.iter().find(|(name, _)| *name == path)?;
        Some((config.model.base?, *blob))
    }

    /// Blobs that make weights: what volunteers ask for.
    pub fn weight_blobs(&self) -> Vec<Hash> {
        match self {
            Self::Open { full, .. } => {
                std::iter::once(*full).chain(self.imported().map(|(_, blob)| blob)).collect()
            }
            Self::Version { delta, full, .. } => std::iter::once(*delta).chain(*full).collect(),
            _ => Vec::new(),
        }
    }

    /// Every blob that the entry names: what whoever goes on with the run needs.
    pub fn blobs(&self) -> Vec<Hash> {
        match self {
            Self::Unit(unit) => vec![unit.unit, unit.receipt],
            Self::Open { files, full, .. } => {
                files.iter().map(|(_, hash)| *hash).chain([*full]).collect()
            }
            _ => self.weight_blobs(),
        }
    }
}

/// An entry in the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Position, from 0.
    pub sequence: u64,
    /// Hash of the record before, zeros for the first.
    pub previous: Hash,
    /// Milliseconds since 1970 by the coordination peer's clock. For people; decides nothing.
    pub time_ms: u64,
    /// What happened.
    pub entry: Entry,
    /// The coordination peer's signature over all of the above.
    pub signature: Signature,
}

/// What a volunteer signs when it announces a result.
pub fn receipt_message(run: &Hash, unit: &Hash, receipt: &Hash, result_bytes: u64) -> Vec<u8> {
    let size = result_bytes.to_le_bytes();
    [b"manyhands receipt 1".as_slice(), &run.0, &unit.0, &receipt.0, &size].concat()
}
