//! Giving out units and audits, and taking back what lapsed.

use super::{
    AUDIT_HEAVY, Assignment, COURTESY, GUIDED_SHARE, HOLDERS_MAX, Kind, LAPSES_BEFORE_PAUSE,
    LAPSES_MAX, LATE, LEASES_A_VOLUNTEER_MAX, Lease, PATIENCE, PAUSE_MS_MAX, SEARCH_MAX, SLACK,
    SOON, Scheduler, Task, TaskId, UNIT_SHARE_MIN, Volunteer,
};
use crate::run::job::JobPath;
use crate::swarm::ids::PeerKey;

impl Scheduler {
    /// Work for `peer`, if there is any and it may have some.
    pub fn take(&mut self, peer: PeerKey, now_ms: u64) -> Option<Assignment> {
        self.now_ms = now_ms;
        let v = self.volunteers.get(&peer)?;
        let most = if v.lapses >= LAPSES_BEFORE_PAUSE { 1 } else { LEASES_A_VOLUNTEER_MAX };
        if !v.may_work(now_ms) || v.leases.len() >= most {
            return None;
        }
        if let Some((audit, kind, cost)) = self.take_audit(peer) {
            self.counts.delegated_audits += 1;
            let expected_ms = self.lease(peer, audit, kind, cost, now_ms);
            self.audit_is_held(peer, audit, self.late_after(now_ms, expected_ms));
            return Some(Assignment::Audit { audit });
        }
        let next = self.jobs.iter().find(|(_, t)| !t.uncut.is_empty()).map(|(p, _)| *p);
        let backup = |s: &mut Self| {
            let task = s.late_for(peer, now_ms, next)?;
            s.counts.backups += 1;
            Some(task)
        };
        // A step waits for its last unit: late ones come before what is not urgent yet.
        let task =
            self.take_homeless(peer, next).or_else(|| backup(self)).or_else(|| self.cut(peer))?;
        let t = self.tasks.get_mut(&task)?;
        t.holders.push(peer);
        let (path, first, count, cost) = (t.path, t.first, t.count, t.cost);
        self.homeless.remove(&(path, task));
        let expected_ms = self.lease(peer, task, Kind::of(path.stage), cost, now_ms);
        let late_ms = self.late_after(now_ms, expected_ms);
        let again = self.tasks.get(&task).is_some_and(|t| t.holders.len() < HOLDERS_MAX);
        self.set_late(task, again.then_some(late_ms));
        Some(Assignment::Unit { task, path, first, count })
    }

    /// When a promise for `expected_ms` is late.
    fn late_after(&self, now_ms: u64, expected_ms: u64) -> u64 {
        // Of a small unit the wait costs less than a second computation would.
        let slack_ms = (self.policy.unit_seconds * 1e3 * SLACK) as u64;
        let took_ms = expected_ms - now_ms;
        now_ms + ((took_ms as f64 * LATE) as u64).max(took_ms + slack_ms)
    }

    /// Whether there may be something to give to volunteers who may not audit.
    pub fn has_units(&self, now_ms: u64) -> bool {
        !self.homeless.is_empty()
            || self.late.first_key_value().is_some_and(|((at, _), _)| *at <= now_ms)
            || self.jobs.values().any(|t| !t.uncut.is_empty())
    }

    /// A unit that nobody holds, unless `next`, the next job to be cut, is more urgent.
    fn take_homeless(&mut self, peer: PeerKey, next: Option<JobPath>) -> Option<TaskId> {
        if self.homeless.is_empty() {
            return None;
        }
        let strength = self.strength(peer)?;
        let urgent = |path: &JobPath| next.is_none_or(|next| *path <= next);
        let mut homeless =
            self.homeless.iter().take(SEARCH_MAX).take_while(|((path, _), _)| urgent(path));
        let ((_, task), _) = homeless.find(|((path, _), (cost, since_ms))| {
            strength.suits(Kind::of(path.stage), *cost, self.now_ms.saturating_sub(*since_ms))
        })?;
        self.counts.reissued += 1;
        Some(*task)
    }

    /// How `peer` compares with others.
    pub(super) fn strength(&self, peer: PeerKey) -> Option<Strength> {
        let speed = self.volunteers.get(&peer)?.speed;
        let present = self.seen.len().max(1) as f64;
        let is_average =
            [0, 1, 2].map(|kind| speed[kind] >= 0.999 * self.total_speed[kind] / present);
        Some(Strength { speed, is_average, unit_ms: self.policy.unit_seconds * 1e3 })
    }

    /// Cuts a unit for this volunteer from the most urgent job that has items left.
    fn cut(&mut self, peer: PeerKey) -> Option<TaskId> {
        let (path, tiling) = self.jobs.iter_mut().find(|(_, t)| !t.uncut.is_empty())?;
        let path: JobPath = *path;
        let (kind, item_cost) = (Kind::of(path.stage) as usize, tiling.item_cost);
        let speed = self.volunteers.get(&peer)?.speed[kind];
        let full = speed * self.policy.unit_seconds;
        let items: usize = tiling.uncut.iter().map(|r| r.end - r.start).sum();
        let rest = items as f64 * tiling.item_cost as f64;
        let share = rest * GUIDED_SHARE * speed / self.total_speed[kind].max(speed);
        let budget = full.min(share.max(full * UNIT_SHARE_MIN));
        let batches = (budget / (tiling.item_cost * tiling.items_min as u64) as f64) as usize;
        let count = batches.min(tiling.items_max / tiling.items_min).max(1) * tiling.items_min;
        let range = tiling.uncut.front_mut()?;
        let (first, count) =
            (range.start, count.min(range.end - range.start).min(tiling.items_max));
        range.start += count;
        if range.start == range.end {
            tiling.uncut.pop_front();
        }
        let task = Task {
            path,
            first,
            count,
            cost: count as u64 * item_cost,
            holders: Vec::new(),
            delivered: false,
            late_ms: None,
        };
        let id = self.next_id;
        self.next_id += 1;
        tiling.tasks.insert(id);
        self.tasks.insert(id, task);
        self.counts.issued += 1;
        Some(id)
    }

    /// A unit that is late with somebody else, and more urgent than `next`.
    fn late_for(&self, peer: PeerKey, now_ms: u64, next: Option<JobPath>) -> Option<TaskId> {
        if self.late.first_key_value().is_none_or(|((at, _), _)| *at > now_ms) {
            return None;
        }
        let strength = self.strength(peer)?;
        let late = self.late.iter().take_while(|((at, _), _)| *at <= now_ms).take(SEARCH_MAX);
        let mut suiting = late.filter(|((at, _), (path, cost))| {
            next.is_none_or(|next| *path < next)
                && strength.suits(Kind::of(path.stage), *cost, now_ms - at)
        });
        let open = |id: &TaskId| {
            self.tasks.get(id).is_some_and(|t| !t.delivered && !t.holders.contains(&peer))
        };
        suiting.find(|((_, id), _)| open(id)).map(|((_, id), _)| *id)
    }

    /// Records the promise; returns when it should be kept.
    fn lease(&mut self, peer: PeerKey, task: TaskId, kind: Kind, cost: u64, now_ms: u64) -> u64 {
        let unit_ms = self.policy.unit_seconds * 1e3;
        let Some(v) = self.volunteers.get_mut(&peer) else { return now_ms };
        let begin = v.leases.iter().map(|(_, l)| l.expected_ms).max().unwrap_or(now_ms).max(now_ms);
        let took_ms = (cost as f64 / v.speed[kind as usize] * 1e3).clamp(1.0, 1e12) as u64;
        let grace_ms = PATIENCE * took_ms + (3.0 * unit_ms) as u64 + 1000;
        let expected_ms = begin + took_ms;
        let lease = Lease { since_ms: now_ms, expected_ms, deadline_ms: begin + grace_ms };
        v.leases.push((task, lease));
        self.deadlines.insert((lease.deadline_ms, peer, task));
        expected_ms
    }

    /// What `peer` has.
    pub fn held(&self, peer: PeerKey) -> Vec<TaskId> {
        self.volunteers
            .get(&peer)
            .map_or(Vec::new(), |v| v.leases.iter().map(|(id, _)| *id).collect())
    }

    /// Takes the lease away, without a consequence for unit or volunteer.
    pub(super) fn drop_lease(&mut self, peer: PeerKey, task: TaskId) {
        let take = |v: &mut Volunteer| {
            let at = v.leases.iter().position(|(id, _)| *id == task)?;
            Some(v.leases.remove(at).1)
        };
        if let Some(lease) = self.volunteers.get_mut(&peer).and_then(take) {
            self.deadlines.remove(&(lease.deadline_ms, peer, task));
        }
        if let Some(t) = self.tasks.get_mut(&task) {
            t.holders.retain(|h| *h != peer);
        }
    }

    /// Takes the lease away and gives the work to others.
    pub fn release(&mut self, peer: PeerKey, task: TaskId) {
        self.drop_lease(peer, task);
        if let Some(t) = self.tasks.get(&task)
            && t.holders.is_empty()
            && !t.delivered
        {
            self.homeless.insert((t.path, task), (t.cost, self.now_ms));
            self.set_late(task, None);
        }
        self.release_audit(peer, task);
    }

    /// What a volunteer announced did not come: its unit goes to others. Whether this happened so
    /// often that it must be expelled.
    pub fn fail(&mut self, peer: PeerKey, task: TaskId, now_ms: u64) -> bool {
        if !self.holds(peer, task) {
            return false;
        }
        self.release(peer, task);
        self.lapse(peer, now_ms) >= LAPSES_MAX
    }

    /// Takes back what is over its deadline, and everything of those who fell silent. Returns who
    /// lapsed so often that it must be expelled.
    pub fn expire(&mut self, now_ms: u64) -> Vec<PeerKey> {
        self.now_ms = now_ms;
        let silence_ms = (self.policy.silence_seconds * 1e3) as u64;
        while let Some(since_ms) = now_ms.checked_sub(silence_ms)
            && let Some(peer) = self.silent(since_ms)
        {
            if !self.held(peer).is_empty() {
                self.lapse(peer, now_ms);
            }
            self.leave(peer);
        }
        self.recall_late_audits(now_ms);
        let mut hoarders = Vec::new();
        while let Some(&(deadline, peer, task)) = self.deadlines.first() {
            if deadline > now_ms {
                break;
            }
            self.slow_down(peer, task);
            self.release(peer, task);
            if self.lapse(peer, now_ms) >= LAPSES_MAX {
                hoarders.push(peer);
            }
        }
        hoarders
    }

    /// A lease of `peer` lapsed: it may be slower than was thought, by another engine or other work
    /// on its machine. Its next units are smaller, and it has longer for them, so that it is not
    /// taken for one who hoards. Who hoards gains little: this ends with the first pause.
    fn slow_down(&mut self, peer: PeerKey, task: TaskId) {
        if let Some(kind) = self.kind_of(task)
            && let Some(v) = self.volunteers.get(&peer)
            && v.lapses < LAPSES_BEFORE_PAUSE
        {
            self.set_speed(peer, kind, v.speed[kind] / PATIENCE as f64);
        }
    }

    /// Counts a lapse; too many bring a pause. Returns how many in a row.
    fn lapse(&mut self, peer: PeerKey, now_ms: u64) -> u32 {
        self.counts.lapsed += 1;
        let Some(v) = self.volunteers.get_mut(&peer) else { return 0 };
        v.lapses += 1;
        if v.lapses >= LAPSES_BEFORE_PAUSE {
            let pause = 1000_u64 << (v.lapses - LAPSES_BEFORE_PAUSE).min(20);
            v.resume_ms = now_ms + pause.min(PAUSE_MS_MAX);
        }
        v.lapses
    }

    /// Whether `peer` holds `task`.
    pub fn holds(&self, peer: PeerKey, task: TaskId) -> bool {
        self.volunteers.get(&peer).is_some_and(|v| v.lease(task).is_some())
    }
}

/// How fast a volunteer is.
pub(super) struct Strength {
    speed: [f64; 3],
    /// Whether it is not slower than the average, of which somebody is always here.
    is_average: [bool; 3],
    unit_ms: f64,
}

impl Strength {
    /// Whether it should have what was cut for somebody else, and has waited so long since: who is
    /// done with it soon comes first; then who needs no longer than it has waited, up to a unit's
    /// time; in the end who is no slower than most.
    pub(super) fn suits(&self, kind: Kind, cost: u64, waited_ms: u64) -> bool {
        let waited_ms = waited_ms as f64;
        let takes_ms = cost as f64 / self.speed[kind as usize] * 1e3;
        takes_ms <= SOON * self.unit_ms + waited_ms.min(self.unit_ms)
            || self.is_average[kind as usize] && waited_ms >= COURTESY * self.unit_ms
    }

    /// Whether it may have an audit of this cost: all may who can, so that those who are in league
    /// audit each other no more often than others do.
    pub(super) fn may_audit(&self, kind: Kind, cost: u64) -> bool {
        let takes_ms = cost as f64 / self.speed[kind as usize] * 1e3;
        takes_ms <= AUDIT_HEAVY * self.unit_ms || self.is_average[kind as usize]
    }
}
