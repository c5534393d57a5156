//! Results: from an upload's end into the run.

use super::audits::audit_kind;
use super::{Accepted, Arrival, Blobs, Coordinator, Held, InFlight, Offer};
use crate::run::job::Stage;
use crate::run::work::Output;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Offence, UnitEntry};
use crate::swarm::scheduler::{TaskId, Urgency};
use crate::swarm::unit::decode_output;

impl Coordinator {
    /// An upload came to an end.
    pub(super) fn result(
        &mut self,
        peer: PeerKey,
        unit: Hash,
        arrival: Arrival,
        blobs: &dyn Blobs,
    ) {
        let Some(key) = self.in_flight(&unit, |u| u.offers.contains_key(&peer)) else { return };
        let Some(in_flight) = self.units.get_mut(&key) else { return };
        let Some(offer) = in_flight.offers.remove(&peer) else { return };
        let task = in_flight.task;
        let bytes = match arrival {
            Arrival::Whole(bytes) => bytes,
            Arrival::Differs => {
                return self.convict(peer, Offence::BytesDifferFromReceipt, Some(unit));
            }
            Arrival::Failed => {
                if self.scheduler.fail(peer, task, self.now_ms) {
                    self.convict(peer, Offence::LeaseHoarding, Some(unit));
                }
                return;
            }
        };
        self.figures.result_bytes += bytes.len() as u64;
        if in_flight.held.is_some() || !self.scheduler.holds(peer, task) {
            return;
        }
        let model = self.pipeline.model();
        let Ok(output) = decode_output(&bytes, &in_flight.unit.work, model) else {
            return self.convict(peer, Offence::Malformed, Some(unit));
        };
        let multiply_adds = in_flight.unit.work.multiply_adds(&output, model);
        let unit_bytes = in_flight.unit.encode();
        self.scheduler.finished(peer, task, multiply_adds, self.now_ms);
        self.scheduler.deliver(task);
        self.keep(unit_bytes);
        self.keep(bytes);
        let held = Held { peer, offer, multiply_adds };
        if !self.scheduler.is_trusted(&peer) {
            in_flight_mut(self, key, |u| u.held = Some(held));
            return self.audit_in_flight(key, held, Urgency::Admission);
        }
        if self.is_drawn(peer, &unit, &offer.receipt) {
            self.audit_in_flight(key, held, Urgency::Spot);
        }
        self.accept(key, held, output);
        self.sync(blobs);
    }

    /// A result enters the run.
    pub(super) fn accept(&mut self, key: (Hash, TaskId), held: Held, output: Output) {
        let unit = key.0;
        let Some(InFlight { task, path, first, count, unit: u, .. }) = self.units.remove(&key)
        else {
            return;
        };
        self.scheduler.forget(task);
        if self.pipeline.supply(path, first, count, output).is_err() {
            return;
        }
        let Held { peer, offer: Offer { receipt, bytes, signature }, multiply_adds } = held;
        let entry = UnitEntry {
            path,
            first: first as u32,
            count: count as u32,
            unit,
            receipt,
            result_bytes: bytes,
            volunteer: peer,
            signature,
            multiply_adds,
        };
        let sequence = self.write(Entry::Unit(entry));
        self.enter(entry, u.weights, sequence);
        self.figures.accepted(multiply_adds, self.now_ms);
        if matches!(path.stage, Stage::Rollout { .. }) {
            self.measure_lengths(path, first, count);
        }
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.news.push((unit, sequence));
        }
    }

    /// Remembers a unit that is in the run.
    pub(super) fn enter(&mut self, entry: UnitEntry, weights: Hash, sequence: u64) -> Accepted {
        let lag = self.pipeline.config.rl.as_ref().map_or(0, |rl| rl.policy_lag as u64);
        let is_rollout = matches!(entry.path.stage, Stage::Rollout { .. });
        let accepted = Accepted {
            sequence,
            ordinal: entry.path.ordinal,
            rests: entry.path.ordinal.saturating_sub(if is_rollout { lag } else { 0 }),
            unit: entry.unit,
            receipt: entry.receipt,
            weights,
            multiply_adds: entry.multiply_adds,
            kind: audit_kind(entry.path.stage) as u8,
        };
        let standing = self.scheduler.standing(entry.volunteer);
        standing.accepted += 1;
        standing.provisional_credit += entry.multiply_adds;
        let record = self.records.entry(entry.volunteer).or_default();
        record.unproven.insert(sequence, accepted);
        self.unsettled.insert((accepted.ordinal, sequence));
        accepted
    }
}

fn in_flight_mut(c: &mut Coordinator, key: (Hash, TaskId), f: impl FnOnce(&mut InFlight)) {
    if let Some(in_flight) = c.units.get_mut(&key) {
        f(in_flight);
    }
}
