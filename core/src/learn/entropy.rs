//! Entropy: measuring it, keeping it in a band, and choosing the tokens that would destroy it.
//!
//! - [`entropy_of_counts`], [`entropy_of_logits`]: Shannon entropy in nats. Log both of tokens and of
//!   answers: one can rise while the other falls (arXiv 2507.14843).
//! - [`EntropyBandConfig`]: the adaptive bonus of Skywork-OR1 (as in TRL), with its single target
//!   widened to a band in which the coefficient rests.
//! - [`CovarianceControl`]: Clip-Cov and KL-Cov of "The entropy mechanism" (arXiv 2505.22617, as in
//!   verl). Both act on few tokens, those whose log-probability and advantage covary most.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};
use super::scalar::{Draws, Purpose, mean};

/// Entropy in nats of the distribution that the counts estimate; 0 when there are none.
pub fn entropy_of_counts(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    let term = |&count: &u64| {
        let p = count as f64 / total;
        -p * libm::log(p)
    };
    counts.iter().filter(|&&count| count > 0).map(term).sum::<f64>() + 0.0
}

/// Entropy in nats of `softmax(logits)`, `(V)`; 0 when there are none.
pub fn entropy_of_logits(logits: &[f64]) -> f64 {
    let top = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let z: f64 = logits.iter().map(|l| libm::exp(l - top)).sum();
    let centre: f64 = logits.iter().map(|l| libm::exp(l - top) * (l - top)).sum();
    if logits.is_empty() { 0.0 } else { libm::log(z) - centre / z }
}

/// Keeps mean token entropy inside `[low, high]` by a bonus `-alpha H` in the loss.
///
/// Below the band alpha grows by `step`, above it shrinks by `step`, inside it rests. A positive
/// alpha acts only up to `high`, a negative one (a penalty, if `coefficient_min` allows it) only
/// from `low` on. With `low == high` and `coefficient_min == 0` this is Skywork-OR1's controller,
/// except that an entropy exactly on target leaves alpha alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyBandConfig {
    /// Lower edge, nats a token. Required: no paper gives a band.
    pub low: f64,
    /// Upper edge, nats a token. Required.
    pub high: f64,
    /// Starting alpha; default 0.01.
    #[serde(default = "default_coefficient")]
    pub coefficient: f64,
    /// Change of alpha a step; default 0.005.
    #[serde(default = "default_step")]
    pub step: f64,
    /// Alpha never falls below; default 0 (bonus only).
    #[serde(default)]
    pub coefficient_min: f64,
    /// Alpha never rises above; default 1.
    #[serde(default = "default_coefficient_max")]
    pub coefficient_max: f64,
}

const fn default_coefficient() -> f64 {
    0.01
}
const fn default_step() -> f64 {
    0.005
}
const fn default_coefficient_max() -> f64 {
    1.0
}

impl EntropyBandConfig {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let band = self.low >= 0.0 && self.low <= self.high && self.high.is_finite();
        let got = format!("[{}, {}]", self.low, self.high);
        require(band, "entropy.low", got, "use 0 <= low <= high, nats a token")?;
        let fits = self.step.is_finite() && self.step > 0.0;
        require(fits, "entropy.step", self.step, "use a positive number, such as 0.005")?;
        let bounds = self.coefficient_min.is_finite()
            && self.coefficient_max.is_finite()
            && self.coefficient_min <= self.coefficient
            && self.coefficient <= self.coefficient_max;
        let fix = "use coefficient_min <= coefficient <= coefficient_max";
        require(bounds, "entropy.coefficient", self.coefficient, fix)
    }

    /// The controller before the first step.
    pub const fn start(&self) -> EntropyBand {
        EntropyBand { coefficient: self.coefficient }
    }
}

/// State of the controller: part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyBand {
    /// Alpha, whether or not it acts at present.
    pub coefficient: f64,
}

impl EntropyBand {
    /// Takes the mean token entropy of a batch (nats), moves alpha, and returns the coefficient that
    /// acts on this batch. A non-finite entropy changes nothing and returns 0.
    pub fn update(&mut self, config: &EntropyBandConfig, entropy: f64) -> f64 {
        let moved = if entropy < config.low {
            self.coefficient + config.step
        } else if entropy > config.high {
            self.coefficient - config.step
        } else {
            self.coefficient
        };
        self.coefficient = moved.clamp(config.coefficient_min, config.coefficient_max);
        let acts =
            if self.coefficient > 0.0 { entropy <= config.high } else { entropy >= config.low };
        if acts && entropy.is_finite() { self.coefficient } else { 0.0 }
    }
}

/// Control of entropy through the covariance of log-probability and advantage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum CovarianceControl {
    /// No token is treated specially. The default.
    #[default]
    None,
    /// Random tokens in a band of covariance lose their policy loss. Use with `clip_low = clip_high = 1`.
    ClipCov {
        /// Lower edge of the band, exclusive: 1.
        low: f64,
        /// Upper edge of the band, exclusive: 5.
        high: f64,
        /// Share of the batch's tokens to choose, at least one: 2e-4.
        share: f64,
    },
    /// The tokens of highest covariance also pay `coefficient |policy - proximal|`. Use with the
    /// clip opened (`clip_low = 1`, `clip_high` large).
    KlCov {
        /// Share of the batch's tokens to choose, at least one: 2e-3 (7B) or 2e-4 (32B).
        share: f64,
        /// Weight of the penalty: 1.
        coefficient: f64,
    },
}

impl CovarianceControl {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let (Self::ClipCov { share, .. } | Self::KlCov { share, .. }) = *self else {
            return Ok(());
        };
        let fits = share > 0.0 && share <= 1.0;
        require(fits, "loss.covariance.share", share, "use a share above 0, at most 1")?;
        match *self {
            Self::ClipCov { low, high, .. } => {
                let got = format!("({low}, {high})");
                require(low < high, "loss.covariance.clip_cov", got, "use low < high")
            }
            Self::KlCov { coefficient, .. } => {
                let fits = coefficient.is_finite() && coefficient >= 0.0;
                require(fits, "loss.covariance.kl_cov.coefficient", coefficient, "use 1")
            }
            Self::None => Ok(()),
        }
    }

    /// Indices of the chosen tokens, ascending, among all unmasked tokens of a batch `(N)`.
    ///
    /// `is_clipped[t]` tells whether the ratio clip already decided token t; Clip-Cov never chooses
    /// such a token. Ties of KL-Cov go to the lower index.
    pub fn choose(&self, covariances: &[f64], is_clipped: &[bool], seed: u64) -> Vec<usize> {
        let quota = |share: f64| ((share * covariances.len() as f64) as usize).max(1);
        let mut chosen = match *self {
            Self::None => vec![],
            Self::ClipCov { low, high, share } => {
                let in_band =
                    |&t: &usize| !is_clipped[t] && covariances[t] > low && covariances[t] < high;
                let mut candidates: Vec<usize> = (0..covariances.len()).filter(in_band).collect();
                let quota = quota(share).min(candidates.len());
                let draws = Draws::new(seed, Purpose::ClipCov);
                // The first `quota` places of a Fisher-Yates shuffle.
                for place in 0..quota {
                    let offset = draws.below(place as u64, candidates.len() - place);
                    candidates.swap(place, place + offset);
                }
                candidates.truncate(quota);
                candidates
            }
            Self::KlCov { share, .. } => {
                let mut order: Vec<usize> = (0..covariances.len()).collect();
                order.sort_by(|&a, &b| covariances[b].total_cmp(&covariances[a]).then(a.cmp(&b)));
                order.truncate(quota(share));
                order
            }
        };
        chosen.sort_unstable();
        chosen
    }
}

/// `(A_t - mean A)(logp_t - mean logp)` of each token, `(N)`: its share of the covariance that
/// drives entropy down by about `eta Cov(log pi, A)` a step.
pub fn covariances(logprobs: &[f64], advantages: &[f64]) -> Vec<f64> {
    assert_eq!(logprobs.len(), advantages.len(), "one advantage a token");
    let (logprob_mean, advantage_mean) = (mean(logprobs), mean(advantages));
    logprobs
        .iter()
        .zip(advantages)
        .map(|(logprob, advantage)| (advantage - advantage_mean) * (logprob - logprob_mean))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::golden::{assert_close, golden, numbers};
    use super::*;

    const BAND: EntropyBandConfig = EntropyBandConfig {
        low: 0.2,
        high: 0.5,
        coefficient: 0.01,
        step: 0.005,
        coefficient_min: 0.0,
        coefficient_max: 0.02,
    };

    #[test]
    fn entropy_known_values() {
        assert_eq!(entropy_of_counts(&[]), 0.0);
        assert_eq!(entropy_of_counts(&[7, 0]), 0.0);
        assert_close("H", &[entropy_of_counts(&[2, 1, 1])], &[1.5 * libm::log(2.0)], 1e-15);
        assert_close("H", &[entropy_of_logits(&[800.0; 4])], &[libm::log(4.0)], 1e-15);
        assert_eq!(entropy_of_logits(&[]), 0.0);
        let golden = golden();
        let logits = numbers(&golden["kl"]["logits"]);
        let expected = numbers(&golden["entropy"]["H"]);
        assert_close("golden", &[entropy_of_logits(&logits)], &expected, 1e-14);
    }

    #[test]
    fn entropy_band_moves_alpha_only_outside_the_band() {
        let mut band = BAND.start();
        assert_eq!(band.update(&BAND, 0.3), 0.01);
        assert_eq!(band.update(&BAND, 0.1), 0.015);
        assert_eq!(band.update(&BAND, 0.1), 0.02);
        assert_eq!(band.update(&BAND, 0.1), 0.02, "bounded");
        assert_eq!(band.update(&BAND, 0.6), 0.0, "no bonus above the band");
        assert!(band.coefficient < 0.02 && band.update(&BAND, 0.4) > 0.0);
        for _ in 0..9 {
            band.update(&BAND, 0.9);
        }
        assert_eq!(band.coefficient, 0.0);
        let before = band;
        assert_eq!(band.update(&BAND, f64::NAN), 0.0);
        assert_eq!(band, before);
    }

    #[test]
    fn entropy_band_may_penalise_if_told_to() {
        let config = EntropyBandConfig { coefficient_min: -0.01, ..BAND };
        let mut band = config.start();
        let acting: Vec<f64> = (0..4).map(|_| band.update(&config, 0.9)).collect();
        assert_close("alpha", &acting, &[0.0, 0.0, -0.005, -0.01], 1e-12);
        assert_eq!(band.update(&config, 0.1), 0.0, "no penalty below the band");
    }

    #[test]
    fn entropy_band_state_survives_a_round_trip() {
        let mut band = BAND.start();
        band.update(&BAND, 0.1);
        let text = serde_json::to_string(&band).unwrap();
        assert_eq!(serde_json::from_str::<EntropyBand>(&text).unwrap(), band);
        let parsed: EntropyBandConfig = serde_json::from_str(r#"{"low":0.2,"high":0.5}"#).unwrap();
        assert_eq!((parsed.coefficient, parsed.step), (0.01, 0.005));
        assert!(EntropyBandConfig { low: 0.6, ..BAND }.validate().is_err());
    }

    /// Covariances of the golden tokens: algorithms §5.4.
    #[test]
    fn kl_cov_chooses_the_highest_covariance() {
        let inputs = &golden()["token_losses"]["inputs"];
        let cov = covariances(&numbers(&inputs["new"]), &numbers(&inputs["A"]));
        assert_close("cov", &cov, &[0.15, 0.95, 0.85, 0.65, 1.85, 0.35, -0.25, 1.05], 1e-12);
        let control = CovarianceControl::KlCov { share: 0.2, coefficient: 1.0 };
        assert_eq!(control.choose(&cov, &[false; 8], 0), [4]);
        let control = CovarianceControl::KlCov { share: 0.5, coefficient: 1.0 };
        assert_eq!(control.choose(&[1.0; 4], &[false; 4], 0), [0, 1], "ties go to the lower index");
    }

    #[test]
    fn clip_cov_chooses_unclipped_tokens_of_the_band() {
        let cov: Vec<f64> = (0..1000).map(|t| f64::from(t % 10) * 0.7).collect();
        let clipped: Vec<bool> = (0..1000).map(|t| t % 20 == 3).collect();
        let control = CovarianceControl::ClipCov { low: 1.0, high: 5.0, share: 0.05 };
        let chosen = control.choose(&cov, &clipped, 11);
        assert_eq!(chosen.len(), 50);
        assert!(chosen.iter().all(|&t| cov[t] > 1.0 && cov[t] < 5.0 && !clipped[t]));
        assert!(chosen.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(chosen, control.choose(&cov, &clipped, 11));
        assert_ne!(chosen, control.choose(&cov, &clipped, 12));
        assert!(control.choose(&[0.0; 8], &[false; 8], 1).is_empty(), "none in the band");
        assert_eq!(control.choose(&[2.0; 8], &[false; 8], 1).len(), 1, "at least one");
        assert!(CovarianceControl::None.choose(&cov, &clipped, 1).is_empty());
    }
}
