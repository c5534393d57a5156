//! pass@k and its uncertainty: how many problems are solved by at least one of k answers.
//!
//! Unbiased estimator of Chen et al. (2107.03374) in the stable product form used by Yue et al.
//! (2504.13837); percentile bootstrap over problems with a fixed seed, so that a report is a
//! function of its data. Support metrics live in [`support`](super::support).

use serde::{Deserialize, Serialize};

use super::entropy::entropy_of_counts;
use super::scalar::{Draws, Purpose, mean};

/// Resamples of a bootstrap interval.
pub const BOOTSTRAP_RESAMPLES: usize = 1000;
/// Seed of all published intervals.
pub const BOOTSTRAP_SEED: u64 = 0x5EED;

/// Results of one problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProblemResult {
    /// Answers sampled.
    pub sample_count: u32,
    /// Of those, correct.
    pub correct_count: u32,
}

/// A mean over problems with a 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// Of the data.
    pub mean: f64,
    /// 2.5th percentile of resampled means.
    pub low: f64,
    /// 97.5th percentile of resampled means.
    pub high: f64,
}

/// Variety of the answers to one problem.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerVariety {
    /// How many different answers.
    pub distinct_count: u32,
    /// Entropy of their frequencies, nats.
    pub entropy: f64,
}

/// `1 - C(n-c, k) / C(n, k)` = `1 - prod_{i=n-c+1..n} (1 - k/i)`; 1 if `n - c < k`.
/// Panics unless `c <= n` and `1 <= k <= n`: there is no unbiased estimate beyond.
pub fn pass_at_k(result: ProblemResult, k: u32) -> f64 {
    let ProblemResult { sample_count: n, correct_count: c } = result;
    assert!(c <= n && (1..=n).contains(&k), "pass@{k} of {c} correct among {n}");
    if n - c < k {
        return 1.0;
    }
    let all_wrong = (n - c + 1..=n).fold(1.0, |p, i| p * (1.0 - f64::from(k) / f64::from(i)));
    1.0 - all_wrong
}

/// pass@k of a known probability of success: `1 - (1 - p)^k`.
pub fn pass_at_k_of_probability(p: f64, k: u32) -> f64 {
    1.0 - libm::pow(1.0 - p, f64::from(k))
}

/// Mean pass@k over problems with its interval; `None` without problems.
pub fn mean_pass_at_k(results: &[ProblemResult], k: u32) -> Option<Interval> {
    let values: Vec<f64> = results.iter().map(|&result| pass_at_k(result, k)).collect();
    bootstrap(&values, BOOTSTRAP_SEED)
}

/// Percentile bootstrap of a mean over problems, `(problems)`; `None` without any.
pub fn bootstrap(values: &[f64], seed: u64) -> Option<Interval> {
    if values.is_empty() {
        return None;
    }
    let draws = Draws::new(seed, Purpose::Bootstrap);
    let count = values.len();
    let resampled_mean = |resample: usize| {
        let first = (resample * count) as u64;
        let sum: f64 = (0..count as u64).map(|i| values[draws.below(first + i, count)]).sum();
        sum / count as f64
    };
    let mut means: Vec<f64> = (0..BOOTSTRAP_RESAMPLES).map(resampled_mean).collect();
    means.sort_by(f64::total_cmp);
    let tail = BOOTSTRAP_RESAMPLES * 25 / 1000;
    Some(Interval {
        mean: mean(values),
        low: means[tail],
        high: means[BOOTSTRAP_RESAMPLES - 1 - tail],
    })
}

/// Sampling-efficiency gap of 2504.13837: the base model's pass@k (k large) minus the trained
/// model's pass@1. What re-weighting the base's own answers could still gain.
pub fn sampling_efficiency_gap(base_pass_at_k: f64, trained_pass_at_1: f64) -> f64 {
    base_pass_at_k - trained_pass_at_1
}

/// First index at which the sign of `a - b` has turned from what it was at the start: where two
/// pass@k curves over the same ks have crossed. `None` if they never do.
pub fn crossing(a: &[f64], b: &[f64]) -> Option<usize> {
    assert_eq!(a.len(), b.len(), "both curves need the same ks");
    let mut signs = a.iter().zip(b).map(|(a, b)| a - b).enumerate().filter(|(_, d)| *d != 0.0);
    let (_, start) = signs.next()?;
    signs.find(|(_, d)| (*d > 0.0) != (start > 0.0)).map(|(index, _)| index)
}

/// Variety of the answers to one problem, compared as they are (normalise first).
pub fn answer_variety<A: Ord>(answers: &[A]) -> AnswerVariety {
    let mut sorted: Vec<&A> = answers.iter().collect();
    sorted.sort();
    let counts: Vec<u64> = sorted.chunk_by(|a, b| a == b).map(|run| run.len() as u64).collect();
    AnswerVariety { distinct_count: counts.len() as u32, entropy: entropy_of_counts(&counts) }
}

#[cfg(test)]
mod tests {
    use super::super::golden::{GOLDEN_TOLERANCE, assert_close, assert_golden, golden, numbers};
    use super::*;
    use proptest::prelude::*;

    const fn result(sample_count: u32, correct_count: u32) -> ProblemResult {
        ProblemResult { sample_count, correct_count }
    }

    #[test]
    fn pass_at_k_equals_golden() {
        let golden = &golden()["passk"];
        let cases = [(10, 3, 1), (10, 3, 5), (256, 1, 128), (16, 0, 8), (16, 12, 8), (5, 3, 2)];
        assert_eq!(golden.as_object().unwrap().len(), cases.len());
        for (n, c, k) in cases {
            let key = format!("n{n}c{c}k{k}");
            assert_golden(&key, &[pass_at_k(result(n, c), k)], &golden[&key]);
        }
    }

    /// Base and trained model cross between k = 2 and k = 4: 2504.13837 in miniature.
    #[test]
    fn pass_at_k_curves_cross_where_golden_says() {
        let golden = &golden()["passk_cross"];
        let [base_p, rl_p] = ["base_p", "rl_p"].map(|key| numbers(&golden[key]));
        let at = |p: &[f64], k| {
            mean(&p.iter().map(|&p| pass_at_k_of_probability(p, k)).collect::<Vec<_>>())
        };
        let ks = [1, 2, 4, 16, 128];
        let [base, rl] = [&base_p, &rl_p].map(|p| ks.map(|k| at(p, k)));
        for (index, k) in ks.iter().enumerate() {
            let key = format!("k={k}");
            assert_golden(&key, &[base[index], rl[index]], &golden[&key]);
        }
        assert_eq!(crossing(&base, &rl), Some(2));
        assert_eq!(crossing(&rl, &rl), None);
        assert_eq!(crossing(&base[2..], &rl[2..]), None);
        let gap = sampling_efficiency_gap(base[4], rl[0]);
        assert_close("gap", &[gap], &[0.9811684654255448 - 0.4625], GOLDEN_TOLERANCE);
    }

    /// The estimator is the mean over all k-subsets; here over every subset of 8 answers.
    #[test]
    fn pass_at_k_is_the_mean_over_subsets() {
        for c in 0..=8_u32 {
            for k in 1..=8_u32 {
                let subsets = (0..256_u32).filter(|s| s.count_ones() == k);
                let (mut solved, mut total) = (0.0, 0.0);
                for subset in subsets {
                    solved += f64::from(u8::from(subset & ((1 << c) - 1) != 0));
                    total += 1.0;
                }
                assert_close("pass@k", &[pass_at_k(result(8, c), k)], &[solved / total], 1e-14);
            }
        }
    }

    #[test]
    fn bootstrap_is_deterministic_and_covers_the_mean() {
        let results: Vec<ProblemResult> = (0..40).map(|i| result(16, i % 17)).collect();
        let interval = mean_pass_at_k(&results, 4).unwrap();
        assert_eq!(Some(interval), mean_pass_at_k(&results, 4));
        assert!(interval.low < interval.mean && interval.mean < interval.high);
        let values: Vec<f64> = results.iter().map(|&r| pass_at_k(r, 4)).collect();
        // The normal approximation of the same interval.
        let m = mean(&values);
        let sd = (values.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / 40.0).sqrt();
        let expected = 2.0 * 1.96 * sd / 40f64.sqrt();
        assert!(((interval.high - interval.low) / expected - 1.0).abs() < 0.1);
        assert_eq!(bootstrap(&[], 1), None);
        assert_eq!(bootstrap(&[0.5; 3], 1), Some(Interval { mean: 0.5, low: 0.5, high: 0.5 }));
    }

    #[test]
    fn answer_variety_counts_distinct_answers() {
        let variety = answer_variety(&["b", "a", "b", "c"]);
        assert_eq!(variety.distinct_count, 3);
        assert_close("H", &[variety.entropy], &[1.5 * libm::log(2.0)], 1e-15);
        let none: [u8; 0] = [];
        assert_eq!(answer_variety(&none), AnswerVariety { distinct_count: 0, entropy: 0.0 });
    }

    proptest! {
        /// More tries never hurt, and one try is the plain success rate.
        #[test]
        fn pass_at_k_grows_with_k(n in 1..200u32, c_share in 0.0..=1.0f64) {
            let r = result(n, (f64::from(n) * c_share) as u32);
            let first = pass_at_k(r, 1);
            prop_assert!((first - f64::from(r.correct_count) / f64::from(n)).abs() < 1e-12);
            for k in 2..=n {
                prop_assert!(pass_at_k(r, k) >= pass_at_k(r, k - 1) - 1e-12);
            }
        }

        /// Dang et al.: the spread of accuracies caps pass@k (Jensen on (1-rho)^2, tight at k = 2).
        #[test]
        fn pass_at_k_respects_the_variance_bound(p in prop::collection::vec(0.0..1.0f64, 1..30), k in 2..64u32) {
            let at_k = mean(&p.iter().map(|&p| pass_at_k_of_probability(p, k)).collect::<Vec<_>>());
            let m = mean(&p);
            let variance = mean(&p.iter().map(|p| (p - m) * (p - m)).collect::<Vec<_>>());
            let bound = 1.0 - libm::pow((1.0 - m) * (1.0 - m) + variance, f64::from(k) / 2.0);
            prop_assert!(at_k <= bound + 1e-12);
        }
    }
}
