//! Who is here, how fast, and since when silent.

use indexmap::IndexMap;

use super::{Lease, Scheduler, TaskId};
use crate::swarm::ids::PeerKey;
use crate::swarm::ledger::Offence;
use crate::swarm::trust::Standing;

/// A volunteer that says it is this many times faster or slower than it said before computes by
/// another engine: what was measured of the other one says nothing.
const ANOTHER_ENGINE: f64 = 4.0;

/// What the scheduler knows of a volunteer.
#[derive(Clone, Debug)]
pub struct Volunteer {
    /// What it has shown.
    pub standing: Standing,
    /// Multiply-adds a second, by [`super::Kind`].
    pub speed: [f64; 3],
    /// What it said of itself.
    claimed: f64,
    /// Whether it is here.
    pub is_present: bool,
    /// When it last showed a sign of life.
    pub seen_ms: u64,
    /// Lapsed leases in a row.
    pub lapses: u32,
    pub(super) resume_ms: u64,
    /// Results of it that an auditor disputes and nobody has judged.
    disputes: u32,
    /// First unit of it that an audit was asked for.
    pub(super) rank: Option<TaskId>,
    /// When it last finished something.
    pub(super) free_ms: u64,
    /// Few: see [`super::LEASES_A_VOLUNTEER_MAX`].
    pub(super) leases: Vec<(TaskId, Lease)>,
    /// Its place in the scheduler's order of silence: a sign of life since then moves it when its
    /// turn comes, so that a sign of life is cheap.
    pub(super) listed_ms: u64,
}

impl Volunteer {
    fn new() -> Self {
        Self {
            standing: Standing::default(),
            speed: [1.0; 3],
            claimed: 0.0,
            is_present: false,
            seen_ms: 0,
            lapses: 0,
            resume_ms: 0,
            disputes: 0,
            rank: None,
            free_ms: 0,
            leases: Vec::new(),
            listed_ms: 0,
        }
    }

    /// Units and audits it holds.
    pub fn lease_count(&self) -> usize {
        self.leases.len()
    }

    pub(super) fn lease(&self, task: TaskId) -> Option<Lease> {
        self.leases.iter().find(|(id, _)| *id == task).map(|(_, lease)| *lease)
    }

    /// Whether it may have work, if there is any.
    pub fn may_work(&self, now_ms: u64) -> bool {
        let is_barred = self.standing.expelled.is_some() || self.disputes > 0;
        self.is_present && !is_barred && now_ms >= self.resume_ms
    }

    /// Whether nothing would be lost by forgetting it.
    fn is_stranger(&self) -> bool {
        self.standing == Standing::default() && self.lapses == 0 && self.rank.is_none()
    }
}

impl Scheduler {
    /// All volunteers that are here, or of whom something is known.
    pub fn volunteers(&self) -> &IndexMap<PeerKey, Volunteer> {
        &self.volunteers
    }

    /// A volunteer's record; a newcomer's if it was never here.
    pub fn standing(&mut self, peer: PeerKey) -> &mut Standing {
        &mut self.entry(peer).standing
    }

    pub(super) fn entry(&mut self, peer: PeerKey) -> &mut Volunteer {
        self.volunteers.entry(peer).or_insert_with(Volunteer::new)
    }

    /// Whether `peer` may get no more work.
    pub fn is_expelled(&self, peer: &PeerKey) -> bool {
        self.volunteers.get(peer).is_some_and(|v| v.standing.expelled.is_some())
    }

    /// Whether results of `peer` go in at once.
    pub fn is_trusted(&self, peer: &PeerKey) -> bool {
        self.volunteers.get(peer).is_some_and(|v| v.standing.is_trusted(&self.policy))
    }

    /// An auditor disputes a result of `peer`: it gets no work until that is judged.
    pub fn accuse(&mut self, peer: PeerKey) {
        self.entry(peer).disputes += 1;
    }

    /// A dispute was judged.
    pub fn acquit(&mut self, peer: PeerKey) {
        if let Some(v) = self.volunteers.get_mut(&peer) {
            v.disputes = v.disputes.saturating_sub(1);
        }
    }

    /// A volunteer says hello, with the speed that it measured: multiply-adds a second.
    pub fn arrive(&mut self, peer: PeerKey, speed: f64, now_ms: u64) {
        let claim = speed.clamp(1e3, 1e18);
        let volunteer = self.entry(peer);
        volunteer.seen_ms = now_ms;
        let before = std::mem::replace(&mut volunteer.claimed, claim);
        if !(before / ANOTHER_ENGINE..=before * ANOTHER_ENGINE).contains(&claim) {
            // Decoding a few sequences uses a fraction of what dense products reach.
            for (kind, share) in [0.25, 1.0, 1.0].into_iter().enumerate() {
                self.set_speed(peer, kind, claim * share);
            }
        }
        let volunteer = self.entry(peer);
        if !std::mem::replace(&mut volunteer.is_present, true) {
            volunteer.listed_ms = now_ms;
            let speed = volunteer.speed;
            self.seen.insert((now_ms, peer));
            self.add_speed(speed, 1.0);
        }
    }

    /// Sets a speed, by index of its kind.
    pub(super) fn set_speed(&mut self, peer: PeerKey, kind: usize, speed: f64) {
        let v = self.entry(peer);
        let old = std::mem::replace(&mut v.speed[kind], speed.max(1.0));
        if v.is_present {
            let change = v.speed[kind] - old;
            self.total_speed[kind] = (self.total_speed[kind] + change).max(0.0);
        }
    }

    /// A sign of life.
    pub fn touch(&mut self, peer: PeerKey, now_ms: u64) {
        self.now_ms = now_ms;
        if let Some(v) = self.volunteers.get_mut(&peer) {
            v.seen_ms = now_ms;
        }
    }

    /// A volunteer leaves; its units go to others. Of one that did nothing, nothing is kept:
    /// identities cost nothing, so that memory must not grow with them.
    pub fn leave(&mut self, peer: PeerKey) {
        let Some(v) = self.volunteers.get_mut(&peer) else { return };
        if std::mem::take(&mut v.is_present) {
            let (listed, speed) = ((v.listed_ms, peer), v.speed);
            self.seen.remove(&listed);
            self.add_speed(speed, -1.0);
        }
        for task in self.held(peer) {
            self.release(peer, task);
        }
        if self.volunteers.get(&peer).is_some_and(Volunteer::is_stranger) {
            self.volunteers.swap_remove(&peer);
        }
    }

    /// Expels a volunteer for good.
    pub fn expel(&mut self, peer: PeerKey, offence: Offence) {
        self.leave(peer);
        self.standing(peer).expelled = Some(offence);
    }

    fn add_speed(&mut self, speed: [f64; 3], sign: f64) {
        for (total, speed) in self.total_speed.iter_mut().zip(speed) {
            *total = (*total + sign * speed).max(0.0);
        }
    }

    /// Whoever has been silent the longest, if that is since before `since_ms`.
    pub(super) fn silent(&mut self, since_ms: u64) -> Option<PeerKey> {
        while let Some(&(listed, peer)) = self.seen.first() {
            if listed > since_ms {
                return None;
            }
            let v = self.volunteers.get_mut(&peer)?;
            if v.seen_ms <= since_ms {
                return Some(peer);
            }
            v.listed_ms = v.seen_ms;
            let listed_again = (v.seen_ms, peer);
            self.seen.pop_first();
            self.seen.insert(listed_again);
        }
        None
    }
}
