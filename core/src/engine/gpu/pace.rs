//! How much work goes into one submission, so that none holds the device for over about 100 ms:
//! a desktop stays usable, and no driver takes a long dispatch for a hang.
//!
//! Work is counted in multiply-adds, of which every kernel does another number a millisecond: each
//! has a budget of its own, and a submission is full when the parts of their budgets add up to
//! one. The core reads no clock: without one from the caller budgets stay small.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use manyhands_shaders::wgsl::Id;

use super::times::Times;

/// Milliseconds since any fixed moment.
pub type Clock = Arc<dyn Fn() -> f64 + Send + Sync>;

const START_WORK: u64 = 4 << 20;
const LEAST_WORK: u64 = 1 << 18;
const MOST_WORK: u64 = 1 << 36;
/// Aimed at; a quarter of what is tolerable leaves room for the estimate's errors, and for other
/// programs that use the device.
const TARGET_MS: f64 = 25.0;
/// A submission that holds less of its budgets, and was not long, says little about fuller ones.
const TELLING: f64 = 0.5;
/// Submissions that end within so short a time were told of together, at the end of the last one.
const TOGETHER_MS: f64 = 0.02;

/// What a submission holds.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Parts of the kernels' budgets, and those budgets.
    parts: BTreeMap<Id, (f64, u64)>,
    /// Whether a kernel had to be compiled for it.
    pub(super) compiled: bool,
}

impl Load {
    /// Adds `work` of a kernel that has this budget.
    pub(super) fn add(&mut self, id: Id, work: usize, budget: u64) {
        let part = self.parts.entry(id).or_insert((0.0, budget));
        *part = (part.0 + work as f64 / budget as f64, budget);
    }

    /// Of the target, what it should take.
    pub(super) fn fill(&self) -> f64 {
        self.parts.values().map(|(part, _)| part).sum()
    }

    /// Whether a dispatch fits beside what is there. One that is too large is alone.
    pub(super) fn has_room(&self, work: usize, budget: u64) -> bool {
        self.is_empty() || self.fill() + work as f64 / budget as f64 <= 1.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The kernel that should take most of the time, and its budget.
    fn largest(&self) -> Option<(Id, u64)> {
        let largest = self.parts.iter().max_by(|a, b| a.1.0.total_cmp(&b.1.0));
        largest.map(|(&id, &(_, budget))| (id, budget))
    }
}

pub(super) struct Pace {
    pub(super) clock: Option<Clock>,
    times: Times,
    budgets: BTreeMap<Id, u64>,
    /// Submissions that were told of together, and when the device began with them.
    together: Vec<Load>,
    began_ms: f64,
    /// When the first of them was done.
    first_done_ms: f64,
    last_done_ms: f64,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            clock: None,
            times: Times::new(),
            budgets: BTreeMap::new(),
            together: Vec::new(),
            began_ms: 0.0,
            first_done_ms: 0.0,
            last_done_ms: 0.0,
        }
    }

    /// Multiply-adds of a kernel that fill a submission.
    pub(super) fn budget(&self, id: Id) -> u64 {
        self.budgets.get(&id).copied().unwrap_or(START_WORK)
    }

    /// How long submissions took since the last [`Self::forget_times`].
    pub(super) fn times(&mut self) -> &Times {
        self.settle();
        &self.times
    }

    /// Begins a new count of times.
    pub(super) fn forget_times(&mut self) {
        self.settle();
        self.times = Times::new();
    }

    /// A submission, handed in at `submitted_ms`, is done at `done_ms`.
    pub(super) fn done(&mut self, load: Load, submitted_ms: f64, done_ms: f64) {
        if self.together.is_empty() || done_ms - self.first_done_ms > TOGETHER_MS {
            self.settle();
            // Submissions queue up: this one began when the one before it ended.
            self.began_ms = submitted_ms.max(self.last_done_ms);
            self.first_done_ms = done_ms;
        }
        self.together.push(load);
        self.last_done_ms = done_ms;
    }

    /// Learns from the submissions that were told of together, which share their time.
    fn settle(&mut self) {
        let loads = std::mem::take(&mut self.together);
        let elapsed_ms = (self.last_done_ms - self.began_ms).max(0.1);
        let fill: f64 = loads.iter().map(Load::fill).sum();
        let compiled = loads.iter().any(|load| load.compiled);
        let mut learned = BTreeSet::new();
        for load in loads {
            let ms = elapsed_ms * load.fill() / fill.max(f64::MIN_POSITIVE);
            let Some((id, budget)) = load.largest().filter(|_| !compiled) else {
                // Compilation says nothing of the work.
                self.times.compiled(ms);
                continue;
            };
            self.times.ran(ms, id);
            if (load.fill() >= TELLING || ms > TARGET_MS) && learned.insert(id) {
                let fits = (budget as f64 * load.fill() * TARGET_MS / ms) as u64;
                let now = self.budget(id);
                let next = fits.clamp(now / 4, now.saturating_mul(2));
                self.budgets.insert(id, next.clamp(LEAST_WORK, MOST_WORK));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The device and its clock: kernels at their multiply-adds a millisecond.
    struct Device {
        pace: Pace,
        now: f64,
    }

    impl Device {
        /// Fills and runs a submission of kernels in turn; how long it took.
        fn run(&mut self, kernels: &[(Id, f64)]) -> (f64, Load) {
            let (mut load, mut ms) = (Load::default(), 0.0);
            for &(id, rate) in kernels.iter().cycle() {
                let budget = self.pace.budget(id);
                if !load.has_room(budget as usize / 8, budget) {
                    break;
                }
                load.add(id, budget as usize / 8, budget);
                ms += (budget / 8) as f64 / rate;
            }
            (ms, load)
        }
    }

    fn device() -> Device {
        Device { pace: Pace::new(), now: 0.0 }
    }

    const SLOW: (Id, f64) = (Id::MatmulWeightGradient, 5e4);
    const FAST: (Id, f64) = (Id::MatmulProduct, 5e6);

    /// Breaks if a slow device's submissions stay long, a fast one's stay short, or a kernel's pace
    /// is taken for another's.
    #[test]
    fn pace_settles_near_its_target_for_every_kernel() {
        for times in [1.0, 20.0, 300.0] {
            let kernels = [SLOW, FAST, (Id::SwigluForward, 5e5)].map(|(id, r)| (id, r * times));
            let mut device = device();
            for round in 0..60 {
                for kernel in kernels {
                    let (ms, load) = device.run(&[kernel]);
                    device.pace.done(load, device.now, device.now + ms);
                    device.now += ms;
                    let near = (TARGET_MS / 2.0..=TARGET_MS * 2.0).contains(&ms);
                    assert!(round < 30 || near, "{kernel:?}: {ms} ms");
                }
            }
            let (ms, _) = device.run(&kernels);
            assert!((TARGET_MS / 2.0..=TARGET_MS * 2.0).contains(&ms), "together {ms} ms");
        }
    }

    /// Breaks if submissions whose end is told at the same moment are taken for short ones.
    #[test]
    fn pace_shares_the_time_of_submissions_that_are_told_of_together() {
        let mut device = device();
        for _ in 0..40 {
            let submitted = device.now;
            let runs: Vec<_> = (0..8).map(|_| device.run(&[SLOW])).collect();
            device.now += runs.iter().map(|(ms, _)| ms).sum::<f64>();
            for (_, load) in runs {
                device.pace.done(load, submitted, device.now);
            }
        }
        let (ms, _) = device.run(&[SLOW]);
        assert!((TARGET_MS / 2.0..=TARGET_MS * 2.0).contains(&ms), "{ms} ms");
        let times = device.pace.times().summary();
        assert_eq!((times.count, times.longest), (320, Some(SLOW.0.kernel().name())));
    }

    /// Breaks if latency is taken for work: a decoder's steps are short, and would shrink budgets.
    #[test]
    fn pace_learns_nothing_from_little_work_or_compilation() {
        let mut pace = Pace::new();
        let id = Id::MatmulProduct;
        for (work, compiled, ms) in [(START_WORK / 8, false, 20.0), (START_WORK, true, 5_000.0)] {
            let mut load = Load { compiled, ..Load::default() };
            load.add(id, work as usize, pace.budget(id));
            pace.done(load, pace.last_done_ms, pace.last_done_ms + ms);
            pace.settle();
            assert_eq!(pace.budget(id), START_WORK);
        }
        let times = pace.times().summary();
        assert_eq!((times.count, times.compiling_count, times.compiling_max_ms), (1, 1, 5_000.0));
    }
}
