//! Audits: who may redo whose work, and in which order.

use super::{HOLDERS_MAX, Kind, SEARCH_MAX, Scheduler, TaskId};
use crate::swarm::ids::PeerKey;

/// Why work is audited; urgent audits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// A convict's units: they may be in the weights.
    Redo,
    /// A newcomer's unit, which waits.
    Admission,
    /// A trusted volunteer's unit, which is in already.
    Spot,
}

#[derive(Clone, Debug)]
pub(super) struct AuditTask {
    of: PeerKey,
    pub(super) kind: Kind,
    cost: u64,
    urgency: Urgency,
    /// Order within the same urgency: all audits of one newcomer before those of the next, so
    /// that some are soon trusted, and audit the others.
    rank: u64,
    holders: Vec<PeerKey>,
    /// When it may be given out a second time.
    late_ms: Option<u64>,
}

/// Urgency, rank and name.
pub(super) type AuditKey = (Urgency, u64, TaskId);

/// An audit that somebody may have: whose work, of which kind, and at which cost.
#[derive(Clone, Copy, Debug)]
pub(super) struct AuditOffer {
    of: PeerKey,
    kind: Kind,
    cost: u64,
}

impl AuditTask {
    fn key(&self, id: TaskId) -> AuditKey {
        (self.urgency, self.rank, id)
    }

    fn offer(&self) -> AuditOffer {
        AuditOffer { of: self.of, kind: self.kind, cost: self.cost }
    }
}

impl Scheduler {
    /// Asks for an audit of work by `of`. Others may be given it; the coordination peer may take it.
    pub fn request_audit(
        &mut self,
        of: PeerKey,
        kind: Kind,
        cost: u64,
        urgency: Urgency,
    ) -> TaskId {
        let (id, key) = self.new_audit(of, kind, cost, urgency);
        self.audit_queue.insert(key, AuditOffer { of, kind, cost });
        id
    }

    /// As [`Self::request_audit`], for the coordination peer only.
    pub fn request_own_audit(
        &mut self,
        of: PeerKey,
        kind: Kind,
        cost: u64,
        urgency: Urgency,
    ) -> TaskId {
        let (id, key) = self.new_audit(of, kind, cost, urgency);
        self.own_queue.insert(key);
        id
    }

    fn new_audit(
        &mut self,
        of: PeerKey,
        kind: Kind,
        cost: u64,
        urgency: Urgency,
    ) -> (TaskId, AuditKey) {
        let id = self.next_id;
        self.next_id += 1;
        let first = *self.entry(of).rank.get_or_insert(id);
        let rank = if urgency == Urgency::Admission { first } else { id };
        let holders = Vec::new();
        let audit = AuditTask { of, kind, cost, urgency, rank, holders, late_ms: None };
        let key = audit.key(id);
        self.audits.insert(id, audit);
        (id, key)
    }

    /// Takes the most urgent audit for the coordination peer itself.
    pub fn take_own_audit(&mut self) -> Option<TaskId> {
        let own = self.own_queue.pop_first();
        let (_, _, id) = own.or_else(|| Some(self.audit_queue.pop_first()?.0))?;
        Some(id)
    }

    /// Audits that wait for somebody.
    pub fn audits_waiting(&self) -> usize {
        self.audit_queue.len()
    }

    /// Audits that wait for the coordination peer.
    pub fn own_audits_waiting(&self) -> usize {
        self.own_queue.len()
    }

    /// An audit is done with.
    pub fn finish_audit(&mut self, audit: TaskId) {
        if let Some(a) = self.audits.remove(&audit) {
            self.audit_queue.remove(&a.key(audit));
            self.own_queue.remove(&a.key(audit));
            if let Some(late_ms) = a.late_ms {
                self.late_audits.remove(&(late_ms, audit));
            }
            for holder in a.holders {
                self.drop_lease(holder, audit);
            }
        }
    }

    /// Gives `peer` the most urgent audit that it may do: only trusted ones audit, never their own
    /// work. Returns its name, kind and cost.
    pub(super) fn take_audit(&mut self, peer: PeerKey) -> Option<(TaskId, Kind, u64)> {
        if self.audit_queue.is_empty() || !self.is_trusted(&peer) {
            return None;
        }
        let strength = self.strength(peer)?;
        let fits = |id, a: &AuditOffer| {
            a.of != peer && strength.may_audit(a.kind, a.cost) && !self.holds(peer, id)
        };
        let mut waiting = self.audit_queue.iter().take(SEARCH_MAX);
        let (key, offer) = waiting.find(|(key, a)| fits(key.2, a)).map(|(key, a)| (*key, *a))?;
        self.audit_queue.remove(&key);
        Some((key.2, offer.kind, offer.cost))
    }

    /// `peer` has promised an audit. One that holds up a unit may be given to another when it is late.
    pub(super) fn audit_is_held(&mut self, peer: PeerKey, id: TaskId, late_ms: u64) {
        let Some(audit) = self.audits.get_mut(&id) else { return };
        audit.holders.push(peer);
        if audit.urgency == Urgency::Admission && audit.holders.len() < HOLDERS_MAX {
            audit.late_ms = Some(late_ms);
            self.late_audits.insert((late_ms, id));
        }
    }

    /// Offers what is late to others.
    pub(super) fn recall_late_audits(&mut self, now_ms: u64) {
        while let Some(&(at, id)) = self.late_audits.first()
            && at <= now_ms
        {
            self.late_audits.pop_first();
            if let Some(audit) = self.audits.get_mut(&id) {
                audit.late_ms = None;
                self.audit_queue.insert(audit.key(id), audit.offer());
                self.counts.backups += 1;
            }
        }
    }

    /// A holder of an audit gives it back.
    pub(super) fn release_audit(&mut self, peer: PeerKey, id: TaskId) {
        let Some(audit) = self.audits.get_mut(&id) else { return };
        let Some(at) = audit.holders.iter().position(|holder| *holder == peer) else { return };
        audit.holders.swap_remove(at);
        if audit.holders.is_empty() {
            self.audit_queue.insert(audit.key(id), audit.offer());
            if let Some(late_ms) = audit.late_ms.take() {
                self.late_audits.remove(&(late_ms, id));
            }
        }
    }
}
