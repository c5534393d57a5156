//! Sampling completions: continuous batching over a key-value cache.
//!
//! The result of a request depends on the weights, its prompt and its draws, and on nothing else:
//! not on the batch it shared, not on the number of slots.

use manyhands_shaders::x1::philox;
use serde::{Deserialize, Serialize};

use super::decoder::Decoder;
use crate::engine::{Batch, Engine, EngineError, RowStats, Saturations};

/// One completion to sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Names the stream of random draws: with the position it is the generator's counter.
    pub stream: [u32; 3],
}

/// How to sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// Key of the generator.
    pub seed: u64,
    /// [`manyhands_shaders::twin::logits::temperature_scale`]; `None` takes the likeliest token.
    pub temperature_scale: Option<i32>,
    /// Longest completion, including the end token.
    pub max_new_tokens: usize,
    /// Token that ends a completion.
    pub end: u32,
    /// Sequences decoded at once.
    pub slots: usize,
}

/// A sampled completion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Tokens, with the end token if it came in time.
    pub tokens: Vec<u32>,
    /// Softmax statistics of each sampled token.
    pub stats: Vec<RowStats>,
}

/// The 64-bit draw of a stream at a position.
pub fn draw(seed: u64, stream: [u32; 3], position: u32) -> u64 {
    let r = philox([stream[0], stream[1], stream[2], position], [seed as u32, (seed >> 32) as u32]);
    u64::from(r[0]) << 32 | u64::from(r[1])
}

struct Active {
    request: usize,
    slot: usize,
    position: usize,
    next: Vec<u32>,
}

/// What was sampled, and what was clamped on the way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// One a request.
    pub completions: Vec<Completion>,
    /// Clamped values, as if each request had been computed by itself.
    pub saturations: Saturations,
}

/// A prompt that several requests begin with, all but its last token.
#[derive(Default)]
struct Shared {
    prompt: Vec<u32>,
    /// Clamped values of one pass over it.
    saturations: Saturations,
}

/// Samples one completion a request, in the order of the requests. Requests that follow each other
/// with the same prompt share its pass. `progress` is told the number of tokens sampled so far
/// after every step and may stop the work by returning `false`; the completions are then
/// incomplete.
pub async fn generate<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    requests: &[Request],
    sampling: &Sampling,
    mut progress: impl FnMut(usize, &[Completion]) -> bool,
) -> Result<Generated, EngineError> {
    let mut saturations = engine.take_saturations().await?;
    let mut done = vec![Completion::default(); requests.len()];
    let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
    let slots = sampling.slots.clamp(1, requests.len().max(1));
    // The last slot holds the prompt that is shared.
    let mut caches = decoder.caches(engine, slots + 1, longest + sampling.max_new_tokens);
    let mut shared = Shared::default();
    let mut free: Vec<usize> = (0..slots).rev().collect();
    let mut waiting = requests.iter().enumerate().peekable();
    let mut active: Vec<Active> = Vec::new();
    let mut sampled = 0;
    loop {
        while !free.is_empty()
            && let Some((request, Request { prompt, .. })) = waiting.next()
        {
            let slot = free.pop().expect("a slot is free");
            let (prefix, last) = prompt.split_at(prompt.len() - 1);
            let again = waiting.peek().is_some_and(|(_, next)| next.prompt == *prompt);
            if shared.prompt != *prompt && again && !prefix.is_empty() {
                saturations.merge(&engine.take_saturations().await?);
                let mut batch = Batch::default();
                batch.push(slots, 0, prefix);
                decoder.states(engine, &batch, &mut caches);
                shared.prompt.clone_from(prompt);
                shared.saturations = engine.take_saturations().await?;
            }
            if shared.prompt == *prompt {
                caches.iter_mut().for_each(|cache| engine.copy_slot(cache, slots, slot));
                saturations.merge(&shared.saturations);
                active.push(Active { request, slot, position: prefix.len(), next: last.to_vec() });
            } else {
                active.push(Active { request, slot, position: 0, next: prompt.clone() });
            }
        }
        if active.is_empty() {
            break;
        }
        let mut batch = Batch::default();
        let (mut last_rows, mut draws) = (Vec::new(), Vec::new());
        for a in &mut active {
            batch.push(a.slot, a.position, &a.next);
            a.position += a.next.len();
            last_rows.push(batch.rows() as u32 - 1);
            let stream = requests[a.request].stream;
            let draw = draw(sampling.seed, stream, done[a.request].tokens.len() as u32);
            draws.push(sampling.temperature_scale.map(|_| draw));
        }
        let mut h = decoder.states(engine, &batch, &mut caches);
        if last_rows.len() != batch.rows() {
            h = engine.rows(&h, &last_rows);
        }
        let logits = decoder.logits(engine, &h);
        let scale = sampling.temperature_scale.unwrap_or(UNIT_SCALE);
        let tokens = engine.sample(&logits, &draws, scale).await?;
        for (a, (token, stats)) in active.iter_mut().zip(tokens) {
            done[a.request].tokens.push(token);
            done[a.request].stats.push(stats);
            a.next = vec![token];
        }
        sampled += active.len();
        active.retain(|a| {
            let c = &done[a.request];
            let ended =
                c.tokens.last() == Some(&sampling.end) || c.tokens.len() >= sampling.max_new_tokens;
            if ended {
                free.push(a.slot);
            }
            !ended
        });
        if !progress(sampled, &done) {
            break;
        }
    }
    saturations.merge(&engine.take_saturations().await?);
    Ok(Generated { completions: done, saturations })
}

/// Temperature scale of the statistics when sampling is greedy: temperature 1.
pub(crate) const UNIT_SCALE: i32 = 24_204_406;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_scale_is_temperature_one() {
        assert_eq!(manyhands_shaders::twin::logits::temperature_scale(1.0), UNIT_SCALE);
    }
}
