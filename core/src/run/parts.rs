//! The outputs of a work's parts, put together as they come in.
//!
//! However the work was cut, and in whatever order its parts come, the whole is the same:
//! values are put side by side, gradients and counts of clamped values are integer sums.

use super::job::SupplyError;
use super::work::{Malformed, Output, Values, Work};
use crate::engine::Saturations;
use crate::model::config::ModelConfig;
use crate::model::generate::Completion;
use crate::model::weights::Gradients;

/// What has come in so far of the output of a work.
#[derive(Debug)]
pub struct Parts {
    present: Vec<bool>,
    missing: usize,
    output: Output,
}

impl Parts {
    /// Nothing yet of the output of `work`.
    pub fn of(work: &Work) -> Self {
        let n = work.items();
        let values = match work {
            Work::Sample { .. } | Work::Check { .. } => {
                Values::Samples(vec![Completion::default(); n])
            }
            Work::Score { .. } => Values::Scores(vec![Vec::new(); n]),
            Work::Gradient { .. } => Values::Gradient(vec![Vec::new(); n], Gradients(Vec::new())),
        };
        let output = Output { saturations: Saturations::default(), values };
        Self { present: vec![false; n], missing: n, output }
    }

    /// Whether item `i` has no output yet.
    pub fn is_missing(&self, i: usize) -> bool {
        !self.present[i]
    }

    /// Tokens that item `i` sampled, if it is one of those and is there.
    pub fn sampled_length(&self, i: usize) -> Option<usize> {
        let Values::Samples(samples) = &self.output.values else { return None };
        samples.get(i).map(|c| c.tokens.len()).filter(|n| *n > 0)
    }

    /// Whether every item has an output.
    pub fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Takes the output of the `count` items of `work` from `first` on.
    pub fn supply(
        &mut self,
        work: &Work,
        first: usize,
        count: usize,
        output: Output,
        model: &ModelConfig,
    ) -> Result<(), SupplyError> {
        let end = first.checked_add(count).filter(|&end| count > 0 && end <= self.present.len());
        let end = end.ok_or(SupplyError::NotMissing)?;
        if self.present[first..end].contains(&true) {
            return Err(SupplyError::NotMissing);
        }
        output.check(&work.slice(first..end), model)?;
        match (&mut self.output.values, output.values) {
            (Values::Samples(all), Values::Samples(new)) => put(&mut all[first..end], new),
            (Values::Scores(all), Values::Scores(new)) => put(&mut all[first..end], new),
            (Values::Gradient(all, sum), Values::Gradient(new, share)) => {
                put(&mut all[first..end], new);
                if sum.0.is_empty() {
                    *sum = share;
                } else {
                    sum.add(&share);
                }
            }
            _ => return Err(Malformed("another kind of result").into()),
        }
        self.output.saturations.merge(&output.saturations);
        self.present[first..end].fill(true);
        self.missing -= count;
        Ok(())
    }

    /// The output of the whole, once it is complete.
    pub fn into_output(self) -> Output {
        self.output
    }
}

fn put<T>(to: &mut [T], from: Vec<T>) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from;
    }
}
