//! How long submissions hold the device, for people: nothing is decided by it.

use manyhands_shaders::wgsl::Id;
use serde::Serialize;

/// Times of one millisecond each are told apart up to this; what is longer shares the last place.
const MS_MAX: usize = 1000;

/// How long submissions held the device since the model was set, milliseconds. Those that the
/// driver tells of at the same moment share their time by what was expected of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SubmissionTimes {
    /// Submissions that ran kernels which were compiled before.
    pub count: u64,
    /// 99 of 100 took no longer, rounded up to a whole millisecond.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// The kernel that had most of the longest one's work.
    pub longest: Option<String>,
    /// Submissions for which a kernel had to be compiled, which holds the device too.
    pub compiling_count: u64,
    /// The longest of those.
    pub compiling_max_ms: f64,
}

/// See [`SubmissionTimes`].
pub(super) struct Times {
    /// By whole milliseconds.
    counts: Vec<u64>,
    max: (f64, Option<Id>),
    compiling: (u64, f64),
}

impl Times {
    pub(super) fn new() -> Self {
        Self { counts: vec![0; MS_MAX + 1], max: (0.0, None), compiling: (0, 0.0) }
    }

    /// A submission took `ms`; `kernel` had most of its work.
    pub(super) fn ran(&mut self, ms: f64, kernel: Id) {
        self.counts[(ms as usize).min(MS_MAX)] += 1;
        if ms > self.max.0 {
            self.max = (ms, Some(kernel));
        }
    }

    /// A submission took `ms`, compilation included.
    pub(super) fn compiled(&mut self, ms: f64) {
        self.compiling = (self.compiling.0 + 1, self.compiling.1.max(ms));
    }

    pub(super) fn summary(&self) -> SubmissionTimes {
        let count: u64 = self.counts.iter().sum();
        let mut left = count - count / 100;
        let within = |n: &u64| {
            left = left.saturating_sub(*n);
            left == 0
        };
        let p99 = self.counts.iter().position(within).unwrap_or(0);
        let (max_ms, longest) = self.max;
        let (compiling_count, compiling_max_ms) = self.compiling;
        // The last place has no upper end but the longest of all.
        let p99_ms = if p99 == MS_MAX { max_ms } else { ((p99 + 1) as f64).min(max_ms) };
        let longest = longest.map(|id| id.kernel().name());
        SubmissionTimes { count, p99_ms, max_ms, longest, compiling_count, compiling_max_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Breaks if the page could call submissions short that are not.
    #[test]
    fn summary_of_submissions_is_that_of_the_sorted_list() {
        assert_eq!(Times::new().summary().p99_ms, 0.0);
        let mut times = Times::new();
        // The 200th of 202 is the last of 99 in 100.
        for ms in 1..=200 {
            times.ran(f64::from(ms) - 0.5, Id::MatmulProduct);
        }
        times.ran(201.0, Id::MatmulProduct);
        times.ran(5000.0, Id::SwigluForward);
        times.compiled(700.0);
        times.compiled(300.0);
        let expected = SubmissionTimes {
            count: 202,
            p99_ms: 200.0,
            max_ms: 5000.0,
            longest: Some(Id::SwigluForward.kernel().name()),
            compiling_count: 2,
            compiling_max_ms: 700.0,
        };
        assert_eq!(times.summary(), expected);
        let mut all_long = Times::new();
        all_long.ran(3000.0, Id::MatmulProduct);
        assert_eq!(all_long.summary().p99_ms, 3000.0);
        let mut one = Times::new();
        one.ran(0.25, Id::MatmulProduct);
        assert_eq!(one.summary().p99_ms, 0.25);
    }
}
