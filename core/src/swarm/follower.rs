//! A follower: mirrors a run's ledger and derives its weights along the way, so that it could go
//! on with the run if the coordination peer is lost. Records in, effects out.
//!
//! It trusts nobody: records are taken only as one chain with the right signatures, and the
//! weights that its own derivation comes to must be those that the ledger names. It hands out no
//! work. A roll-back is a restart from the mirrored ledger, as for the coordinator.

use std::collections::BTreeMap;

use super::coordinator::{Blobs, Files};
use super::ids::{Hash, PeerKey};
use super::ledger::Entry;
use super::past::ByPath;
use super::protocol::{PROTOCOL, PeerAddress, Refusal, Request, Response};
use super::recovery::{RecoverError, Recovered, Snapshots, snapshot_is_due, supply_again};
use super::status::{RunState, Status, StatusEvent, VersionStatus};
use super::versions::Versions;
use crate::conformance::suite::DIGEST;
use crate::run::config::RunConfig;
use crate::run::pipeline::{Advanced, Pipeline, TrainError};
use crate::run::problems::Problems;
use crate::run::report::StepReport;
use crate::run::state::Evaluation;
use crate::swarm::chain::{BrokenChain, Verifier};

/// Why a ledger is not followed any further.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The next record is not one.
    #[error(transparent)]
    Chain(#[from] BrokenChain),
    /// The coordination peer publishes weights that the units do not lead to.
    #[error(
        "record {sequence} of the ledger names the weights {named} after step {ordinal}, but its units lead to {derived}; do not trust this coordination peer"
    )]
    OtherWeights {
        /// Which record.
        sequence: u64,
        /// Steps of all phases.
        ordinal: u64,
        /// What it says.
        named: Hash,
        /// What comes out.
        derived: Hash,
    },
    /// Somebody goes on with the run who was never named as a follower.
    #[error("record {sequence} lets {coordinator} go on, whom the ledger never named")]
    Stranger {
        /// Which record.
        sequence: u64,
        /// Who.
        coordinator: PeerKey,
    },
    /// The derivation fails where the coordination peer's did not.
    #[error("the run cannot be derived from its ledger: {0}")]
    Derivation(#[from] TrainError),
}

/// Something to be done outside, in order.
#[derive(Debug)]
pub enum Effect {
    /// Keep a state to go on from.
    Snapshot {
        /// Steps of all phases.
        ordinal: u64,
        /// What to keep.
        files: Box<Files>,
    },
    /// Forget states after this one, and start again from the ledger: the run was rolled back.
    Restart {
        /// Steps of all phases that still stand.
        ordinal: u64,
    },
    /// Tell whoever watches.
    Announce(Box<StatusEvent>),
}

/// What a request is answered with.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// This.
    Response(Response),
    /// Records of the ledger.
    Records {
        /// First record.
        from: u64,
        /// At most so many.
        limit: u32,
    },
}

/// Weights that only the ledger or only the derivation has come to.
#[derive(Clone, Copy, Debug)]
enum OneSided {
    Named { sequence: u64, weights: Hash },
    Derived(Hash),
}

/// See the module.
#[derive(Debug)]
pub struct Follower {
    verifier: Verifier,
    versions: Versions,
    pipeline: Pipeline,
    /// Units whose jobs are not open yet, or whose blobs were missing.
    by_path: ByPath,
    /// By steps of all phases: versions that wait for their other half.
    unmatched: BTreeMap<u64, OneSided>,
    followers: Vec<PeerKey>,
    peers: Vec<PeerAddress>,
    snapshot_ordinal: u64,
    final_ordinal: u64,
    unit_count: u64,
    rolled_back: bool,
    closed: bool,
    last_step: Option<StepReport>,
    last_evaluation: Option<Evaluation>,
    effects: Vec<Effect>,
}

impl Follower {
    /// Stands where the mirrored ledger ends, which has its first record at least.
    ///
    /// # Errors
    /// When the ledger is not that of the run, or is damaged.
    pub fn start(
        config: RunConfig,
        problems: Problems,
        ledger: &mut dyn Iterator<Item = Vec<u8>>,
        snapshots: &Snapshots,
        blobs: &dyn Blobs,
    ) -> Result<Self, RecoverError> {
        let recovered = Recovered::read(config, problems, ledger, snapshots)?;
        let mut by_path = ByPath::new();
        for (sequence, unit) in recovered.past.standing() {
            by_path.entry(unit.path).or_default().push((*sequence, *unit));
        }
        let mut follower = Self {
            by_path,
            unmatched: BTreeMap::new(),
            followers: recovered.past.followers,
            peers: Vec::new(),
            snapshot_ordinal: recovered.snapshot_ordinal,
            final_ordinal: recovered.past.final_ordinal,
            unit_count: recovered.past.units.len() as u64,
            rolled_back: false,
            closed: recovered.past.closed,
            last_step: None,
            last_evaluation: None,
            effects: Vec::new(),
            verifier: recovered.verifier,
            versions: recovered.versions,
            pipeline: recovered.pipeline,
        };
        // What the ledger named before is in `versions`; a difference shows with the next record.
        follower.derive(blobs).map_err(|e| RecoverError::Underivable(e.to_string()))?;
        // What happened before the ledger's end was told before.
        follower.effects.retain(|effect| !matches!(effect, Effect::Announce(_)));
        Ok(follower)
    }

    /// The run.
    pub fn run(&self) -> Option<Hash> {
        self.verifier.run()
    }

    /// Records that were taken: the number of the next one.
    pub fn sequence(&self) -> u64 {
        self.verifier.sequence()
    }

    /// Who coordinates the run now.
    pub fn coordinator(&self) -> Option<PeerKey> {
        self.verifier.signer()
    }

    /// Whether the ledger is complete.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The run as it was derived.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Who coordinates and who follows, as volunteers are told.
    pub fn set_peers(&mut self, peers: Vec<PeerAddress>) {
        self.peers = peers;
    }

    /// Takes the next record, whose blobs are there. After an error, and after a restart was
    /// asked for, it takes no more.
    ///
    /// # Errors
    /// When the coordination peer is not to be trusted; the record must not be kept then.
    pub fn push(&mut self, bytes: &[u8], blobs: &dyn Blobs) -> Result<Vec<Effect>, FollowError> {
        let record = self.verifier.push(bytes)?;
        let sequence = record.sequence;
        self.versions.take(&record.entry);
        match record.entry {
            Entry::Unit(unit) => {
                self.unit_count += 1;
                self.by_path.entry(unit.path).or_default().push((sequence, unit));
            }
            Entry::Version { ordinal, update: 0, weights, .. } => {
                self.compare(ordinal, OneSided::Named { sequence, weights })?;
            }
            Entry::RolledBack { ordinal } => {
                self.announce(StatusEvent::RolledBack { ordinal });
                self.effects.push(Effect::Restart { ordinal });
                self.rolled_back = true;
            }
            Entry::Final { ordinal } => {
                self.final_ordinal = ordinal;
                self.announce(StatusEvent::Final { ordinal });
            }
            Entry::Expelled { volunteer, offence, .. } => {
                self.announce(StatusEvent::Expelled { peer: volunteer.to_string(), offence });
            }
            Entry::Follower { coordinator } => self.followers.push(coordinator),
            Entry::Promoted { coordinator } => {
                if !self.followers.contains(&coordinator) {
                    return Err(FollowError::Stranger { sequence, coordinator });
                }
            }
            Entry::Closed { .. } => {
                self.closed = true;
                self.announce(StatusEvent::State { state: RunState::Done });
            }
            Entry::Open { .. }
            | Entry::Version { .. }
            | Entry::Audit { .. }
            | Entry::Voided { .. } => {}
        }
        if !self.rolled_back {
            self.derive(blobs)?;
        }
        Ok(std::mem::take(&mut self.effects))
    }

    fn announce(&mut self, event: StatusEvent) {
        self.effects.push(Effect::Announce(Box::new(event)));
    }

    /// Holds what one side came to until the other one does.
    fn compare(&mut self, ordinal: u64, side: OneSided) -> Result<(), FollowError> {
        let (sequence, named, derived) = match (self.unmatched.remove(&ordinal), side) {
            (None, side) => {
                self.unmatched.insert(ordinal, side);
                return Ok(());
            }
            (Some(OneSided::Named { sequence, weights }), OneSided::Derived(derived))
            | (Some(OneSided::Derived(derived)), OneSided::Named { sequence, weights }) => {
                (sequence, weights, derived)
            }
            // The same side again: the newer word counts.
            (Some(_), side) => {
                self.unmatched.insert(ordinal, side);
                return Ok(());
            }
        };
        if named == derived {
            return Ok(());
        }
        Err(FollowError::OtherWeights { sequence, ordinal, named, derived })
    }

    /// Lets the units of the ledger enter, as far as they reach.
    fn derive(&mut self, blobs: &dyn Blobs) -> Result<(), FollowError> {
        loop {
            let advanced = self.pipeline.advance()?;
            let mut progress = advanced.is_some();
            match advanced {
                Some(Advanced::Step(report)) => self.stepped(report)?,
                Some(Advanced::Evaluation(evaluation)) => {
                    self.last_evaluation = Some((*evaluation).clone());
                    let ordinal = self.pipeline.ordinal();
                    self.announce(StatusEvent::Evaluation { ordinal, evaluation });
                }
                Some(Advanced::Phase(_)) | None => {}
            }
            let open: Vec<_> = self.pipeline.jobs().map(|j| j.job.path).collect();
            for path in open {
                let Some(units) = self.by_path.get_mut(&path) else { continue };
                let pipeline = &mut self.pipeline;
                let before = units.len();
                units.retain(|(_, unit)| !supply_again(pipeline, unit, blobs));
                progress |= units.len() < before;
            }
            if !progress {
                return Ok(());
            }
        }
    }

    fn stepped(&mut self, report: Box<StepReport>) -> Result<(), FollowError> {
        let ordinal = self.pipeline.ordinal();
        let weights: Hash = self.pipeline.version().hash().into();
        // Units of steps that are done are of no use any more.
        self.by_path.retain(|path, _| path.ordinal >= ordinal);
        self.last_step = Some((*report).clone());
        self.announce(StatusEvent::Step { ordinal, report });
        // A version that the mirrored ledger named before this follower started is compared too.
        match self.versions.at(ordinal).filter(|_| !self.unmatched.contains_key(&ordinal)) {
            Some(named) if named != weights => {
                let (sequence, derived) = (self.sequence(), weights);
                return Err(FollowError::OtherWeights { sequence, ordinal, named, derived });
            }
            Some(_) => {}
            None => self.compare(ordinal, OneSided::Derived(weights))?,
        }
        if snapshot_is_due(&mut self.pipeline, &mut self.snapshot_ordinal) {
            let files = self.pipeline.state().save(&self.pipeline.config, self.pipeline.model());
            self.effects.push(Effect::Snapshot { ordinal, files: Box::new(files) });
        }
        Ok(())
    }

    /// Answers a volunteer, or another follower.
    pub fn answer(&self, request: Request) -> Answer {
        Answer::Response(match request {
            Request::Ledger { from, limit } => return Answer::Records { from, limit },
            Request::Weights { want, have } => match self.versions.plan(want, &have) {
                Some((base, blobs)) => Response::Weights { base, blobs },
                None => Response::Refused(Refusal::UnknownWeights),
            },
            Request::Peers => Response::Peers(self.peers.clone()),
            Request::Hello { protocol, .. } if protocol != PROTOCOL => {
                Response::Refused(Refusal::Protocol(PROTOCOL))
            }
            _ => Response::Refused(Refusal::Follower),
        })
    }

    /// What dashboards show; addresses are the caller's to fill in.
    pub fn status(&self) -> Status {
        let ordinal = self.pipeline.ordinal();
        let text = |hash: Option<Hash>| hash.map(|h| h.to_string()).unwrap_or_default();
        let mut status = Status {
            run: text(self.run()),
            name: self.pipeline.config.name.clone(),
            state: if self.closed { RunState::Done } else { RunState::Running },
            phase: Some(self.pipeline.state().phase),
            ordinal,
            steps: self.pipeline.config.steps(),
            weights: Hash::from(self.pipeline.version().hash()).to_string(),
            parameters: self.pipeline.model().parameter_count() as u64,
            policy_version: self.pipeline.state().optimizer.update_count,
            digest: DIGEST.into(),
            coordinator: self.coordinator().map(|c| c.to_string()).unwrap_or_default(),
            ledger_records: self.sequence(),
            versions: VersionStatus {
                newest_ordinal: ordinal,
                final_ordinal: self.final_ordinal,
                provisional: ordinal.saturating_sub(self.final_ordinal),
                rolled_back: 0,
            },
            last_step: self.last_step.clone(),
            last_evaluation: self.last_evaluation.clone(),
            ..Status::default()
        };
        status.units.accepted = self.unit_count;
        status
    }
}
