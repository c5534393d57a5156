//! Audits: what is asked, of whom, and what follows from the answer.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::{Accepted, Audit, Blobs, Coordinator, Held, InFlight};
use crate::run::job::Stage;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Offence, Verdict};
use crate::swarm::scheduler::{Kind, TaskId, Urgency};
use crate::swarm::unit::decode_output;

/// Audits of auditors wait for the own engine as long as they are fewer.
pub const OWN_CHECKS_MAX: usize = 64;

impl Coordinator {
    /// Whether a unit of a trusted volunteer is audited: decided after the receipt, by a draw that
    /// nobody can foresee.
    pub(super) fn is_drawn(&mut self, peer: PeerKey, unit: &Hash, receipt: &Hash) -> bool {
        let policy = &self.pipeline.config.swarm;
        let standing = self.scheduler.standing(peer);
        let (trusted, probability) =
            (standing.is_trusted(policy), standing.audit_probability(policy));
        trusted && self.draw(b"audit", unit, receipt) < probability
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

    pub(super) fn audit_in_flight(&mut self, key: (Hash, TaskId), held: Held, urgency: Urgency) {
        let Some(in_flight) = self.units.get(&key) else { return };
        let audit = Audit {
            unit: key.0,
            of: held.peer,
            receipt: held.offer.receipt,
            weights: in_flight.unit.weights,
            version: Some(in_flight.version.clone()),
            urgency,
            kind: audit_kind(in_flight.path.stage),
            cost: held.multiply_adds,
            given: None,
            auditor: None,
            disputed: None,
        };
        self.ask(audit);
    }

    pub(super) fn ask(&mut self, audit: Audit) {
        let id = self.scheduler.request_audit(audit.of, audit.kind, audit.cost, audit.urgency);
        self.audits.insert(id, audit);
    }

    /// Asks for an audit of a unit that is in the run. What a convict left is redone by the own
    /// engine alone: others may be in league with it.
    pub(super) fn audit_accepted(&mut self, of: PeerKey, a: Accepted, urgency: Urgency) {
        let audit = Audit::again(of, a, urgency);
        match urgency {
            Urgency::Redo => self.ask_myself(audit),
            Urgency::Admission | Urgency::Spot => self.ask(audit),
        }
    }

    /// A unit of `of` that is in the run and that the own engine has not redone.
    pub(super) fn unproven(&self, of: &PeerKey, unit: &Hash) -> Option<Accepted> {
        self.records.get(of)?.unproven.values().find(|a| a.unit == *unit).copied()
    }

    /// The own engine finished an audit: the last word.
    pub(super) fn executed(&mut self, id: TaskId, receipt: Hash, blobs: &dyn Blobs) {
        // Before a roll-back another audit may have been under way.
        if self.executing != Some(id) {
            return;
        }
        self.executing = None;
        let Some(audit) = self.audits.remove(&id) else { return };
        self.scheduler.finish_audit(id);
        self.figures.own_audit += audit.cost;
        if let Some((auditor, found)) = audit.auditor
            && found != receipt
        {
            self.convict(auditor, Offence::WrongResult, Some(audit.unit));
        }
        // An auditor that was right gets the credit, though its word alone was not enough.
        let right = audit.auditor.filter(|(_, found)| *found == receipt);
        let auditor = right.map_or(self.writer.coordinator(), |(auditor, _)| auditor);
        self.verdict(audit, auditor, receipt, blobs);
    }

    /// A volunteer finished an audit.
    pub(super) fn audited_by(
        &mut self,
        auditor: PeerKey,
        id: TaskId,
        receipt: Hash,
        blobs: &dyn Blobs,
    ) {
        let Some(mut audit) = self.audits.remove(&id) else { return };
        self.scheduler.finished(auditor, id, audit.cost, self.now_ms);
        self.scheduler.finish_audit(id);
        self.figures.delegated_audit += audit.cost;
        let (of, unit, claimed) = (audit.of, audit.unit, audit.receipt);
        if receipt != claimed {
            audit.auditor = Some((auditor, receipt));
            audit.given = None;
            self.dispute(&mut audit);
            return self.ask_myself(audit);
        }
        self.verdict(audit, auditor, receipt, blobs);
        let drawn =
            self.draw(b"auditor", &unit, &claimed) < self.pipeline.config.swarm.audit_the_auditors;
        // One engine cannot keep up with a share of all audits of a large swarm.
        let has_time = self.scheduler.own_audits_waiting() < OWN_CHECKS_MAX;
        if drawn
            && has_time
            && let Some(accepted) = self.unproven(&of, &unit)
        {
            self.ask_myself(Audit::again(of, accepted, Urgency::Spot));
        }
    }

    /// Before the run ends, the own engine redoes a unit of each kind of each volunteer that others
    /// alone have vouched for, so that liars in league are found however many they are; beyond
    /// [`OWN_CHECKS_MAX`] volunteers of those with the most such units. Returns whether there is one.
    pub(super) fn check_everybody(&mut self) -> bool {
        let unseen = self.records.iter().filter(|(_, r)| !r.unproven.is_empty());
        let mut unseen: Vec<(Reverse<usize>, PeerKey)> =
            unseen.map(|(peer, r)| (Reverse(r.unproven.len()), *peer)).collect();
        unseen.sort_unstable();
        unseen.truncate(OWN_CHECKS_MAX);
        for (_, peer) in &unseen {
            // Nobody foresees which.
            let mut drawn = BTreeMap::new();
            for a in self.records.get(peer).into_iter().flat_map(|r| r.unproven.values()) {
                let draw = (self.draw(b"last", &a.unit, &a.receipt) * 1e15) as u64;
                let best = drawn.entry(a.kind).or_insert((draw, *a));
                *best = (*best).min((draw, *a));
            }
            for (_, a) in drawn.into_values() {
                self.ask_myself(Audit::again(*peer, a, Urgency::Spot));
            }
        }
        !unseen.is_empty()
    }

    /// Nobody waits for the judgement but the accused: its unit goes to others, and it gets no more
    /// work until then.
    fn dispute(&mut self, audit: &mut Audit) {
        audit.urgency = Urgency::Redo;
        // The judgement may be far off: the weights can be made again.
        audit.version = None;
        self.scheduler.accuse(audit.of);
        if let Some((key, held)) = self.held(audit)
            && let Some(in_flight) = self.units.get_mut(&key)
        {
            in_flight.held = None;
            audit.disputed = Some(held);
            self.scheduler.reopen(key.1);
        }
    }

    /// The result that waits for this audit, and where.
    fn held(&self, audit: &Audit) -> Option<((Hash, TaskId), Held)> {
        let waits = |u: &InFlight| u.held.is_some_and(|h| h.peer == audit.of);
        let key = self.in_flight(&audit.unit, waits)?;
        Some((key, self.units.get(&key)?.held?))
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
        if audit.auditor.is_some() {
            self.scheduler.acquit(of);
        }
        let held = match audit.disputed {
            None => self.held(&audit),
            Some(held) => {
                let open = self.in_flight(&unit, |u| u.held.is_none());
                let key = open.filter(|_| !self.scheduler.is_expelled(&of));
                // Of a right result that came too late there is nothing to write.
                if valid && key.is_none() {
                    return;
                }
                key.map(|key| (key, held))
            }
        };
        if valid && let Some((key, held)) = held {
            let model = self.pipeline.model();
            let output = self.units.get(&key).and_then(|u| {
                decode_output(&blobs.get(&held.offer.receipt)?, &u.unit.work, model).ok()
            });
            if let Some(output) = output {
                self.accept(key, held, output);
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
            if audit.disputed.is_none()
                && let Some((key, _)) = held
                && let Some(u) = self.units.get_mut(&key)
            {
                u.held = None;
                self.scheduler.reopen(key.1);
            }
            self.convict(of, Offence::WrongResult, Some(unit));
            // Whoever found the lie valid is in league with the liar.
            if let Some(auditor) = self.vouched.remove(&(of, unit)) {
                self.convict(auditor, Offence::WrongResult, Some(unit));
            }
            self.redone(of, unit, false);
        }
        self.sync(blobs);
    }

    /// An audit of `unit` was valid: its volunteer's units up to it are settled.
    pub(super) fn settle(&mut self, of: PeerKey, unit: Hash, auditor: PeerKey, cost: u64) {
        let own = self.writer.coordinator();
        if auditor != own {
            self.scheduler.standing(auditor).credit += cost;
        }
        // What was found valid on an auditor's word has been counted.
        let again = auditor == own && self.vouched.remove(&(of, unit)).is_some();
        let record = self.records.entry(of).or_default();
        let found = record.unproven.values().find(|a| a.unit == unit).map(|a| a.sequence);
        if let Some(sequence) = found {
            let since = record.settled.map_or(0, |s| s + 1);
            // An older unit's audit may come after a newer one's: nothing is left to settle then.
            let later = record.unproven.range(since..);
            let settled: Vec<Accepted> =
                later.take_while(|(s, _)| **s <= sequence).map(|(_, a)| *a).collect();
            record.settled = record.settled.max(Some(sequence));
            if auditor == own {
                record.unproven.remove(&sequence);
            } else {
                self.vouched.insert((of, unit), auditor);
            }
            let credit: u64 = settled.iter().map(|a| a.multiply_adds).sum();
            for a in settled {
                self.unsettled.remove(&(a.ordinal, a.sequence));
            }
            let standing = self.scheduler.standing(of);
            standing.credit += credit;
            standing.provisional_credit = standing.provisional_credit.saturating_sub(credit);
        }
        if !again {
            let standing = self.scheduler.standing(of);
            standing.audited += 1;
            standing.valid_in_a_row += 1;
        }
        self.redone(of, unit, true);
    }
}

impl Audit {
    /// Of a unit that is in the run.
    fn again(of: PeerKey, a: Accepted, urgency: Urgency) -> Self {
        Self {
            unit: a.unit,
            of,
            receipt: a.receipt,
            weights: a.weights,
            version: None,
            urgency,
            kind: [Kind::Sample, Kind::Forward, Kind::Gradient][usize::from(a.kind.min(2))],
            cost: a.multiply_adds,
            given: None,
            auditor: None,
            disputed: None,
        }
    }
}

/// Samples are checked by a forward pass.
pub(super) fn audit_kind(stage: Stage) -> Kind {
    match Kind::of(stage) {
        Kind::Sample => Kind::Forward,
        kind => kind,
    }
}
