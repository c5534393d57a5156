//! One step of reinforcement learning with verifiable rewards: ProRL v1 and v2 and their kin.
//!
//! Roll out, filter groups, shape rewards, make advantages, weight tokens, differentiate, update;
//! then let the reset policy decide about the reference. Which problems and which version enter a
//! step is fixed by index: problem `j` of step `s` has index `s 2^20 + j`.

use serde::{Deserialize, Serialize};

use super::config::RlSection;
use super::gradient::{accumulate, score};
use super::report::{Part, Phase, Progress, RlReport, StepReport};
use super::rollout::{Rollout, logprob, roll_out};
use super::trainer::{TrainError, Trainer};
use crate::engine::{Engine, SeedRow};
use crate::learn::dynamic_sampling::{Next, Selection};
use crate::learn::optimizer::UpdatePlan;
use crate::learn::reset::{Observation, ResetReason};
use crate::learn::scalar::mean;
use crate::learn::weights::{BatchWeights, RolloutTokens, StepContext, batch_weights};
use crate::model::decoder::{Decoder, DeviceGradients};
use crate::model::generate::Sampling;
use crate::model::tokenizer::END;
use crate::tasks::Split;
use manyhands_shaders::twin::logits::temperature_scale;

/// Sequences decoded at once.
const SLOTS: usize = 512;
/// Problems that one step can draw: its own range of indices.
const PROBLEMS_A_STEP_MAX: u64 = 1 << 20;

/// The rollouts of one step, before anything is computed from them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// Step that will train on them.
    pub step: u64,
    /// Optimizer updates of the weights that sampled.
    pub version: u64,
    /// Groups in index order, refills included.
    pub groups: Vec<Vec<Rollout>>,
    /// Positions of the groups that enter the step.
    pub kept: Vec<usize>,
    /// Useless groups, all wrong and all right.
    pub useless: [u32; 2],
}

impl Sampled {
    /// Whether every index, length and token fits: a checkpoint may come from anywhere.
    pub(super) fn is_consistent(&self, vocabulary: usize, context: usize) -> bool {
        let fits = |r: &Rollout| {
            let n = r.tokens.len();
            let tokens = r.prompt.iter().chain(&r.tokens);
            let values = r.logprobs.iter().chain(&r.entropies).chain([&r.reward]);
            !r.prompt.is_empty()
                && n > 0
                && r.prompt.len() + n <= context
                && [r.logprobs.len(), r.entropies.len(), r.entropy_centers.len()] == [n; 3]
                && tokens.copied().all(|t| (t as usize) < vocabulary)
                && values.copied().all(f64::is_finite)
        };
        !self.groups.is_empty()
            && self.groups.iter().all(|g| !g.is_empty() && g.iter().all(fits))
            && self.kept.iter().all(|&g| g < self.groups.len())
    }
}

/// Samples the groups of step `step` under the current policy, refilling as configured.
async fn sample_step<E: Engine>(
    trainer: &Trainer<'_, E>,
    rl: &RlSection,
    step: u64,
    observer: &mut dyn FnMut(Progress),
) -> Result<Sampled, TrainError> {
    observer(Progress::Begins(Part::Rollout));
    let sampling = Sampling {
        seed: trainer.config.seed,
        temperature_scale: Some(temperature_scale(rl.temperature)),
        max_new_tokens: rl.max_new_tokens,
        end: END,
        slots: SLOTS,
    };
    let mut groups: Vec<Vec<Rollout>> = Vec::new();
    let (mut wanted, mut draws, mut tokens) = (rl.prompts as u64, 0, 0);
    let selection: Selection = loop {
        let first = groups.len() as u64;
        let wanted_now = wanted.min(PROBLEMS_A_STEP_MAX - first);
        let indices: Vec<u64> =
            (first..first + wanted_now).map(|j| step * PROBLEMS_A_STEP_MAX + j).collect();
        let drawn: Vec<_> =
            indices.iter().map(|&i| trainer.problems.draw(i, Split::Train)).collect();
        let streams: Vec<[u32; 2]> =
            indices.iter().map(|&i| [i as u32, (i >> 32) as u32]).collect();
        let new = roll_out(
            trainer.engine,
            &trainer.policy,
            &trainer.problems,
            &drawn,
            &streams,
            rl.group_size,
            &sampling,
            |n| observer(Progress::Tokens(tokens + n)),
        )
        .await?;
        tokens += new.iter().flatten().map(|r| r.tokens.len()).sum::<usize>();
        groups.extend(new);
        draws += 1;
        let rewards: Vec<Vec<f64>> =
            groups.iter().map(|g| g.iter().map(|r| r.reward).collect()).collect();
        let selection = rl.learn.dynamic_sampling.select(&rewards, rl.prompts as u32, draws);
        match selection.next {
            Next::Draw(n) if (groups.len() as u64) < PROBLEMS_A_STEP_MAX => wanted = u64::from(n),
            _ => break selection,
        }
    };
    Ok(Sampled {
        step,
        version: trainer.state.optimizer.update_count,
        groups,
        kept: selection.kept,
        useless: [selection.dropped_all_wrong, selection.dropped_all_right],
    })
}

/// Log-probabilities of the completions under a policy, scored by a forward pass.
async fn completion_logprobs<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    rollouts: &[&Rollout],
    scale: i32,
) -> Result<Vec<Vec<f64>>, TrainError> {
    let sequences: Vec<Vec<u32>> = rollouts.iter().map(|r| r.sequence()).collect();
    let stats = score(engine, decoder, &sequences, scale).await?;
    let completion = |(stats, r): (&Vec<_>, &&Rollout)| {
        stats[r.prompt.len() - 1..].iter().map(logprob).collect()
    };
    Ok(stats.iter().zip(rollouts).map(completion).collect())
}

/// Seeds of a rollout's sequence: zero over the prompt, its weights over the completion.
fn seeds(rollout: &Rollout, weights: &[i32], entropy_weights: &[i32]) -> Vec<SeedRow> {
    let prompt = vec![SeedRow::default(); rollout.prompt.len() - 1];
    let completion = (0..rollout.tokens.len()).map(|t| SeedRow {
        target: rollout.tokens[t],
        weight: weights[t],
        entropy_weight: entropy_weights[t],
        entropy_center: rollout.entropy_centers[t],
    });
    prompt.into_iter().chain(completion).collect()
}

/// One step.
pub(super) async fn step<E: Engine>(
    trainer: &mut Trainer<'_, E>,
    rl: &RlSection,
    observer: &mut dyn FnMut(Progress),
) -> Result<StepReport, TrainError> {
    let step = trainer.state.step;
    let mut sampled_tokens = 0;
    let mut next = trainer.state.pending.back().map_or(step, |s| s.step + 1);
    while next <= (step + rl.policy_lag as u64).min(rl.steps - 1) {
        let sampled = sample_step(trainer, rl, next, observer).await?;
        sampled_tokens += sampled.groups.iter().flatten().map(|r| r.tokens.len()).sum::<usize>();
        trainer.state.pending.push_back(sampled);
        next += 1;
    }
    let sampled = trainer.state.pending.pop_front().expect("this step has been sampled");
    let outcome = learn(trainer, rl, &sampled, observer).await?;

    let all = || sampled.groups.iter().flatten();
    let count = all().count() as f64;
    let token_entropies: Vec<f64> = all().flat_map(|r| r.entropies.iter().copied()).collect();
    let kl = (rl.learn.loss.kl.beta > 0.0).then_some(outcome.weights.stats.kl);
    let reset = outcome.plan.and_then(|_| {
        // The validation score of this step, if it was evaluated, arrives with the next one.
        let validation = trainer.state.evaluations.last();
        let validation = validation.filter(|e| e.phase == Phase::Rl && e.step == step);
        let validation = validation.and_then(|e| e.report.overall.pass_at_k.get(&1));
        let seen = Observation { step: step + 1, kl, validation: validation.map(|v| v.mean) };
        trainer.state.reset.observe(&rl.learn.reset, seen)
    });
    if let Some(reset) = &reset {
        if trainer.state.reference.is_some() {
            trainer.state.reference = Some(trainer.state.master());
            trainer.upload_reference();
        }
        if reset.reset_optimizer {
            trainer.state.optimizer.reset();
        }
    }
    Ok(StepReport {
        phase: Phase::Rl,
        step: step + 1,
        policy_version: trainer.state.optimizer.update_count,
        loss: outcome.weights.stats.loss,
        grad_norm: outcome.plan.map_or(0.0, |p| p.grad_norm),
        learning_rate: outcome.plan.map_or(0.0, |p| p.learning_rate),
        trained_tokens: outcome.trained_tokens,
        sampled_tokens: sampled_tokens as u64,
        saturations: trainer.take_saturations().await?,
        rl: Some(RlReport {
            reward: all().map(|r| r.reward).sum::<f64>() / count,
            length: token_entropies.len() as f64 / count,
            truncated: all().filter(|r| !r.ended).count() as f64 / count,
            entropy: mean(&token_entropies),
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
    })
}

/// What came of the updates of a step.
struct Outcome {
    weights: BatchWeights,
    /// `None` if no group was useful: the step changes nothing.
    plan: Option<UpdatePlan>,
    trained_tokens: u64,
    entropy_coefficient: f64,
    policy_lag: u64,
    sampler_mismatch: f64,
}

/// Advantages over all kept groups, then `rl.updates` updates on consecutive shares of them.
async fn learn<E: Engine>(
    trainer: &mut Trainer<'_, E>,
    rl: &RlSection,
    sampled: &Sampled,
    observer: &mut dyn FnMut(Progress),
) -> Result<Outcome, TrainError> {
    let learn = &rl.learn;
    let kept: Vec<&Vec<Rollout>> = sampled.kept.iter().map(|&g| &sampled.groups[g]).collect();
    let shaped = |r: &Rollout| {
        learn.length.shape(r.reward, r.tokens.len() as u32, !r.ended, trainer.state.step)
    };
    let rewards: Vec<Vec<f64>> = kept.iter().map(|g| g.iter().map(shaped).collect()).collect();
    let counts: Vec<Vec<u32>> =
        kept.iter().map(|g| g.iter().map(|r| r.tokens.len() as u32).collect()).collect();
    let advantages = learn.advantage.advantages(&rewards, &counts);

    let rollouts: Vec<&Rollout> = kept.iter().flat_map(|g| g.iter()).collect();
    let advantages: Vec<f64> = advantages.into_iter().flatten().collect();
    let scale = temperature_scale(rl.temperature);
    let policy_lag = trainer.state.optimizer.update_count - sampled.version;
    let mut outcome = Outcome {
        weights: batch_weights(&learn.loss, &[], StepContext::default())?,
        plan: None,
        trained_tokens: 0,
        entropy_coefficient: 0.0,
        policy_lag,
        sampler_mismatch: 0.0,
    };
    if rollouts.is_empty() {
        return Ok(outcome);
    }

    let entropies: Vec<f64> = rollouts.iter().flat_map(|r| r.entropies.iter().copied()).collect();
    if let (Some(config), Some(band)) = (&learn.entropy, &mut trainer.state.entropy_band) {
        outcome.entropy_coefficient = band.update(config, mean(&entropies));
    }
    observer(Progress::Begins(Part::Score));
    let sampler: Vec<Vec<f64>> = rollouts.iter().map(|r| r.logprobs.clone()).collect();
    // The same weights give the same bits: without lag the sampler's numbers are the trainer's.
    let proximal = match policy_lag {
        0 => sampler.clone(),
        _ => completion_logprobs(trainer.engine, &trainer.policy, &rollouts, scale).await?,
    };
    let reference = match &trainer.reference {
        Some(r) => Some(completion_logprobs(trainer.engine, r, &rollouts, scale).await?),
        None => None,
    };

    let share = kept.len().div_ceil(rl.updates) * rl.group_size;
    for (update, range) in
        (0..rollouts.len()).step_by(share).map(|a| a..(a + share).min(rollouts.len())).enumerate()
    {
        let part = &rollouts[range.clone()];
        let policy = match update {
            0 => proximal[range.clone()].to_vec(),
            _ => completion_logprobs(trainer.engine, &trainer.policy, part, scale).await?,
        };
        let masks: Vec<Vec<bool>> = part.iter().map(|r| vec![true; r.tokens.len()]).collect();
        let tokens: Vec<RolloutTokens<'_>> = range
            .clone()
            .enumerate()
            .map(|(j, i)| RolloutTokens {
                policy_logprobs: &policy[j],
                proximal_logprobs: &proximal[i],
                sampler_logprobs: &sampler[i],
                reference_logprobs: reference.as_ref().map(|r| r[i].as_slice()),
                entropies: Some(&rollouts[i].entropies),
                loss_mask: &masks[j],
                advantage: advantages[i],
            })
            .collect();
        let context = StepContext {
            entropy_coefficient: outcome.entropy_coefficient,
            seed: trainer.config.seed ^ trainer.state.step << 16 ^ update as u64,
        };
        let weights = batch_weights(&learn.loss, &tokens, context)?;

        observer(Progress::Begins(Part::Gradient));
        let sequences: Vec<Vec<u32>> = part.iter().map(|r| r.sequence()).collect();
        let pairs = weights.token_weights.iter().zip(&weights.entropy_weights);
        let seeds: Vec<Vec<SeedRow>> =
            part.iter().zip(pairs).map(|(r, (w, u))| seeds(r, w, u)).collect();
        let mut grads = DeviceGradients::zeros(trainer.engine, &trainer.policy.config);
        let mut done = 0;
        let report = |n: usize| {
            done += n;
            observer(Progress::Tokens(done));
        };
        let (engine, decoder) = (trainer.engine, &trainer.policy);
        let stats =
            accumulate(engine, decoder, &sequences, &seeds, scale, &mut grads, report).await?;
        for ((stats, rollout), policy) in stats.iter().zip(part).zip(&policy) {
            for (s, p) in stats[rollout.prompt.len() - 1..].iter().zip(policy) {
                outcome.sampler_mismatch = outcome.sampler_mismatch.max((logprob(s) - p).abs());
            }
        }
        let grads = grads.view(engine).await?;

        observer(Progress::Begins(Part::Update));
        // The seed differentiates with respect to logits / temperature.
        let mut gradient_scale = weights.scale;
        gradient_scale.divisor *= rl.temperature;
        outcome.plan = Some(trainer.update(&learn.optimizer, &grads, gradient_scale)?);
        outcome.trained_tokens += weights.stats.token_count;
        outcome.weights = weights;
    }
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crafted checkpoint must not reach an index or a length that panics.
    #[test]
    fn sampled_that_does_not_fit_is_refused() {
        let rollout = Rollout {
            prompt: vec![1, 5],
            tokens: vec![7, 2],
            logprobs: vec![-0.5; 2],
            entropies: vec![0.1; 2],
            entropy_centers: vec![9; 2],
            reward: 1.0,
            ended: true,
        };
        let of = |groups, kept| Sampled { step: 0, version: 0, groups, kept, useless: [0; 2] };
        let with = |change: fn(&mut Rollout)| {
            let mut r = rollout.clone();
            change(&mut r);
            of(vec![vec![r]], vec![0]).is_consistent(8, 4)
        };
        assert!(with(|_| ()));
        assert!(!with(|r| r.prompt.clear()));
        assert!(!with(|r| r.tokens[0] = 8));
        assert!(!with(|r| r.prompt.push(3)));
        assert!(!with(|r| r.logprobs.truncate(1)));
        assert!(!with(|r| r.entropies[0] = f64::NAN));
        assert!(!of(vec![vec![rollout.clone()]], vec![1]).is_consistent(8, 4));
        assert!(!of(vec![vec![]], vec![]).is_consistent(8, 4));
    }
}
