//! The coordinator: turns what volunteers send into a run. Events in, effects out.
//!
//! It owns the run's [`Pipeline`], the [`Scheduler`] of leases, and the pen of the ledger. It does no
//! arithmetic of the model itself: audits are effects, whose outcome comes back as an event. Effects
//! are carried out in order; what the ledger must remember comes before what others are told, so
//! that a crash between any two effects loses nothing that anybody was promised, and
//! [`Coordinator::recover`] goes on from ledger and blobs alone. A roll-back is the same thing:
//! it is written, and the coordinator starts again.

mod audits;
mod convictions;
mod events;
mod progress;
mod recover;
mod requests;
mod results;
mod show;
mod takes;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::chain::Writer;
use super::ids::{Hash, PeerKey, Signature};
use super::ledger::{Entry, Offence};
use super::past::ByPath;
use super::protocol::{PeerAddress, Refusal, Response};
use super::scheduler::{Kind, Scheduler, TaskId, Urgency, Waiting};
use super::status::StatusEvent;
use super::unit::Unit;
use super::versions::Versions;
use crate::run::job::{JobPath, Version};
use crate::run::pipeline::{Pipeline, TrainError};

pub use super::recovery::RecoverError;
pub use audits::OWN_CHECKS_MAX;
pub use events::{Arrival, Effect, Event, Execution, Files};
pub use recover::Start;

/// Volunteers with an open session.
pub const SESSIONS_MAX: usize = 1 << 16;
/// Followers of a coordination peer.
pub const FOLLOWERS_MAX: usize = 16;
/// Accepted units that a volunteer is told of at once.
pub const NEWS_MAX: usize = 256;

/// Bytes by their hash: what the coordinator has asked to be kept.
pub trait Blobs {
    /// The blob, if it is there.
    fn get(&self, hash: &Hash) -> Option<Vec<u8>>;
}

impl Blobs for BTreeMap<Hash, Vec<u8>> {
    fn get(&self, hash: &Hash) -> Option<Vec<u8>> {
        Self::get(self, hash).cloned()
    }
}

/// A volunteer that is here.
#[derive(Clone, Debug, Default)]
struct Session {
    agent: String,
    engine: String,
    joined_ms: u64,
    /// Accepted since it was last told.
    news: Vec<(Hash, u64)>,
}

/// A result that was announced.
#[derive(Clone, Copy, Debug)]
struct Offer {
    receipt: Hash,
    bytes: u64,
    signature: Signature,
}

/// A unit that is out, or whose result waits for an audit.
#[derive(Debug)]
struct InFlight {
    task: TaskId,
    path: JobPath,
    first: usize,
    count: usize,
    unit: Unit,
    version: Arc<Version>,
    offers: BTreeMap<PeerKey, Offer>,
    held: Option<Held>,
}

/// A result that waits for its audit.
#[derive(Clone, Copy, Debug)]
struct Held {
    peer: PeerKey,
    offer: Offer,
    multiply_adds: u64,
}

/// A unit in the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Accepted {
    sequence: u64,
    ordinal: u64,
    /// Earliest step whose state rests on it.
    rests: u64,
    unit: Hash,
    receipt: Hash,
    weights: Hash,
    multiply_adds: u64,
    kind: u8,
}

/// Units of one volunteer that the own engine has not redone.
#[derive(Debug, Default)]
struct Record {
    unproven: BTreeMap<u64, Accepted>,
    /// Sequence of the newest unit that an audit stands behind.
    settled: Option<u64>,
}

/// An audit that was asked for.
#[derive(Debug)]
struct Audit {
    unit: Hash,
    of: PeerKey,
    receipt: Hash,
    weights: Hash,
    version: Option<Arc<Version>>,
    urgency: Urgency,
    kind: Kind,
    cost: u64,
    /// The unit that an auditor is given, while one has it.
    given: Option<Hash>,
    /// An auditor that found another receipt.
    auditor: Option<(PeerKey, Hash)>,
    /// The result that waited for this audit until an auditor disputed it. It enters yet if it was
    /// right and nobody else has computed the unit.
    disputed: Option<Held>,
}

/// See the module.
#[derive(Debug)]
pub struct Coordinator {
    pipeline: Pipeline,
    writer: Writer,
    run: Hash,
    config_json: String,
    audit_seed: [u8; 32],
    peers: Vec<PeerAddress>,
    token: String,
    scheduler: Scheduler,
    sessions: BTreeMap<PeerKey, Session>,
    /// Who waits for work: those who may not audit, and those who may.
    waiting: [Waiting<u64>; 2],
    /// By hash of the bytes, and task: items that are alike make units that are.
    units: BTreeMap<(Hash, TaskId), InFlight>,
    audits: BTreeMap<TaskId, Audit>,
    /// The audit that the own engine works on.
    executing: Option<TaskId>,
    records: BTreeMap<PeerKey, Record>,
    /// Accepted units that no audit stands behind: step and sequence.
    unsettled: BTreeSet<(u64, u64)>,
    /// Convicts whose units are being redone: those to do, and those found false.
    redo: BTreeMap<PeerKey, (BTreeSet<Hash>, Vec<Accepted>)>,
    /// Volunteers on whose word a unit of another one was found valid: whose, and which.
    vouched: BTreeMap<(PeerKey, Hash), PeerKey>,
    /// Units of the ledger that stand, whose jobs have not been opened since the start: after a
    /// roll-back they enter again when the run comes to them.
    spare: ByPath,
    /// Why the run cannot go on, unless a lie is the reason.
    failure: Option<TrainError>,
    versions: Versions,
    final_ordinal: u64,
    snapshot_ordinal: u64,
    mean_length: f64,
    paused: bool,
    /// The own engine has been asked for units of everybody.
    checked_all: bool,
    closed: bool,
    /// Rolled back or failed: only a restart helps.
    halted: bool,
    /// Rolled back: the last effect is a restart.
    restarts: bool,
    figures: show::Figures,
    now_ms: u64,
    wall_ms: u64,
    started_ms: u64,
    blobs_out: Vec<(Hash, Vec<u8>)>,
    records_out: Vec<Vec<u8>>,
    effects: Vec<Effect>,
}

impl Coordinator {
    /// The run's identity.
    pub fn run(&self) -> Hash {
        self.run
    }

    /// The run.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Whether the run is complete and every version final.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The scheduler, for figures.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Steps up to which every contributor has passed a later audit.
    pub fn final_ordinal(&self) -> u64 {
        self.final_ordinal
    }

    /// Results of steps before `ordinal`, which are final, are not stored any more: whoever
    /// computed them will not be checked for them again. A replay computes them again.
    pub fn forget(&mut self, ordinal: u64) {
        for record in self.records.values_mut() {
            record.unproven.retain(|_, a| a.ordinal >= ordinal);
        }
        self.unsettled = self.unsettled.split_off(&(ordinal, 0));
        let known = |peer: &PeerKey, unit: &Hash| {
            self.records.get(peer).is_some_and(|r| r.unproven.values().any(|a| a.unit == *unit))
        };
        self.vouched.retain(|(peer, unit), _| known(peer, unit));
    }

    /// Who coordinates, first, and who follows.
    pub fn peers(&self) -> &[PeerAddress] {
        &self.peers
    }

    /// Who coordinates and who follows, as volunteers are told.
    pub fn set_peers(&mut self, peers: Vec<PeerAddress>) {
        self.peers = peers;
    }

    /// Takes an event at `now_ms` of a monotonic clock; `wall_ms`, since 1970, only goes into the
    /// ledger, for people.
    pub fn handle(
        &mut self,
        now_ms: u64,
        wall_ms: u64,
        event: Event,
        blobs: &dyn Blobs,
    ) -> Vec<Effect> {
        self.now_ms = now_ms;
        self.wall_ms = wall_ms;
        if !self.halted {
            match event {
                Event::Request { peer, token, request } => {
                    self.request(peer, token, request, blobs)
                }
                Event::Malformed { peer } => self.convict(peer, Offence::Malformed, None),
                Event::Result { peer, unit, arrival } => self.result(peer, unit, arrival, blobs),
                Event::Left { peer } => self.left(peer),
                Event::Flooding { peer } => self.convict(peer, Offence::Flooding, None),
                Event::Executed { audit, receipt } => self.executed(audit, receipt, blobs),
                Event::Tick => {
                    for peer in self.scheduler.expire(now_ms) {
                        self.convict(peer, Offence::LeaseHoarding, None);
                    }
                }
                Event::Pause(paused) => self.paused = paused,
            }
            self.execute_next(blobs);
            self.serve_waiting(blobs);
        }
        self.flush();
        if std::mem::take(&mut self.restarts) {
            // Sessions end with this coordinator: who waits says hello to the next one.
            let waiting: Vec<u64> = self.waiting.iter_mut().flat_map(Waiting::drain).collect();
            for token in waiting {
                let response = Response::Refused(Refusal::NoSession);
                self.effects.push(Effect::Reply { token, response });
            }
            self.effects.push(Effect::Restart);
        }
        std::mem::take(&mut self.effects)
    }

    /// Writes an entry; it is persisted before any effect that follows.
    fn write(&mut self, entry: Entry) -> u64 {
        let (record, bytes) = self.writer.append(self.wall_ms, entry);
        self.records_out.push(bytes);
        record.sequence
    }

    fn keep(&mut self, bytes: Vec<u8>) -> Hash {
        let hash = Hash::of(&bytes);
        self.blobs_out.push((hash, bytes));
        hash
    }

    /// Puts what was written before the effects that follow.
    fn flush(&mut self) {
        if self.blobs_out.is_empty() && self.records_out.is_empty() {
            return;
        }
        let blobs = std::mem::take(&mut self.blobs_out);
        let records = std::mem::take(&mut self.records_out);
        self.effects.push(Effect::Persist { blobs, records });
    }

    fn effect(&mut self, effect: Effect) {
        self.flush();
        self.effects.push(effect);
    }

    fn announce(&mut self, event: StatusEvent) {
        self.effect(Effect::Announce(Box::new(event)));
    }

    /// Gives the own engine the most urgent audit.
    fn execute_next(&mut self, blobs: &dyn Blobs) {
        if self.executing.is_some() || self.halted {
            return;
        }
        while let Some(id) = self.scheduler.take_own_audit() {
            let Some(audit) = self.audits.get(&id) else { continue };
            let model = self.pipeline.model();
            let unit = blobs.get(&audit.unit).and_then(|u| Unit::decode(&u, model).ok());
            let weights = unit.map_or(audit.weights, |u| u.weights);
            let plan = self.versions.plan(weights, &[]).map_or(Vec::new(), |(_, blobs)| blobs);
            let execution = Execution {
                audit: id,
                unit: audit.unit,
                result: audit.receipt,
                weights,
                version: audit.version.clone(),
                plan,
            };
            self.executing = Some(id);
            self.effect(Effect::Execute(execution));
            return;
        }
    }
}

#[cfg(test)]
mod tests;
