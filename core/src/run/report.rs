//! What is logged: one JSON line a step, one a evaluation. Field names are a stable interface.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::engine::Saturations;
use crate::learn::passk::Interval;
use crate::learn::weights::BatchStats;

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Supervised fine-tuning.
    Sft,
    /// Reinforcement learning.
    Rl,
    /// All steps are done.
    Done,
}

/// Told to the caller while a step runs, so that it can show progress and measure time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// This part of the step begins.
    Begins(Part),
    /// Tokens processed in this part so far.
    Tokens(usize),
}

/// Parts of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Sampling completions.
    Rollout,
    /// Forward passes for log-probabilities.
    Score,
    /// Forward and backward passes.
    Gradient,
    /// Optimizer, quantisation and upload of the next version.
    Update,
    /// Sampling on held-out problems.
    Evaluate,
}

/// Saturation counts by site; empty when nothing was clamped.
pub fn saturation_map(s: &Saturations) -> BTreeMap<String, u64> {
    let named = Saturations::NAMES.iter().zip(s.0);
    named.filter(|(_, n)| *n > 0).map(|(name, n)| (name.to_string(), n)).collect()
}

/// One optimizer step's worth of numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Phase of the run.
    pub phase: Phase,
    /// Step within the phase, counted from 1.
    pub step: u64,
    /// Policy version after the step: optimizer updates so far.
    pub policy_version: u64,
    /// Loss of the batch.
    pub loss: f64,
    /// Norm of the mean gradient, before clipping; of the last update.
    pub grad_norm: f64,
    /// Scheduled learning rate of the last update.
    pub learning_rate: f64,
    /// Tokens trained on.
    pub trained_tokens: u64,
    /// Tokens sampled in this step.
    pub sampled_tokens: u64,
    /// Clamps in all exact arithmetic of the step.
    pub saturations: BTreeMap<String, u64>,
    /// Reinforcement learning only.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub rl: Option<RlReport>,
}

/// The numbers of a reinforcement learning step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RlReport {
    /// Mean strict reward over all sampled rollouts, before any filter or shaping.
    pub reward: f64,
    /// Mean completion length in tokens.
    pub length: f64,
    /// Share of completions cut off at the limit.
    pub truncated: f64,
    /// Mean token entropy of the sampler, nats.
    pub entropy: f64,
    /// Entropy bonus in force.
    pub entropy_coefficient: f64,
    /// Groups sampled, refills included.
    pub groups_sampled: u32,
    /// Groups that entered the step.
    pub groups_kept: u32,
    /// Useless groups, all wrong.
    pub groups_all_wrong: u32,
    /// Useless groups, all right.
    pub groups_all_right: u32,
    /// Policy version minus the version that sampled.
    pub policy_lag: u64,
    /// Largest difference between the log-probabilities that the sampler published and those of
    /// the backward pass under the same weights, nats. Exact arithmetic makes it 0.
    pub sampler_mismatch: f64,
    /// Loss statistics of the last update.
    pub batch: BatchStats,
    /// Why the reference was reset after this step.
    pub reset: Option<String>,
}

/// Pass rates of one source, or of all together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PassReport {
    /// Held-out problems.
    pub problems: usize,
    /// Completions a problem.
    pub samples: usize,
    /// Correct completions in all.
    pub correct: u64,
    /// pass@k with 95% bootstrap intervals over problems, by k.
    pub pass_at_k: BTreeMap<usize, Interval>,
    /// Mean over problems of the entropy of the final answers, nats.
    pub answer_entropy: f64,
    /// Mean number of distinct final answers a problem.
    pub distinct_answers: f64,
}

/// An evaluation on held-out problems.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Sampling temperature.
    pub temperature: f64,
    /// All problems together.
    pub overall: PassReport,
    /// By source.
    pub families: BTreeMap<String, PassReport>,
    /// Share of problems that the most likely completion solves.
    pub greedy: f64,
    /// Mean token entropy, nats.
    pub token_entropy: f64,
    /// Mean completion length in tokens.
    pub length: f64,
    /// Share of completions cut off at the limit.
    pub truncated: f64,
    /// Hash of the weights that were evaluated.
    pub weights: String,
}
