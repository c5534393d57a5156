//! Units: pieces of a job as bytes. A unit says everything that its result depends on, so its hash
//! names the result; a result's hash is its receipt.

use manyhands_shaders::twin::SITE_COUNT;
use serde::{Deserialize, Serialize};

use super::ids::Hash;
use super::share;
use crate::engine::{RowStats, Saturations};
use crate::model::config::ModelConfig;
use crate::model::generate::Completion;
use crate::model::weights::Gradients;
use crate::run::work::{Malformed, Output, Values, Work};

/// Largest unit.
pub const UNIT_BYTES_MAX: usize = 4 << 20;
/// Largest result.
pub const RESULT_BYTES_MAX: usize = 1 << 30;

/// A piece of work under named weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Hash of the weights.
    pub weights: Hash,
    /// What to compute.
    pub work: Work,
}

impl Unit {
    /// The bytes whose hash names the unit.
    pub fn encode(&self) -> Vec<u8> {
        let config = bincode::config::standard();
        bincode::serde::encode_to_vec(self, config).expect("a unit is plain data")
    }

    /// Reads a unit and checks that the model can compute it.
    pub fn decode(bytes: &[u8], model: &ModelConfig) -> Result<Self, Malformed> {
        if bytes.len() > UNIT_BYTES_MAX {
            return Err(Malformed("a unit that is too large"));
        }
        // The limit counts every integer in full, though most take fewer bytes.
        let config = bincode::config::standard().with_limit::<{ 8 * UNIT_BYTES_MAX }>();
        let (unit, read): (Self, _) = bincode::serde::decode_from_slice(bytes, config)
            .map_err(|_| Malformed("the bytes are no unit"))?;
        if read != bytes.len() {
            return Err(Malformed("bytes after the unit"));
        }
        unit.work.check(model)?;
        Ok(unit)
    }
}

/// `t`, total and moment of a token.
type Stats = (i32, u64, u64);

#[derive(Serialize, Deserialize)]
enum WireValues {
    Samples(Vec<(Vec<u32>, Vec<Stats>)>),
    Scores(Vec<Vec<Stats>>),
    Gradient(Vec<Vec<Stats>>, Vec<u8>),
}

#[derive(Serialize, Deserialize)]
struct WireOutput {
    saturations: [u64; SITE_COUNT],
    values: WireValues,
}

fn pack(stats: &[RowStats]) -> Vec<Stats> {
    stats.iter().map(|s| (s.t, s.total, s.moment)).collect()
}

fn unpack(stats: Vec<Stats>) -> Vec<RowStats> {
    let row = |(t, total, moment)| RowStats { t, total, moment, greedy: 0 };
    stats.into_iter().map(row).collect()
}

/// The bytes whose hash is the receipt.
pub fn encode_output(output: &Output) -> Vec<u8> {
    let all = |stats: &[Vec<RowStats>]| stats.iter().map(|s| pack(s)).collect();
    let values = match &output.values {
        Values::Samples(samples) => WireValues::Samples(
            samples.iter().map(|c| (c.tokens.clone(), pack(&c.stats))).collect(),
        ),
        Values::Scores(stats) => WireValues::Scores(all(stats)),
        Values::Gradient(stats, sum) => WireValues::Gradient(all(stats), share::encode(sum)),
    };
    let wire = WireOutput { saturations: output.saturations.0, values };
    bincode::serde::encode_to_vec(wire, bincode::config::standard()).expect("plain data")
}

/// Reads a result and checks that it can be that of `work`.
pub fn decode_output(bytes: &[u8], work: &Work, model: &ModelConfig) -> Result<Output, Malformed> {
    let config = bincode::config::standard().with_limit::<{ 2 * RESULT_BYTES_MAX }>();
    let (wire, read): (WireOutput, _) = bincode::serde::decode_from_slice(bytes, config)
        .map_err(|_| Malformed("the bytes are no result"))?;
    if read != bytes.len() {
        return Err(Malformed("bytes after the result"));
    }
    let values = match wire.values {
        WireValues::Samples(samples) => {
            let completion = |(tokens, stats)| Completion { tokens, stats: unpack(stats) };
            Values::Samples(samples.into_iter().map(completion).collect())
        }
        WireValues::Scores(stats) => Values::Scores(stats.into_iter().map(unpack).collect()),
        WireValues::Gradient(stats, bytes) => {
            if !matches!(work, Work::Gradient { .. }) {
                return Err(Malformed("another kind of result"));
            }
            let mut sum = Gradients::zeros(model);
            share::add_decoded(&bytes, &mut sum).map_err(|_| Malformed("the share is no share"))?;
            Values::Gradient(stats.into_iter().map(unpack).collect(), sum)
        }
    };
    let output = Output { saturations: Saturations(wire.saturations), values };
    output.check(work, model)?;
    Ok(output)
}

/// An upper bound of the size of the result of `work`: what a volunteer may announce.
pub fn result_bytes_max(work: &Work, model: &ModelConfig) -> u64 {
    // Varints: 5 bytes a token, 5 + 9 + 9 bytes of statistics, 9 of length a sequence.
    let tokens = |n: usize| n as u64 * 28 + 18;
    let stats = match work {
        Work::Sample { requests, max_new_tokens, .. } => {
            requests.len() as u64 * tokens(*max_new_tokens as usize)
        }
        Work::Check { claims, .. } => claims.iter().map(|c| tokens(c.len())).sum(),
        Work::Score { sequences, .. } => sequences.iter().map(|s| tokens(s.tokens.len())).sum(),
        Work::Gradient { sequences, .. } => {
            let share = model.parameter_count() as u64 * 9;
            share + sequences.iter().map(|s| tokens(s.tokens.len())).sum::<u64>()
        }
    };
    (4096 + stats).min(RESULT_BYTES_MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate::Request;
    use crate::run::work::Scored;

    fn model() -> ModelConfig {
        ModelConfig::preset("nano", 128, 32_768).expect("a preset")
    }

    /// A unit is refused by its length alone; one that is as long as it may be is read.
    #[test]
    fn unit_beyond_its_bound_is_refused() {
        let unit = |count| {
            let sequences = vec![Scored { tokens: vec![5; 32_768], first: 1 }; count];
            let work = Work::Score { temperature_scale: 4_000_000, sequences };
            Unit { weights: Hash([1; 32]), work }
        };
        let large = unit(UNIT_BYTES_MAX / 32_900);
        assert_eq!(Unit::decode(&large.encode(), &model()).as_ref(), Ok(&large));
        let beyond = unit(1 + UNIT_BYTES_MAX / 32_768).encode();
        assert!(beyond.len() > UNIT_BYTES_MAX);
        assert_eq!(Unit::decode(&beyond, &model()), Err(Malformed("a unit that is too large")));
    }

    /// What may be announced is never less than a correct result has, and bounded in any case.
    #[test]
    fn result_of_any_work_fits_what_may_be_announced() {
        let row = RowStats { t: i32::MAX, total: u64::MAX, moment: u64::MAX, greedy: 0 };
        let sample = |count: usize, new: u32| Work::Sample {
            seed: 0,
            temperature_scale: None,
            max_new_tokens: new,
            end: 2,
            requests: vec![Request { prompt: vec![1], stream: [0; 3] }; count],
        };
        let longest = Completion { tokens: vec![u32::MAX; 100], stats: vec![row; 100] };
        let values = Values::Samples(vec![longest; 20]);
        let output = Output { saturations: Saturations([u64::MAX; SITE_COUNT]), values };
        let bytes = encode_output(&output).len() as u64;
        let announced = result_bytes_max(&sample(20, 100), &model());
        assert!(bytes <= announced && announced < 2 * bytes + 8192, "{bytes} {announced}");
        let endless = result_bytes_max(&sample(100_000, 30_000), &model());
        assert_eq!(endless, RESULT_BYTES_MAX as u64);
    }

    /// A length that no bytes stand behind is refused without memory for it.
    #[test]
    fn result_that_claims_more_than_it_has_is_refused() {
        let work = Work::Score {
            temperature_scale: 4_000_000,
            sequences: vec![Scored { tokens: vec![5; 3], first: 1 }],
        };
        let mut bytes = vec![0; SITE_COUNT];
        // Scores, then a length of 2^60 sequences.
        bytes.extend([1, 253, 0, 0, 0, 0, 0, 0, 0, 16]);
        let refused = decode_output(&bytes, &work, &model());
        assert_eq!(refused, Err(Malformed("the bytes are no result")));
    }
}
