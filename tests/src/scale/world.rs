//! The simulated time: volunteers, their network, and what a coordination peer does with results.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use manyhands_core::run::config::SwarmSection;
use manyhands_core::run::job::{JobPath, Stage};
use manyhands_core::swarm::coordinator::OWN_CHECKS_MAX;
use manyhands_core::swarm::ids::PeerKey;
use manyhands_core::swarm::ledger::Offence;
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
const OWN_SPEED: f64 = 2e10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
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
struct Work {
    task: TaskId,
    cost: u64,
    kind: usize,
    is_audit: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Honesty {
    Honest,
    Liar,
    Turncoat,
}

struct Volunteer {
    honesty: Honesty,
    speed: [f64; 3],
    latency_ms: u64,
    present: bool,
    /// Visits so far: what belongs to an earlier one is void.
    visit: u32,
    since_ms: u64,
    asking: bool,
    computing: bool,
    queue: Vec<Work>,
    /// False or not, of units that no audit looked at: cost.
    unaudited: Vec<(u64, bool)>,
}

struct Unit {
    path: JobPath,
    count: usize,
    cost: u64,
}

struct Audit {
    of: usize,
    cost: u64,
    is_false: bool,
    /// The unit that waits for it, if it is a newcomer's.
    holds: Option<TaskId>,
}

pub(super) struct World<'a> {
    scale: &'a Scale,
    policy: SwarmSection,
    scheduler: Scheduler,
    queue: BinaryHeap<Reverse<(u64, u64, usize, u32, What)>>,
    events: u64,
    volunteers: Vec<Volunteer>,
    units: BTreeMap<TaskId, Unit>,
    audits: BTreeMap<TaskId, Audit>,
    /// Items that a job still needs.
    jobs: BTreeMap<JobPath, usize>,
    items: usize,
    sampled: u64,
    step: u64,
    own_busy: bool,
    rng: u64,
    now_ms: u64,
    figures: Figures,
}

fn key(i: usize) -> PeerKey {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(i as u64).to_be_bytes());
    PeerKey(bytes)
}

fn index(key: &PeerKey) -> usize {
    key.0[..8].iter().fold(0, |sum, b| sum << 8 | usize::from(*b))
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
    fn random(&mut self) -> f64 {
        self.rng = self.rng.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.rng;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn push(&mut self, at_ms: u64, who: usize, what: What) {
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

    fn leave(&mut self, who: usize) {
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
    fn open_jobs(&mut self) {
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
        self.scheduler.open(path, item_cost(Kind::of(path.stage)), 1 << 20, &[whole]);
    }

    fn audit_myself(&mut self) {
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

    fn audited(&mut self, id: TaskId, by: Option<usize>) {
        let Some(audit) = self.audits.remove(&id) else { return };
        self.scheduler.finish_audit(id);
        self.figures.audited += audit.cost as f64;
        let drawn = self.random() < self.policy.audit_the_auditors;
        let has_time = self.scheduler.own_audits_waiting() < OWN_CHECKS_MAX;
        if by.is_some() && (audit.is_false || drawn && has_time) {
            let (of, kind) = (key(audit.of), Kind::Forward);
            let urgency = if audit.is_false { Urgency::Redo } else { Urgency::Spot };
            let id = self.scheduler.request_own_audit(of, kind, audit.cost, urgency);
            self.audits.insert(id, audit);
            return;
        }
        if !audit.is_false {
            let standing = self.scheduler.standing(key(audit.of));
            standing.audited += 1;
            standing.valid_in_a_row += 1;
            if let Some(task) = audit.holds {
                self.accept(task);
            }
            return;
        }
        self.figures.wasted += audit.cost as f64;
        if let Some(task) = audit.holds {
            self.scheduler.reopen(task);
        }
        self.expel(audit.of);
    }

    fn expel(&mut self, who: usize) {
        if self.scheduler.is_expelled(&key(who)) {
            return;
        }
        let is_honest = self.volunteers[who].honesty == Honesty::Honest;
        let count =
            if is_honest { &mut self.figures.honest_expelled } else { &mut self.figures.expelled };
        *count += 1;
        self.leave(who);
        self.scheduler.expel(key(who), Offence::WrongResult);
        let own: Vec<TaskId> =
            self.audits.iter().filter(|(_, a)| a.of == who).map(|(id, _)| *id).collect();
        for id in own {
            self.scheduler.finish_audit(id);
            if let Some(Audit { holds: Some(task), .. }) = self.audits.remove(&id) {
                self.scheduler.reopen(task);
            }
        }
        for (cost, is_false) in std::mem::take(&mut self.volunteers[who].unaudited) {
            // Done again at once by the coordination peer or others: all of it is verification.
            self.figures.audited += cost as f64;
            self.figures.wasted += if is_false { cost as f64 } else { 0.0 };
        }
    }
}

fn item_cost(kind: Kind) -> u64 {
    if kind == Kind::Gradient { 3 * ITEM_COST } else { ITEM_COST }
}

fn audit_kind(path: JobPath) -> Kind {
    match Kind::of(path.stage) {
        Kind::Sample => Kind::Forward,
        kind => kind,
    }
}
