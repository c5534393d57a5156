//! One step of reinforcement learning with verifiable rewards: ProRL v1 and v2 and their kin.
//!
//! Shape rewards, make advantages, weight tokens, differentiate, update, once a mini-batch; then
//! let the reset policy decide about the reference.

use std::ops::Range;
use std::sync::Arc;

use manyhands_shaders::twin::logits::temperature_scale;

use super::{Pipeline, TrainError};
use crate::engine::{RowStats, Saturations};
use crate::learn::optimizer::UpdatePlan;
use crate::learn::reset::{Observation, ResetReason};
use crate::learn::scalar::mean;
use crate::learn::weights::{BatchWeights, RolloutTokens, StepContext, batch_weights};
use crate::run::config::RlSection;
use crate::run::job::Stage;
use crate::run::report::{Phase, RlReport, StepReport, saturation_map};
use crate::run::rollout::{Rollout, Sampled, logprob};
use crate::run::samples;
use crate::run::work::{Output, Scored, Seed, Seeded, Values, Work};

/// A step of learning under way.
#[derive(Debug)]
pub(super) struct Learning {
    sampled: Sampled,
    /// Positions of the rollouts that enter the step: group and rollout.
    kept: Vec<(usize, usize)>,
    advantages: Vec<f64>,
    /// Log-probabilities by kept rollout and token: the trainer's before this step, the
    /// reference's, and the policy's in the mini-batch at hand.
    proximal: Option<Vec<Vec<f64>>>,
    reference: Option<Vec<Vec<f64>>>,
    policy: Option<Vec<Vec<f64>>>,
    /// The weights of the mini-batch whose gradient is being computed.
    weights: Option<BatchWeights>,
    update: usize,
    outcome: Outcome,
}

/// What came of the updates so far.
#[derive(Debug)]
struct Outcome {
    weights: BatchWeights,
    /// `None` if no group was useful: the step changes nothing.
    plan: Option<UpdatePlan>,
    trained_tokens: u64,
    entropy_coefficient: f64,
    policy_lag: u64,
    sampler_mismatch: f64,
    saturations: Saturations,
}

impl Learning {
    fn rollout(&self, i: usize) -> &Rollout {
        let (group, rollout) = self.kept[i];
        &self.sampled.groups[group][rollout]
    }

    /// Kept rollouts of the mini-batch at hand; empty when all are done.
    fn range(&self, rl: &RlSection) -> Range<usize> {
        let share = self.sampled.kept.len().div_ceil(rl.updates).max(1) * rl.group_size;
        let start = (self.update * share).min(self.kept.len());
        start..(start + share).min(self.kept.len())
    }

    pub(super) fn updates(&self) -> u32 {
        self.update as u32
    }

    fn sampler_logprobs(&self) -> Vec<Vec<f64>> {
        (0..self.kept.len()).map(|i| self.rollout(i).logprobs.clone()).collect()
    }
}

fn score_work(learning: &Learning, range: Range<usize>, temperature_scale: i32) -> Work {
    let scored = |i| {
        let r: &Rollout = learning.rollout(i);
        Scored { tokens: r.sequence(), first: r.prompt.len() as u32 }
    };
    Work::Score { temperature_scale, sequences: range.map(scored).collect() }
}

fn logprobs(stats: &[Vec<RowStats>]) -> Vec<Vec<f64>> {
    stats.iter().map(|s| s.iter().map(logprob).collect()).collect()
}

impl Pipeline {
    fn rl(&self) -> RlSection {
        self.config.rl.clone().expect("rollouts belong to an rl section")
    }

    /// Advantages over all kept groups; opens the scores that the step needs.
    pub(super) fn start_learning(&mut self, sampled: Sampled) -> Result<Learning, TrainError> {
        let rl = self.rl();
        let learn = &rl.learn;
        let kept: Vec<&Vec<Rollout>> = sampled.kept.iter().map(|&g| &sampled.groups[g]).collect();
        let shaped = |r: &Rollout| {
            learn.length.shape(r.reward, r.tokens.len() as u32, !r.ended, self.state.step)
        };
        let rewards: Vec<Vec<f64>> = kept.iter().map(|g| g.iter().map(shaped).collect()).collect();
        let counts: Vec<Vec<u32>> =
            kept.iter().map(|g| g.iter().map(|r| r.tokens.len() as u32).collect()).collect();
        let advantages = learn.advantage.advantages(&rewards, &counts);
        let policy_lag = self.state.optimizer.update_count - sampled.version;
        let positions = sampled.kept.iter();
        let kept = positions.flat_map(|&g| (0..sampled.groups[g].len()).map(move |r| (g, r)));
        let mut learning = Learning {
            kept: kept.collect(),
            advantages: advantages.into_iter().flatten().collect(),
            proximal: None,
            reference: None,
            policy: None,
            weights: None,
            update: 0,
            outcome: Outcome {
                weights: batch_weights(&learn.loss, &[], StepContext::default())?,
                plan: None,
                trained_tokens: 0,
                entropy_coefficient: 0.0,
                policy_lag,
                sampler_mismatch: 0.0,
                saturations: Saturations(sampled.saturations),
            },
            sampled,
        };
        let n = learning.kept.len();
        if n == 0 {
            return Ok(learning);
        }
        if let (Some(config), Some(band)) = (&learn.entropy, &mut self.state.entropy_band) {
            let entropies = (0..n).flat_map(|i| learning.rollout(i).entropies.iter().copied());
            let entropies: Vec<f64> = entropies.collect();
            learning.outcome.entropy_coefficient = band.update(config, mean(&entropies));
        }
        let scale = temperature_scale(rl.temperature);
        // The same weights give the same bits: without lag the sampler's numbers are the trainer's.
        if policy_lag == 0 {
            learning.proximal = Some(learning.sampler_logprobs());
        } else {
            let work = score_work(&learning, 0..n, scale);
            let version = self.version.clone();
            self.open(self.path(Stage::Proximal), &version, work);
        }
        if let Some(reference) = self.reference.clone().filter(|_| !self.is_reference(policy_lag)) {
            self.open(self.path(Stage::Reference), &reference, score_work(&learning, 0..n, scale));
        }
        Ok(learning)
    }

    /// Whether the scores by the trainer are those by the reference: the same weights, just after a
    /// reset, and so the same units of work.
    fn is_reference(&self, policy_lag: u64) -> bool {
        policy_lag > 0 && self.reference.as_ref().is_some_and(|r| r.hash() == self.version.hash())
    }

    /// Scores of a stage, once they are there.
    fn take_scores(&mut self, stage: Stage, outcome: &mut Outcome) -> Option<Vec<Vec<f64>>> {
        let output = self.take_output(self.path(stage))?;
        outcome.saturations.merge(&output.saturations);
        let Values::Scores(stats) = &output.values else {
            unreachable!("outputs are checked against their work");
        };
        Some(logprobs(stats))
    }

    /// Goes on as far as the outputs allow; the report once all mini-batches are done.
    pub(super) fn go_on_learning(
        &mut self,
        learning: &mut Learning,
    ) -> Result<Option<StepReport>, TrainError> {
        let rl = self.rl();
        loop {
            let range = learning.range(&rl);
            if range.is_empty() {
                // The reset policy reads this step's evaluation.
                return Ok(self.examination.is_none().then(|| self.finish_learning(learning)));
            }
            let outcome = &mut learning.outcome;
            if learning.proximal.is_none() {
                learning.proximal = self.take_scores(Stage::Proximal, outcome);
                if self.is_reference(outcome.policy_lag) {
                    learning.reference.clone_from(&learning.proximal);
                }
            }
            if learning.reference.is_none() && self.reference.is_some() {
                learning.reference = self.take_scores(Stage::Reference, outcome);
            }
            let update = learning.update as u32;
            if update > 0 && learning.policy.is_none() {
                learning.policy = self.take_scores(Stage::Policy { update }, outcome);
            }
            let gradient = Stage::Gradient { update };
            if learning.weights.is_some() {
                let Some(output) = self.take_output(self.path(gradient)) else { return Ok(None) };
                self.learn_mini_batch(learning, &rl, range, output)?;
            } else {
                let Some(proximal) = &learning.proximal else { return Ok(None) };
                if update == 0 {
                    learning.policy = Some(proximal[range.clone()].to_vec());
                }
                let scored = self.reference.is_none() || learning.reference.is_some();
                if !scored || learning.policy.is_none() {
                    return Ok(None);
                }
                let work = self.weigh(learning, &rl, range)?;
                let version = self.version.clone();
                self.open(self.path(gradient), &version, work);
            }
        }
    }

    /// From log-probabilities to the weights of every token of a mini-batch.
    fn weigh(
        &self,
        learning: &mut Learning,
        rl: &RlSection,
        range: Range<usize>,
    ) -> Result<Work, TrainError> {
        let masks: Vec<Vec<bool>> =
            range.clone().map(|i| vec![true; learning.rollout(i).tokens.len()]).collect();
        let (Some(policy), Some(proximal)) = (&learning.policy, &learning.proximal) else {
            unreachable!("scores are there before a mini-batch is weighed");
        };
        let tokens = range.clone().enumerate().map(|(j, i)| RolloutTokens {
            policy_logprobs: &policy[j],
            proximal_logprobs: &proximal[i],
            sampler_logprobs: &learning.rollout(i).logprobs,
            reference_logprobs: learning.reference.as_ref().map(|r| r[i].as_slice()),
            entropies: Some(&learning.rollout(i).entropies),
            loss_mask: &masks[j],
            advantage: learning.advantages[i],
        });
        let context = StepContext {
            entropy_coefficient: learning.outcome.entropy_coefficient,
            seed: self.config.seed ^ self.state.step << 16 ^ learning.update as u64,
        };
        let weights = batch_weights(&rl.learn.loss, &tokens.collect::<Vec<_>>(), context)?;
        let pairs = weights.token_weights.iter().zip(&weights.entropy_weights);
        let sequences =
            range.zip(pairs).map(|(i, (w, u))| {
                let r = learning.rollout(i);
                let seeds = w.iter().zip(u).zip(&r.entropy_centers);
                let seed = |((&weight, &entropy_weight), &entropy_center): ((&i32, &i32), &i32)| {
                    Seed { weight, entropy_weight, entropy_center }
                };
                Seeded {
                    tokens: r.sequence(),
                    first: r.prompt.len() as u32,
                    seeds: seeds.map(seed).collect(),
                }
            });
        let scale = temperature_scale(rl.temperature);
        let work = Work::Gradient { temperature_scale: scale, sequences: sequences.collect() };
        learning.weights = Some(weights);
        Ok(work)
    }

    /// Updates from the gradient of a mini-batch; opens the scores of the next one.
    fn learn_mini_batch(
        &mut self,
        learning: &mut Learning,
        rl: &RlSection,
        range: Range<usize>,
        output: Output,
    ) -> Result<(), TrainError> {
        let (Values::Gradient(stats, gradients), Some(weights), Some(policy)) =
            (output.values, learning.weights.take(), learning.policy.take())
        else {
            unreachable!("outputs are checked against their work");
        };
        let outcome = &mut learning.outcome;
        outcome.saturations.merge(&output.saturations);
        for (s, p) in logprobs(&stats).iter().flatten().zip(policy.iter().flatten()) {
            outcome.sampler_mismatch = outcome.sampler_mismatch.max((s - p).abs());
        }
        // The seed differentiates with respect to logits / temperature.
        let mut scale = weights.scale;
        scale.divisor *= rl.temperature;
        outcome.plan = Some(self.update(&rl.learn.optimizer, &gradients, scale)?);
        outcome.trained_tokens += weights.stats.token_count;
        outcome.weights = weights;
        learning.update += 1;
        let next = learning.range(rl);
        if !next.is_empty() {
            debug_assert_eq!(next.start, range.end);
            let work = score_work(learning, next, temperature_scale(rl.temperature));
            let (update, version) = (learning.update as u32, Arc::clone(&self.version));
            self.open(self.path(Stage::Policy { update }), &version, work);
        }
        Ok(())
    }

    fn finish_learning(&mut self, learning: &Learning) -> StepReport {
        let rl = self.rl();
        let (step, sampled, outcome) = (self.state.step, &learning.sampled, &learning.outcome);
        let kl = (rl.learn.loss.kl.beta > 0.0).then_some(outcome.weights.stats.kl);
        let reset = outcome.plan.and_then(|_| {
            let validation = self.state.evaluations.last();
            let validation = validation.filter(|e| e.phase == Phase::Rl && e.step == step);
            let validation = validation.and_then(|e| e.report.overall.pass_at_k.get(&1));
            let seen = Observation { step: step + 1, kl, validation: validation.map(|v| v.mean) };
            self.state.reset.observe(&rl.learn.reset, seen)
        });
        if let Some(reset) = &reset {
            if self.state.reference.is_some() {
                self.state.reference = Some(self.state.master());
                self.reference = Some(self.version.clone());
            }
            if reset.reset_optimizer {
                self.state.optimizer.reset();
            }
        }
        let advantage = |group, rollout| {
            let at = learning.kept.iter().position(|&kept| kept == (group, rollout))?;
            Some(learning.advantages[at])
        };
        let (ordinal, language) = (self.state.ordinal(&self.config), self.problems.language());
        samples::add(&mut self.samples, ordinal + 1, sampled, language, advantage);
        let all = || sampled.groups.iter().flatten();
        let count = all().count() as f64;
        let entropies: Vec<f64> = all().flat_map(|r| r.entropies.iter().copied()).collect();
        StepReport {
            phase: Phase::Rl,
            step: step + 1,
            policy_version: self.state.optimizer.update_count,
            loss: outcome.weights.stats.loss,
            grad_norm: outcome.plan.map_or(0.0, |p| p.grad_norm),
            learning_rate: outcome.plan.map_or(0.0, |p| p.learning_rate),
            trained_tokens: outcome.trained_tokens,
            sampled_tokens: entropies.len() as u64,
            saturations: saturation_map(&outcome.saturations),
            rl: Some(RlReport {
                reward: all().map(|r| r.reward).sum::<f64>() / count,
                length: entropies.len() as f64 / count,
                truncated: all().filter(|r| !r.ended).count() as f64 / count,
                entropy: mean(&entropies),
                entropy_coefficient: outcome.entropy_coefficient,
                groups_sampled: sampled.groups.len() as u32,
                groups_kept: sampled.kept.len() as u32,
                groups_all_wrong: sampled.useless[0],
                groups_all_right: sampled.useless[1],
                policy_lag: outcome.policy_lag,
                sampler_mismatch: outcome.sampler_mismatch,
                batch: outcome.weights.stats,
                reset: reset.map(|r| match r.reason {
                    ResetReason::Schedule => "schedule".into(),
                    ResetReason::Kl => "kl".into(),
                    ResetReason::Stalled => "stalled".into(),
                }),
            }),
        }
    }
}
