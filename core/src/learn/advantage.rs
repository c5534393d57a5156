//! Rewards to advantages: one number a rollout, which every token of the rollout then carries.
//!
//! Four estimators. Within a group of G rollouts of one prompt, with rewards `R_i`:
//!
//! - group-normalised (GRPO; ProRL, arXiv 2505.24864): `(R_i - mean) / (std + eps)`;
//! - mean-only (Dr. GRPO, arXiv 2503.20783): `R_i - mean`;
//! - leave-one-out (RLOO): `R_i - mean of the others` = `G/(G-1) (R_i - mean)`;
//! - REINFORCE++-baseline (ProRL v2): `R_i - mean`, then whitened over the whole batch.
//!
//! Defined edge cases, where the formulas are 0/0 or noise: a group whose rewards are all equal
//! (a group of one included) gives exact zeros, an empty group gives no advantages, and a batch
//! that cannot be whitened (no spread, or fewer than two tokens) gives exact zeros.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};
use super::scalar::{all_equal, mean};

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AdvantageEstimator {
    /// GRPO. ProRL v1.
    GroupNormalised {
        /// Subtracted from the count in the variance: 1 (verl, TRL) or 0.
        ddof: u32,
        /// Added to the standard deviation: 1e-6 in verl, 1e-4 in TRL.
        eps: f64,
    },
    /// Dr. GRPO.
    MeanOnly,
    /// RLOO.
    LeaveOneOut,
    /// REINFORCE++-baseline. ProRL v2.
    ReinforceBaseline {
        /// Statistics of the second normalisation.
        whitening: Whitening,
    },
}

/// Which mean and variance the whole batch is whitened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whitening {
    /// Each rollout counts once a token; variance divided by N (`NeMo-RL`).
    TokenBiased,
    /// Each rollout counts once a token; variance divided by N - 1, plus 1e-8 (verl).
    TokenUnbiased,
    /// Each rollout counts once; variance divided by N (the wording of the ProRL v2 blog).
    Sample,
}

/// Added to the variance by verl's `masked_whiten`.
const VERL_VARIANCE_EPS: f64 = 1e-8;

impl Default for AdvantageEstimator {
    /// ProRL v2 as published in `NeMo-RL`.
    fn default() -> Self {
        Self::ReinforceBaseline { whitening: Whitening::TokenBiased }
    }
}

impl AdvantageEstimator {
    /// GRPO with verl's constants.
    pub const fn group_normalised() -> Self {
        Self::GroupNormalised { ddof: 1, eps: 1e-6 }
    }

    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let Self::GroupNormalised { ddof, eps } = *self else { return Ok(()) };
        require(ddof <= 1, "advantage.group_normalised.ddof", ddof, "use 0 or 1")?;
        require(
            eps.is_finite() && eps >= 0.0,
            "advantage.group_normalised.eps",
            eps,
            "use a number from 0 up, such as 1e-6",
        )
    }

    /// Advantages of a batch of groups, in the order given.
    ///
    /// `rewards[g][i]` is the reward of rollout i of group g (unitless), `token_counts[g][i]` its
    /// number of unmasked tokens; the latter is read by token-weighted whitening only.
    pub fn advantages(&self, rewards: &[Vec<f64>], token_counts: &[Vec<u32>]) -> Vec<Vec<f64>> {
        let mut out: Vec<Vec<f64>> = rewards.iter().map(|group| self.within_group(group)).collect();
        if let Self::ReinforceBaseline { whitening } = *self {
            whiten(whitening, &mut out, token_counts);
        }
        out
    }

    fn within_group(&self, rewards: &[f64]) -> Vec<f64> {
        if all_equal(rewards) {
            return vec![0.0; rewards.len()];
        }
        let count = rewards.len() as f64;
        let baseline = mean(rewards);
        let centred = rewards.iter().map(|reward| reward - baseline);
        match *self {
            Self::GroupNormalised { ddof, eps } => {
                let squares: f64 = centred.clone().map(|a| a * a).sum();
                let std = (squares / (count - f64::from(ddof))).sqrt();
                centred.map(|a| a / (std + eps)).collect()
            }
            Self::LeaveOneOut => centred.map(|a| count / (count - 1.0) * a).collect(),
            Self::MeanOnly | Self::ReinforceBaseline { .. } => centred.collect(),
        }
    }
}

/// `(A - mean) / std` over the batch, in place.
fn whiten(whitening: Whitening, groups: &mut [Vec<f64>], token_counts: &[Vec<u32>]) {
    let values: Vec<f64> = groups.iter().flatten().copied().collect();
    let weights: Vec<f64> = match whitening {
        Whitening::Sample => vec![1.0; values.len()],
        Whitening::TokenBiased | Whitening::TokenUnbiased => {
            token_counts.iter().flatten().map(|&count| f64::from(count)).collect()
        }
    };
    assert_eq!(values.len(), weights.len(), "one token count is needed for each reward");

    let total: f64 = weights.iter().sum();
    let seen: Vec<f64> =
        (0..values.len()).filter(|&i| weights[i] > 0.0).map(|i| values[i]).collect();
    let (degrees, eps) = match whitening {
        Whitening::TokenUnbiased => (total - 1.0, VERL_VARIANCE_EPS),
        Whitening::TokenBiased | Whitening::Sample => (total, 0.0),
    };
    if all_equal(&seen) || degrees <= 0.0 {
        groups.iter_mut().flatten().for_each(|a| *a = 0.0);
        return;
    }
    let centre = values.iter().zip(&weights).map(|(a, w)| w * a).sum::<f64>() / total;
    let squares: f64 =
        values.iter().zip(&weights).map(|(a, w)| w * ((a - centre) * (a - centre))).sum();
    let std = (squares / degrees + eps).sqrt();
    groups.iter_mut().flatten().for_each(|a| *a = (*a - centre) / std);
}

#[cfg(test)]
mod tests {
    use super::super::golden::{assert_golden, golden, numbers};
    use super::*;
    use proptest::prelude::*;

    fn one_group(estimator: AdvantageEstimator, rewards: &[f64]) -> Vec<f64> {
        estimator.advantages(&[rewards.to_vec()], &[vec![1; rewards.len()]]).remove(0)
    }

    #[test]
    fn advantage_group_estimators_equal_golden() {
        let golden = &golden()["adv"];
        let rewards = numbers(&golden["rewards"]);
        for (key, estimator) in [
            (
                "grpo_ddof1_eps1e-6(verl)",
                AdvantageEstimator::GroupNormalised { ddof: 1, eps: 1e-6 },
            ),
            ("grpo_ddof1_eps1e-4(trl)", AdvantageEstimator::GroupNormalised { ddof: 1, eps: 1e-4 }),
            ("grpo_ddof0", AdvantageEstimator::GroupNormalised { ddof: 0, eps: 0.0 }),
            ("dr_grpo", AdvantageEstimator::MeanOnly),
            ("rloo=rlp", AdvantageEstimator::LeaveOneOut),
            ("rloo_check", AdvantageEstimator::LeaveOneOut),
        ] {
            assert_golden(key, &one_group(estimator, &rewards), &golden[key]);
        }
    }

    #[test]
    fn advantage_reinforce_baseline_equals_golden() {
        let golden = &golden()["reinforce_pp_baseline"];
        let groups = |key: &str| -> Vec<Vec<f64>> {
            golden[key].as_array().unwrap().iter().map(numbers).collect()
        };
        let lengths: Vec<Vec<u32>> =
            groups("lens").iter().map(|g| g.iter().map(|&l| l as u32).collect()).collect();
        for (key, whitening) in [
            ("nemo_biased_var", Whitening::TokenBiased),
            ("verl_unbiased_var", Whitening::TokenUnbiased),
            ("sample_level(blog)", Whitening::Sample),
        ] {
            let got = AdvantageEstimator::ReinforceBaseline { whitening }
                .advantages(&groups("rewards"), &lengths)
                .concat();
            assert_golden(key, &got, &golden[key]);
        }
    }

    /// 0.1 summed three times is not 0.3: a computed standard deviation of 1e-17 would turn rounding
    /// noise into advantages of order one.
    #[test]
    fn advantage_zero_variance_is_exactly_zero() {
        for estimator in all_estimators() {
            for rewards in [vec![0.1; 3], vec![0.0; 8], vec![1.0]] {
                assert_eq!(
                    one_group(estimator, &rewards),
                    vec![0.0; rewards.len()],
                    "{estimator:?}"
                );
            }
        }
    }

    #[test]
    fn advantage_empty_group_is_empty() {
        for estimator in all_estimators() {
            let rewards = [vec![], vec![1.0, 0.0]];
            let got = estimator.advantages(&rewards, &[vec![], vec![3, 4]]);
            assert!(got[0].is_empty() && got[1].len() == 2, "{estimator:?}");
            assert!(got[1][0] > 0.0 && got[1][1] < 0.0, "{estimator:?}");
            assert!(estimator.advantages(&[], &[]).is_empty());
        }
    }

    #[test]
    fn advantage_whitening_without_tokens_is_zero() {
        let estimator =
            AdvantageEstimator::ReinforceBaseline { whitening: Whitening::TokenUnbiased };
        assert_eq!(estimator.advantages(&[vec![1.0, 0.0]], &[vec![0, 0]]), [[0.0, 0.0]]);
        assert_eq!(estimator.advantages(&[vec![1.0, 0.0]], &[vec![1, 0]]), [[0.0, 0.0]]);
    }

    #[test]
    fn advantage_config_rejects_unknown_keys_and_bad_values() {
        let parse = serde_json::from_str::<AdvantageEstimator>;
        assert_eq!(parse("\"leave_one_out\"").unwrap(), AdvantageEstimator::LeaveOneOut);
        assert!(parse(r#"{"group_normalised":{"ddof":1,"eps":1e-6,"std":2}}"#).is_err());
        let bad = AdvantageEstimator::GroupNormalised { ddof: 2, eps: 0.0 };
        assert!(bad.validate().unwrap_err().to_string().contains("ddof"));
    }

    fn all_estimators() -> [AdvantageEstimator; 6] {
        [
            AdvantageEstimator::GroupNormalised { ddof: 1, eps: 0.0 },
            AdvantageEstimator::MeanOnly,
            AdvantageEstimator::LeaveOneOut,
            AdvantageEstimator::ReinforceBaseline { whitening: Whitening::TokenBiased },
            AdvantageEstimator::ReinforceBaseline { whitening: Whitening::TokenUnbiased },
            AdvantageEstimator::ReinforceBaseline { whitening: Whitening::Sample },
        ]
    }

    proptest! {
        /// Advantages of a group sum to zero and keep the order of the rewards.
        #[test]
        fn advantage_is_centred_and_monotone(rewards in prop::collection::vec(-2.0..2.0f64, 2..20)) {
            for estimator in &all_estimators()[..3] {
                let a = one_group(*estimator, &rewards);
                prop_assert!(a.iter().sum::<f64>().abs() < 1e-9);
                for i in 1..a.len() {
                    prop_assert_eq!(rewards[i] > rewards[0], a[i] > a[0]);
                }
            }
        }
    }
}
