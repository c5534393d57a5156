//! Evaluation on held-out problems: pass@1 and pass@k with intervals, entropy, distinct answers.

use std::collections::BTreeMap;

use manyhands_shaders::twin::logits::temperature_scale;

use super::config::EvalSection;
use super::problems::{Drawn, Problems};
use super::report::{EvalReport, PassReport};
use super::rollout::{Rollout, RolloutError, roll_out};
use crate::engine::Engine;
use crate::learn::passk::{ProblemResult, answer_variety, mean_pass_at_k};
use crate::learn::scalar::mean;
use crate::model::decoder::Decoder;
use crate::model::generate::Sampling;
use crate::model::tokenizer::{END, decode};
use crate::tasks::{Split, final_answer};

/// Sequences decoded at once.
pub const SLOTS: usize = 256;
/// Marks the random streams of evaluation, apart from those of training.
const STREAM: u32 = 1 << 24;

/// Evaluates a policy. `progress` is told tokens sampled so far.
pub async fn evaluate<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    weights: blake3::Hash,
    problems: &Problems,
    config: &EvalSection,
    max_new_tokens: usize,
    seed: u64,
    mut progress: impl FnMut(usize),
) -> Result<EvalReport, RolloutError> {
    let drawn: Vec<Drawn> =
        (0..config.problems).map(|i| problems.draw(i as u64, Split::HeldOut)).collect();
    let streams: Vec<[u32; 2]> = (0..config.problems).map(|i| [i as u32, STREAM]).collect();
    let sampling = Sampling {
        seed,
        temperature_scale: Some(temperature_scale(config.temperature)),
        max_new_tokens,
        end: END,
        slots: SLOTS,
    };
    let groups = roll_out(
        engine,
        decoder,
        problems,
        &drawn,
        &streams,
        config.samples,
        &sampling,
        &mut progress,
    )
    .await?;
    let greedy = Sampling { temperature_scale: None, ..sampling };
    let greedy = roll_out(engine, decoder, problems, &drawn, &streams, 1, &greedy, |_| ()).await?;

    let mut by_source: BTreeMap<String, Vec<&[Rollout]>> = BTreeMap::new();
    for (d, group) in drawn.iter().zip(&groups) {
        by_source.entry(problems.source_name(d)).or_default().push(group);
    }
    let all: Vec<&[Rollout]> = groups.iter().map(Vec::as_slice).collect();
    let rollouts = || groups.iter().flatten();
    let count = rollouts().count() as f64;
    let entropies: Vec<f64> = rollouts().flat_map(|r| r.entropies.iter().copied()).collect();
    Ok(EvalReport {
        temperature: config.temperature,
        overall: pass_report(&all, &config.k),
        families: by_source.iter().map(|(k, g)| (k.clone(), pass_report(g, &config.k))).collect(),
        greedy: greedy.iter().flatten().filter(|r| is_correct(r)).count() as f64
            / config.problems as f64,
        token_entropy: mean(&entropies),
        length: entropies.len() as f64 / count,
        truncated: rollouts().filter(|r| !r.ended).count() as f64 / count,
        weights: weights.to_hex().to_string(),
    })
}

/// Only full marks count as a pass.
fn is_correct(rollout: &Rollout) -> bool {
    rollout.reward >= 1.0
}

fn pass_report(groups: &[&[Rollout]], ks: &[usize]) -> PassReport {
    let correct = |g: &&[Rollout]| g.iter().filter(|r| is_correct(r)).count() as u32;
    let results: Vec<ProblemResult> = groups
        .iter()
        .map(|g| ProblemResult { sample_count: g.len() as u32, correct_count: correct(g) })
        .collect();
    let variety: Vec<_> = groups
        .iter()
        .map(|g| {
            let answers = g.iter().map(|r| {
                let text = decode(&r.tokens);
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
