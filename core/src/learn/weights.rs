//! From rollouts to the integer weights that are *all* that enters the backward pass.
//!
//! The loss of a batch is `sum_i c_i sum_t (policy_it + beta kl_it - alpha H_it) / divisor`, where
//! `c_i` and `divisor` come from [`aggregate`](super::aggregate). The engine computes
//! `d logits = (p - onehot) * w`, the gradient of `-w * logprob`, and separately the gradient of
//! `-u * H`. Hence, for a loss scale of `2^S`:
//!
//! ```text
//! w_it = round_half_even(-c_i (d policy_it + beta d kl_it) / d logprob_it * 2^(16+S))
//! u_it = round_half_even( c_i alpha ln 2                                 * 2^(16+S))
//! ```
//!
//! as `i32`, clamped to `+-(2^30 - 1)`, `u` to `+-2^23`, with a count. Never is a weight divided by a token count:
//! weights stay of order one, and the f64 `divisor` is applied by the optimizer to the integer sum.
//! Masked tokens weigh 0. Importance weights multiply the policy term only, not KL or entropy.
//!
//! Batch statistics are plain means over unmasked tokens unless named otherwise.

use std::f64::consts::LN_2;

use manyhands_shaders::twin::logits::ENTROPY_WEIGHT_MAX;
use manyhands_shaders::x1::LIM;
use serde::{Deserialize, Serialize};

use super::aggregate::Aggregation;
use super::config::{ConfigError, require};
use super::entropy::{CovarianceControl, covariances};
use super::kl::{KlConfig, mismatch_kl};
use super::objective::{Objective, SequenceRatios, TokenLogprobs, TokenLoss, token_loss};

/// Weights are `FX(16)`, times `2^S`.
pub const WEIGHT_FRACTION_BITS: u32 = 16;
/// Largest S: weights up to 16 in magnitude are then still exact to half a unit.
pub const LOSS_SCALE_LOG2_MAX: u32 = 10;
/// Published log-probabilities are `round(lp * 2^24)`.
pub const LOGPROB_FRACTION_BITS: u32 = 24;

/// The log-probability, in nats, that a published integer stands for. Exact.
pub fn logprob_from_fixed(fixed: i32) -> f64 {
    f64::from(fixed) / f64::from(1_u32 << LOGPROB_FRACTION_BITS)
}

/// The loss as a function of log-probabilities and advantages. Defaults are those of ProRL v2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// Policy loss of a token.
    pub objective: Objective,
    /// Penalty for leaving the reference.
    pub kl: KlConfig,
    /// From tokens to a batch; default `token_mean`.
    pub aggregation: Aggregation,
    /// Clip-Cov or KL-Cov; default `none`.
    pub covariance: CovarianceControl,
    /// S of the loss scale `2^S`; default 0.
    pub loss_scale_log2: u32,
}

impl LossConfig {
    /// Checks every part.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.objective.validate()?;
        self.kl.validate()?;
        self.aggregation.validate()?;
        self.covariance.validate()?;
        let fits = self.loss_scale_log2 <= LOSS_SCALE_LOG2_MAX;
        require(fits, "loss.loss_scale_log2", self.loss_scale_log2, "use 0 to 10")
    }
}

/// One rollout's completion, all slices `(T)`. Values under the mask are not read.
#[derive(Clone, Copy, Debug)]
pub struct RolloutTokens<'a> {
    /// Under the weights being trained, nats.
    pub policy_logprobs: &'a [f64],
    /// Under the trainer's weights before this update, nats.
    pub proximal_logprobs: &'a [f64],
    /// As reported by the sampler, nats.
    pub sampler_logprobs: &'a [f64],
    /// Under the reference policy, nats; needed when `kl.beta` is above 0.
    pub reference_logprobs: Option<&'a [f64]>,
    /// Token entropies under the policy, nats, if measured.
    pub entropies: Option<&'a [f64]>,
    /// Which tokens are trained on.
    pub loss_mask: &'a [bool],
    /// Of the whole rollout.
    pub advantage: f64,
}

/// What changes from step to step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepContext {
    /// Alpha of the entropy bonus: what [`EntropyBand::update`](super::entropy::EntropyBand::update) returned.
    pub entropy_coefficient: f64,
    /// Seed of random choices (Clip-Cov): the run's seed mixed with the step.
    pub seed: u64,
}

/// Why no weights could be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeightsError {
    /// A slice is shorter or longer than the mask.
    #[error("rollout {rollout}: {what} has {got} entries, the mask has {expected}")]
    Length {
        /// Index in the batch.
        rollout: usize,
        /// Which slice.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The mask's length.
        expected: usize,
    },
    /// KL is on, but a rollout was not scored under the reference.
    #[error("rollout {rollout} has no reference log-probabilities, but kl.beta is above 0")]
    NoReference {
        /// Index in the batch.
        rollout: usize,
    },
    /// An unmasked input is infinite or not a number.
    #[error("rollout {rollout}, token {token}: an input is not finite")]
    NotFinite {
        /// Index in the batch.
        rollout: usize,
        /// Position in the completion.
        token: usize,
    },
}

/// What the integer gradient sum must be multiplied by: `2^-(16+S) / divisor`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradientScale {
    /// S.
    pub loss_scale_log2: u32,
    /// Of the aggregation; 0 when the batch had no token.
    pub divisor: f64,
}

/// The integers that enter the backward pass, and what to divide by afterwards.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchWeights {
    /// `w`, `(B, T)` ragged: weight of `-logprob`, `FX(16) x 2^S`.
    pub token_weights: Vec<Vec<i32>>,
    /// `u`, `(B, T)` ragged: weight of `-H` in bits (the kernels measure entropy to base 2),
    /// `FX(16) x 2^S`.
    pub entropy_weights: Vec<Vec<i32>>,
    /// For the optimizer.
    pub scale: GradientScale,
    /// For people.
    pub stats: BatchStats,
}

/// Statistics of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchStats {
    /// The whole loss, aggregated.
    pub loss: f64,
    /// Its policy part, aggregated.
    pub policy_loss: f64,
    /// Mean estimate of KL to the reference, nats a token; 0 if not scored.
    pub kl: f64,
    /// Mean token entropy, nats; 0 if not measured.
    pub entropy: f64,
    /// Share of tokens whose loss the lower clip decided.
    pub clip_low_fraction: f64,
    /// Share of tokens whose loss the upper clip decided.
    pub clip_high_fraction: f64,
    /// Share of tokens whose loss `dual_clip` or `delta` decided.
    pub clip_dual_fraction: f64,
    /// Mean importance ratio.
    pub ratio_mean: f64,
    /// Mean estimate of KL(sampler, proximal), nats a token. 0 at policy lag 0: arithmetic is exact.
    pub mismatch_kl: f64,
    /// Mean of `|w|`, in units of one (without `2^(16+S)`).
    pub weight_abs_mean: f64,
    /// Unmasked tokens.
    pub token_count: u64,
    /// Tokens removed by the importance mask.
    pub dropped_token_count: u64,
    /// Sequences all of whose unmasked tokens were removed.
    pub dropped_sequence_count: u64,
    /// Tokens chosen by Clip-Cov or KL-Cov.
    pub covariance_token_count: u64,
    /// Weights that had to be clamped.
    pub clamped_weight_count: u64,
    /// Non-zero weights that were rounded to 0.
    pub vanished_weight_count: u64,
}

/// One unmasked token on its way to a weight.
struct Token {
    rollout: usize,
    position: usize,
    policy: TokenLoss,
}

/// Makes the weights of a batch, under a config that passed [`LossConfig::validate`]. Everything is
/// summed rollout by rollout, token by token.
pub fn batch_weights(
    config: &LossConfig,
    rollouts: &[RolloutTokens<'_>],
    step: StepContext,
) -> Result<BatchWeights, WeightsError> {
    for (index, rollout) in rollouts.iter().enumerate() {
        rollout.check(index, config.kl.beta > 0.0)?;
    }
    let counts: Vec<u32> = rollouts.iter().map(|r| r.unmasked().count() as u32).collect();
    let aggregation = config.aggregation.weights(&counts);
    let scale =
        GradientScale { loss_scale_log2: config.loss_scale_log2, divisor: aggregation.divisor };
    let mut rounding = Rounding::new(config.loss_scale_log2);
    let mut stats = BatchStats::default();

    let mut tokens = policy_losses(&config.objective, rollouts, &mut stats);
    control_covariance(config.covariance, rollouts, &mut tokens, step.seed, &mut stats);

    let zeros = || rollouts.iter().map(|r| vec![0; r.loss_mask.len()]).collect::<Vec<Vec<i32>>>();
    let (mut token_weights, mut entropy_weights) = (zeros(), zeros());
    for Token { rollout: i, position: t, policy } in &tokens {
        let (rollout, c) = (&rollouts[*i], aggregation.sequence_weights[*i]);
        let kl = rollout.reference_logprobs.map_or_else(Default::default, |reference| {
            config.kl.term(rollout.policy_logprobs[*t], reference[*t])
        });
        let entropy = rollout.entropies.map_or(0.0, |entropies| entropies[*t]);
        let beta = config.kl.beta;
        let weight = -(c * (policy.dloss_dlogprob + beta * kl.dvalue_dlogprob));
        token_weights[*i][*t] = rounding.round(weight, LIM);
        entropy_weights[*i][*t] =
            rounding.round(c * step.entropy_coefficient * LN_2, ENTROPY_WEIGHT_MAX);

        stats.policy_loss += c * policy.loss;
        stats.loss += c * (policy.loss + beta * kl.value - step.entropy_coefficient * entropy);
        stats.kl += kl.value;
        stats.entropy += entropy;
        stats.weight_abs_mean += weight.abs();
    }
    stats.clamped_weight_count = rounding.clamped;
    stats.vanished_weight_count = rounding.vanished;
    stats.finish(aggregation.divisor);
    Ok(BatchWeights { token_weights, entropy_weights, scale, stats })
}

/// Policy losses of all unmasked tokens, in order; counts clips, drops and mismatches.
fn policy_losses(
    objective: &Objective,
    rollouts: &[RolloutTokens<'_>],
    stats: &mut BatchStats,
) -> Vec<Token> {
    let mut tokens = vec![];
    for (index, rollout) in rollouts.iter().enumerate() {
        let sequence = SequenceRatios::of(rollout.unmasked().map(|t| rollout.logprobs(t)));
        let start = tokens.len();
        for position in rollout.unmasked() {
            let logprobs = rollout.logprobs(position);
            let policy = token_loss(objective, logprobs, sequence, rollout.advantage);
            stats.token_count += 1;
            stats.clip_low_fraction += f64::from(u8::from(policy.clipped_low));
            stats.clip_high_fraction += f64::from(u8::from(policy.clipped_high));
            stats.clip_dual_fraction += f64::from(u8::from(policy.clipped_dual));
            stats.ratio_mean += policy.importance_ratio;
            stats.mismatch_kl += mismatch_kl(logprobs.proximal, logprobs.sampler);
            stats.dropped_token_count += u64::from(policy.is_dropped());
            tokens.push(Token { rollout: index, position, policy });
        }
        let own: &[Token] = &tokens[start..];
        let is_dropped = !own.is_empty() && own.iter().all(|t| t.policy.is_dropped());
        stats.dropped_sequence_count += u64::from(is_dropped);
    }
    tokens
}

/// Clip-Cov and KL-Cov: changes the policy loss of the chosen tokens.
fn control_covariance(
    control: CovarianceControl,
    rollouts: &[RolloutTokens<'_>],
    tokens: &mut [Token],
    seed: u64,
    stats: &mut BatchStats,
) {
    if control == CovarianceControl::None {
        return;
    }
    let logprobs: Vec<f64> =
        tokens.iter().map(|t| rollouts[t.rollout].policy_logprobs[t.position]).collect();
    let advantages: Vec<f64> = tokens.iter().map(|t| rollouts[t.rollout].advantage).collect();
    let clipped: Vec<bool> =
        tokens.iter().map(|t| t.policy.clipped_low || t.policy.clipped_high).collect();
    let chosen = control.choose(&covariances(&logprobs, &advantages), &clipped, seed);
    stats.covariance_token_count = chosen.len() as u64;
    for index in chosen {
        let token = &mut tokens[index];
        if let CovarianceControl::KlCov { coefficient, .. } = control {
            let logprobs = rollouts[token.rollout].logprobs(token.position);
            let distance = logprobs.policy - logprobs.proximal;
            let sign = if distance == 0.0 { 0.0 } else { distance.signum() };
            token.policy.loss += coefficient * distance.abs();
            token.policy.dloss_dlogprob += coefficient * sign;
        } else {
            token.policy.loss = 0.0;
            token.policy.dloss_dlogprob = 0.0;
        }
    }
}

impl RolloutTokens<'_> {
    /// Positions of the unmasked tokens, ascending.
    fn unmasked(&self) -> impl Iterator<Item = usize> {
        (0..self.loss_mask.len()).filter(|&t| self.loss_mask[t])
    }

    fn logprobs(&self, t: usize) -> TokenLogprobs {
        TokenLogprobs {
            policy: self.policy_logprobs[t],
            proximal: self.proximal_logprobs[t],
            sampler: self.sampler_logprobs[t],
        }
    }

    fn check(&self, rollout: usize, needs_reference: bool) -> Result<(), WeightsError> {
        if needs_reference && self.reference_logprobs.is_none() {
            return Err(WeightsError::NoReference { rollout });
        }
        let expected = self.loss_mask.len();
        let slices = [
            ("policy_logprobs", Some(self.policy_logprobs)),
            ("proximal_logprobs", Some(self.proximal_logprobs)),
            ("sampler_logprobs", Some(self.sampler_logprobs)),
            ("reference_logprobs", self.reference_logprobs),
            ("entropies", self.entropies),
        ];
        for (what, slice) in slices.iter().filter_map(|(what, s)| s.map(|s| (*what, s))) {
            if slice.len() != expected {
                return Err(WeightsError::Length { rollout, what, got: slice.len(), expected });
            }
            if let Some(token) = self.unmasked().find(|&t| !slice[t].is_finite()) {
                return Err(WeightsError::NotFinite { rollout, token });
            }
        }
        match self.unmasked().next() {
            Some(token) if !self.advantage.is_finite() => {
                Err(WeightsError::NotFinite { rollout, token })
            }
            _ => Ok(()),
        }
    }
}

impl BatchStats {
    /// Sums to means; an empty batch keeps its zeros.
    fn finish(&mut self, divisor: f64) {
        if self.token_count == 0 {
            return;
        }
        self.loss /= divisor;
        self.policy_loss /= divisor;
        let count = self.token_count as f64;
        for sum in [
            &mut self.kl,
            &mut self.entropy,
            &mut self.clip_low_fraction,
            &mut self.clip_high_fraction,
            &mut self.clip_dual_fraction,
            &mut self.ratio_mean,
            &mut self.mismatch_kl,
            &mut self.weight_abs_mean,
        ] {
            *sum /= count;
        }
    }
}

/// Rounds to `FX(16) x 2^S` and counts what was lost.
struct Rounding {
    unit: f64,
    clamped: u64,
    vanished: u64,
}

impl Rounding {
    fn new(loss_scale_log2: u32) -> Self {
        let unit = f64::from(1_u32 << (WEIGHT_FRACTION_BITS + loss_scale_log2));
        Self { unit, clamped: 0, vanished: 0 }
    }

    fn round(&mut self, weight: f64, limit: i32) -> i32 {
        let limit = f64::from(limit);
        let rounded = (weight * self.unit).round_ties_even();
        self.clamped += u64::from(rounded.abs() > limit);
        self.vanished += u64::from(rounded == 0.0 && weight != 0.0);
        rounded.clamp(-limit, limit) as i32
    }
}

#[cfg(test)]
mod tests;
