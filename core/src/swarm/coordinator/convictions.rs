//! Convictions: what becomes of a liar's units and of those that it vouched for.

use std::collections::BTreeSet;

use super::{Accepted, Audit, Coordinator, Effect};
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Offence};
use crate::swarm::scheduler::Urgency;
use crate::swarm::status::StatusEvent;

impl Coordinator {
    /// Expels a volunteer; all its units that the own engine has not redone are, and all that were
    /// found valid on its word.
    pub(super) fn convict(&mut self, peer: PeerKey, offence: Offence, unit: Option<Hash>) {
        if self.scheduler.is_expelled(&peer) {
            return;
        }
        self.write(Entry::Expelled { volunteer: peer, offence, unit });
        self.expel(peer, offence);
        // Whoever only computed wrongly may be an honest owner of a broken machine: requests are
        // answered with the reason. Others are cut off.
        if !matches!(offence, Offence::WrongResult | Offence::LeaseHoarding) {
            self.effect(Effect::Ban(peer));
        }
        self.announce(StatusEvent::Expelled { peer: peer.to_string(), offence });
    }

    /// The part of a conviction that is repeated when the ledger is read again.
    pub(super) fn expel(&mut self, peer: PeerKey, offence: Offence) {
        self.sessions.remove(&peer);
        self.stop_waiting(&peer);
        self.scheduler.expel(peer, offence);
        for in_flight in self.units.values_mut() {
            in_flight.offers.remove(&peer);
            if in_flight.held.take_if(|h| h.peer == peer).is_some() {
                self.scheduler.reopen(in_flight.task);
            }
        }
        self.drop_audits(|a| a.of == peer);
        self.doubt_word_of(peer);
        let record = self.records.get(&peer);
        let unproven: Vec<Accepted> =
            record.map_or(Vec::new(), |r| r.unproven.values().copied().collect());
        if unproven.is_empty() {
            return;
        }
        let units: BTreeSet<Hash> = unproven.iter().map(|a| a.unit).collect();
        self.redo.insert(peer, (units, Vec::new()));
        for a in unproven {
            self.audit_accepted(peer, a, Urgency::Redo);
        }
    }

    /// Drops audits that nobody waits for, except the one under way.
    fn drop_audits(&mut self, which: impl Fn(&Audit) -> bool) {
        let dropped = self.audits.iter().filter(|(id, a)| which(a) && self.executing != Some(**id));
        for id in dropped.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.audits.remove(&id);
            self.scheduler.finish_audit(id);
        }
    }

    /// Redoes what was found valid on the word of a convict.
    fn doubt_word_of(&mut self, auditor: PeerKey) {
        let doubtful = self.vouched.iter().filter(|(_, by)| **by == auditor).map(|(key, _)| *key);
        for (of, unit) in doubtful.collect::<Vec<_>>() {
            self.vouched.remove(&(of, unit));
            let found = self.unproven(&of, &unit);
            if let Some(accepted) = found.filter(|_| !self.scheduler.is_expelled(&of)) {
                self.audit_accepted(of, accepted, Urgency::Redo);
            }
        }
    }

    /// A convict's unit was redone. After the last one the run is rolled back if one was false.
    pub(super) fn redone(&mut self, peer: PeerKey, unit: Hash, valid: bool) {
        let Some((waiting, lies)) = self.redo.get_mut(&peer) else { return };
        if waiting.remove(&unit) && !valid {
            let lie =
                self.records.get(&peer).and_then(|r| r.unproven.values().find(|a| a.unit == unit));
            lies.extend(lie);
        }
        let is_over = waiting.is_empty();
        self.drop_audits(|a| a.of == peer && a.unit == unit);
        if !is_over {
            return;
        }
        let Some((_, lies)) = self.redo.remove(&peer) else { return };
        if lies.is_empty() {
            let record = self.records.entry(peer).or_default();
            for a in std::mem::take(&mut record.unproven).into_values() {
                self.unsettled.remove(&(a.ordinal, a.sequence));
            }
            return;
        }
        let ordinal = lies.iter().map(|a| a.rests).min().unwrap_or(0);
        // First of all: once the ledger has forgotten the lies, their states would pass for good.
        self.effect(Effect::DropSnapshots { after: ordinal });
        for lie in &lies {
            self.write(Entry::Voided { unit: lie.unit, volunteer: peer });
        }
        self.write(Entry::RolledBack { ordinal });
        self.announce(StatusEvent::RolledBack { ordinal });
        self.restarts = true;
        self.halted = true;
    }
}
