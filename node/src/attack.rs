//! Volunteers that lie, as real processes: to show that lies are found. Only in builds with the
//! feature `attacks`.

use clap::ValueEnum;
use manyhands_core::run::work::{Output, Values, Work};
use manyhands_core::swarm::unit::encode_output;

/// How to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attack {
    /// Random bytes.
    Random,
    /// A result of zeros.
    Zeros,
    /// Gradients of the wrong sign; everything else is honest.
    SignFlip,
    /// Gradients a hundred times too large.
    Scale,
    /// One bit of a gradient.
    BitFlip,
    /// Completions cut short by an early end.
    EarlyEnd,
    /// Honest until trusted, then one unit in twenty is false.
    Rarely,
}

/// A liar and what it remembers.
pub struct Liar {
    attack: Attack,
    units: u64,
}

impl Liar {
    /// Begins to lie.
    pub fn new(attack: Attack) -> Self {
        Self { attack, units: 0 }
    }

    /// The bytes that are sent instead of `output`.
    pub fn falsify(&mut self, work: &Work, mut output: Output) -> Vec<u8> {
        self.units += 1;
        match (self.attack, &mut output.values) {
            (Attack::Random, _) => {
                let mut noise = vec![0; 512];
                blake3::Hasher::new()
                    .update(&self.units.to_le_bytes())
                    .finalize_xof()
                    .fill(&mut noise);
                return noise;
            }
            (Attack::Zeros, _) => return vec![0; 512],
            (Attack::SignFlip, Values::Gradient(_, sum)) => {
                sum.0.iter_mut().flatten().for_each(|g| *g = -*g);
            }
            (Attack::Scale, Values::Gradient(_, sum)) => {
                sum.0.iter_mut().flatten().for_each(|g| *g *= 100);
            }
            (Attack::BitFlip, Values::Gradient(_, sum)) => flip(&mut sum.0),
            (Attack::Rarely, Values::Gradient(_, sum))
                if self.units > 20 && self.units.is_multiple_of(20) =>
            {
                flip(&mut sum.0);
            }
            (Attack::EarlyEnd, Values::Samples(samples)) => {
                if let Work::Sample { end, .. } = work {
                    for c in samples.iter_mut().filter(|c| c.tokens.len() > 2) {
                        c.tokens.truncate(2);
                        c.stats.truncate(2);
                        c.tokens[1] = *end;
                    }
                }
            }
            _ => {}
        }
        encode_output(&output)
    }
}

fn flip(sum: &mut [Vec<i64>]) {
    if let Some(g) = sum.first_mut().and_then(|t| t.first_mut()) {
        *g ^= 1;
    }
}
