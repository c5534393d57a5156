//! Supervised fine-tuning on the worked traces of the task families.

use super::config::SftSection;
use super::gradient::accumulate;
use super::report::{Part, Phase, Progress, StepReport};
use super::rollout::logprob;
use super::trainer::{TrainError, Trainer};
use crate::engine::{Engine, SeedRow};
use crate::learn::weights::GradientScale;
use crate::model::decoder::DeviceGradients;
use crate::model::tokenizer::{END, encode, encode_prompt};
use crate::tasks::Split;
use manyhands_shaders::twin::logits::temperature_scale;

/// Weight 1 of a token, Q16.
const ONE: i32 = 1 << 16;

/// One step: mean cross-entropy over the tokens of `batch` traces and their ends.
pub(super) async fn step<E: Engine>(
    trainer: &mut Trainer<'_, E>,
    sft: &SftSection,
    observer: &mut dyn FnMut(Progress),
) -> Result<StepReport, TrainError> {
    let vocabulary = trainer.policy.config.vocabulary;
    let context = trainer.policy.config.context;
    let (mut sequences, mut seeds) = (Vec::new(), Vec::new());
    for i in 0..sft.batch {
        let index = trainer.state.step * sft.batch as u64 + i as u64;
        let drawn = trainer.problems.draw(index, Split::Train);
        let mut sequence = encode_prompt(&drawn.problem.prompt, vocabulary)?;
        let prompt = sequence.len();
        sequence.extend(encode(&drawn.problem.trace, vocabulary)?);
        sequence.push(END);
        if sequence.len() > context {
            let needed = sequence.len();
            return Err(TrainError::TraceTooLong { needed, context });
        }
        let row = |t: usize| {
            let weight = if t + 1 >= prompt { ONE } else { 0 };
            SeedRow { target: sequence[t + 1], weight, ..SeedRow::default() }
        };
        seeds.push((0..sequence.len() - 1).map(row).collect::<Vec<_>>());
        sequences.push(sequence);
    }

    observer(Progress::Begins(Part::Gradient));
    let mut grads = DeviceGradients::zeros(trainer.engine, &trainer.policy.config);
    let mut tokens = 0;
    let report = |n: usize| {
        tokens += n;
        observer(Progress::Tokens(tokens));
    };
    let scale = temperature_scale(1.0);
    let (engine, policy) = (trainer.engine, &trainer.policy);
    let stats = accumulate(engine, policy, &sequences, &seeds, scale, &mut grads, report).await?;
    let grads = grads.view(engine).await?;

    let trained = |s: &&SeedRow| s.weight != 0;
    let trained_tokens = seeds.iter().flatten().filter(trained).count();
    let nll = seeds.iter().flatten().zip(stats.iter().flatten());
    let loss: f64 = nll.filter(|(s, _)| trained(s)).map(|(_, r)| -logprob(r)).sum();

    observer(Progress::Begins(Part::Update));
    let scale = GradientScale { loss_scale_log2: 0, divisor: trained_tokens as f64 };
    let plan = trainer.update(&sft.optimizer, &grads, scale)?;
    Ok(StepReport {
        phase: Phase::Sft,
        step: trainer.state.step + 1,
        policy_version: trainer.state.optimizer.update_count,
        loss: loss / trained_tokens as f64,
        grad_norm: plan.grad_norm,
        learning_rate: plan.learning_rate,
        trained_tokens: trained_tokens as u64,
        sampled_tokens: 0,
        saturations: trainer.take_saturations().await?,
        rl: None,
    })
}
