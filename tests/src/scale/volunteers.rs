//! Volunteers and their network: they come and go, ask, compute and send.

use manyhands_core::swarm::ids::PeerKey;
use manyhands_core::swarm::scheduler::{Assignment, Kind, LEASES_A_VOLUNTEER_MAX, TaskId, Turn};

use super::results::item_cost;
use super::world::{Unit, What, Work, World, index, key};

/// Multiply-adds a second of the slowest volunteer; the fastest is 20 times faster.
const SPEED_MIN: f64 = 5e9;
/// Longest wait for work within one question.
const HOLD_MS: u64 = 5_000;
/// Audits in a row behind a volunteer that has been trusted for long.
const VETERAN_AUDITS: u32 = 50;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Honesty {
    Honest,
    Liar,
    Turncoat,
}

pub(super) struct Volunteer {
    pub(super) honesty: Honesty,
    pub(super) speed: [f64; 3],
    latency_ms: u64,
    pub(super) present: bool,
    /// Visits so far: what belongs to an earlier one is void.
    pub(super) visit: u32,
    pub(super) since_ms: u64,
    asking: bool,
    computing: bool,
    queue: Vec<Work>,
    /// Newest version that it has, from 1.
    version: u64,
    /// Audits of its units that have no verdict.
    pub(super) audits: Vec<TaskId>,
    /// Multiply-adds of its units that no audit looked at, and of those among them that are false.
    pub(super) unaudited: (u64, u64),
}

impl World<'_> {
    pub(super) fn volunteer(&mut self, i: usize) -> Volunteer {
        let speed = SPEED_MIN * 20.0_f64.powf(self.random());
        let decode = 0.15 + 0.2 * self.random();
        let (draw, half) = (self.random(), self.random() < 0.5);
        let honesty = match (draw < self.scale.cheats, half) {
            (false, _) => Honesty::Honest,
            (true, true) => Honesty::Liar,
            (true, false) => Honesty::Turncoat,
        };
        if honesty != Honesty::Liar && self.random() < self.scale.veterans {
            self.scheduler.standing(key(i)).valid_in_a_row = VETERAN_AUDITS;
        }
        Volunteer {
            honesty,
            speed: [speed * decode, speed, speed * 0.8],
            latency_ms: 25 + (self.random() * 225.0) as u64,
            present: false,
            visit: 0,
            since_ms: 0,
            asking: false,
            computing: false,
            queue: Vec::new(),
            version: 0,
            audits: Vec::new(),
            unaudited: (0, 0),
        }
    }

    fn beat_ms(&self) -> u64 {
        (self.scale.policy.silence_seconds * 250.0) as u64
    }

    pub(super) fn beat(&mut self, who: usize) {
        self.message(who, self.sizes.beat);
        self.push(self.now_ms + self.beat_ms(), who, What::Beat);
    }

    pub(super) fn arrive(&mut self, who: usize) {
        if self.scheduler.is_expelled(&key(who)) {
            return;
        }
        self.scheduler.arrive(key(who), self.volunteers[who].speed[1], self.now_ms);
        self.message(who, self.sizes.hello);
        let stay = -self.random().max(1e-9).ln() * self.scale.stay_seconds * 1e3;
        let v = &mut self.volunteers[who];
        v.visit += 1;
        (v.present, v.since_ms, v.asking, v.computing) = (true, self.now_ms, false, false);
        v.queue.clear();
        if self.scale.stay_seconds > 0.0 {
            self.push(self.now_ms + stay as u64, who, What::Go);
        }
        self.push(self.now_ms + self.beat_ms(), who, What::Beat);
        self.ask(who, 0);
    }

    pub(super) fn leave(&mut self, who: usize) {
        let v = &mut self.volunteers[who];
        if !std::mem::take(&mut v.present) {
            return;
        }
        v.visit += 1;
        for waiting in &mut self.waiting {
            waiting.release(&key(who));
        }
        if v.honesty == Honesty::Honest {
            self.figures.present_seconds += (self.now_ms - v.since_ms) as f64 / 1e3;
        }
    }

    pub(super) fn go(&mut self, who: usize) {
        self.leave(who);
        if self.random() < 0.5 {
            self.scheduler.leave(key(who));
        }
        let away = -self.random().max(1e-9).ln() * self.scale.away_seconds * 1e3;
        self.push(self.now_ms + away as u64, who, What::Arrive);
    }

    /// Asks for work if there is room for it.
    fn ask(&mut self, who: usize, pause_ms: u64) {
        let v = &mut self.volunteers[who];
        let held = v.queue.len() + usize::from(v.computing);
        if v.present && !v.asking && held < LEASES_A_VOLUNTEER_MAX {
            v.asking = true;
            let at = self.now_ms + pause_ms + v.latency_ms;
            self.push(at, who, What::Take);
        }
    }

    /// A question for work: answered, or kept while there is none.
    pub(super) fn take(&mut self, who: usize) {
        self.message(who, self.sizes.take);
        if !self.give(who) {
            let v = &self.volunteers[who];
            let known = self.scheduler.volunteers().get(&key(who));
            // Who has something else to do goes on with it; who is barred comes again.
            let is_barred = known.is_none_or(|k| !k.may_work(self.now_ms));
            if v.computing || !v.queue.is_empty() || is_barred {
                return self.answer(who, None);
            }
            let which = usize::from(!self.scheduler.is_trusted(&key(who)));
            self.waiting[which].hold(key(who), v.speed[2], self.now_ms + HOLD_MS, ());
        }
    }

    /// Answers questions that were kept: as far as there is work; and those that are old.
    pub(super) fn serve_waiting(&mut self) {
        for which in [0, 1] {
            while let Some(peer) = self.waiting[which].due(self.now_ms) {
                self.waiting[which].release(&peer);
                if !self.give(index(&peer)) {
                    self.answer(index(&peer), None);
                }
            }
            let mut turn = Turn::of_the_oldest();
            while which == 0
                && self.scheduler.audits_waiting() > 0
                && let Some(peer) = self.waiting[which].next(&mut turn)
            {
                self.try_waiting(which, peer, &mut turn);
            }
            let mut turn = Turn::of_the_fastest();
            while self.scheduler.has_units(self.now_ms)
                && let Some(peer) = self.waiting[which].next(&mut turn)
            {
                self.try_waiting(which, peer, &mut turn);
            }
        }
    }

    fn try_waiting(&mut self, which: usize, peer: PeerKey, turn: &mut Turn) {
        if self.give(index(&peer)) {
            self.waiting[which].release(&peer);
        } else {
            turn.in_vain += 1;
        }
    }

    /// Gives work, if there is some.
    fn give(&mut self, who: usize) -> bool {
        let Some(assignment) = self.scheduler.take(key(who), self.now_ms) else { return false };
        let work = match assignment {
            Assignment::Unit { task, path, count, .. } => {
                let kind = Kind::of(path.stage);
                let cost = count as u64 * item_cost(kind);
                self.units.entry(task).or_insert(Unit { path, count, cost });
                self.figures.unit_bytes += self.sizes.unit(kind as usize, count as u64);
                let lag = if kind == Kind::Sample { self.scale.policy_lag } else { 0 };
                self.fetch_version(who, 1 + path.ordinal.saturating_sub(lag));
                Work { task, cost, kind: kind as u8, is_audit: false }
            }
            Assignment::Audit { audit } => {
                let (cost, items) = (self.audits[&audit].cost, self.audits[&audit].items);
                let kind = Kind::Forward as u8;
                self.figures.unit_bytes += self.sizes.unit(usize::from(kind), items);
                Work { task: audit, cost, kind, is_audit: true }
            }
        };
        self.answer(who, Some(work));
        true
    }

    fn answer(&mut self, who: usize, work: Option<Work>) {
        self.figures.message_bytes += self.sizes.idle;
        let at = self.now_ms + self.volunteers[who].latency_ms;
        self.push(at, who, What::Given(work));
    }

    /// Changes of the weights, one version after the other.
    fn fetch_version(&mut self, who: usize, version: u64) {
        let v = &mut self.volunteers[who];
        if version > v.version {
            v.version = version;
            self.figures.version_bytes += self.sizes.version();
            self.message(who, self.sizes.weights);
        }
    }

    pub(super) fn given(&mut self, who: usize, work: Option<Work>) {
        let v = &mut self.volunteers[who];
        v.asking = false;
        match work {
            Some(work) => {
                v.queue.push(work);
                self.compute(who);
                self.ask(who, 0);
            }
            None => {
                let retry_ms = (self.scale.policy.unit_seconds * 100.0).clamp(100.0, 2000.0);
                self.ask(who, retry_ms as u64);
            }
        }
    }

    fn compute(&mut self, who: usize) {
        let noise = 0.9 + 0.2 * self.random();
        let v = &mut self.volunteers[who];
        if v.computing || v.queue.is_empty() {
            return;
        }
        v.computing = true;
        let work = v.queue.remove(0);
        let speed = v.speed[usize::from(work.kind)];
        let ms = (work.cost as f64 / speed * 1e3 * noise).max(1.0) as u64;
        self.push(self.now_ms + ms, who, What::Computed(work));
        if self.volunteers[who].honesty == Honesty::Honest {
            self.figures.busy_seconds += ms as f64 / 1e3;
        }
    }

    pub(super) fn computed(&mut self, who: usize, work: Work) {
        let v = &mut self.volunteers[who];
        v.computing = false;
        // A question, its answer, and the bytes.
        let at = self.now_ms + 3 * v.latency_ms;
        self.push(at, who, What::Result(work));
        self.compute(who);
        self.ask(who, 0);
    }
}
