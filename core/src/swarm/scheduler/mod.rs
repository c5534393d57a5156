//! Who does what: leases of units and audits, cut to fit each volunteer. Knows nothing of
//! arithmetic: a job is a path, a number of items and their cost in multiply-adds.
//!
//! Jobs are served most urgent first. A unit is cut for a volunteer's measured speed, smaller
//! towards the end of a job so that all finish together; units whose holders fall silent go to
//! others; when nothing is left, the slowest units are given out a second time.

mod audits;
mod leases;
mod volunteers;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Range, RangeInclusive};

use indexmap::IndexMap;

use super::ids::PeerKey;
use crate::run::config::SwarmSection;
use crate::run::job::{JobPath, Stage};
use audits::{AuditKey, AuditOffer, AuditTask};

pub use audits::Urgency;
pub use volunteers::Volunteer;
pub use waiting::{IN_VAIN_MAX, Turn, Waiting};

/// Units that a volunteer may hold: one to compute, one to have ready.
pub const LEASES_A_VOLUNTEER_MAX: usize = 2;
/// Volunteers that may hold the same unit.
pub const HOLDERS_MAX: usize = 3;
/// Lapsed leases in a row after which a volunteer gets one unit at a time, after a pause.
pub const LAPSES_BEFORE_PAUSE: u32 = 3;
/// Lapsed leases in a row, without one result, that expel.
pub const LAPSES_MAX: u32 = 12;
/// Units and audits of others that are looked at for one question: a bound on its cost.
pub const SEARCH_MAX: usize = 64;
/// Longest pause after lapses.
const PAUSE_MS_MAX: u64 = 600_000;
/// A lease lasts this many times the expected time; whoever lets one lapse is taken to be so many
/// times slower than was thought.
const PATIENCE: u64 = 4;
/// A unit is given out a second time when it is this many times later than expected.
const LATE: f64 = 1.5;
/// Share of a job's rest, relative to a volunteer's share of the swarm's speed, that one unit takes.
const GUIDED_SHARE: f64 = 0.5;
/// Smallest unit towards the end of a job, relative to a full one.
const UNIT_SHARE_MIN: f64 = 0.125;
/// It is not late before so much of a unit's time has passed beyond what was expected.
const SLACK: f64 = 0.25;
/// Somebody else's unit goes at once to whoever needs at most this many times a unit's time.
const SOON: f64 = 0.5;
/// After so much of a unit's time, to whoever is not slower than the average.
const COURTESY: f64 = 0.5;
/// An audit goes to a volunteer that needs at most this many times a unit's time.
const AUDIT_HEAVY: f64 = 2.0;
/// Weight of a new measurement of speed.
const SPEED_GAIN: f64 = 0.3;

/// Names a unit while it is open.
pub type TaskId = u64;

/// What kind of arithmetic: volunteers have a speed for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Token by token.
    Sample,
    /// Forward passes.
    Forward,
    /// Forward and backward passes.
    Gradient,
}

impl Kind {
    /// Of a job.
    pub fn of(stage: Stage) -> Self {
        match stage {
            Stage::Evaluate | Stage::EvaluateGreedy | Stage::Rollout { .. } => Self::Sample,
            Stage::Proximal | Stage::Reference | Stage::Policy { .. } => Self::Forward,
            Stage::Gradient { .. } => Self::Gradient,
        }
    }
}

/// What a volunteer is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assignment {
    /// Items `first .. first + count` of a job.
    Unit {
        /// Its name.
        task: TaskId,
        /// The job.
        path: JobPath,
        /// First item.
        first: usize,
        /// Number of items.
        count: usize,
    },
    /// Somebody else's unit once more.
    Audit {
        /// Name of the audit.
        audit: TaskId,
    },
}

/// A unit that somebody should be computing.
#[derive(Clone, Debug)]
struct Task {
    path: JobPath,
    first: usize,
    count: usize,
    cost: u64,
    holders: Vec<PeerKey>,
    /// A result is there, or is on its way.
    delivered: bool,
    /// When it may be given out a second time.
    late_ms: Option<u64>,
}

/// A job that is being cut into units.
#[derive(Clone, Debug)]
struct Tiling {
    /// Items that nobody was given.
    uncut: VecDeque<Range<usize>>,
    item_cost: u64,
    items_min: usize,
    items_max: usize,
    /// Units that were cut and are not done with.
    tasks: BTreeSet<TaskId>,
}

/// A promise of a volunteer.
#[derive(Clone, Copy, Debug)]
struct Lease {
    since_ms: u64,
    expected_ms: u64,
    deadline_ms: u64,
}

/// Figures of a scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Units given out for the first time.
    pub issued: u64,
    /// Units given out again because their holder fell silent.
    pub reissued: u64,
    /// Units and audits given out a second time because they were late.
    pub backups: u64,
    /// Audits given to volunteers.
    pub delegated_audits: u64,
    /// Leases that lapsed.
    pub lapsed: u64,
}

/// Leases of everything that is open.
#[derive(Debug)]
pub struct Scheduler {
    policy: SwarmSection,
    volunteers: IndexMap<PeerKey, Volunteer>,
    jobs: BTreeMap<JobPath, Tiling>,
    tasks: BTreeMap<TaskId, Task>,
    audits: BTreeMap<TaskId, AuditTask>,
    next_id: TaskId,
    /// Units that nobody holds: cost, and since when.
    homeless: BTreeMap<(JobPath, TaskId), (u64, u64)>,
    /// Units that are held and may have one more holder, by when they are late: job and cost.
    late: BTreeMap<(u64, TaskId), (JobPath, u64)>,
    /// Audits that nobody holds.
    audit_queue: BTreeMap<AuditKey, AuditOffer>,
    /// Audits that are held and hold up a unit, by when they are late.
    late_audits: BTreeSet<(u64, TaskId)>,
    /// Audits that only the coordination peer may do.
    own_queue: BTreeSet<AuditKey>,
    deadlines: BTreeSet<(u64, PeerKey, TaskId)>,
    /// Who is present, by when it was last known to live.
    seen: BTreeSet<(u64, PeerKey)>,
    /// Summed speed of all that are present, by kind.
    total_speed: [f64; 3],
    /// The newest time that was told.
    now_ms: u64,
    /// What happened so far.
    pub counts: Counts,
}

impl Scheduler {
    /// Nothing to do, nobody here. Names of units and audits start at `first_id`.
    pub fn new(policy: SwarmSection, first_id: TaskId) -> Self {
        Self {
            policy,
            volunteers: IndexMap::new(),
            jobs: BTreeMap::new(),
            tasks: BTreeMap::new(),
            audits: BTreeMap::new(),
            next_id: first_id,
            homeless: BTreeMap::new(),
            late: BTreeMap::new(),
            audit_queue: BTreeMap::new(),
            late_audits: BTreeSet::new(),
            own_queue: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            seen: BTreeSet::new(),
            total_speed: [0.0; 3],
            now_ms: 0,
            counts: Counts::default(),
        }
    }

    /// The `missing` items of a job can be worked on. `item_cost` is the expected cost of an item in
    /// multiply-adds; a unit has as many items as `items` says, in multiples of the least number,
    /// but for what is left over.
    pub fn open(
        &mut self,
        path: JobPath,
        item_cost: u64,
        items: RangeInclusive<usize>,
        missing: &[Range<usize>],
    ) {
        let uncut = missing.iter().filter(|r| !r.is_empty()).cloned().collect();
        let items_min = (*items.start()).max(1);
        let items_max = (*items.end()).max(items_min);
        let (item_cost, tasks) = (item_cost.max(1), BTreeSet::new());
        let tiling = Tiling { uncut, item_cost, items_min, items_max, tasks };
        self.jobs.entry(path).or_insert(tiling);
    }

    /// Whether this job is known.
    pub fn is_open(&self, path: JobPath) -> bool {
        self.jobs.contains_key(&path)
    }

    /// A job is complete: whatever is still out for it is not wanted.
    pub fn close(&mut self, path: JobPath) {
        let tasks = self.jobs.remove(&path).map_or(BTreeSet::new(), |t| t.tasks);
        for task in tasks {
            self.forget(task);
        }
    }

    /// Jobs that are open.
    pub fn open_jobs(&self) -> impl Iterator<Item = JobPath> {
        self.jobs.keys().copied()
    }

    /// A unit's result is there: nobody else is asked for it.
    pub fn deliver(&mut self, task: TaskId) {
        if let Some(t) = self.tasks.get_mut(&task) {
            t.delivered = true;
            self.homeless.remove(&(t.path, task));
            self.set_late(task, None);
        }
    }

    /// A delivered unit was false: it must be computed again.
    pub fn reopen(&mut self, task: TaskId) {
        if let Some(t) = self.tasks.get_mut(&task) {
            t.delivered = false;
            if t.holders.is_empty() {
                self.homeless.insert((t.path, task), (t.cost, self.now_ms));
            }
        }
    }

    /// A unit is done with.
    pub fn forget(&mut self, task: TaskId) {
        self.set_late(task, None);
        if let Some(t) = self.tasks.remove(&task) {
            self.homeless.remove(&(t.path, task));
            if let Some(tiling) = self.jobs.get_mut(&t.path) {
                tiling.tasks.remove(&task);
            }
            for peer in t.holders {
                self.drop_lease(peer, task);
            }
        }
    }

    /// A volunteer finished `task`, which cost `cost` multiply-adds: measures its speed.
    pub fn finished(&mut self, peer: PeerKey, task: TaskId, cost: u64, now_ms: u64) {
        let Some(kind) = self.kind_of(task) else { return };
        let Some(v) = self.volunteers.get_mut(&peer) else { return };
        let Some(lease) = v.lease(task) else { return };
        v.lapses = 0;
        let began = lease.since_ms.max(v.free_ms);
        v.free_ms = now_ms;
        let measured = cost as f64 * 1e3 / now_ms.saturating_sub(began).max(1) as f64;
        let old = v.speed[kind];
        self.set_speed(peer, kind, old + SPEED_GAIN * (measured - old));
        self.drop_lease(peer, task);
    }

    /// Index of a unit's or audit's [`Kind`].
    fn kind_of(&self, task: TaskId) -> Option<usize> {
        match (self.tasks.get(&task), self.audits.get(&task)) {
            (Some(t), _) => Some(Kind::of(t.path.stage) as usize),
            (_, Some(a)) => Some(a.kind as usize),
            _ => None,
        }
    }

    fn set_late(&mut self, task: TaskId, late_ms: Option<u64>) {
        let Some(t) = self.tasks.get_mut(&task) else { return };
        if let Some(old) = std::mem::replace(&mut t.late_ms, late_ms) {
            self.late.remove(&(old, task));
        }
        self.late.extend(late_ms.map(|at| ((at, task), (t.path, t.cost))));
    }
}

#[cfg(test)]
mod tests;
