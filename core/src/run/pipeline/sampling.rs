//! Rollouts of steps to come. Which problems and which version enter a step is fixed by index:
//! problem `j` of step `s` has index `s 2^20 + j`, and the version is that of step `s - policy_lag`.

use std::sync::Arc;

use manyhands_shaders::twin::logits::temperature_scale;

use super::{Pipeline, TrainError};
use crate::engine::Saturations;
use crate::learn::dynamic_sampling::Next;
use crate::model::generate::Request;
use crate::run::job::{JobPath, Stage, Version};
use crate::run::problems::Drawn;
use crate::run::rollout::{Rollout, Sampled, prompt_tokens};
use crate::run::work::{Values, Work};
use crate::tasks::Split;

/// Problems that one step can draw: its own range of indices.
const PROBLEMS_A_STEP_MAX: u64 = 1 << 20;

/// The rollouts of a step, while they are being sampled.
#[derive(Debug)]
pub(super) struct Sampling {
    version: Arc<Version>,
    sampled: Sampled,
    saturations: Saturations,
    /// Problems of the draw at hand.
    drawn: Vec<Drawn>,
    prompts: Vec<Vec<u32>>,
    /// Draws begun.
    draws: u32,
    complete: bool,
}

impl Pipeline {
    /// Begins to sample for every step that may be sampled by the current version.
    pub(super) fn begin_rollouts(&mut self) -> Result<(), TrainError> {
        let Some(rl) = &self.config.rl else { return Ok(()) };
        let (steps, lag, prompts) = (rl.steps, rl.policy_lag as u64, rl.prompts as u64);
        let last = self.sampling.back().map(|s| &s.sampled).or(self.state.pending.back());
        let mut next = last.map_or(self.state.step, |s| s.step + 1);
        while next <= (self.state.step + lag).min(steps - 1) {
            let mut sampling = Sampling {
                version: self.version.clone(),
                sampled: Sampled {
                    step: next,
                    version: self.state.optimizer.update_count,
                    groups: Vec::new(),
                    kept: Vec::new(),
                    useless: [0; 2],
                    saturations: Saturations::default().0,
                },
                saturations: Saturations::default(),
                drawn: Vec::new(),
                prompts: Vec::new(),
                draws: 0,
                complete: false,
            };
            self.draw(&mut sampling, prompts)?;
            self.sampling.push_back(sampling);
            next += 1;
        }
        Ok(())
    }

    fn rollout_path(&self, step: u64, draw: u32) -> JobPath {
        let ordinal = self.ordinal() - self.state.step + step;
        JobPath { ordinal, stage: Stage::Rollout { draw } }
    }

    /// Opens a draw of `wanted` more problems.
    fn draw(&mut self, sampling: &mut Sampling, wanted: u64) -> Result<(), TrainError> {
        let Some(rl) = &self.config.rl else { return Ok(()) };
        let (step, first) = (sampling.sampled.step, sampling.sampled.groups.len() as u64);
        let wanted = wanted.min(PROBLEMS_A_STEP_MAX - first);
        let indices = (first..first + wanted).map(|j| step * PROBLEMS_A_STEP_MAX + j);
        let mut requests = Vec::new();
        sampling.drawn.clear();
        sampling.prompts.clear();
        for index in indices {
            let drawn = self.problems.draw(index, Split::Train);
            let prompt = prompt_tokens(
                &drawn.problem,
                &self.model,
                self.problems.language(),
                rl.max_new_tokens,
            )?;
            for sample in 0..rl.group_size {
                let stream = [index as u32, (index >> 32) as u32, sample as u32];
                requests.push(Request { prompt: prompt.clone(), stream });
            }
            sampling.drawn.push(drawn);
            sampling.prompts.push(prompt);
        }
        let work = Work::Sample {
            seed: self.config.seed,
            temperature_scale: Some(temperature_scale(rl.temperature)),
            max_new_tokens: rl.max_new_tokens as u32,
            end: self.problems.language().end(),
            requests,
        };
        self.open(self.rollout_path(step, sampling.draws), &sampling.version, work);
        sampling.draws += 1;
        Ok(())
    }

    /// Takes complete draws; refills what dynamic sampling wants refilled.
    pub(super) fn collect_rollouts(&mut self) -> Result<(), TrainError> {
        let mut all = std::mem::take(&mut self.sampling);
        for sampling in &mut all {
            while !sampling.complete {
                let path = self.rollout_path(sampling.sampled.step, sampling.draws - 1);
                let Some(output) = self.take_output(path) else { break };
                let Values::Samples(completions) = output.values else {
                    unreachable!("outputs are checked against their work");
                };
                sampling.saturations.merge(&output.saturations);
                let mut completions = completions.into_iter();
                let tokenizer = self.problems.language();
                let group_size = self.config.rl.as_ref().map_or(1, |rl| rl.group_size);
                for (drawn, prompt) in sampling.drawn.iter().zip(&sampling.prompts) {
                    let group = completions.by_ref().take(group_size);
                    let rollout =
                        |c| Rollout::new(prompt.clone(), c, &self.problems, drawn, tokenizer);
                    sampling.sampled.groups.push(group.map(rollout).collect());
                }
                self.select(sampling)?;
            }
        }
        self.sampling = all;
        while self.sampling.front().is_some_and(|s| s.complete) {
            let Some(mut front) = self.sampling.pop_front() else { break };
            front.sampled.saturations = front.saturations.0;
            self.state.pending.push_back(front.sampled);
        }
        Ok(())
    }

    /// Chooses the groups that enter the step, or opens another draw.
    fn select(&mut self, sampling: &mut Sampling) -> Result<(), TrainError> {
        let Some(rl) = &self.config.rl else { return Ok(()) };
        let groups = &sampling.sampled.groups;
        let rewards: Vec<Vec<f64>> =
            groups.iter().map(|g| g.iter().map(|r| r.reward).collect()).collect();
        let selection =
            rl.learn.dynamic_sampling.select(&rewards, rl.prompts as u32, sampling.draws);
        match selection.next {
            Next::Draw(n) if (groups.len() as u64) < PROBLEMS_A_STEP_MAX => {
                self.draw(sampling, u64::from(n))
            }
            _ => {
                sampling.sampled.kept = selection.kept;
                sampling.sampled.useless =
                    [selection.dropped_all_wrong, selection.dropped_all_right];
                sampling.complete = true;
                Ok(())
            }
        }
    }

    /// The rollouts of this step, once they are complete.
    pub(super) fn take_sampled(&mut self) -> Option<Sampled> {
        let step = self.state.step;
        let first = self.state.pending.front()?;
        (first.step == step).then(|| self.state.pending.pop_front())?
    }
}
