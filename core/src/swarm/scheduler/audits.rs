//! Audits: who may redo whose work, and in which order.

use super::{Kind, SEARCH_MAX, Scheduler, TaskId};
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

#[derive(Clone, Copy, Debug)]
pub(super) struct AuditTask {
    of: PeerKey,
    pub(super) kind: Kind,
    cost: u64,
    urgency: Urgency,
    /// Order within the same urgency: all audits of one newcomer before those of the next, so
    /// that some are soon trusted, and audit the others.
    rank: u64,
    holder: Option<PeerKey>,
}

/// Urgency, rank and name.
pub(super) type AuditKey = (Urgency, u64, TaskId);

impl AuditTask {
    fn key(&self, id: TaskId) -> AuditKey {
        (self.urgency, self.rank, id)
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
        let (id, audit) = self.new_audit(of, kind, cost, urgency);
        self.audit_queue.insert(audit.key(id), audit);
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
        let (id, audit) = self.new_audit(of, kind, cost, urgency);
        self.own_queue.insert(audit.key(id));
        id
    }

    fn new_audit(
        &mut self,
        of: PeerKey,
        kind: Kind,
        cost: u64,
        urgency: Urgency,
    ) -> (TaskId, AuditTask) {
        let id = self.next_id;
        self.next_id += 1;
        let first = *self.entry(of).rank.get_or_insert(id);
        let rank = if urgency == Urgency::Admission { first } else { id };
        let audit = AuditTask { of, kind, cost, urgency, rank, holder: None };
        self.audits.insert(id, audit);
        (id, audit)
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
            if let Some(holder) = a.holder {
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
        let most = self.heaviest(peer);
        let fits = |a: &AuditTask| a.of != peer && a.cost as f64 <= most[a.kind as usize];
        let mut waiting = self.audit_queue.iter().take(SEARCH_MAX);
        let (key, audit) = waiting.find(|(_, a)| fits(a)).map(|(key, a)| (*key, *a))?;
        self.audit_queue.remove(&key);
        let (.., id) = key;
        if let Some(a) = self.audits.get_mut(&id) {
            a.holder = Some(peer);
        }
        Some((id, audit.kind, audit.cost))
    }

    /// The holder of an audit gives it back.
    pub(super) fn release_audit(&mut self, peer: PeerKey, id: TaskId) {
        if let Some(audit) = self.audits.get_mut(&id)
            && audit.holder == Some(peer)
        {
            audit.holder = None;
            self.audit_queue.insert(audit.key(id), *audit);
        }
    }
}
