//! Results, audits, convictions.

use std::collections::BTreeSet;

use super::{Accepted, Arrival, Audit, Blobs, Coordinator, Effect, Held, InFlight, Offer};
use crate::run::job::Stage;
use crate::run::work::Output;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Offence, UnitEntry, Verdict};
use crate::swarm::scheduler::{Kind, TaskId, Urgency};
use crate::swarm::status::StatusEvent;
use crate::swarm::unit::decode_output;

/// Audits of auditors wait for the own engine as long as they are fewer.
pub const OWN_CHECKS_MAX: usize = 64;

impl Coordinator {
    /// An upload came to an end.
    pub(super) fn result(&mut self, peer: PeerKey, unit: Hash, arrival: Arrival) {
        let Some(in_flight) = self.units.get_mut(&unit) else { return };
        let Some(offer) = in_flight.offers.remove(&peer) else { return };
        let task = in_flight.task;
        let bytes = match arrival {
            Arrival::Whole(bytes) => bytes,
            Arrival::Differs => {
                return self.convict(peer, Offence::BytesDifferFromReceipt, Some(unit));
            }
            Arrival::Failed => return self.scheduler.release(peer, task),
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
            in_flight_mut(self, &unit, |u| u.held = Some(held));
            return self.audit_in_flight(unit, held, Urgency::Admission);
        }
        // Whether it is audited is decided after the receipt, by a draw that nobody can foresee.
        let probability =
            self.scheduler.standing(peer).audit_probability(&self.pipeline.config.swarm);
        let spot = self.draw(b"audit", &unit, &offer.receipt) < probability;
        if spot {
            self.audit_in_flight(unit, held, Urgency::Spot);
        }
        self.accept(unit, held, output);
        self.sync();
    }

    /// A number in 0 to 1 that follows from the audit seed.
    fn draw(&self, purpose: &[u8], unit: &Hash, receipt: &Hash) -> f64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.audit_seed);
        hasher.update(purpose).update(&unit.0).update(&receipt.0);
        let hash = hasher.finalize();
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hash.as_bytes()[..8]);
        (u64::from_le_bytes(bytes) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn audit_in_flight(&mut self, unit: Hash, held: Held, urgency: Urgency) {
        let Some(in_flight) = self.units.get(&unit) else { return };
        let audit = Audit {
            unit,
            of: held.peer,
            receipt: held.offer.receipt,
            weights: in_flight.unit.weights,
            version: Some(in_flight.version.clone()),
            urgency,
            kind: audit_kind(in_flight.path.stage),
            cost: held.multiply_adds,
            given: None,
            auditor: None,
        };
        self.ask(audit);
    }

    pub(super) fn ask(&mut self, audit: Audit) {
        let id = self.scheduler.request_audit(audit.of, audit.kind, audit.cost, audit.urgency);
        self.audits.insert(id, audit);
    }

    /// Asks for an audit of a unit that is in the run.
    pub(super) fn audit_accepted(&mut self, of: PeerKey, a: Accepted, urgency: Urgency) {
        let kind = [Kind::Sample, Kind::Forward, Kind::Gradient][usize::from(a.kind.min(2))];
        self.ask(Audit {
            unit: a.unit,
            of,
            receipt: a.receipt,
            weights: a.weights,
            version: None,
            urgency,
            kind,
            cost: a.multiply_adds,
            given: None,
            auditor: None,
        });
    }

    /// A result enters the run.
    fn accept(&mut self, unit: Hash, held: Held, output: Output) {
        let Some(InFlight { task, path, first, count, unit: u, .. }) = self.units.remove(&unit)
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
    pub(super) fn enter(&mut self, entry: UnitEntry, weights: Hash, sequence: u64) {
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
        record.unaudited.insert(sequence, accepted);
        self.unsettled.insert((accepted.ordinal, sequence));
    }

    /// The own engine finished an audit: the last word.
    pub(super) fn executed(&mut self, id: TaskId, receipt: Hash, blobs: &dyn Blobs) {
        if self.executing == Some(id) {
            self.executing = None;
        }
        let Some(audit) = self.audits.remove(&id) else { return };
        self.scheduler.finish_audit(id);
        self.figures.own_audit += audit.cost;
        if let Some((auditor, found)) = audit.auditor
            && found != receipt
        {
            self.convict(auditor, Offence::WrongResult, Some(audit.unit));
        }
        let coordinator = self.writer.coordinator();
        self.verdict(audit, coordinator, receipt, blobs);
    }

    /// A volunteer finished an audit.
    pub(super) fn audited_by(
        &mut self,
        auditor: PeerKey,
        id: TaskId,
        receipt: Hash,
        blobs: &dyn Blobs,
    ) {
        let Some(audit) = self.audits.get_mut(&id) else { return };
        self.scheduler.finished(auditor, id, audit.cost, self.now_ms);
        let (unit, claimed) = (audit.unit, audit.receipt);
        let disputed = receipt != claimed;
        let drawn =
            self.draw(b"auditor", &unit, &claimed) < self.pipeline.config.swarm.audit_the_auditors;
        // One engine cannot keep up with a share of all audits of a large swarm.
        let has_time = self.scheduler.own_audits_waiting() < OWN_CHECKS_MAX;
        let again = disputed || drawn && has_time;
        let Some(mut audit) = self.audits.remove(&id) else { return };
        self.scheduler.finish_audit(id);
        self.figures.delegated_audit += audit.cost;
        if again {
            // The coordination peer's own execution decides, and before anything else.
            audit.auditor = Some((auditor, receipt));
            audit.given = None;
            if disputed {
                audit.urgency = Urgency::Redo;
            }
            self.ask_myself(audit);
        } else {
            self.verdict(audit, auditor, receipt, blobs);
        }
    }

    /// Queues an audit that no volunteer may do.
    fn ask_myself(&mut self, audit: Audit) {
        let id = self.scheduler.request_own_audit(audit.of, audit.kind, audit.cost, audit.urgency);
        self.audits.insert(id, audit);
    }

    /// What follows from an audit.
    fn verdict(&mut self, audit: Audit, auditor: PeerKey, receipt: Hash, blobs: &dyn Blobs) {
        let (of, unit) = (audit.of, audit.unit);
        let valid = receipt == audit.receipt;
        let held = self.units.get(&unit).and_then(|u| u.held).filter(|h| h.peer == of);
        if valid && let Some(held) = held {
            let model = self.pipeline.model();
            let output = self.units.get(&unit).and_then(|u| {
                decode_output(&blobs.get(&held.offer.receipt)?, &u.unit.work, model).ok()
            });
            if let Some(output) = output {
                self.accept(unit, held, output);
            }
        }
        let verdict = if valid { Verdict::Valid } else { Verdict::Invalid };
        let multiply_adds = audit.cost;
        let entry = Entry::Audit { unit, volunteer: of, auditor, verdict, receipt, multiply_adds };
        self.write(entry);
        self.figures.audited += 1;
        if valid {
            self.settle(of, unit, auditor, multiply_adds);
        } else {
            self.figures.invalid += 1;
            if held.is_some()
                && let Some(u) = self.units.get_mut(&unit)
            {
                u.held = None;
                let task = u.task;
                self.scheduler.reopen(task);
            }
            if self.scheduler.is_expelled(&of) {
                self.redone(of, unit, false);
            } else {
                self.convict(of, Offence::WrongResult, Some(unit));
                self.redone(of, unit, false);
            }
        }
        self.sync();
    }

    /// An audit of `unit` was valid: its volunteer's units up to it are settled.
    pub(super) fn settle(&mut self, of: PeerKey, unit: Hash, auditor: PeerKey, cost: u64) {
        if auditor != self.writer.coordinator() {
            self.scheduler.standing(auditor).credit += cost;
        }
        let record = self.records.entry(of).or_default();
        let found = record.unaudited.values().find(|a| a.unit == unit).map(|a| a.sequence);
        if let Some(sequence) = found {
            let since = record.settled.map_or(0, |s| s + 1);
            // Audits may come to an end in another order than the units entered.
            let newly = (since <= sequence).then(|| record.unaudited.range(since..=sequence));
            let settled: Vec<Accepted> = newly.into_iter().flatten().map(|(_, a)| *a).collect();
            record.settled = record.settled.max(Some(sequence));
            record.unaudited.remove(&sequence);
            let credit: u64 = settled.iter().map(|a| a.multiply_adds).sum();
            for a in settled {
                self.unsettled.remove(&(a.ordinal, a.sequence));
            }
            let standing = self.scheduler.standing(of);
            standing.credit += credit;
            standing.provisional_credit = standing.provisional_credit.saturating_sub(credit);
        }
        let standing = self.scheduler.standing(of);
        standing.audited += 1;
        standing.valid_in_a_row += 1;
        self.redone(of, unit, true);
    }

    /// Expels a volunteer; all its units that no audit has looked at are redone.
    pub(super) fn convict(&mut self, peer: PeerKey, offence: Offence, unit: Option<Hash>) {
        if self.scheduler.is_expelled(&peer) {
            return;
        }
        self.write(Entry::Expelled { volunteer: peer, offence, unit });
        self.expel(peer, offence);
        self.effect(Effect::Ban(peer));
        self.announce(StatusEvent::Expelled { peer: peer.to_string(), offence });
    }

    /// The part of a conviction that is repeated when the ledger is read again.
    pub(super) fn expel(&mut self, peer: PeerKey, offence: Offence) {
        self.sessions.remove(&peer);
        self.scheduler.expel(peer, offence);
        for in_flight in self.units.values_mut() {
            in_flight.offers.remove(&peer);
            if in_flight.held.take_if(|h| h.peer == peer).is_some() {
                self.scheduler.reopen(in_flight.task);
            }
        }
        let own = self.audits.iter().filter(|(_, a)| a.of == peer).map(|(id, _)| *id);
        for id in own.collect::<Vec<_>>() {
            if self.executing != Some(id) {
                self.audits.remove(&id);
                self.scheduler.finish_audit(id);
            }
        }
        let unaudited: Vec<Accepted> = self
            .records
            .get(&peer)
            .map(|r| r.unaudited.values().copied().collect())
            .unwrap_or_default();
        let units: BTreeSet<Hash> = unaudited.iter().map(|a| a.unit).collect();
        if units.is_empty() {
            return;
        }
        self.redo.insert(peer, (units, Vec::new()));
        for a in unaudited {
            self.audit_accepted(peer, a, Urgency::Redo);
        }
    }

    /// A convict's unit was redone. After the last one the run is rolled back if one was false.
    fn redone(&mut self, peer: PeerKey, unit: Hash, valid: bool) {
        let Some((waiting, lies)) = self.redo.get_mut(&peer) else { return };
        if waiting.remove(&unit) && !valid {
            let record = self.records.get(&peer);
            lies.extend(record.and_then(|r| r.unaudited.values().find(|a| a.unit == unit)));
        }
        if !waiting.is_empty() {
            return;
        }
        let Some((_, lies)) = self.redo.remove(&peer) else { return };
        if lies.is_empty() {
            let Some(record) = self.records.get_mut(&peer) else { return };
            for a in std::mem::take(&mut record.unaudited).into_values() {
                self.unsettled.remove(&(a.ordinal, a.sequence));
            }
            return;
        }
        let ordinal = lies.iter().map(|a| a.rests).min().unwrap_or(0);
        for lie in &lies {
            self.write(Entry::Voided { unit: lie.unit, volunteer: peer });
        }
        self.write(Entry::RolledBack { ordinal });
        self.effect(Effect::DropSnapshots { after: ordinal });
        self.announce(StatusEvent::RolledBack { ordinal });
        self.effect(Effect::Restart);
        self.halted = true;
    }
}

fn in_flight_mut(c: &mut Coordinator, unit: &Hash, f: impl FnOnce(&mut InFlight)) {
    if let Some(in_flight) = c.units.get_mut(unit) {
        f(in_flight);
    }
}

/// Samples are checked by a forward pass.
fn audit_kind(stage: Stage) -> Kind {
    match Kind::of(stage) {
        Kind::Sample => Kind::Forward,
        kind => kind,
    }
}
