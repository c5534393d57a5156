//! The training loop without an engine: from a state to the jobs that its next step needs, and
//! from their outputs to the next state.
//!
//! Jobs that are open at the same time do not depend on each other: with a policy lag the rollouts
//! of steps to come are sampled beside the gradients of this one. What enters a step is fixed by
//! index, never by arrival, so the states that a run passes through are a pure function of its
//! file.

mod learning;
mod sampling;
mod supervised;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::config::{RunConfig, RunConfigError};
use super::evaluate::Examination;
use super::job::{Job, JobPath, OpenJob, Stage, SupplyError, Version};
use super::problems::Problems;
use super::report::{Phase, StepReport};
use super::rollout::RolloutError;
use super::samples::SampleGroup;
use super::state::{Evaluation, State};
use super::work::{Output, Work};
use crate::engine::EngineError;
use crate::learn::optimizer::{AdamWConfig, OptimizerError, UpdatePlan};
use crate::learn::weights::{GradientScale, WeightsError};
use crate::model::config::ModelConfig;
use crate::model::tokenizer::EncodeError;
use crate::model::weights::{Gradients, Weights};
use learning::Learning;
use sampling::Sampling;

/// Why a run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Rollouts could not be made.
    #[error(transparent)]
    Rollout(#[from] RolloutError),
    /// A trace that the vocabulary cannot spell.
    #[error("a trace cannot be encoded: {0}")]
    Encode(#[from] EncodeError),
    /// A trace that does not fit.
    #[error("a trace needs {needed} tokens, the context is {context}; raise model.context")]
    TraceTooLong {
        /// Tokens of prompt, trace and end.
        needed: usize,
        /// The model's context.
        context: usize,
    },
    /// The optimizer refused the gradient.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// Rollouts and settings do not fit.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Values left the range of the exact arithmetic.
    #[error(
        "{count} values were clamped in step {step} ({sites}), over the limit of {limit}; lower the learning rate, or start from an older checkpoint"
    )]
    Saturated {
        /// Step within the phase.
        step: u64,
        /// Clamped values.
        count: u64,
        /// Counts by site.
        sites: String,
        /// Largest count that is tolerated.
        limit: u64,
    },
}

/// Clamped values that any step may have; a large one may have one a token, because the first token
/// of a sequence has some large terms in every layer of many models. Beyond this the numbers mean
/// nothing.
pub const SATURATIONS_MAX: u64 = 10_000;

/// Longest completion when evaluating a run that says nothing of it.
pub const EVALUATED_TOKENS_MAX: usize = 256;

/// Something that a run got done.
#[derive(Clone, Debug, PartialEq)]
pub enum Advanced {
    /// An evaluation on held-out problems.
    Evaluation(Box<Evaluation>),
    /// A step; the state is at the boundary after it.
    Step(Box<StepReport>),
    /// A phase is complete, this one begins.
    Phase(Phase),
}

/// What the step at hand is doing.
#[derive(Debug)]
enum Now {
    /// At the boundary before a step.
    Boundary,
    /// Waiting for the gradient of traces.
    Supervised(supervised::Traces),
    /// Waiting for rollouts.
    Sampling,
    /// Learning from rollouts.
    Learning(Box<Learning>),
    /// All is computed; an evaluation, or the barrier, may hold the step back.
    Finished {
        report: Box<StepReport>,
        /// Updates that it made.
        updates: u32,
    },
}

/// A run as a state machine over jobs.
#[derive(Debug)]
pub struct Pipeline {
    /// The run file.
    pub config: RunConfig,
    model: ModelConfig,
    problems: Problems,
    state: State,
    version: Arc<Version>,
    reference: Option<Arc<Version>>,
    jobs: BTreeMap<JobPath, OpenJob>,
    sampling: VecDeque<Sampling>,
    examination: Option<Examination>,
    now: Now,
    barrier: bool,
    samples: VecDeque<SampleGroup>,
}

impl Pipeline {
    /// A run in the given state.
    pub fn new(
        config: RunConfig,
        problems: Problems,
        state: State,
    ) -> Result<Self, RunConfigError> {
        config.validate()?;
        let model = config.model()?;
        let version = |m: &Vec<Vec<f32>>| Version::new(Weights::quantize(&model, m));
        Ok(Self {
            version: version(&state.master()),
            reference: state.reference.as_ref().map(version),
            config,
            model,
            problems,
            state,
            jobs: BTreeMap::new(),
            sampling: VecDeque::new(),
            examination: None,
            now: Now::Boundary,
            barrier: false,
            samples: VecDeque::new(),
        })
    }

    /// All that changes. Between a boundary and the next the step at hand is not part of it.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Shape of the model.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// The current policy.
    pub fn version(&self) -> &Arc<Version> {
        &self.version
    }

    /// Some of the newest groups that the run learned from, oldest first. A pipeline that was just
    /// made has none.
    pub fn samples(&self) -> &VecDeque<SampleGroup> {
        &self.samples
    }

    /// Steps of all phases behind the state.
    pub fn ordinal(&self) -> u64 {
        self.state.ordinal(&self.config)
    }

    /// Steps of the current phase; 0 when done.
    pub fn phase_steps(&self) -> u64 {
        match self.state.phase {
            Phase::Sft => self.config.sft.as_ref().map_or(0, |s| s.steps),
            Phase::Rl => self.config.rl.as_ref().map_or(0, |s| s.steps),
            Phase::Done => 0,
        }
    }

    /// Updates that the step at hand has made.
    pub fn updates_in_step(&self) -> u32 {
        match &self.now {
            Now::Learning(learning) => learning.updates(),
            Now::Finished { updates, .. } => *updates,
            _ => 0,
        }
    }

    /// Longest completion when evaluating.
    pub fn max_new_tokens(&self) -> usize {
        let untrained = (self.model.context / 2).min(EVALUATED_TOKENS_MAX);
        self.config.rl.as_ref().map_or(untrained, |rl| rl.max_new_tokens)
    }

    /// The problems, and the imported model.
    pub fn problems(&self) -> &Problems {
        &self.problems
    }

    /// Whether nothing is under way that a checkpoint of [`Self::state`] would lose.
    pub fn is_at_boundary(&self) -> bool {
        matches!(self.now, Now::Boundary) && self.sampling.is_empty() && self.examination.is_none()
    }

    /// With the barrier up no step ends before all rollouts that it began are there, so that every
    /// boundary can be saved. It costs overlap, and changes no bit.
    pub fn set_barrier(&mut self, up: bool) {
        self.barrier = up;
    }

    /// Whether every step is done, and the last evaluation.
    pub fn is_done(&self) -> bool {
        self.state.phase == Phase::Done && self.examination.is_none() && !self.evaluation_due()
    }

    /// Jobs that wait for outputs, most urgent first.
    pub fn jobs(&self) -> impl Iterator<Item = &OpenJob> {
        self.jobs.values().filter(|j| !j.is_complete())
    }

    /// The open job at `path`.
    pub fn job(&self, path: JobPath) -> Option<&OpenJob> {
        self.jobs.get(&path)
    }

    /// Takes the output of `count` items of a job.
    pub fn supply(
        &mut self,
        path: JobPath,
        first: usize,
        count: usize,
        output: Output,
    ) -> Result<(), SupplyError> {
        let job = self.jobs.get_mut(&path).ok_or(SupplyError::NoJob)?;
        job.supply(first, count, output, &self.model)
    }

    /// Goes on as far as the outputs allow, to the next thing that got done. `None`: outputs are
    /// missing, or the run is done.
    pub fn advance(&mut self) -> Result<Option<Advanced>, TrainError> {
        loop {
            self.collect_rollouts()?;
            if let Some(evaluation) = self.finish_evaluation() {
                return Ok(Some(Advanced::Evaluation(Box::new(evaluation))));
            }
            match std::mem::replace(&mut self.now, Now::Boundary) {
                Now::Boundary => {
                    let began = self.begin()?;
                    if began.is_some() || matches!(self.now, Now::Boundary) {
                        return Ok(began);
                    }
                }
                Now::Supervised(traces) => match self.take_output(self.path(GRADIENT)) {
                    Some(output) => {
                        let report = Box::new(self.learn_traces(&traces, output)?);
                        self.now = Now::Finished { report, updates: 1 };
                    }
                    None => {
                        self.now = Now::Supervised(traces);
                        return Ok(None);
                    }
                },
                Now::Sampling => match self.take_sampled() {
                    Some(sampled) => {
                        self.now = Now::Learning(Box::new(self.start_learning(sampled)?))
                    }
                    None => {
                        self.now = Now::Sampling;
                        return Ok(None);
                    }
                },
                Now::Learning(mut learning) => {
                    if let Some(report) = self.go_on_learning(&mut learning)? {
                        let (report, updates) = (Box::new(report), learning.updates());
                        self.now = Now::Finished { report, updates };
                    } else {
                        self.now = Now::Learning(learning);
                        return Ok(None);
                    }
                }
                Now::Finished { report, updates } => {
                    let held = self.barrier && !self.sampling.is_empty();
                    if held || self.examination.is_some() {
                        self.now = Now::Finished { report, updates };
                        return Ok(None);
                    }
                    return self.commit(report).map(Some);
                }
            }
        }
    }

    /// Path of a job of this step.
    fn path(&self, stage: Stage) -> JobPath {
        JobPath { ordinal: self.ordinal(), stage }
    }

    fn open(&mut self, path: JobPath, version: &Arc<Version>, work: Work) {
        let job = Job { path, version: version.clone(), work };
        self.jobs.insert(path, OpenJob::new(job));
    }

    /// The output of a job, once it is complete.
    fn take_output(&mut self, path: JobPath) -> Option<Output> {
        let complete = self.jobs.get(&path).is_some_and(OpenJob::is_complete);
        complete.then(|| self.jobs.remove(&path).map(OpenJob::into_output))?
    }

    /// Leaves a boundary: into the next step, the next phase, or nowhere when all is done.
    fn begin(&mut self) -> Result<Option<Advanced>, TrainError> {
        if self.examination.is_none() && self.evaluation_due() {
            self.begin_evaluation()?;
        }
        if self.state.phase == Phase::Done {
            return Ok(None);
        }
        if self.state.step >= self.phase_steps() {
            if self.examination.is_some() {
                return Ok(None);
            }
            let next = if self.state.phase == Phase::Sft { Phase::Rl } else { Phase::Done };
            self.state.enter(next, &self.config);
            self.upload_reference();
            return Ok(Some(Advanced::Phase(self.state.phase)));
        }
        match self.state.phase {
            Phase::Sft => self.begin_traces()?,
            _ => {
                self.begin_rollouts()?;
                self.now = Now::Sampling;
            }
        }
        Ok(None)
    }

    /// The step becomes part of the state.
    fn commit(&mut self, report: Box<StepReport>) -> Result<Advanced, TrainError> {
        let count = report.saturations.values().sum();
        let limit = SATURATIONS_MAX.max(report.trained_tokens + report.sampled_tokens);
        if count > limit {
            let sites = format!("{:?}", report.saturations);
            return Err(TrainError::Saturated { step: report.step, count, sites, limit });
        }
        self.state.step += 1;
        Ok(Advanced::Step(report))
    }

    /// Whether the state should be evaluated before it goes on.
    fn evaluation_due(&self) -> bool {
        let (state, every) = (&self.state, self.config.eval.every);
        let boundary = match state.phase {
            Phase::Sft => false,
            Phase::Rl => state.step == 0,
            Phase::Done => true,
        };
        let periodic = every > 0 && state.step > 0 && state.step.is_multiple_of(every);
        let complete = state.phase != Phase::Done && state.step >= self.phase_steps();
        let last = state.evaluations.last().map(|e| (e.phase, e.step));
        (boundary || (periodic && !complete)) && last != Some((state.phase, state.step))
    }

    fn begin_evaluation(&mut self) -> Result<(), TrainError> {
        let (examination, [sampled, greedy]) = Examination::new(
            &self.problems,
            &self.model,
            self.problems.language(),
            &self.config.eval,
            self.max_new_tokens(),
            self.config.seed,
        )?;
        let version = self.version.clone();
        self.open(self.path(Stage::Evaluate), &version, sampled);
        self.open(self.path(Stage::EvaluateGreedy), &version, greedy);
        self.examination = Some(examination);
        Ok(())
    }

    fn finish_evaluation(&mut self) -> Option<Evaluation> {
        let paths = [self.path(Stage::Evaluate), self.path(Stage::EvaluateGreedy)];
        let complete = |p: &JobPath| self.jobs.get(p).is_some_and(OpenJob::is_complete);
        let weights = self.jobs.get(&paths[0])?.job.version.hash();
        if !paths.iter().all(complete) {
            return None;
        }
        let examination = self.examination.take()?;
        let [sampled, greedy] = paths.map(|p| self.take_output(p));
        let report = examination.report(
            &self.problems,
            self.problems.language(),
            weights,
            [sampled?, greedy?],
        );
        let (phase, step) = (self.state.phase, self.state.step);
        let evaluation = Evaluation { phase, step, report };
        self.state.evaluations.push(evaluation.clone());
        Some(evaluation)
    }

    /// One optimizer update from integer gradients, to the next version.
    fn update(
        &mut self,
        config: &AdamWConfig,
        gradients: &Gradients,
        scale: GradientScale,
    ) -> Result<UpdatePlan, OptimizerError> {
        let slices: Vec<&[i64]> = gradients.0.iter().map(Vec::as_slice).collect();
        let plan = self.state.optimizer.step(config, scale, &slices)?;
        let master = self.state.optimizer.tensors.iter().map(|t| Cow::Borrowed(&*t.master));
        let weights = Weights::quantize(&self.model, &master.collect::<Vec<Cow<'_, [f32]>>>());
        self.version = Version::new(weights);
        Ok(plan)
    }

    /// Makes the reference follow the state's.
    fn upload_reference(&mut self) {
        let version = |m: &Vec<Vec<f32>>| Version::new(Weights::quantize(&self.model, m));
        self.reference = self.state.reference.as_ref().map(version);
    }
}

/// The only gradient of a supervised step, the first of others.
const GRADIENT: Stage = Stage::Gradient { update: 0 };
