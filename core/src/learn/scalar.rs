//! The few scalar rules that every learning formula shares: log-ratio clamp, mean, counter draws.
//!
//! Sums run from the first element to the last; nothing here is reassociated.

use manyhands_shaders::x1::philox;

/// Log-ratios are clamped to `[-20, 20]` before `exp`, as verl does. Beyond the clamp the ratio is
/// constant, so its gradient is zero.
pub const LOG_RATIO_LIMIT: f64 = 20.0;

/// `exp` of a log-ratio under [`LOG_RATIO_LIMIT`], in nats.
pub fn ratio(log_ratio: f64) -> f64 {
    libm::exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
}

/// Whether the gradient passes through [`ratio`]: the clamp is inactive.
pub fn ratio_is_free(log_ratio: f64) -> bool {
    log_ratio.abs() <= LOG_RATIO_LIMIT
}

/// Arithmetic mean, first to last; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Whether all values are equal: the exact test for zero variance. A mean of equal floats may
/// differ from them in the last bit, so a computed variance is not that test.
pub fn all_equal(values: &[f64]) -> bool {
    values.windows(2).all(|pair| pair[0] == pair[1])
}

/// What a sequence of draws is for. Purposes never share random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Choosing tokens in Clip-Cov.
    ClipCov = 1,
    /// Resampling problems for confidence intervals.
    Bootstrap = 2,
}

/// Counter-based uniform draws: a pure function of (seed, purpose, index), by Philox4x32-10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draws {
    key: [u32; 2],
    purpose: Purpose,
}

impl Draws {
    /// Sets learning's counters apart from the sampler's, which may share the run's seed.
    const DOMAIN: u32 = 0x4C45_524E;

    /// Draws for one purpose under one seed.
    pub const fn new(seed: u64, purpose: Purpose) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], purpose }
    }

    /// A number in `0..n`, uniform up to a bias below `n * 2^-64`. Panics when `n` is 0.
    pub fn below(&self, index: u64, n: usize) -> usize {
        assert!(n > 0, "no number lies below 0");
        let counter = [index as u32, (index >> 32) as u32, self.purpose as u32, Self::DOMAIN];
        let word = philox(counter, self.key);
        let r = u64::from(word[0]) | (u64::from(word[1]) << 32);
        ((u128::from(r) * n as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of generator or of counter layout would silently change every interval and choice.
    #[test]
    fn draws_are_a_pure_function_of_seed_purpose_and_index() {
        let draws = Draws::new(7, Purpose::Bootstrap);
        let first: Vec<usize> = (0..6).map(|i| draws.below(i, 1000)).collect();
        let again: Vec<usize> = (0..6).rev().map(|i| draws.below(i, 1000)).rev().collect();
        assert_eq!(first, again);
        let other: Vec<usize> =
            (0..6).map(|i| Draws::new(7, Purpose::ClipCov).below(i, 1000)).collect();
        assert_ne!(first, other);
    }

    #[test]
    fn draws_cover_the_range_evenly() {
        let draws = Draws::new(3, Purpose::Bootstrap);
        let mut counts = [0_u32; 10];
        for i in 0..10_000 {
            counts[draws.below(i, 10)] += 1;
        }
        assert!(counts.iter().all(|&c| (850..1150).contains(&c)), "{counts:?}");
    }

    #[test]
    fn all_equal_sees_what_a_computed_variance_misses() {
        let values = [0.1; 3];
        assert!(all_equal(&values) && all_equal(&[]) && !all_equal(&[0.1, 0.2]));
        assert_eq!(mean(&[]), 0.0);
    }
}
