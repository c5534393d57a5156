//! Jobs: what a run needs computed next, and the outputs of their parts as they come in.

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::parts::Parts;
use super::work::{Malformed, Output, Work};
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;

/// Where in a run some work belongs. Ordered as the run needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobPath {
    /// Steps of all phases before the step that waits for this.
    pub ordinal: u64,
    /// What the work is for.
    pub stage: Stage,
}

/// What a job is for, in the order of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stage {
    /// Completions of held-out problems by the weights before the step.
    Evaluate,
    /// The likeliest completion of each held-out problem.
    EvaluateGreedy,
    /// Completions to train on; `draw` counts refills.
    Rollout {
        /// 0 for the first draw.
        draw: u32,
    },
    /// Log-probabilities under the weights before the step.
    Proximal,
    /// Log-probabilities under the reference.
    Reference,
    /// Log-probabilities under the weights before mini-batch `update`, from 1.
    Policy {
        /// Index of the mini-batch.
        update: u32,
    },
    /// The gradient of mini-batch `update`.
    Gradient {
        /// Index of the mini-batch.
        update: u32,
    },
}

/// Weights and their hash, which is computed when somebody asks.
#[derive(Debug)]
pub struct Version {
    /// The weights.
    pub weights: Weights,
    hash: OnceLock<blake3::Hash>,
}

impl Version {
    /// A version of the weights.
    pub fn new(weights: Weights) -> Arc<Self> {
        Arc::new(Self { weights, hash: OnceLock::new() })
    }

    /// [`Weights::hash`].
    pub fn hash(&self) -> blake3::Hash {
        *self.hash.get_or_init(|| self.weights.hash())
    }
}

/// Work of a run, under the weights that do it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Where it belongs.
    pub path: JobPath,
    /// Under these weights.
    pub version: Arc<Version>,
    /// What to compute.
    pub work: Work,
}

/// An output that cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SupplyError {
    /// No such job is open.
    #[error("no such job is open")]
    NoJob,
    /// Some of the items are beyond the job's end, or are there already.
    #[error("the items are not missing from the job")]
    NotMissing,
    /// It cannot be the work's output.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// A job and the outputs of its parts so far.
#[derive(Debug)]
pub struct OpenJob {
    /// The job.
    pub job: Job,
    parts: Parts,
}

impl OpenJob {
    pub(super) fn new(job: Job) -> Self {
        let parts = Parts::of(&job.work);
        Self { job, parts }
    }

    /// Whether item `i` has no output yet.
    pub fn is_missing(&self, i: usize) -> bool {
        self.parts.is_missing(i)
    }

    /// Tokens that item `i` sampled, if it is one of those and is there.
    pub fn sampled_length(&self, i: usize) -> Option<usize> {
        self.parts.sampled_length(i)
    }

    /// Whether every item has an output.
    pub fn is_complete(&self) -> bool {
        self.parts.is_complete()
    }

    /// Takes the output of the items from `first` on.
    pub(super) fn supply(
        &mut self,
        first: usize,
        count: usize,
        output: Output,
        model: &ModelConfig,
    ) -> Result<(), SupplyError> {
        self.parts.supply(&self.job.work, first, count, output, model)
    }

    pub(super) fn into_output(self) -> Output {
        self.parts.into_output()
    }
}
