//! Evaluation on held-out problems: pass@1 and pass@k with intervals, entropy, distinct answers.

use std::collections::BTreeMap;

use manyhands_shaders::twin::logits::temperature_scale;

use super::config::EvalSection;
use super::execute::execute;
use super::problems::{Drawn, Problems};
use super::report::{EvalReport, PassReport};
use super::rollout::{Rollout, RolloutError, prompt_tokens};
use super::work::{Output, Values, Work};
use crate::engine::{Engine, EngineError};
use crate::learn::passk::{ProblemResult, answer_variety, mean_pass_at_k};
use crate::learn::scalar::mean;
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::generate::Request;
use crate::model::tokenizer::Tokenizer;
use crate::tasks::{Split, final_answer};

/// Marks the random streams of evaluation, apart from those of training.
const STREAM: u32 = 1 << 24;

/// An evaluation could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// A problem does not fit.
    #[error(transparent)]
    Rollout(#[from] RolloutError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// The held-out problems of an evaluation.
#[derive(Clone, Debug)]
pub struct Examination {
    drawn: Vec<Drawn>,
    config: EvalSection,
}

impl Examination {
    /// Draws the problems, and says what must be sampled: `samples` completions of each in turn,
    /// and the likeliest one of each.
    pub fn new(
        problems: &Problems,
        model: &ModelConfig,
        tokenizer: &dyn Tokenizer,
        config: &EvalSection,
        max_new_tokens: usize,
        seed: u64,
    ) -> Result<(Self, [Work; 2]), RolloutError> {
        let draw = |i| problems.draw(i as u64, Split::HeldOut);
        let drawn: Vec<Drawn> = (0..config.problems).map(draw).collect();
        let prompts =
            drawn.iter().map(|d| prompt_tokens(&d.problem, model, tokenizer, max_new_tokens));
        let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
        let work = |temperature_scale: Option<i32>, samples: usize| {
            let request = |(i, prompt): (usize, &Vec<u32>)| {
                let prompt = prompt.clone();
                let request = move |sample| Request {
                    prompt: prompt.clone(),
                    stream: [i as u32, STREAM, sample as u32],
                };
                (0..samples).map(request)
            };
            Work::Sample {
                seed,
                temperature_scale,
                max_new_tokens: max_new_tokens as u32,
                end: tokenizer.end(),
                requests: prompts.iter().enumerate().flat_map(request).collect(),
            }
        };
        let sampled = work(Some(temperature_scale(config.temperature)), config.samples);
        let greedy = work(None, 1);
        Ok((Self { drawn, config: config.clone() }, [sampled, greedy]))
    }

    /// Scores the outputs of the two works.
    pub fn report(
        &self,
        problems: &Problems,
        tokenizer: &dyn Tokenizer,
        weights: blake3::Hash,
        outputs: [Output; 2],
    ) -> EvalReport {
        let [groups, greedy] = outputs.map(|output| self.rollouts(problems, tokenizer, output));
        let mut by_source: BTreeMap<String, Vec<&[Rollout]>> = BTreeMap::new();
        for (d, group) in self.drawn.iter().zip(&groups) {
            by_source.entry(problems.source_name(d)).or_default().push(group);
        }
        let all: Vec<&[Rollout]> = groups.iter().map(Vec::as_slice).collect();
        let rollouts = || groups.iter().flatten();
        let count = rollouts().count() as f64;
        let entropies: Vec<f64> = rollouts().flat_map(|r| r.entropies.iter().copied()).collect();
        let ks = &self.config.k;
        EvalReport {
            temperature: self.config.temperature,
            overall: pass_report(&all, ks, tokenizer),
            families: by_source
                .iter()
                .map(|(k, g)| (k.clone(), pass_report(g, ks, tokenizer)))
                .collect(),
            greedy: greedy.iter().flatten().filter(|r| is_correct(r)).count() as f64
                / self.drawn.len() as f64,
            token_entropy: mean(&entropies),
            length: entropies.len() as f64 / count,
            truncated: rollouts().filter(|r| !r.ended).count() as f64 / count,
            weights: weights.to_hex().to_string(),
        }
    }

    /// One group a problem.
    fn rollouts(
        &self,
        problems: &Problems,
        tokenizer: &dyn Tokenizer,
        output: Output,
    ) -> Vec<Vec<Rollout>> {
        let Values::Samples(completions) = output.values else { return Vec::new() };
        let samples = completions.len() / self.drawn.len();
        let mut completions = completions.into_iter();
        let group = |d: &Drawn| {
            let own = completions.by_ref().take(samples);
            // The prompt plays no part in any figure.
            own.map(|c| Rollout::new(Vec::new(), c, problems, d, tokenizer)).collect()
        };
        self.drawn.iter().map(group).collect()
    }
}

/// Evaluates a policy on an engine. `progress` is told tokens sampled so far.
pub async fn evaluate<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    weights: blake3::Hash,
    problems: &Problems,
    tokenizer: &dyn Tokenizer,
    config: &EvalSection,
    max_new_tokens: usize,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Result<EvalReport, EvaluateError> {
    let (examination, [sampled, greedy]) =
        Examination::new(problems, &decoder.config, tokenizer, config, max_new_tokens, seed)?;
    let sampled = execute(engine, decoder, &sampled, &mut progress).await?;
    let greedy = execute(engine, decoder, &greedy, |_| ()).await?;
    Ok(examination.report(problems, tokenizer, weights, [sampled, greedy]))
}

/// Only full marks count as a pass.
fn is_correct(rollout: &Rollout) -> bool {
    rollout.reward >= 1.0
}

fn pass_report(groups: &[&[Rollout]], ks: &[usize], tokenizer: &dyn Tokenizer) -> PassReport {
    let correct = |g: &&[Rollout]| g.iter().filter(|r| is_correct(r)).count() as u32;
    let results: Vec<ProblemResult> = groups
        .iter()
        .map(|g| ProblemResult { sample_count: g.len() as u32, correct_count: correct(g) })
        .collect();
    let variety: Vec<_> = groups
        .iter()
        .map(|g| {
            let answers = g.iter().map(|r| {
                let text = tokenizer.decode(&r.tokens);
                final_answer(&text).map(str::to_string)
            });
            answer_variety(&answers.collect::<Vec<_>>())
        })
        .collect();
    let pass = |&k: &usize| mean_pass_at_k(&results, k as u32).map(|interval| (k, interval));
    PassReport {
        problems: groups.len(),
        samples: groups.first().map_or(0, |g| g.len()),
        correct: results.iter().map(|r| u64::from(r.correct_count)).sum(),
        pass_at_k: ks.iter().filter_map(pass).collect(),
        answer_entropy: mean(&variety.iter().map(|v| v.entropy).collect::<Vec<_>>()),
        distinct_answers: mean(
            &variety.iter().map(|v| f64::from(v.distinct_count)).collect::<Vec<_>>(),
        ),
    }
}
