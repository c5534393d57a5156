//! All settings of learning in one place, with the two ProRL presets, and the error they share.
//!
//! Every struct denies unknown keys, fills missing ones from the documented defaults (those of
//! ProRL v2), and has a `validate` that names the key and the fix. Cross-field rules live here.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

use super::advantage::AdvantageEstimator;
use super::dynamic_sampling::DynamicSamplingConfig;
use super::entropy::EntropyBandConfig;
use super::kl::KlConfig;
use super::length::LengthConfig;
use super::objective::Objective;
use super::optimizer::AdamWConfig;
use super::reset::ResetConfig;
use super::weights::LossConfig;

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{key}` is {got}: {fix}")]
pub struct ConfigError {
    /// Path of the setting below `[learn]`.
    pub key: &'static str,
    /// What it was set to.
    pub got: String,
    /// What to write instead.
    pub fix: &'static str,
}

/// `Ok` if `holds`, else the error that names `key`, its value and the fix.
pub(crate) fn require(
    holds: bool,
    key: &'static str,
    got: impl Display,
    fix: &'static str,
) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError { key, got: got.to_string(), fix }) }
}

/// Everything between a rewarded rollout and the next policy version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearnConfig {
    /// Which groups enter a step.
    pub dynamic_sampling: DynamicSamplingConfig,
    /// Length penalties; all off by default.
    pub length: LengthConfig,
    /// Rewards to advantages; default REINFORCE++-baseline.
    pub advantage: AdvantageEstimator,
    /// Advantages to per-token weights.
    pub loss: LossConfig,
    /// Adaptive entropy bonus; off by default.
    pub entropy: Option<EntropyBandConfig>,
    /// When the reference policy moves.
    pub reset: ResetConfig,
    /// Gradients to weights.
    pub optimizer: AdamWConfig,
}

impl Default for LearnConfig {
    fn default() -> Self {
        Self::prorl_v2()
    }
}

impl LearnConfig {
    /// ProRL v1 (arXiv 2505.24864): clip 0.2/0.4, group-normalised advantages, resets that also
    /// clear the optimizer. The paper reports neither the KL coefficient nor its estimator nor the
    /// aggregation: `kl_beta` is asked for; k2 and token mean are our choice, as in v2.
    pub fn prorl_v1(kl_beta: f64) -> Self {
        Self {
            advantage: AdvantageEstimator::group_normalised(),
            loss: LossConfig {
                objective: Objective::prorl_v1(),
                kl: KlConfig { beta: kl_beta, ..KlConfig::default() },
                ..LossConfig::default()
            },
            reset: ResetConfig::prorl_v1(),
            ..Self::prorl_v2()
        }
    }

    /// ProRL v2 (NVIDIA blog, 2025-08; constants of the public `NeMo-RL` and `OpenRLHF` configs):
    /// clip 0.2/0.27, REINFORCE++-baseline, k2 with beta 1e-4, IcePop, resets that keep the optimizer.
    pub fn prorl_v2() -> Self {
        Self {
            dynamic_sampling: DynamicSamplingConfig::default(),
            length: LengthConfig::default(),
            advantage: AdvantageEstimator::default(),
            loss: LossConfig::default(),
            entropy: None,
            reset: ResetConfig::prorl_v2(),
            optimizer: AdamWConfig::default(),
        }
    }

    /// Checks every part and how they fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.dynamic_sampling.validate()?;
        self.length.validate()?;
        self.advantage.validate()?;
        self.loss.validate()?;
        self.entropy.iter().try_for_each(EntropyBandConfig::validate)?;
        self.reset.validate()?;
        self.optimizer.validate()?;
        let kl_is_measured = self.reset.kl_above.is_none() || self.loss.kl.beta > 0.0;
        let fix = "set loss.kl.beta above 0 (reference log-probabilities are scored only then), or drop reset.kl_above";
        require(kl_is_measured, "reset.kl_above", "set without a kl term", fix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_survive_a_round_trip() {
        for preset in [LearnConfig::prorl_v1(1e-3), LearnConfig::prorl_v2()] {
            preset.validate().unwrap();
            let text = serde_json::to_string(&preset).unwrap();
            assert_eq!(serde_json::from_str::<LearnConfig>(&text).unwrap(), preset);
        }
    }

    /// The constants a reader of the papers looks for first.
    #[test]
    fn presets_carry_the_published_constants() {
        let (v1, v2) = (LearnConfig::prorl_v1(1e-3), LearnConfig::prorl_v2());
        let clip = |c: &LearnConfig| (c.loss.objective.clip_low, c.loss.objective.clip_high);
        assert_eq!((clip(&v1), clip(&v2)), ((0.2, 0.4), (0.2, 0.27)));
        assert_eq!((v1.loss.kl.beta, v2.loss.kl.beta), (1e-3, 1e-4));
        assert!(v1.reset.reset_optimizer && !v2.reset.reset_optimizer);
    }

    #[test]
    fn config_empty_is_the_default_and_unknown_keys_fail() {
        assert_eq!(serde_json::from_str::<LearnConfig>("{}").unwrap(), LearnConfig::default());
        for text in [r#"{"los":{}}"#, r#"{"loss":{"klx":{}}}"#, r#"{"reset":{"every":3}}"#] {
            assert!(serde_json::from_str::<LearnConfig>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn config_kl_trigger_needs_a_kl_term() {
        let mut config = LearnConfig::prorl_v2();
        config.reset.kl_above = Some(0.5);
        config.loss.kl.beta = 0.0;
        let error = config.validate().unwrap_err();
        assert!(error.to_string().contains("loss.kl.beta"), "{error}");
    }
}
