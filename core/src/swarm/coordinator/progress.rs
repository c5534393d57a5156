//! From accepted results to versions: the pipeline goes on, versions are published and become
//! final.

use std::collections::BTreeSet;

use super::{Accepted, Blobs, Coordinator, Effect};
use crate::model::weights::Weights;
use crate::run::job::{JobPath, OpenJob};
use crate::run::pipeline::{Advanced, TrainError};
use crate::run::work::Work;
use crate::swarm::delta;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::Entry;
use crate::swarm::recovery::snapshot_is_due;
use crate::swarm::scheduler::Urgency;
use crate::swarm::status::{RunState, StatusEvent};
use crate::swarm::unit::UNIT_BYTES_MAX;
use crate::swarm::versions::FULL_EVERY;

/// A version that is provisional for so many steps makes its contributors' last units be audited.
const PROVISIONAL_STEPS_MAX: u64 = 25;
/// Weight of a new completion in the mean length.
const LENGTH_GAIN: f64 = 0.01;

impl Coordinator {
    /// Goes on as far as the results allow.
    pub(super) fn sync(&mut self, blobs: &dyn Blobs) {
        while !self.halted && self.failure.is_none() {
            let before = self.pipeline.version().clone();
            let advanced = match self.pipeline.advance() {
                Ok(advanced) => advanced,
                Err(error) => {
                    self.doubt(error);
                    break;
                }
            };
            let step = matches!(advanced, Some(Advanced::Step(_)));
            if step || !std::sync::Arc::ptr_eq(&before, self.pipeline.version()) {
                let base = before.weights.clone();
                self.publish(before.hash().into(), &base, step);
            }
            match advanced {
                None if self.supply_spare(blobs) => {}
                None => break,
                Some(Advanced::Step(report)) => {
                    let ordinal = self.pipeline.ordinal();
                    self.figures.step(&report, self.now_ms);
                    self.announce(StatusEvent::Step { ordinal, report });
                    self.save_if_due();
                    self.audit_old();
                }
                Some(Advanced::Evaluation(evaluation)) => {
                    let ordinal = self.pipeline.ordinal();
                    self.figures.evaluation = Some((*evaluation).clone());
                    self.announce(StatusEvent::Evaluation { ordinal, evaluation });
                }
                Some(Advanced::Phase(_)) => {}
            }
        }
        if self.failure.is_none() {
            self.open_jobs();
        }
        self.finish();
    }

    /// The run cannot go on. If a lie is the reason, redoing what is not final finds it.
    pub(super) fn doubt(&mut self, error: TrainError) {
        self.failure = Some(error);
        let mut doubtful = Vec::new();
        for (peer, record) in &self.records {
            let recent = record.unproven.values().filter(|a| a.ordinal >= self.final_ordinal);
            doubtful.extend(recent.map(|a| (*peer, *a)));
        }
        for (peer, accepted) in doubtful {
            if !self.scheduler.is_expelled(&peer) {
                self.audit_accepted(peer, accepted, Urgency::Redo);
            }
        }
    }

    /// Lets the scheduler know what is open.
    fn open_jobs(&mut self) {
        let open: Vec<JobPath> = self.pipeline.jobs().map(|j| j.job.path).collect();
        let closed = self.scheduler.open_jobs().filter(|p| !open.contains(p));
        for path in closed.collect::<Vec<_>>() {
            self.scheduler.close(path);
            self.units.retain(|_, u| u.path != path);
        }
        for path in open {
            if !self.scheduler.is_open(path)
                && let Some(job) = self.pipeline.job(path)
            {
                let items = self.items_min(&job.job.work)..=items_max(&job.job.work);
                let (cost, missing) = (self.item_cost(job), missing_ranges(job));
                self.scheduler.open(path, cost, items, &missing);
            }
        }
    }

    /// Expected cost of an item, multiply-adds.
    fn item_cost(&self, job: &OpenJob) -> u64 {
        let work = &job.job.work;
        let model = self.pipeline.model();
        let length = self.mean_length.min(self.pipeline.max_new_tokens() as f64) as usize;
        let n = work.items();
        let seen = n.min(16);
        let sum: u64 =
            (0..seen).map(|i| work.item_multiply_adds(i * n / seen, length, model)).sum();
        sum / seen as u64
    }

    /// Takes in how long completions are.
    pub(super) fn measure_lengths(&mut self, path: JobPath, first: usize, count: usize) {
        let Some(job) = self.pipeline.job(path) else { return };
        for length in (first..first + count).filter_map(|i| job.sampled_length(i)) {
            self.mean_length += LENGTH_GAIN * (length as f64 - self.mean_length);
        }
    }

    /// Publishes the pipeline's version as what changed from `base`.
    pub(super) fn publish(&mut self, base: Hash, base_weights: &Weights, step: bool) {
        let version = self.pipeline.version().clone();
        let weights: Hash = version.hash().into();
        let delta = delta::encode(Some(base_weights), &version.weights);
        let delta_bytes = delta.len() as u64;
        self.figures.version_bytes += delta_bytes;
        let delta = self.keep(delta);
        let full = (self.versions.since_full + 1 >= FULL_EVERY)
            .then(|| delta::encode(None, &version.weights))
            .map(|bytes| self.keep(bytes));
        let ordinal = self.pipeline.ordinal();
        let update = if step { 0 } else { self.pipeline.updates_in_step() };
        self.versions.insert(step.then_some(ordinal), weights, base, delta, full);
        self.write(Entry::Version { ordinal, update, weights, delta, delta_bytes, base, full });
        let policy_version = self.pipeline.state().optimizer.update_count;
        self.announce(StatusEvent::Version {
            ordinal,
            policy_version,
            weights: weights.to_string(),
        });
    }

    /// Keeps the state now and then.
    fn save_if_due(&mut self) {
        if snapshot_is_due(&mut self.pipeline, &mut self.snapshot_ordinal) {
            self.snapshot();
        }
    }

    pub(super) fn snapshot(&mut self) {
        let files = self.pipeline.state().save(&self.pipeline.config, self.pipeline.model());
        let ordinal = self.pipeline.ordinal();
        self.effect(Effect::Snapshot { ordinal, files: Box::new(files) });
    }

    /// The newest unproven unit of whoever keeps a version provisional.
    fn newest_unaudited(&self, sequence: u64) -> Option<(PeerKey, Accepted)> {
        let owner = self.records.iter().find(|(_, r)| r.unproven.contains_key(&sequence))?;
        let newest = owner.1.unproven.values().next_back()?;
        Some((*owner.0, *newest))
    }

    fn audit_old(&mut self) {
        let ordinal = self.pipeline.ordinal();
        let Some(&(oldest, sequence)) = self.unsettled.first() else { return };
        if oldest + PROVISIONAL_STEPS_MAX <= ordinal {
            self.audit_newest(sequence);
        }
    }

    /// Asks for an audit of the newest unit of the owner of `sequence`, once.
    fn audit_newest(&mut self, sequence: u64) {
        let Some((peer, newest)) = self.newest_unaudited(sequence) else { return };
        if self.audits.values().all(|a| a.of != peer) {
            self.audit_accepted(peer, newest, Urgency::Spot);
        }
    }

    /// Marks versions final; closes the run when all are.
    pub(super) fn finish(&mut self) {
        if self.halted || self.closed {
            return;
        }
        if self.audits.is_empty()
            && self.redo.is_empty()
            && let Some(error) = self.failure.take()
        {
            self.halted = true;
            self.announce(StatusEvent::State { state: RunState::Failed });
            return self.effect(Effect::Failed(error));
        }
        let done = self.pipeline.is_done();
        // Rollouts for steps to come may be all that is unsettled.
        let ordinal = self.pipeline.ordinal();
        let stands = self.unsettled.first().map_or(ordinal, |(o, _)| ordinal.min(*o));
        let stands = if self.redo.is_empty() { stands } else { self.final_ordinal };
        if stands > self.final_ordinal {
            self.final_ordinal = stands;
            self.write(Entry::Final { ordinal: stands });
            self.announce(StatusEvent::Final { ordinal: stands });
        }
        if !done {
            return;
        }
        let waiting: Vec<(PeerKey, Accepted)> = self.unsettled_volunteers().collect();
        let audited: BTreeSet<PeerKey> = self.audits.values().map(|a| a.of).collect();
        for (peer, newest) in waiting.iter().filter(|(peer, _)| !audited.contains(peer)) {
            self.audit_accepted(*peer, *newest, Urgency::Spot);
        }
        if waiting.is_empty() && self.redo.is_empty() && self.audits.is_empty() {
            if !std::mem::replace(&mut self.checked_all, true) && self.check_everybody() {
                return;
            }
            let weights: Hash = self.pipeline.version().hash().into();
            self.closed = true;
            self.write(Entry::Closed { weights });
            self.announce(StatusEvent::State { state: RunState::Done });
            self.effect(Effect::Closed(weights));
        }
    }

    /// Items that a unit should have. Where the weights are larger than caches, engines read them
    /// from memory once a batch, and are several times slower an item with a few than with many;
    /// whole groups share their prompt's pass besides.
    fn items_min(&self, work: &Work) -> usize {
        let model = self.pipeline.model();
        if model.frozen().parameter_count() < LARGE_MODEL {
            return 1;
        }
        match (work, &self.pipeline.config.rl) {
            (Work::Sample { .. }, Some(rl)) => rl.group_size.min(GROUPED_ITEMS),
            _ => BATCH_ITEMS,
        }
    }

    /// The newest unit of each volunteer that has one that no audit stands behind.
    fn unsettled_volunteers(&self) -> impl Iterator<Item = (PeerKey, Accepted)> {
        self.records.iter().filter_map(|(peer, record)| {
            let since = record.settled.map_or(0, |s| s + 1);
            record.unproven.range(since..).next()?;
            record.unproven.values().next_back().map(|newest| (*peer, *newest))
        })
    }
}

/// Parameters from which a model does not fit the caches of a processor.
const LARGE_MODEL: usize = 8 << 20;
/// Items that a unit of a large model should have.
const BATCH_ITEMS: usize = 8;
/// Items to which a group of rollouts, which share the pass of their prompt, is kept together.
const GROUPED_ITEMS: usize = 16;

/// Items whose unit is sure to fit a message.
fn items_max(work: &Work) -> usize {
    // Varints: 5 bytes a token; 15 bytes of seeds a token; 32 bytes an item.
    let longest = match work {
        Work::Sample { requests, .. } => {
            requests.iter().map(|r| r.prompt.len() * 5 + 32).max().unwrap_or(1)
        }
        Work::Check { requests, claims, .. } => {
            let pairs = requests.iter().zip(claims);
            pairs.map(|(r, c)| (r.prompt.len() + c.len()) * 5 + 48).max().unwrap_or(1)
        }
        Work::Score { sequences, .. } => {
            sequences.iter().map(|s| s.tokens.len() * 5 + 32).max().unwrap_or(1)
        }
        Work::Gradient { sequences, .. } => {
            sequences.iter().map(|s| s.tokens.len() * 20 + 48).max().unwrap_or(1)
        }
    };
    (UNIT_BYTES_MAX / 2 / longest).max(1)
}

/// Runs of items without an output.
fn missing_ranges(job: &OpenJob) -> Vec<std::ops::Range<usize>> {
    let mut out: Vec<std::ops::Range<usize>> = Vec::new();
    for i in (0..job.job.work.items()).filter(|&i| job.is_missing(i)) {
        match out.last_mut() {
            Some(range) if range.end == i => range.end = i + 1,
            _ => out.push(i..i + 1),
        }
    }
    out
}
