//! Rollouts: sampled completions with the sampler's exact statistics.

use std::f64::consts::LN_2;

use manyhands_shaders::twin::SITE_COUNT;
use serde::{Deserialize, Serialize};

use super::problems::{Drawn, Problems};
use crate::engine::RowStats;
use crate::model::config::ModelConfig;
use crate::model::generate::Completion;
use crate::model::tokenizer::{EncodeError, Tokenizer};
use crate::tasks::Problem;

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

    /// Scores a completion of `drawn`. One that was cut off is wrong, whatever it says.
    pub fn new(
        prompt: Vec<u32>,
        completion: Completion,
        problems: &Problems,
        drawn: &Drawn,
        tokenizer: &dyn Tokenizer,
    ) -> Self {
        let ended = completion.tokens.last() == Some(&tokenizer.end());
        let reward = || problems.score(drawn, &tokenizer.decode(&completion.tokens));
        Self {
            reward: if ended { reward() } else { 0.0 },
            prompt,
            ended,
            logprobs: completion.stats.iter().map(logprob).collect(),
            entropies: completion.stats.iter().map(entropy).collect(),
            entropy_centers: completion.stats.iter().map(entropy_center).collect(),
            tokens: completion.tokens,
        }
    }
}

/// The tokens of a problem's prompt, if prompt and completion fit the context.
pub fn prompt_tokens(
    problem: &Problem,
    model: &ModelConfig,
    tokenizer: &dyn Tokenizer,
    max_new_tokens: usize,
) -> Result<Vec<u32>, RolloutError> {
    let prompt = tokenizer.encode_prompt(&problem.prompt)?;
    if prompt.len() + max_new_tokens > model.context {
        let (problem, context) = (problem.prompt.clone(), model.context);
        return Err(RolloutError::TooLong { problem, prompt: prompt.len(), context });
    }
    Ok(prompt)
}

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
    /// Clamped values while sampling, by site.
    pub saturations: [u64; SITE_COUNT],
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

/// Why rollouts could not be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RolloutError {
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
        let of = |groups, kept| Sampled {
            step: 0,
            version: 0,
            groups,
            kept,
            useless: [0; 2],
            saturations: [0; SITE_COUNT],
        };
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
