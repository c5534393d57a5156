//! From token losses to one loss: what each token counts, and the divisor that is applied last.
//!
//! With B sequences of `n_i` unmasked tokens, N = sum of `n_i`, and losses `l_it`:
//!
//! | mode | loss | used by |
//! | --- | --- | --- |
//! | `token_mean` | `sum l / N` | DAPO 2503.14476 |
//! | `seq_mean_token_mean` | `1/B sum_i (1/n_i sum_t l)` | GRPO, GSPO |
//! | `seq_mean_token_sum` | `sum l / B` | verl |
//! | `seq_mean_token_sum_norm` | `sum l / L_max` | verl (B times `dr_grpo`) |
//! | `dr_grpo` | `sum l / (B L_max)` | Dr. GRPO 2503.20783, as in TRL |
//!
//! The integer backward pass would lose gradients divided by token counts (2^-17 at 1e5 tokens), so
//! the loss is factored as `sum_i sequence_weight_i sum_t l_it / divisor` with weights of order one;
//! only the optimizer divides. For `seq_mean_token_mean`, `sequence_weight_i = (N/B) / n_i`, whose
//! mean over tokens is 1, and the divisor is N.
//!
//! Counts are those of the *original* loss mask. A token that importance masking rejects still
//! counts, so that rejecting does not raise the weight of the survivors (AReaL).
//! B leaves out sequences without a token (as verl does), except in `dr_grpo`, whose point is a
//! divisor that does not depend on what was sampled.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};

/// How token losses are averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Aggregation {
    /// Every token counts the same. The default.
    #[default]
    TokenMean,
    /// Every sequence counts the same.
    SeqMeanTokenMean,
    /// Sum over tokens, mean over sequences.
    SeqMeanTokenSum,
    /// Sum over tokens and sequences, divided by a constant.
    SeqMeanTokenSumNorm {
        /// `L_max`, tokens.
        length_max: u32,
    },
    /// Sum over tokens, mean over sequences, divided by a constant.
    DrGrpo {
        /// `L_max`, tokens.
        length_max: u32,
    },
}

/// The factors of an aggregated loss.
#[derive(Clone, Debug, PartialEq)]
pub struct AggregationWeights {
    /// `(B)`, of order one; 0 for sequences without a token.
    pub sequence_weights: Vec<f64>,
    /// Divides the sum; 0 when the batch has no token at all.
    pub divisor: f64,
}

impl Aggregation {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match *self {
            Self::SeqMeanTokenSumNorm { length_max } | Self::DrGrpo { length_max } => require(
                length_max > 0,
                "aggregation.length_max",
                length_max,
                "use the longest completion, in tokens",
            ),
            Self::TokenMean | Self::SeqMeanTokenMean | Self::SeqMeanTokenSum => Ok(()),
        }
    }

    /// Weights for sequences with the given numbers of unmasked tokens, `(B)`.
    pub fn weights(&self, token_counts: &[u32]) -> AggregationWeights {
        let tokens: f64 = token_counts.iter().map(|&n| f64::from(n)).sum();
        let filled = token_counts.iter().filter(|&&n| n > 0).count() as f64;
        let divisor = match *self {
            Self::TokenMean | Self::SeqMeanTokenMean => tokens,
            Self::SeqMeanTokenSum => filled,
            Self::SeqMeanTokenSumNorm { length_max } => f64::from(length_max),
            Self::DrGrpo { length_max } => token_counts.len() as f64 * f64::from(length_max),
        };
        let weight = |n: u32| match self {
            _ if n == 0 => 0.0,
            Self::SeqMeanTokenMean => tokens / filled / f64::from(n),
            _ => 1.0,
        };
        AggregationWeights {
            sequence_weights: token_counts.iter().map(|&n| weight(n)).collect(),
            divisor: if tokens > 0.0 { divisor } else { 0.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden::{assert_golden, golden, numbers};
    use super::*;
    use proptest::prelude::*;

    fn aggregated(mode: Aggregation, sequences: &[&[f64]]) -> f64 {
        let counts: Vec<u32> = sequences.iter().map(|s| s.len() as u32).collect();
        let weights = mode.weights(&counts);
        let sum: f64 = sequences
            .iter()
            .zip(&weights.sequence_weights)
            .map(|(s, w)| w * s.iter().sum::<f64>())
            .sum();
        sum / weights.divisor
    }

    #[test]
    fn aggregation_equals_golden() {
        let golden = golden();
        let losses = numbers(&golden["token_losses"]["prorl_0.2_0.4"]["loss"]);
        let expected = &golden["aggregation(len 2 and 6, prorl 0.2/0.4)"];
        for (key, mode) in [
            ("grpo seq-mean-token-mean", Aggregation::SeqMeanTokenMean),
            ("dapo token-mean", Aggregation::TokenMean),
            ("dr_grpo sum/(B*Lmax), Lmax=10", Aggregation::DrGrpo { length_max: 10 }),
            ("verl seq-mean-token-sum", Aggregation::SeqMeanTokenSum),
            (
                "verl seq-mean-token-sum-norm (sum/Lmax only), Lmax=10",
                Aggregation::SeqMeanTokenSumNorm { length_max: 10 },
            ),
        ] {
            assert_golden(key, &[aggregated(mode, &[&losses[..2], &losses[2..]])], &expected[key]);
        }
    }

    #[test]
    fn aggregation_empty_sequences_weigh_nothing() {
        let weights = Aggregation::SeqMeanTokenMean.weights(&[0, 4, 2]);
        assert_eq!(weights.sequence_weights, [0.0, 0.75, 1.5]);
        assert_eq!(weights.divisor, 6.0);
        assert_eq!(Aggregation::SeqMeanTokenSum.weights(&[0, 4, 2]).divisor, 2.0);
        assert_eq!(Aggregation::DrGrpo { length_max: 8 }.weights(&[0, 4, 2]).divisor, 24.0);
        for mode in [Aggregation::TokenMean, Aggregation::DrGrpo { length_max: 8 }] {
            assert_eq!(mode.weights(&[0, 0]).divisor, 0.0);
        }
    }

    #[test]
    fn aggregation_config_is_strict() {
        let parse = serde_json::from_str::<Aggregation>;
        assert_eq!(
            parse(r#"{"dr_grpo":{"length_max":9}}"#).unwrap(),
            Aggregation::DrGrpo { length_max: 9 }
        );
        assert!(parse(r#"{"dr_grpo":{"length_max":9,"x":1}}"#).is_err());
        assert!(Aggregation::DrGrpo { length_max: 0 }.validate().is_err());
    }

    proptest! {
        /// Token-weighted, sequence weights average to one: they survive rounding to Q16.
        #[test]
        fn aggregation_weights_are_of_order_one(counts in prop::collection::vec(0u32..500, 1..20)) {
            prop_assume!(counts.iter().any(|&n| n > 0));
            for mode in [Aggregation::TokenMean, Aggregation::SeqMeanTokenMean] {
                let weights = mode.weights(&counts);
                let total: f64 = counts
                    .iter()
                    .zip(&weights.sequence_weights)
                    .map(|(&n, w)| f64::from(n) * w)
                    .sum();
                prop_assert!((total / weights.divisor - 1.0).abs() < 1e-12);
            }
        }
    }
}
