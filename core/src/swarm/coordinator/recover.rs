//! Starting a run, and going on with one from its ledger and blobs.

use std::collections::{BTreeMap, BTreeSet};

use super::{Accepted, Blobs, Coordinator, Effect, Files, show};
use crate::conformance::suite::DIGEST;
use crate::run::config::RunConfig;
use crate::run::pipeline::Advanced;
use crate::run::problems::Problems;
use crate::swarm::chain::Writer;
use crate::swarm::delta;
use crate::swarm::ids::{Hash, PeerKey, Secret};
use crate::swarm::ledger::{Entry, UnitEntry};
use crate::swarm::past::{ByPath, Past};
use crate::swarm::recovery::{RecoverError, Recovered, Snapshots, supply_again};
use crate::swarm::scheduler::{Scheduler, Urgency};

/// What a coordination peer starts with.
pub struct Start<'a> {
    /// The run file.
    pub config: RunConfig,
    /// Its problems.
    pub problems: Problems,
    /// Content hashes of the problem files.
    pub files: Vec<(String, Hash)>,
    /// The peer's key.
    pub secret: Secret,
    /// Secret seed of the choice of audits.
    pub audit_seed: [u8; 32],
    /// The operator's token.
    pub token: String,
    /// The ledger so far; empty for a new run.
    pub ledger: &'a mut dyn Iterator<Item = Vec<u8>>,
    /// States that were kept, newest first: steps of all phases, and how to read them.
    pub snapshots: Snapshots,
    /// Results of steps before this one are not stored any more: see [`Coordinator::forget`].
    pub forgotten: u64,
    /// Whether to go on with a run whose coordination peer is lost.
    pub promote: bool,
    /// Times, as for [`Coordinator::handle`].
    pub now_ms: u64,
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

impl Coordinator {
    /// Starts a run, or goes on with it. The effects of what was done on the way come from the
    /// next [`Coordinator::handle`].
    pub fn recover(start: Start<'_>, blobs: &dyn Blobs) -> Result<Self, RecoverError> {
        let recovered =
            Recovered::read(start.config, start.problems, start.ledger, &start.snapshots)?;
        let Recovered { verifier, past, versions, pipeline, snapshot_ordinal, config_json } =
            recovered;
        let own = start.secret.key();
        let is_new = verifier.sequence() == 0;
        let mut promoted = false;
        if let Some(signer) = verifier.signer().filter(|s| *s != own) {
            if !start.promote {
                return Err(RecoverError::OtherSigner { signer, own });
            }
            if !past.followers.contains(&own) {
                return Err(RecoverError::NoFollower { own });
            }
            promoted = true;
        }
        let writer = if is_new {
            Writer::new(start.secret.clone())
        } else {
            Writer::after(&verifier, start.secret.clone())
        };
        let max_new_tokens = pipeline.max_new_tokens();
        // No audit that was under way before a roll-back bears the name of one to come.
        let first_id = verifier.sequence() << 24;
        let swarm = pipeline.config.swarm.clone();
        let mut c = Self {
            pipeline,
            writer,
            run: verifier.run().unwrap_or(Hash([0; 32])),
            config_json,
            audit_seed: start.audit_seed,
            peers: Vec::new(),
            token: start.token,
            scheduler: Scheduler::new(swarm, first_id),
            sessions: BTreeMap::new(),
            waiting: Default::default(),
            units: BTreeMap::new(),
            audits: BTreeMap::new(),
            executing: None,
            records: BTreeMap::new(),
            unsettled: BTreeSet::new(),
            redo: BTreeMap::new(),
            vouched: BTreeMap::new(),
            spare: ByPath::new(),
            failure: None,
            versions,
            final_ordinal: past.final_ordinal,
            snapshot_ordinal,
            mean_length: max_new_tokens as f64 / 2.0,
            checked_all: false,
            paused: false,
            closed: past.closed,
            halted: false,
            restarts: false,
            figures: show::Figures::default(),
            now_ms: start.now_ms,
            wall_ms: start.wall_ms,
            started_ms: start.now_ms,
            blobs_out: Vec::new(),
            records_out: Vec::new(),
            effects: Vec::new(),
        };
        if is_new {
            c.open(start.files);
        } else if promoted {
            c.write(Entry::Promoted { coordinator: own });
        }
        c.resume(past, start.forgotten, blobs);
        Ok(c)
    }

    /// The first record, and the weights before the first step.
    fn open(&mut self, files: Vec<(String, Hash)>) {
        let version = self.pipeline.version().clone();
        let weights: Hash = version.hash().into();
        let full = self.keep(delta::encode(None, &version.weights));
        let entry = Entry::Open {
            config: self.config_json.clone(),
            files,
            digest: DIGEST.into(),
            weights,
            full,
            coordinator: self.writer.coordinator(),
        };
        self.versions.take(&entry);
        self.write(entry);
        self.run = self.writer.run().unwrap_or(Hash([0; 32]));
    }

    /// Lets everything that stands enter again, in the order of the ledger.
    fn resume(&mut self, past: Past, forgotten: u64, blobs: &dyn Blobs) {
        let mut by_path = ByPath::new();
        let mut drawn: BTreeMap<u64, (PeerKey, Accepted)> = BTreeMap::new();
        let mut units = past.standing().copied().peekable();
        for audit in &past.audits {
            while let Some((sequence, unit)) = units.next_if(|(s, _)| *s < audit.sequence) {
                self.enter_again(sequence, unit, &mut by_path, &mut drawn);
            }
            self.settle(audit.of, audit.unit, audit.auditor, audit.cost);
            self.figures.audited += 1;
            self.figures.own_audit += audit.cost;
            drawn.retain(|_, (of, a)| *of != audit.of || a.unit != audit.unit);
        }
        for (sequence, unit) in units {
            self.enter_again(sequence, unit, &mut by_path, &mut drawn);
        }
        self.forget(forgotten);
        drawn.retain(|_, (_, a)| a.ordinal >= forgotten);
        self.spare = by_path;
        self.refill(blobs);
        for (peer, offence) in past.expelled {
            self.expel(peer, offence);
        }
        for (peer, accepted) in drawn.into_values() {
            if !self.scheduler.is_expelled(&peer) {
                self.audit_accepted(peer, accepted, Urgency::Spot);
            }
        }
        self.sync(blobs);
        if past.closed {
            // It may not have been told before.
            self.effect(Effect::Closed(self.pipeline.version().hash().into()));
        }
    }

    /// A unit of the ledger, and whether it was drawn for an audit when it was accepted.
    fn enter_again(
        &mut self,
        sequence: u64,
        unit: UnitEntry,
        by_path: &mut ByPath,
        drawn: &mut BTreeMap<u64, (PeerKey, Accepted)>,
    ) {
        by_path.entry(unit.path).or_default().push((sequence, unit));
        let is_drawn = self.is_drawn(unit.volunteer, &unit.unit, &unit.receipt);
        let accepted = self.enter(unit, Hash([0; 32]), sequence);
        self.figures.useful += unit.multiply_adds;
        if is_drawn {
            drawn.insert(sequence, (unit.volunteer, accepted));
        }
    }

    /// Supplies the pipeline from units that stand, as far as they reach.
    fn refill(&mut self, blobs: &dyn Blobs) {
        loop {
            let before = self.pipeline.version().clone();
            let advanced = match self.pipeline.advance() {
                Ok(advanced) => advanced,
                Err(error) => return self.doubt(error),
            };
            let step = matches!(advanced, Some(Advanced::Step(_)));
            let weights: Hash = self.pipeline.version().hash().into();
            let known = match step {
                true => self.versions.at(self.pipeline.ordinal()) == Some(weights),
                false => self.versions.plan(weights, &[]).is_some(),
            };
            if !known {
                // The ledger ends between a result and the version that it completed.
                self.publish(before.hash().into(), &before.weights, step);
            }
            if !self.supply_spare(blobs) && advanced.is_none() {
                return;
            }
        }
    }

    /// Supplies jobs that were just opened from units that stand already, in the order of the
    /// ledger: whoever derives the run again does the same. Whether there were any.
    pub(super) fn supply_spare(&mut self, blobs: &dyn Blobs) -> bool {
        let ordinal = self.pipeline.ordinal();
        self.spare.retain(|path, _| path.ordinal >= ordinal);
        let open: Vec<_> = self.pipeline.jobs().map(|j| j.job.path).collect();
        let mut any = false;
        for path in open {
            for (_, entry) in self.spare.remove(&path).into_iter().flatten() {
                any |= supply_again(&mut self.pipeline, &entry, blobs);
            }
        }
        any
    }

    /// Takes the state from the coordination peer's own files, for checks in tests.
    pub fn state_files(&self) -> Files {
        self.pipeline.state().save(&self.pipeline.config, self.pipeline.model())
    }
}
