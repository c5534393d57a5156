//! What an engine is asked to compute for a run: pure functions of weights and inputs.
//!
//! A [`Work`] is a list of independent items (requests or sequences). It can be cut anywhere:
//! the output of the whole is the concatenation, for gradients the integer sum, of the outputs of
//! its parts. Nothing in an output depends on who computed it, where, when, or beside what.

use std::ops::Range;

use manyhands_shaders::twin::logits::{ENTROPY_WEIGHT_MAX, T_MAX};
use manyhands_shaders::x1::LIM;
use serde::{Deserialize, Serialize};

use crate::engine::{RowStats, Saturations, SeedRow};
use crate::model::config::ModelConfig;
use crate::model::generate::{Completion, Request};
use crate::model::weights::{Gradients, shapes};

/// Clamped values that one result may report of a site: sums of many results stay below 2^64.
const SATURATIONS_END: u64 = 1 << 40;

/// Seed of one trained token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// Weight of `-log p(token)` in the loss, Q16 times the loss scale.
    pub weight: i32,
    /// Weight of the entropy bonus; 0 for none.
    pub entropy_weight: i32,
    /// Mean of `t` under the sampler, `FX(16)`.
    pub entropy_center: i32,
}

/// A sequence whose tokens from `first` on are scored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scored {
    /// Prompt and completion.
    pub tokens: Vec<u32>,
    /// Index of the first scored token, at least 1.
    pub first: u32,
}

/// A sequence whose tokens from `first` on are trained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seeded {
    /// Prompt and completion.
    pub tokens: Vec<u32>,
    /// Index of the first trained token, at least 1.
    pub first: u32,
    /// One a token from `first` on.
    pub seeds: Vec<Seed>,
}

/// Something to compute under given weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Sample one completion a request.
    Sample {
        /// Key of the generator.
        seed: u64,
        /// `None` takes the likeliest token.
        temperature_scale: Option<i32>,
        /// Longest completion, the end token included.
        max_new_tokens: u32,
        /// Token that ends a completion.
        end: u32,
        /// Prompts and their streams of random draws.
        requests: Vec<Request>,
    },
    /// Sample once more what somebody says was sampled: one prefill over prompt and claimed tokens
    /// recomputes every logit and draw, because decoding equals the full forward pass. The output
    /// is that of the sampling if and only if the claim is right.
    Check {
        /// Key of the generator.
        seed: u64,
        /// `None` takes the likeliest token.
        temperature_scale: Option<i32>,
        /// Prompts and their streams of random draws.
        requests: Vec<Request>,
        /// The claimed tokens of each request.
        claims: Vec<Vec<u32>>,
    },
    /// Statistics of every token from `first` on.
    Score {
        /// Temperature of the distribution.
        temperature_scale: i32,
        /// What to score.
        sequences: Vec<Scored>,
    },
    /// The gradient of the seeded loss, and the statistics of the trained tokens.
    Gradient {
        /// Temperature of the distribution.
        temperature_scale: i32,
        /// What to differentiate.
        sequences: Vec<Seeded>,
    },
}

/// What a work's items give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Values {
    /// One completion a request.
    Samples(Vec<Completion>),
    /// Statistics of the scored tokens of each sequence.
    Scores(Vec<Vec<RowStats>>),
    /// Statistics of the trained tokens of each sequence, and the sum of the gradients.
    Gradient(Vec<Vec<RowStats>>, Gradients),
}

/// The result of a work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Clamped values.
    pub saturations: Saturations,
    /// One value an item.
    pub values: Values,
}

/// Work or a result that no correct program makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

fn require(holds: bool, problem: &'static str) -> Result<(), Malformed> {
    if holds { Ok(()) } else { Err(Malformed(problem)) }
}

impl Work {
    /// Number of items.
    pub fn items(&self) -> usize {
        match self {
            Self::Sample { requests, .. } | Self::Check { requests, .. } => requests.len(),
            Self::Score { sequences, .. } => sequences.len(),
            Self::Gradient { sequences, .. } => sequences.len(),
        }
    }

    /// The part with these items.
    pub fn slice(&self, items: Range<usize>) -> Self {
        match self {
            Self::Sample { seed, temperature_scale, max_new_tokens, end, requests } => {
                Self::Sample {
                    seed: *seed,
                    temperature_scale: *temperature_scale,
                    max_new_tokens: *max_new_tokens,
                    end: *end,
                    requests: requests[items].to_vec(),
                }
            }
            Self::Check { seed, temperature_scale, requests, claims } => Self::Check {
                seed: *seed,
                temperature_scale: *temperature_scale,
                requests: requests[items.clone()].to_vec(),
                claims: claims[items].to_vec(),
            },
            Self::Score { temperature_scale, sequences } => Self::Score {
                temperature_scale: *temperature_scale,
                sequences: sequences[items].to_vec(),
            },
            Self::Gradient { temperature_scale, sequences } => Self::Gradient {
                temperature_scale: *temperature_scale,
                sequences: sequences[items].to_vec(),
            },
        }
    }

    /// The work whose output is the same as this one's if `claimed` is right: itself, except for
    /// samples, which are cheaper to check than to make.
    pub fn audit(&self, claimed: &Output) -> Self {
        match (self, &claimed.values) {
            (Self::Sample { seed, temperature_scale, requests, .. }, Values::Samples(samples)) => {
                Self::Check {
                    seed: *seed,
                    temperature_scale: *temperature_scale,
                    requests: requests.clone(),
                    claims: samples.iter().map(|c| c.tokens.clone()).collect(),
                }
            }
            _ => self.clone(),
        }
    }

    /// Checks that a model of this shape can compute it: work may come from anywhere.
    pub fn check(&self, model: &ModelConfig) -> Result<(), Malformed> {
        let tokens = |tokens: &[u32]| tokens.iter().all(|&t| (t as usize) < model.vocabulary);
        let sequence = |t: &[u32], first: u32| {
            require(tokens(t), "a token is outside the vocabulary")?;
            require(t.len() >= 2 && t.len() <= model.context + 1, "a sequence does not fit")?;
            require((1..t.len()).contains(&(first as usize)), "nothing is scored")
        };
        // 0.05 to 20, as `temperature_scale` makes them.
        let scale = |s: i32| require((1_000_000..500_000_000).contains(&s), "no temperature");
        require(self.items() > 0, "no items")?;
        match self {
            Self::Sample { temperature_scale, max_new_tokens, end, requests, .. } => {
                temperature_scale.map_or(Ok(()), scale)?;
                require((*end as usize) < model.vocabulary, "the end is no token")?;
                require(*max_new_tokens > 0, "nothing to sample")?;
                requests.iter().try_for_each(|r| {
                    let length = r.prompt.len() + *max_new_tokens as usize;
                    require(!r.prompt.is_empty() && tokens(&r.prompt), "a prompt is no text")?;
                    require(length <= model.context, "a request is over the context")
                })
            }
            Self::Check { temperature_scale, requests, claims, .. } => {
                temperature_scale.map_or(Ok(()), scale)?;
                require(requests.len() == claims.len(), "a claim is missing")?;
                requests.iter().zip(claims).try_for_each(|(r, claim)| {
                    let known = tokens(&r.prompt) && tokens(claim);
                    require(known, "a token is outside the vocabulary")?;
                    require(!r.prompt.is_empty() && !claim.is_empty(), "nothing to check")?;
                    require(r.prompt.len() + claim.len() <= model.context, "a claim does not fit")
                })
            }
            Self::Score { temperature_scale, sequences } => {
                scale(*temperature_scale)?;
                sequences.iter().try_for_each(|s| sequence(&s.tokens, s.first))
            }
            Self::Gradient { temperature_scale, sequences } => {
                scale(*temperature_scale)?;
                sequences.iter().try_for_each(|s| {
                    sequence(&s.tokens, s.first)?;
                    let trained = s.tokens.len() - s.first as usize;
                    require(s.seeds.len() == trained, "seeds and tokens differ in number")?;
                    let bounded = |s: &Seed| {
                        s.weight.unsigned_abs() <= LIM.unsigned_abs()
                            && s.entropy_weight.unsigned_abs() <= ENTROPY_WEIGHT_MAX.unsigned_abs()
                            && (0..=T_MAX).contains(&s.entropy_center)
                    };
                    require(s.seeds.iter().all(bounded), "a seed is out of range")
                })
            }
        }
    }

    /// Multiply-adds of the matrix products behind an output: what is credited. The length of
    /// completions is taken from the output.
    pub fn multiply_adds(&self, output: &Output, model: &ModelConfig) -> u64 {
        let sampled = |i: usize| match &output.values {
            Values::Samples(completions) => completions.get(i).map_or(0, |c| c.tokens.len()),
            _ => 0,
        };
        (0..self.items()).map(|i| self.item_multiply_adds(i, sampled(i), model)).sum()
    }

    /// Multiply-adds of item `i`, if it samples `sampled` tokens.
    pub fn item_multiply_adds(&self, i: usize, sampled: usize, model: &ModelConfig) -> u64 {
        let forward = |rows: usize| rows as u64 * model.multiply_adds(rows.div_ceil(2));
        match self {
            Self::Sample { requests, .. } => {
                forward((requests[i].prompt.len() + sampled).saturating_sub(1))
            }
            Self::Check { requests, claims, .. } => {
                forward(requests[i].prompt.len() + claims[i].len() - 1)
            }
            Self::Score { sequences, .. } => forward(sequences[i].tokens.len() - 1),
            Self::Gradient { sequences, .. } => {
                let rows = sequences[i].tokens.len() - 1;
                rows as u64 * model.gradient_multiply_adds(rows.div_ceil(2))
            }
        }
    }
}

impl Seeded {
    /// Seed rows of every next token.
    pub fn rows(&self) -> Vec<SeedRow> {
        let before = vec![SeedRow::default(); self.first as usize - 1];
        let trained = self.tokens[self.first as usize..].iter().zip(&self.seeds);
        let trained = trained.map(|(&target, s)| SeedRow {
            target,
            weight: s.weight,
            entropy_weight: s.entropy_weight,
            entropy_center: s.entropy_center,
        });
        before.into_iter().chain(trained).collect()
    }
}

impl Output {
    /// Checks that this can be the output of `work`: counts, ranges and ends.
    pub fn check(&self, work: &Work, model: &ModelConfig) -> Result<(), Malformed> {
        let few = self.saturations.0.iter().all(|&n| n < SATURATIONS_END);
        require(few, "more clamped values than any work has")?;
        let one = 1_u64 << 23;
        let largest = one * model.vocabulary as u64;
        let row = |r: &RowStats| {
            let fits = (0..=T_MAX).contains(&r.t) && (one..=largest).contains(&r.total);
            require(fits && r.moment <= r.total * T_MAX as u64, "statistics are out of range")
        };
        let counts = |stats: &[Vec<RowStats>], scored: &mut dyn Iterator<Item = usize>| {
            let expected: Vec<usize> = scored.collect();
            let got: Vec<usize> = stats.iter().map(Vec::len).collect();
            require(expected == got, "statistics and tokens differ in number")?;
            stats.iter().flatten().try_for_each(row)
        };
        match (&self.values, work) {
            (Values::Samples(samples), Work::Sample { max_new_tokens, end, requests, .. }) => {
                require(samples.len() == requests.len(), "a completion is missing")?;
                samples.iter().try_for_each(|c| {
                    let inner = &c.tokens[..c.tokens.len().saturating_sub(1)];
                    let cut = c.tokens.len() == *max_new_tokens as usize;
                    let ends = c.tokens.last() == Some(end) && !inner.contains(end)
                        || cut && !c.tokens.contains(end);
                    require(ends && c.tokens.len() <= *max_new_tokens as usize, "a wrong end")?;
                    let known = c.tokens.iter().all(|&t| (t as usize) < model.vocabulary);
                    require(known, "a token is outside the vocabulary")?;
                    require(c.stats.len() == c.tokens.len(), "statistics are missing")?;
                    c.stats.iter().try_for_each(row)
                })
            }
            (Values::Samples(samples), Work::Check { requests, .. }) => {
                require(samples.len() == requests.len(), "a completion is missing")
            }
            (Values::Scores(stats), Work::Score { sequences, .. }) => {
                counts(stats, &mut sequences.iter().map(|s| s.tokens.len() - s.first as usize))
            }
            (Values::Gradient(stats, gradients), Work::Gradient { sequences, .. }) => {
                let shapes = shapes(model);
                let mut sizes = shapes.iter().map(|s| s.rows * s.cols);
                let fits = gradients.0.len() == shapes.len()
                    && gradients.0.iter().all(|g| sizes.next() == Some(g.len()));
                require(fits, "the gradient has another shape")?;
                counts(stats, &mut sequences.iter().map(|s| s.seeds.len()))
            }
            _ => Err(Malformed("another kind of result")),
        }
    }
}
