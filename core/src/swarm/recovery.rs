//! What a ledger, its blobs and the states that were kept lead to: where a coordination peer that
//! starts again goes on, and where a follower stands.

use std::collections::BTreeMap;

use super::chain::{BrokenChain, Verifier};
use super::coordinator::Blobs;
use super::ids::{Hash, PeerKey};
use super::ledger::{Entry, Record, UnitEntry};
use super::past::{Past, is_missing, output_of, unit_of};
use super::versions::Versions;
use crate::checkpoint::CheckpointError;
use crate::conformance::suite::DIGEST;
use crate::model::weights::Weights;
use crate::run::config::{RunConfig, RunConfigError};
use crate::run::pipeline::Pipeline;
use crate::run::problems::Problems;
use crate::run::state::State;

/// Why a coordination peer cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The ledger is damaged.
    #[error("the ledger is damaged: {0}")]
    Chain(#[from] BrokenChain),
    /// The first record opens another run.
    #[error("the ledger belongs to another run file; give this run another directory")]
    OtherRun,
    /// The run was made by other arithmetic.
    #[error("the ledger was written under arithmetic {ledger}, this program computes {DIGEST}")]
    OtherArithmetic {
        /// Digest in the ledger.
        ledger: String,
    },
    /// The ledger is somebody else's.
    #[error(
        "the ledger is signed by {signer}, this peer is {own}; `--follow URL` mirrors it, `--promote` goes on with it if the other peer is lost"
    )]
    OtherSigner {
        /// Who signs.
        signer: PeerKey,
        /// Who wants to.
        own: PeerKey,
    },
    /// Only a follower that the ledger names may go on.
    #[error(
        "this peer is {own}, which the ledger does not name as a follower; follow the run with `--follow URL` first"
    )]
    NoFollower {
        /// Who wants to.
        own: PeerKey,
    },
    /// The units of the ledger do not lead where it says.
    #[error("{0}")]
    Underivable(String),
    /// The run file cannot work.
    #[error(transparent)]
    Config(#[from] RunConfigError),
    /// A snapshot cannot be read.
    #[error(transparent)]
    Snapshot(#[from] CheckpointError),
}

/// States that were kept, newest first: steps of all phases, and the files of the checkpoint.
pub type Snapshots = Vec<(u64, BTreeMap<String, Vec<u8>>)>;

/// A ledger that was read, and the run at the newest state that still stands.
pub(super) struct Recovered {
    pub verifier: Verifier,
    pub past: Past,
    pub versions: Versions,
    pub pipeline: Pipeline,
    pub snapshot_ordinal: u64,
    pub config_json: String,
}

impl Recovered {
    pub(super) fn read(
        config: RunConfig,
        problems: Problems,
        ledger: &mut dyn Iterator<Item = Vec<u8>>,
        snapshots: &Snapshots,
    ) -> Result<Self, RecoverError> {
        let config_json = serde_json::to_string(&config).expect("a run file is plain data");
        let mut verifier = Verifier::default();
        let (mut past, mut versions) = (Past::default(), Versions::default());
        for bytes in ledger {
            let record = verifier.push(&bytes)?;
            open(&record, &config_json)?;
            versions.take(&record.entry);
            past.take(record.sequence, &record.entry);
        }
        let model = config.model()?;
        let mut state = State::new(&config, &model, problems.initial(&model));
        let mut snapshot_ordinal = 0;
        for (ordinal, files) in snapshots {
            let (stored, snapshot) = State::load(files)?;
            let weights = Weights::quantize(&model, &snapshot.master());
            // States that were rolled back, or belong to another run, do not count.
            if stored == config && versions.at(*ordinal) == Some(weights.hash().into()) {
                (state, snapshot_ordinal) = (snapshot, *ordinal);
                break;
            }
        }
        let pipeline = Pipeline::new(config, problems, state)?;
        Ok(Self { verifier, past, versions, pipeline, snapshot_ordinal, config_json })
    }
}

/// Whether a first record opens this run under this arithmetic.
fn open(record: &Record, config_json: &str) -> Result<(), RecoverError> {
    match &record.entry {
        Entry::Open { config, .. } if config != config_json => Err(RecoverError::OtherRun),
        Entry::Open { digest, .. } if digest != DIGEST => {
            Err(RecoverError::OtherArithmetic { ledger: digest.clone() })
        }
        _ => Ok(()),
    }
}

/// Lets one unit of the ledger enter again; `false` if it is there already, is not what the run
/// asks for, or its blob is lost, in which case it is computed again.
pub(super) fn supply_again(pipeline: &mut Pipeline, entry: &UnitEntry, blobs: &dyn Blobs) -> bool {
    let unit = unit_of(pipeline, entry).filter(|_| is_missing(pipeline, entry));
    let Some(unit) = unit else { return false };
    let Ok(output) = output_of(pipeline, entry, &unit, blobs) else { return false };
    let (first, count) = (entry.first as usize, entry.count as usize);
    pipeline.supply(entry.path, first, count, output).is_ok()
}

/// Whether the state should be kept now. Steps are held back shortly if that is what it takes.
pub(super) fn snapshot_is_due(pipeline: &mut Pipeline, snapshot_ordinal: &mut u64) -> bool {
    let ordinal = pipeline.ordinal();
    let every = pipeline.config.checkpoint.every;
    let due = ordinal >= *snapshot_ordinal + every || ordinal == pipeline.config.steps();
    pipeline.set_barrier(ordinal + 2 >= *snapshot_ordinal + every);
    if !(due && pipeline.is_at_boundary()) {
        return false;
    }
    *snapshot_ordinal = ordinal;
    pipeline.set_barrier(false);
    true
}

/// The run that a ledger's first record opens: its settings, and its problem files by path.
///
/// # Errors
/// When the bytes are not the first record of a run that this program understands.
pub fn opening(record: &[u8]) -> Result<(RunConfig, Vec<(String, Hash)>), String> {
    let record = Verifier::default().push(record).map_err(|e| e.to_string())?;
    let Entry::Open { config, files, .. } = record.entry else {
        return Err("the first record opens no run".into());
    };
    let config: RunConfig = serde_json::from_str(&config).map_err(|e| e.to_string())?;
    config.validate().map_err(|e| e.to_string())?;
    Ok((config, files))
}
