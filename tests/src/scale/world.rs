//! The simulated time: what happens when, and to whom.

use std::collections::BTreeMap;

use manyhands_core::run::job::JobPath;
use manyhands_core::swarm::ids::PeerKey;
use manyhands_core::swarm::scheduler::{Scheduler, TaskId, Waiting};

use super::agenda::Agenda;
use super::bytes::Sizes;
use super::volunteers::{Honesty, Volunteer};
use super::{Figures, Scale};

/// Multiply-adds of sampling one item; a gradient takes three times as many.
pub(super) const ITEM_COST: u64 = 2_000_000_000;
/// Speed of the coordination peer's own engine.
pub(super) const OWN_SPEED: f64 = 2e10;
/// Between two looks at what lapsed.
const TICK_MS: u64 = 1000;

#[derive(Clone, Copy, Debug)]
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    pub(super) task: TaskId,
    pub(super) cost: u64,
    pub(super) kind: u8,
    pub(super) is_audit: bool,
}

pub(super) struct Unit {
    pub(super) path: JobPath,
    pub(super) count: usize,
    pub(super) cost: u64,
}

pub(super) struct Audit {
    pub(super) of: usize,
    pub(super) items: u64,
    pub(super) cost: u64,
    pub(super) is_false: bool,
    /// The unit that waits for it, if it is a newcomer's.
    pub(super) holds: Option<TaskId>,
}

/// Whose, at which of its visits, what.
type Due = (u32, u32, What);

pub(super) struct World<'a> {
    pub(super) scale: &'a Scale,
    pub(super) scheduler: Scheduler,
    pub(super) sizes: Sizes,
    agenda: Agenda<Due>,
    events: u64,
    pub(super) volunteers: Vec<Volunteer>,
    /// Questions for work that have no answer yet, of those who may audit and of the others.
    pub(super) waiting: [Waiting<()>; 2],
    pub(super) units: BTreeMap<TaskId, Unit>,
    pub(super) audits: BTreeMap<TaskId, Audit>,
    /// Items that a job still needs.
    pub(super) jobs: BTreeMap<JobPath, usize>,
    pub(super) items: usize,
    pub(super) sampled: u64,
    pub(super) step: u64,
    pub(super) own_busy: bool,
    rng: u64,
    pub(super) now_ms: u64,
    pub(super) figures: Figures,
}

pub(super) fn key(i: usize) -> PeerKey {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&(i as u64).to_le_bytes());
    PeerKey(bytes)
}

pub(super) fn index(key: &PeerKey) -> usize {
    key.0[..8].iter().rev().fold(0, |sum, b| sum << 8 | usize::from(*b))
}

impl<'a> World<'a> {
    pub(super) fn new(scale: &'a Scale) -> Self {
        let mut world = Self {
            scale,
            scheduler: Scheduler::new(scale.policy.clone(), 0),
            sizes: Sizes::new(),
            agenda: Agenda::new(),
            events: 0,
            volunteers: Vec::new(),
            waiting: Default::default(),
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
            let volunteer = world.volunteer(i);
            // Rollout and gradient of one item, by all together.
            let sample = ITEM_COST as f64 / volunteer.speed[0];
            let gradient = 3.0 * ITEM_COST as f64 / volunteer.speed[2];
            seconds_an_item += 1.0 / (sample + gradient);
            world.volunteers.push(volunteer);
            let at = (world.random() * 20_000.0) as u64;
            world.push(at, i, What::Arrive);
        }
        world.items = (seconds_an_item * scale.step_seconds).max(8.0) as usize;
        world.push(TICK_MS, 0, What::Tick);
        world.open_jobs();
        world
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
        self.agenda.push(at_ms, (who as u32, visit, what));
    }

    pub(super) fn run(mut self) -> Figures {
        let half = self.scale.steps / 2;
        let mut first_half = None;
        while let Some((at, (who, visit, what))) = self.agenda.pop() {
            self.now_ms = at;
            self.event(who as usize, visit, what);
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
        figures.events = self.events;
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
            What::Beat => self.beat(who),
            What::Own(id) => {
                self.own_busy = false;
                self.audited(id, None);
            }
            What::Tick => {
                for peer in self.scheduler.expire(self.now_ms) {
                    self.expel(index(&peer));
                }
                self.push(self.now_ms + TICK_MS, 0, What::Tick);
            }
        }
        self.serve_waiting();
        self.audit_myself();
    }

    /// A request and its answer, of so many bytes together.
    pub(super) fn message(&mut self, who: usize, bytes: u64) {
        self.figures.messages += 1;
        self.figures.message_bytes += bytes;
        self.scheduler.touch(key(who), self.now_ms);
    }
}
