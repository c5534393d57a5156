//! The simulated time: volunteers, their network, and what a coordination peer does with results.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use manyhands_core::run::config::SwarmSection;
use manyhands_core::run::job::JobPath;
use manyhands_core::swarm::ids::PeerKey;
use manyhands_core::swarm::scheduler::{
    Assignment, Kind, LEASES_A_VOLUNTEER_MAX, Scheduler, TaskId, Urgency,
};

use super::{Figures, Scale};

/// Multiply-adds of sampling one item; a gradient takes three times as many.
const ITEM_COST: u64 = 2_000_000_000;
/// Multiply-adds a second of the slowest volunteer; the fastest is 20 times faster.
const SPEED_MIN: f64 = 5e9;
/// Pause between two signs of life.
const BEAT_MS: u64 = 7_500;
/// Speed of the coordination peer's own engine.
pub(super) const OWN_SPEED: f64 = 2e10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum What {
    /// A volunteer comes.
    Arrive,
    /// A volunteer goes, with or without a word.
    Go,
    /// A question for work is at the coordination peer.
    Take,
    /// Work, or none, is at the volunteer.
    Given(Option<Work>),
    /// The volunteer has computed something.
    Computed(Work),
    /// Its result is at the coordination peer.
    Result(Work),
    Beat,
    /// The coordination peer computed an audit.
    Own(TaskId),
    Tick,
}

/// A lease: what it costs and how it is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Work {
    task: TaskId,
    cost: u64,
    kind: usize,
    is_audit: bool,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Honesty {
    Honest,
    Liar,
    Turncoat,
}

pub(super) struct Volunteer {
    pub(super) honesty: Honesty,
    pub(super) speed: [f64; 3],
    pub(super) latency_ms: u64,
    pub(super) present: bool,
    /// Visits so far: what belongs to an earlier one is void.
    pub(super) visit: u32,
    pub(super) since_ms: u64,
    pub(super) asking: bool,
    pub(super) computing: bool,
    pub(super) queue: Vec<Work>,
    /// False or not, of units that no audit looked at: cost.
    pub(super) unaudited: Vec<(u64, bool)>,
}

pub(super) struct Unit {
    pub(super) path: JobPath,
    pub(super) count: usize,
    pub(super) cost: u64,
}

pub(super) struct Audit {
    pub(super) of: usize,
    pub(super) cost: u64,
    pub(super) is_false: bool,
    /// The unit that waits for it, if it is a newcomer's.
    pub(super) holds: Option<TaskId>,
}

/// When, order among the same, whose, at which of its visits, what.
type Due = (u64, u64, usize, u32, What);

pub(super) struct World<'a> {
    pub(super) scale: &'a Scale,
    pub(super) policy: SwarmSection,
    pub(super) scheduler: Scheduler,
    pub(super) queue: BinaryHeap<Reverse<Due>>,
    pub(super) events: u64,
    pub(super) volunteers: Vec<Volunteer>,
    pub(super) units: BTreeMap<TaskId, Unit>,
    pub(super) audits: BTreeMap<TaskId, Audit>,
    /// Items that a job still needs.
    pub(super) jobs: BTreeMap<JobPath, usize>,
    pub(super) items: usize,
    pub(super) sampled: u64,
    pub(super) step: u64,
    pub(super) own_busy: bool,
    pub(super) rng: u64,
    pub(super) now_ms: u64,
    pub(super) figures: Figures,
}

pub(super) fn key(i: usize) -> PeerKey {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(i as u64).to_le_bytes());
    PeerKey(bytes)
}

fn index(key: &PeerKey) -> usize {
    key.0[..8].iter().rev().fold(0, |sum, b| sum << 8 | usize::from(*b))
}

impl<'a> World<'a> {
    pub(super) fn new(scale: &'a Scale) -> Self {
        let policy = SwarmSection::default();
        let mut world = Self {
            scale,
            scheduler: Scheduler::new(policy.clone(), 0),
            policy,
            queue: BinaryHeap::new(),
            events: 0,
            volunteers: Vec::new(),
            units: BTreeMap::new(),
            audits: BTreeMap::new(),
            jobs: BTreeMap::new(),
            items: 0,
            sampled: 0,
            step: 0,
            own_busy: false,
            rng: scale.seed,
            now_ms: 0,
            figures: Figures::default(),
        };
        let mut seconds_an_item = 0.0;
        for i in 0..scale.volunteers {
            let volunteer = world.volunteer();
            // Rollout and gradient of one item, by all together.
            let sample = ITEM_COST as f64 / volunteer.speed[0];
            let gradient = 3.0 * ITEM_COST as f64 / volunteer.speed[2];
            seconds_an_item += 1.0 / (sample + gradient);
            world.volunteers.push(volunteer);
            let at = (world.random() * 20_000.0) as u64;
            world.push(at, i, What::Arrive);
        }
        world.items = (seconds_an_item * scale.step_seconds).max(8.0) as usize;
        world.push(1000, 0, What::Tick);
        world.open_jobs();
        world
    }

    fn volunteer(&mut self) -> Volunteer {
        let speed = SPEED_MIN * 20.0_f64.powf(self.random());
        let decode = 0.15 + 0.2 * self.random();
        let (draw, half) = (self.random(), self.random() < 0.5);
        let honesty = match (draw < self.scale.cheats, half) {
            (false, _) => Honesty::Honest,
            (true, true) => Honesty::Liar,
            (true, false) => Honesty::Turncoat,
        };
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
            unaudited: Vec::new(),
        }
    }

    /// Splitmix64, 0 to 1.
    pub(super) fn random(&mut self) -> f64 {
        self.rng = self.rng.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.rng;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn push(&mut self, at_ms: u64, who: usize, what: What) {
        let visit = self.volunteers.get(who).map_or(0, |v| v.visit);
        self.events += 1;
        self.queue.push(Reverse((at_ms, self.events, who, visit, what)));
    }

    pub(super) fn run(mut self) -> Figures {
        let half = self.scale.steps / 2;
        let mut first_half = None;
        while let Some(Reverse((at, _, who, visit, what))) = self.queue.pop() {
            self.now_ms = at;
            self.event(who, visit, what);
            if self.step >= half && first_half.is_none() {
                first_half = Some(self.seen());
            }
            if self.step >= self.scale.steps {
                break;
            }
        }
        let mut all = self.seen();
        let before = first_half.unwrap_or_default();
        all.late_present_seconds = all.present_seconds - before.present_seconds;
        all.late_busy_seconds = all.busy_seconds - before.busy_seconds;
        all.late_seconds = all.seconds - before.seconds;
        all.late_useful = all.useful - before.useful;
        all.late_audited = all.audited - before.audited;
        all.trusted = (0..self.volunteers.len())
            .filter(|i| self.scheduler.is_trusted(&key(*i)))
            .count() as u64;
        all
    }

    /// The figures at this moment.
    fn seen(&self) -> Figures {
        let mut figures = self.figures;
        for v in self.volunteers.iter().filter(|v| v.present && v.honesty == Honesty::Honest) {
            figures.present_seconds += (self.now_ms - v.since_ms) as f64 / 1e3;
        }
        figures.steps = self.step;
        figures.seconds = self.now_ms as f64 / 1e3;
        figures.backups = self.scheduler.counts.backups;
        figures.lapsed = self.scheduler.counts.lapsed;
        figures
    }

    fn event(&mut self, who: usize, visit: u32, what: What) {
        // A result that is under way arrives even if its sender is gone.
        let stale = visit != self.volunteers[who].visit;
        let always = matches!(what, What::Result(_) | What::Own(_) | What::Tick | What::Arrive);
        if stale && !always {
            return;
        }
        match what {
            What::Arrive => self.arrive(who),
            What::Go => self.go(who),
            What::Take => self.take(who),
            What::Given(work) => self.given(who, work),
            What::Computed(work) => self.computed(who, work),
            What::Result(work) => self.result(who, work),
            What::Beat => {
                self.message(who);
                self.push(self.now_ms + BEAT_MS, who, What::Beat);
            }
            What::Own(id) => {
                self.own_busy = false;
                self.audited(id, None);
            }
            What::Tick => {
                for peer in self.scheduler.expire(self.now_ms) {
                    self.expel(index(&peer));
                }
                self.push(self.now_ms + 1000, 0, What::Tick);
            }
        }
        self.audit_myself();
    }

    fn message(&mut self, who: usize) {
        self.figures.messages += 1;
        self.scheduler.touch(key(who), self.now_ms);
    }

    fn arrive(&mut self, who: usize) {
        if self.scheduler.is_expelled(&key(who)) {
            return;
        }
        self.scheduler.arrive(key(who), self.volunteers[who].speed[1], self.now_ms);
        self.figures.messages += 1;
        let stay = -self.random().max(1e-9).ln() * self.scale.stay_seconds * 1e3;
        let v = &mut self.volunteers[who];
        v.visit += 1;
        (v.present, v.since_ms, v.asking, v.computing) = (true, self.now_ms, false, false);
        v.queue.clear();
        if self.scale.stay_seconds > 0.0 {
            self.push(self.now_ms + stay as u64, who, What::Go);
        }
        self.push(self.now_ms + BEAT_MS, who, What::Beat);
        self.ask(who, 0);
    }

    pub(super) fn leave(&mut self, who: usize) {
        let v = &mut self.volunteers[who];
        if !std::mem::take(&mut v.present) {
            return;
        }
        v.visit += 1;
        if v.honesty == Honesty::Honest {
            self.figures.present_seconds += (self.now_ms - v.since_ms) as f64 / 1e3;
        }
    }

    fn go(&mut self, who: usize) {
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

    fn take(&mut self, who: usize) {
        self.message(who);
        let assignment = self.scheduler.take(key(who), self.now_ms);
        let work = assignment.map(|a| match a {
            Assignment::Unit { task, path, count, .. } => {
                let kind = Kind::of(path.stage);
                let cost = count as u64 * item_cost(kind);
                self.units.entry(task).or_insert(Unit { path, count, cost });
                Work { task, cost, kind: kind as usize, is_audit: false }
            }
            Assignment::Audit { audit } => {
                let cost = self.audits[&audit].cost;
                Work { task: audit, cost, kind: Kind::Forward as usize, is_audit: true }
            }
        });
        let at = self.now_ms + self.volunteers[who].latency_ms;
        self.push(at, who, What::Given(work));
    }

    fn given(&mut self, who: usize, work: Option<Work>) {
        let v = &mut self.volunteers[who];
        v.asking = false;
        match work {
            Some(work) => {
                v.queue.push(work);
                self.compute(who);
                self.ask(who, 0);
            }
            None => {
                let retry_ms = (self.policy.unit_seconds * 50.0).clamp(20.0, 2000.0) as u64;
                self.ask(who, retry_ms);
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
        let ms = (work.cost as f64 / v.speed[work.kind] * 1e3 * noise).max(1.0) as u64;
        self.push(self.now_ms + ms, who, What::Computed(work));
        if self.volunteers[who].honesty == Honesty::Honest {
            self.figures.busy_seconds += ms as f64 / 1e3;
        }
    }

    fn computed(&mut self, who: usize, work: Work) {
        let v = &mut self.volunteers[who];
        v.computing = false;
        // A question, its answer, and the bytes.
        let at = self.now_ms + 3 * v.latency_ms;
        self.push(at, who, What::Result(work));
        self.compute(who);
        self.ask(who, 0);
    }

    fn result(&mut self, who: usize, work: Work) {
        self.message(who);
        if !self.scheduler.holds(key(who), work.task) {
            self.figures.wasted += work.cost as f64;
            return;
        }
        if work.is_audit {
            self.scheduler.finished(key(who), work.task, work.cost, self.now_ms);
            return self.audited(work.task, Some(who));
        }
        let Some(unit) = self.units.get(&work.task) else { return };
        let (path, cost) = (unit.path, unit.cost);
        self.scheduler.finished(key(who), work.task, cost, self.now_ms);
        self.scheduler.deliver(work.task);
        let trusted = self.scheduler.is_trusted(&key(who));
        let is_false = match self.volunteers[who].honesty {
            Honesty::Honest => false,
            Honesty::Liar => true,
            Honesty::Turncoat => trusted && self.random() < 0.05,
        };
        let kind = audit_kind(path);
        let mut request = |urgency, holds| {
            let id = self.scheduler.request_audit(key(who), kind, cost, urgency);
            self.audits.insert(id, Audit { of: who, cost, is_false, holds });
        };
        if !trusted {
            return request(Urgency::Admission, Some(work.task));
        }
        let p = self.scheduler.standing(key(who)).audit_probability(&self.policy);
        if self.random() < p {
            let id = self.scheduler.request_audit(key(who), kind, cost, Urgency::Spot);
            self.audits.insert(id, Audit { of: who, cost, is_false, holds: None });
        } else {
            self.volunteers[who].unaudited.push((cost, is_false));
        }
        self.figures.false_units += u64::from(is_false);
        self.accept(work.task);
    }
}

pub(super) fn item_cost(kind: Kind) -> u64 {
    if kind == Kind::Gradient { 3 * ITEM_COST } else { ITEM_COST }
}

fn audit_kind(path: JobPath) -> Kind {
    match Kind::of(path.stage) {
        Kind::Sample => Kind::Forward,
        kind => kind,
    }
}
