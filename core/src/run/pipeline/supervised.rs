//! Supervised fine-tuning on the worked traces of the task families.

use manyhands_shaders::twin::logits::temperature_scale;

use super::{GRADIENT, Now, Pipeline, TrainError};
use crate::learn::weights::GradientScale;
use crate::run::report::{Phase, StepReport, saturation_map};
use crate::run::rollout::logprob;
use crate::run::work::{Output, Seed, Seeded, Values, Work};
use crate::tasks::Split;

/// Weight 1 of a token, Q16.
const ONE: i32 = 1 << 16;

/// What a supervised step trains on.
#[derive(Debug)]
pub(super) struct Traces {
    tokens: usize,
}

impl Pipeline {
    /// Opens the gradient of mean cross-entropy over the tokens of `batch` traces and their ends.
    pub(super) fn begin_traces(&mut self) -> Result<(), TrainError> {
        let Some(sft) = &self.config.sft else { return Ok(()) };
        let (language, context) = (self.problems.language(), self.model.context);
        let mut sequences = Vec::with_capacity(sft.batch);
        for i in 0..sft.batch {
            let index = self.state.step * sft.batch as u64 + i as u64;
            let drawn = self.problems.draw(index, Split::Train);
            let mut tokens = language.encode_prompt(&drawn.problem.prompt)?;
            let first = tokens.len();
            tokens.extend(language.encode_answer(&drawn.problem.trace)?);
            tokens.push(language.end());
            if tokens.len() > context {
                let needed = tokens.len();
                return Err(TrainError::TraceTooLong { needed, context });
            }
            let seeds = vec![Seed { weight: ONE, ..Seed::default() }; tokens.len() - first];
            sequences.push(Seeded { tokens, first: first as u32, seeds });
        }
        let tokens = sequences.iter().map(|s| s.seeds.len()).sum();
        let work = Work::Gradient { temperature_scale: temperature_scale(1.0), sequences };
        let version = self.version.clone();
        self.open(self.path(GRADIENT), &version, work);
        self.now = Now::Supervised(Traces { tokens });
        Ok(())
    }

    /// Learns from the gradient.
    pub(super) fn learn_traces(
        &mut self,
        traces: &Traces,
        output: Output,
    ) -> Result<StepReport, TrainError> {
        let Values::Gradient(stats, gradients) = output.values else {
            unreachable!("outputs are checked against their work");
        };
        let loss: f64 = stats.iter().flatten().map(|r| -logprob(r)).sum();
        let divisor = traces.tokens as f64;
        let optimizer = self.config.sft.as_ref().map(|s| s.optimizer).unwrap_or_default();
        let scale = GradientScale { loss_scale_log2: 0, divisor };
        let plan = self.update(&optimizer, &gradients, scale)?;
        Ok(StepReport {
            phase: Phase::Sft,
            step: self.state.step + 1,
            policy_version: self.state.optimizer.update_count,
            loss: loss / divisor,
            grad_norm: plan.grad_norm,
            learning_rate: plan.learning_rate,
            trained_tokens: traces.tokens as u64,
            sampled_tokens: 0,
            saturations: saturation_map(&output.saturations),
            rl: None,
        })
    }
}
