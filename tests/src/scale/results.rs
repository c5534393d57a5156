//! What the coordination peer does: results enter, jobs follow each other, audits end.

use manyhands_core::run::job::{JobPath, Stage};
use manyhands_core::swarm::coordinator::OWN_CHECKS_MAX;
use manyhands_core::swarm::ledger::Offence;
use manyhands_core::swarm::scheduler::{Kind, TaskId, Urgency};

use super::volunteers::Honesty;
use super::world::{Audit, ITEM_COST, OWN_SPEED, What, Work, World, key};

impl World<'_> {
    pub(super) fn result(&mut self, who: usize, work: Work) {
        self.message(who, self.sizes.receipt);
        if !self.scheduler.holds(key(who), work.task) {
            self.figures.wasted += work.cost as f64;
            return;
        }
        if work.is_audit {
            self.scheduler.finished(key(who), work.task, work.cost, self.now_ms);
            return self.audited(work.task, Some(who));
        }
        let Some(unit) = self.units.get(&work.task) else { return };
        let (path, cost, items) = (unit.path, unit.cost, unit.count as u64);
        self.figures.result_bytes += self.sizes.result(usize::from(work.kind), items);
        self.scheduler.finished(key(who), work.task, cost, self.now_ms);
        self.scheduler.deliver(work.task);
        let trusted = self.scheduler.is_trusted(&key(who));
        let is_false = match self.volunteers[who].honesty {
            Honesty::Honest => false,
            Honesty::Liar => true,
            Honesty::Turncoat => trusted && self.random() < 0.05,
        };
        let audit = Audit { of: who, items, cost, is_false, holds: None };
        if !trusted {
            let audit = Audit { holds: Some(work.task), ..audit };
            return self.request(path, audit, Urgency::Admission);
        }
        let p = self.scheduler.standing(key(who)).audit_probability(&self.scale.policy);
        if self.random() < p {
            self.request(path, audit, Urgency::Spot);
        } else {
            let (all, lies) = &mut self.volunteers[who].unaudited;
            *all += cost;
            *lies += if is_false { cost } else { 0 };
        }
        self.figures.false_units += u64::from(is_false);
        self.accept(work.task);
    }

    fn request(&mut self, path: JobPath, audit: Audit, urgency: Urgency) {
        let kind = match Kind::of(path.stage) {
            Kind::Sample => Kind::Forward,
            kind => kind,
        };
        let id = self.scheduler.request_audit(key(audit.of), kind, audit.cost, urgency);
        self.volunteers[audit.of].audits.push(id);
        self.audits.insert(id, audit);
    }

    fn accept(&mut self, task: TaskId) {
        let Some(unit) = self.units.remove(&task) else { return };
        self.scheduler.forget(task);
        self.figures.units += 1;
        self.figures.useful += unit.cost as f64;
        if let Some(left) = self.jobs.get_mut(&unit.path) {
            *left -= unit.count;
        }
        if self.jobs.get(&unit.path) == Some(&0) {
            self.jobs.remove(&unit.path);
            self.scheduler.close(unit.path);
            self.open_jobs();
        }
    }

    /// The run's shape: rollouts of `step + policy_lag` beside the gradient of `step`.
    pub(super) fn open_jobs(&mut self) {
        loop {
            let gradient = JobPath { ordinal: self.step, stage: Stage::Gradient { update: 0 } };
            let rollout = |ordinal| JobPath { ordinal, stage: Stage::Rollout { draw: 0 } };
            while self.sampled <= self.step + self.scale.policy_lag {
                self.open(rollout(self.sampled));
                self.sampled += 1;
            }
            if self.jobs.contains_key(&rollout(self.step)) || self.jobs.contains_key(&gradient) {
                return;
            }
            if self.figures.steps == self.step {
                self.figures.steps += 1;
                return self.open(gradient);
            }
            self.step += 1;
        }
    }

    fn open(&mut self, path: JobPath) {
        self.jobs.insert(path, self.items);
        let whole = 0..self.items;
        self.scheduler.open(path, item_cost(Kind::of(path.stage)), 1..=1 << 20, &[whole]);
    }

    pub(super) fn audit_myself(&mut self) {
        if self.own_busy {
            return;
        }
        let Some(id) = self.scheduler.take_own_audit() else { return };
        let Some(audit) = self.audits.get(&id) else { return };
        self.own_busy = true;
        self.figures.own_audits += 1;
        let ms = (audit.cost as f64 / OWN_SPEED * 1e3) as u64;
        self.push(self.now_ms + ms.max(1), 0, What::Own(id));
    }

    fn end_audit(&mut self, id: TaskId) -> Option<Audit> {
        let audit = self.audits.remove(&id)?;
        self.scheduler.finish_audit(id);
        let of = &mut self.volunteers[audit.of].audits;
        if let Some(at) = of.iter().position(|a| *a == id) {
            of.swap_remove(at);
        }
        Some(audit)
    }

    pub(super) fn audited(&mut self, id: TaskId, by: Option<usize>) {
        let Some(mut audit) = self.end_audit(id) else { return };
        self.figures.audited += audit.cost as f64;
        if by.is_some() && audit.is_false {
            self.scheduler.accuse(key(audit.of));
            if let Some(task) = audit.holds.take() {
                self.scheduler.reopen(task);
            }
            return self.check_myself(audit, Urgency::Redo);
        }
        if !audit.is_false {
            let standing = self.scheduler.standing(key(audit.of));
            standing.audited += 1;
            standing.valid_in_a_row += 1;
            if let Some(task) = audit.holds.take() {
                self.accept(task);
            }
            let drawn = by.is_some() && self.random() < self.scale.policy.audit_the_auditors;
            if drawn && self.scheduler.own_audits_waiting() < OWN_CHECKS_MAX {
                self.check_myself(audit, Urgency::Spot);
            }
            return;
        }
        self.figures.wasted += audit.cost as f64;
        self.scheduler.acquit(key(audit.of));
        if let Some(task) = audit.holds {
            self.scheduler.reopen(task);
        }
        self.expel(audit.of);
    }

    /// The coordination peer redoes what an auditor did.
    fn check_myself(&mut self, audit: Audit, urgency: Urgency) {
        let of = key(audit.of);
        let id = self.scheduler.request_own_audit(of, Kind::Forward, audit.cost, urgency);
        self.volunteers[audit.of].audits.push(id);
        self.audits.insert(id, audit);
    }

    pub(super) fn expel(&mut self, who: usize) {
        if self.scheduler.is_expelled(&key(who)) {
            return;
        }
        let is_honest = self.volunteers[who].honesty == Honesty::Honest;
        let count =
            if is_honest { &mut self.figures.honest_expelled } else { &mut self.figures.expelled };
        *count += 1;
        self.leave(who);
        self.scheduler.expel(key(who), Offence::WrongResult);
        for id in std::mem::take(&mut self.volunteers[who].audits) {
            if let Some(Audit { holds: Some(task), .. }) = self.end_audit(id) {
                self.scheduler.reopen(task);
            }
        }
        // Done again at once by the coordination peer or others: all of it is verification.
        let (all, lies) = std::mem::take(&mut self.volunteers[who].unaudited);
        self.figures.audited += all as f64;
        self.figures.wasted += lies as f64;
    }
}

pub(super) fn item_cost(kind: Kind) -> u64 {
    if kind == Kind::Gradient { 3 * ITEM_COST } else { ITEM_COST }
}
