//! Rollouts: sampled completions with the sampler's exact statistics.

use std::f64::consts::LN_2;

use serde::{Deserialize, Serialize};

use super::problems::{Drawn, Problems};
use crate::engine::{Engine, EngineError, RowStats};
use crate::model::decoder::Decoder;
use crate::model::generate::{Completion, Request, Sampling, generate};
use crate::model::tokenizer::{EncodeError, decode, encode_prompt};

/// Natural log of the probability of the row's target token.
///
/// `-t ln 2 - ln(Z 2^-23)`, rounded to Q24 as it is published: the sampler, the trainer and the
/// auditor read the same number.
pub fn logprob(stats: &RowStats) -> f64 {
    let nats = -(f64::from(stats.t) / 65_536.0) * LN_2 - log_total(stats);
    (nats * 16_777_216.0).round_ties_even() / 16_777_216.0
}

fn log_total(stats: &RowStats) -> f64 {
    libm::log(stats.total as f64 / 8_388_608.0)
}

/// Entropy of the row's distribution in nats.
pub fn entropy(stats: &RowStats) -> f64 {
    stats.moment as f64 / stats.total as f64 / 65_536.0 * LN_2 + log_total(stats)
}

/// `H / ln 2 - log2(Z 2^-23)` in `FX(16)`: the mean of `t`, which the entropy seed is centred on.
pub fn entropy_center(stats: &RowStats) -> i32 {
    ((stats.moment + stats.total / 2) / stats.total) as i32
}

/// One sampled completion of a problem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// Completion tokens, with the end token if it came in time.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the sampler, nats.
    pub logprobs: Vec<f64>,
    /// Entropy at each token, nats.
    pub entropies: Vec<f64>,
    /// Mean of `t` at each token, `FX(16)`: see [`entropy_center`].
    pub entropy_centers: Vec<i32>,
    /// Strict reward, 0 to 1.
    pub reward: f64,
    /// Whether the end token came in time.
    pub ended: bool,
}

impl Rollout {
    /// Prompt and completion.
    pub fn sequence(&self) -> Vec<u32> {
        [self.prompt.as_slice(), &self.tokens].concat()
    }

    fn new(prompt: Vec<u32>, completion: Completion, reward: f64, end: u32) -> Self {
        Self {
            prompt,
            ended: completion.tokens.last() == Some(&end),
            logprobs: completion.stats.iter().map(logprob).collect(),
            entropies: completion.stats.iter().map(entropy).collect(),
            entropy_centers: completion.stats.iter().map(entropy_center).collect(),
            tokens: completion.tokens,
            reward,
        }
    }
}

/// Samples `group_size` completions of each problem and scores them: one group a problem.
/// `streams[i]` names the random stream of problem `i`.
pub async fn roll_out<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    problems: &Problems,
    drawn: &[Drawn],
    streams: &[[u32; 2]],
    group_size: usize,
    sampling: &Sampling,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<Rollout>>, RolloutError> {
    let mut requests = Vec::new();
    for (d, stream) in drawn.iter().zip(streams) {
        let prompt = encode_prompt(&d.problem.prompt, decoder.config.vocabulary)?;
        if prompt.len() + sampling.max_new_tokens > decoder.config.context {
            let problem = d.problem.prompt.clone();
            let context = decoder.config.context;
            return Err(RolloutError::TooLong { problem, prompt: prompt.len(), context });
        }
        for sample in 0..group_size {
            let stream = [stream[0], stream[1], sample as u32];
            requests.push(Request { prompt: prompt.clone(), stream });
        }
    }
    let report = |tokens: usize, _: &[Completion]| {
        progress(tokens);
        true
    };
    let completions = generate(engine, decoder, &requests, sampling, report).await?;
    let rollouts = requests.into_iter().zip(completions).enumerate().map(|(i, (r, c))| {
        let reward = problems.score(&drawn[i / group_size], &decode(&c.tokens));
        // A completion that was cut off is wrong, whatever it says.
        let ended = c.tokens.last() == Some(&sampling.end);
        Rollout::new(r.prompt, c, if ended { reward } else { 0.0 }, sampling.end)
    });
    let rollouts: Vec<Rollout> = rollouts.collect();
    Ok(rollouts.chunks(group_size).map(<[Rollout]>::to_vec).collect())
}

/// Why rollouts could not be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RolloutError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A prompt that the vocabulary cannot spell.
    #[error("a prompt cannot be encoded: {0}")]
    Encode(#[from] EncodeError),
    /// Prompt and completion do not fit the context.
    #[error(
        "the prompt {problem:?} has {prompt} tokens, which with max_new_tokens is over the context of {context}; raise model.context or lower max_new_tokens"
    )]
    TooLong {
        /// The prompt.
        problem: String,
        /// Its tokens.
        prompt: usize,
        /// The model's context.
        context: usize,
    },
}
