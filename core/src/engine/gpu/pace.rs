//! How much work goes into one submission, so that none holds the device for over about 100 ms:
//! a desktop stays usable, and no driver takes a long dispatch for a hang.
//!
//! Work is counted in multiply-adds. The core reads no clock: without one from the caller the
//! budget stays small.

use std::sync::Arc;

use manyhands_shaders::wgsl::Id;

use super::times::Times;

/// Milliseconds since any fixed moment.
pub type Clock = Arc<dyn Fn() -> f64 + Send + Sync>;

const START_WORK: u64 = 16 << 20;
const LEAST_WORK: u64 = 1 << 20;
const MOST_WORK: u64 = 1 << 36;
/// Aimed at; half of what is tolerable leaves room for the estimate's errors.
const TARGET_MS: f64 = 50.0;

pub(super) struct Pace {
    pub(super) clock: Option<Clock>,
    pub(super) times: Times,
    budget: u64,
    last_done_ms: f64,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { clock: None, times: Times::new(), budget: START_WORK, last_done_ms: 0.0 }
    }

    /// Multiply-adds after which to submit.
    pub(super) fn budget(&self) -> u64 {
        self.budget
    }

    /// A submission of `work` multiply-adds, handed in at `submitted_ms`, is done at `done_ms`.
    /// `kernel` had most of the work; without one, kernels were compiled for it, and the time says
    /// nothing of the work.
    pub(super) fn done(&mut self, work: u64, kernel: Option<Id>, submitted_ms: f64, done_ms: f64) {
        // Submissions queue up: this one began when the one before it ended.
        let elapsed = (done_ms - submitted_ms.max(self.last_done_ms)).max(0.1);
        self.last_done_ms = done_ms;
        let Some(kernel) = kernel else { return self.times.compiled(elapsed) };
        self.times.ran(elapsed, kernel);
        let fits = (work as f64 * TARGET_MS / elapsed) as u64;
        // A submission that was cut short by a read says little about larger ones.
        let full = work >= self.budget / 2;
        if fits < self.budget || full {
            self.budget = fits
                .clamp(self.budget / 4, self.budget.saturating_mul(2))
                .clamp(LEAST_WORK, MOST_WORK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Breaks if a slow device's submissions stay long, or a fast one's stay short.
    #[test]
    fn pace_settles_near_its_target_on_any_device() {
        for work_per_ms in [50_000.0, 2e6, 5e8] {
            let (mut pace, mut now) = (Pace::new(), 0.0);
            for _ in 0..40 {
                let work = pace.budget();
                let done = now + work as f64 / work_per_ms;
                pace.done(work, Some(Id::MatmulProduct), now, done);
                now = done;
            }
            let ms = pace.budget() as f64 / work_per_ms;
            assert!((25.0..=100.0).contains(&ms), "{work_per_ms} a ms: {ms} ms");
        }
    }

    /// Breaks if the first units of a fast device were cut finely because its driver compiles slowly.
    #[test]
    fn pace_learns_nothing_from_compilation() {
        let mut pace = Pace::new();
        pace.done(START_WORK, None, 0.0, 5_000.0);
        assert_eq!(pace.budget(), START_WORK);
        let times = pace.times.summary();
        assert_eq!((times.count, times.compiling_count, times.compiling_max_ms), (0, 1, 5_000.0));
    }
}
