//! A run on one machine: the pipeline's jobs, computed by one engine.

use std::sync::Arc;

use super::config::{RunConfig, RunConfigError};
use super::execute::execute;
use super::job::{Stage, Version};
use super::pipeline::{Advanced, Pipeline, TrainError};
use super::problems::Problems;
use super::report::{Part, Progress};
use super::state::State;
use crate::engine::Engine;
use crate::model::decoder::{Decoder, Loader};

/// Versions that are kept on the engine: the policy and the reference.
const DECODERS_MAX: usize = 2;

/// A run on an engine.
pub struct Trainer<'e, E: Engine> {
    engine: &'e E,
    /// The run.
    pub pipeline: Pipeline,
    /// Most recently used last.
    decoders: Vec<(Arc<Version>, Decoder<E>)>,
    loader: Loader<E>,
}

impl<'e, E: Engine> Trainer<'e, E> {
    /// A trainer in the given state. The engine was built for this model's constants.
    pub fn new(
        engine: &'e E,
        config: RunConfig,
        problems: Problems,
        state: State,
    ) -> Result<Self, RunConfigError> {
        let mut pipeline = Pipeline::new(config, problems, state)?;
        // One engine has nothing to overlap, and every boundary can be saved.
        pipeline.set_barrier(true);
        Ok(Self { engine, pipeline, decoders: Vec::new(), loader: Loader::default() })
    }

    /// All that changes.
    pub fn state(&self) -> &State {
        self.pipeline.state()
    }

    /// BLAKE3 hash of the current policy's weights.
    pub fn weights_hash(&self) -> blake3::Hash {
        self.pipeline.version().hash()
    }

    /// Works until the next thing got done; `None` when the run is.
    pub async fn advance(
        &mut self,
        observer: &mut dyn FnMut(Progress),
    ) -> Result<Option<Advanced>, TrainError> {
        loop {
            observer(Progress::Begins(Part::Update));
            if let Some(advanced) = self.pipeline.advance()? {
                return Ok(Some(advanced));
            }
            let Some(open) = self.pipeline.jobs().next() else { return Ok(None) };
            let job = open.job.clone();
            observer(Progress::Begins(part(job.path.stage)));
            self.load(&job.version);
            let (_, decoder) = &self.decoders[self.decoders.len() - 1];
            let report = |n| observer(Progress::Tokens(n));
            let output = execute(self.engine, decoder, &job.work, report).await?;
            let supplied = self.pipeline.supply(job.path, 0, job.work.items(), output);
            supplied.expect("an engine's output fits its work");
        }
    }

    /// Makes `version` the last of the decoders.
    fn load(&mut self, version: &Arc<Version>) {
        let known = self.decoders.iter().position(|(v, _)| Arc::ptr_eq(v, version));
        let entry = match known {
            Some(i) => self.decoders.remove(i),
            None => {
                let imported = self.pipeline.problems().imported().map(AsRef::as_ref);
                let decoder = self.loader.load(self.engine, &version.weights, imported);
                (version.clone(), decoder)
            }
        };
        let surplus = (self.decoders.len() + 1).saturating_sub(DECODERS_MAX);
        self.decoders.drain(..surplus);
        self.decoders.push(entry);
    }
}

/// The part of a step that a job belongs to.
pub fn part(stage: Stage) -> Part {
    match stage {
        Stage::Evaluate | Stage::EvaluateGreedy => Part::Evaluate,
        Stage::Rollout { .. } => Part::Rollout,
        Stage::Proximal | Stage::Reference | Stage::Policy { .. } => Part::Score,
        Stage::Gradient { .. } => Part::Gradient,
    }
}
