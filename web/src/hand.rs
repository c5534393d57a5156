//! The unit in hand: cut into parts, one engine each, and put together again.
//!
//! How it is cut changes nothing (`core::run::parts`), so that engines in workers of their own
//! take the place of threads, without memory that they share.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use manyhands_core::model::config::ModelConfig;
use manyhands_core::run::parts::Parts;
use manyhands_core::run::work::{Output, Work};
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::unit::{Unit, decode_output, encode_output};

/// Seconds that an engine should be busy with a part, where it is to rest between parts.
const PART_SECONDS: f64 = 1.0;
/// Parts that an engine computes of one unit, one after another.
const ROUNDS_MAX: f64 = 16.0;

/// Names a part: no two parts of a session have the same number.
pub type PartId = u32;

/// A part that is to be computed.
#[derive(Debug, PartialEq)]
pub struct Part {
    /// Its number.
    pub id: PartId,
    /// What to compute: a unit by itself.
    pub unit: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub struct Hand {
    /// The unit's hash.
    pub hash: Hash,
    /// The unit.
    pub unit: Unit,
    /// When it was begun, milliseconds.
    pub started_ms: f64,
    parts: Parts,
    waiting: VecDeque<(PartId, Range<usize>)>,
    out: BTreeMap<PartId, Range<usize>>,
    tokens: BTreeMap<PartId, u64>,
}

/// A unit that is done.
#[derive(Debug)]
pub struct Done {
    /// Its hash.
    pub hash: Hash,
    /// What it was for.
    pub kind: &'static str,
    /// The result.
    pub bytes: Vec<u8>,
    /// Its work.
    pub multiply_adds: u64,
}

/// What a unit is for, in a word.
pub fn kind(work: &Work) -> &'static str {
    match work {
        Work::Sample { .. } => "rollout",
        Work::Check { .. } => "check",
        Work::Score { .. } => "score",
        Work::Gradient { .. } => "gradient",
    }
}

/// Tokens that a work processes, at most.
fn tokens_max(work: &Work) -> u64 {
    match work {
        Work::Sample { requests, max_new_tokens, .. } => {
            requests.len() as u64 * u64::from(*max_new_tokens)
        }
        Work::Check { requests, claims, .. } => {
            let rows = requests.iter().zip(claims).map(|(r, c)| r.prompt.len() + c.len() - 1);
            rows.sum::<usize>() as u64
        }
        Work::Score { sequences, .. } => sequences.iter().map(|s| s.tokens.len() as u64 - 1).sum(),
        Work::Gradient { sequences, .. } => {
            sequences.iter().map(|s| s.tokens.len() as u64 - 1).sum()
        }
    }
}

impl Hand {
    /// Cuts a unit for so many engines. `speed` is that of one of them in multiply-adds a second;
    /// if they are to rest now and then, parts are small enough for it. Parts are numbered from
    /// `first_id`.
    pub fn new(
        hash: Hash,
        unit: Unit,
        model: &ModelConfig,
        (engines, speed, rests): (usize, f64, bool),
        first_id: PartId,
        now_ms: f64,
    ) -> Self {
        let items = unit.work.items();
        let sampled = match &unit.work {
            Work::Sample { max_new_tokens, .. } => *max_new_tokens as usize,
            _ => 0,
        };
        let cost = |i| unit.work.item_multiply_adds(i, sampled, model);
        let seconds = (0..items).map(cost).sum::<u64>() as f64 / (speed.max(1.0) * engines as f64);
        let rounds =
            if rests { (seconds / PART_SECONDS).ceil().clamp(1.0, ROUNDS_MAX) } else { 1.0 };
        let count = (engines.max(1) * rounds as usize).min(items);
        let cut = |i: usize| i * items / count;
        let waiting = (0..count).map(|i| (first_id + i as PartId, cut(i)..cut(i + 1))).collect();
        let (out, tokens) = (BTreeMap::new(), BTreeMap::new());
        let parts = Parts::of(&unit.work);
        Self { hash, unit, started_ms: now_ms, parts, waiting, out, tokens }
    }

    /// Parts of which nobody has begun.
    pub fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// The next part, for an engine that has nothing to do.
    pub fn take(&mut self) -> Option<Part> {
        let (id, items) = self.waiting.pop_front()?;
        let work = self.unit.work.slice(items.clone());
        self.out.insert(id, items);
        Some(Part { id, unit: Unit { weights: self.unit.weights, work }.encode() })
    }

    /// An engine has processed so many tokens of a part. Whether it is one of this unit's.
    pub fn progress(&mut self, id: PartId, tokens: u64) -> bool {
        let known = self.out.contains_key(&id);
        if known {
            self.tokens.insert(id, tokens);
        }
        known
    }

    /// Tokens processed, and to be processed at most.
    pub fn tokens(&self) -> (u64, u64) {
        (self.tokens.values().sum(), tokens_max(&self.unit.work))
    }

    /// Takes the result of a part; `Some` once the unit is done. An error is the engine's.
    pub fn computed(
        &mut self,
        id: PartId,
        bytes: Vec<u8>,
        model: &ModelConfig,
    ) -> Result<Option<Done>, String> {
        // A part of an earlier unit, which nobody waits for any more.
        let Some(items) = self.out.remove(&id) else { return Ok(None) };
        let work = self.unit.work.slice(items.clone());
        let output = decode_output(&bytes, &work, model).map_err(|e| e.to_string())?;
        let whole = items.len() == self.unit.work.items();
        let done = |output: &Output, bytes| Done {
            hash: self.hash,
            kind: kind(&self.unit.work),
            multiply_adds: self.unit.work.multiply_adds(output, model),
            bytes,
        };
        if whole {
            return Ok(Some(done(&output, bytes)));
        }
        let supplied = self.parts.supply(&self.unit.work, items.start, items.len(), output, model);
        supplied.map_err(|e| e.to_string())?;
        if !self.parts.is_complete() {
            return Ok(None);
        }
        let output = std::mem::replace(&mut self.parts, Parts::of(&self.unit.work)).into_output();
        Ok(Some(done(&output, encode_output(&output))))
    }
}

#[cfg(test)]
mod tests {
    use manyhands_core::engine::cpu::Cpu;
    use manyhands_core::model::decoder::Decoder;
    use manyhands_core::model::generate::Request;
    use manyhands_core::model::init::master_weights;
    use manyhands_core::model::weights::Weights;
    use manyhands_core::run::execute::execute;
    use manyhands_core::run::work::{Seed, Seeded};

    use super::*;

    fn works() -> Vec<Work> {
        let tokens = |i: u32| (0..9 + i).map(|t| (t * 7 + i) % 100 + 3).collect::<Vec<u32>>();
        let requests = (0..5).map(|i| Request { prompt: tokens(i), stream: [i, 0, 0] }).collect();
        let seeds = |n: usize| vec![Seed { weight: 65_536, ..Seed::default() }; n];
        let sequences = (0..5).map(|i| {
            let tokens = tokens(i);
            Seeded { seeds: seeds(tokens.len() - 2), first: 2, tokens }
        });
        vec![
            Work::Sample {
                seed: 3,
                temperature_scale: Some(24_204_406),
                max_new_tokens: 7,
                end: 2,
                requests,
            },
            Work::Gradient { temperature_scale: 24_204_406, sequences: sequences.collect() },
        ]
    }

    /// Breaks if a receipt could depend on how many engines a tab has, or on who is done first.
    #[test]
    fn unit_cut_in_any_way_has_the_same_result() {
        let model = ModelConfig::preset("nano", 128, 64).unwrap();
        let weights = Weights::quantize(&model, &master_weights(&model, 1));
        let engine = Cpu::new(model.constants(), 1, None);
        let decoder = Decoder::new(&engine, &weights);
        let run = |work: &Work| {
            encode_output(&pollster::block_on(execute(&engine, &decoder, work, |_| ())).unwrap())
        };
        for work in works() {
            let unit = Unit { weights: weights.hash().into(), work };
            let (hash, whole) = (Hash::of(&unit.encode()), run(&unit.work));
            for (engines, rests) in [(1, false), (2, false), (3, false), (9, false), (2, true)] {
                let setup = (engines, 1e5, rests);
                let mut hand = Hand::new(hash, unit.clone(), &model, setup, 7, 0.0);
                let mut parts: Vec<Part> = std::iter::from_fn(|| hand.take()).collect();
                assert!(rests || parts.len() == engines.min(5), "{} parts", parts.len());
                parts.reverse();
                let mut done = None;
                for part in parts {
                    assert!(done.is_none());
                    let work = Unit::decode(&part.unit, &model).unwrap().work;
                    done = hand.computed(part.id, run(&work), &model).unwrap();
                }
                let done = done.unwrap();
                assert_eq!((done.hash, done.bytes == whole), (hash, true), "{engines} engines");
                assert!(done.multiply_adds > 0);
            }
        }
    }

    #[test]
    fn result_of_another_kind_is_refused_and_of_another_unit_ignored() {
        let model = ModelConfig::preset("nano", 128, 64).unwrap();
        let [sample, _] = works().try_into().unwrap();
        let unit = Unit { weights: Hash([0; 32]), work: sample };
        let mut hand = Hand::new(Hash([1; 32]), unit, &model, (2, 1e9, false), 0, 0.0);
        let part = hand.take().unwrap();
        assert!(hand.computed(99, vec![1, 2, 3], &model).unwrap().is_none());
        assert!(hand.computed(part.id, vec![1, 2, 3], &model).is_err());
    }
}
