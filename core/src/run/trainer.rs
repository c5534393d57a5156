//! The training loop as a state machine: state in, one step, state out.
//!
//! A run is a pure function of its file. All that a step reads is in [`State`], and a state that
//! was saved and loaded continues with the same bits.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::config::{RunConfig, RunConfigError};
use super::problems::Problems;
use super::report::{EvalReport, Phase, Progress, StepReport, saturation_map};
use super::rl::Sampled;
use super::rollout::RolloutError;
use super::{evaluate, rl, sft};
use crate::checkpoint::{
    CheckpointError, Manifest, OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE, decode_floats,
    encode_floats, encode_weights,
};
use crate::engine::{Engine, EngineError};
use crate::learn::entropy::EntropyBand;
use crate::learn::optimizer::{AdamW, AdamWConfig, OptimizerError, TensorState, UpdatePlan};
use crate::learn::reset::ResetState;
use crate::learn::weights::{GradientScale, WeightsError};
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::init::master_weights;
use crate::model::tokenizer::EncodeError;
use crate::model::weights::{Weights, shapes};

/// Why a step failed. The trainer may be between two updates then: go on from a checkpoint.
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

/// Clamped values a step may have. Beyond this the numbers mean nothing.
pub const SATURATIONS_MAX: u64 = 10_000;

/// Everything that a step reads and writes.
#[derive(Clone, Debug)]
pub struct State {
    /// What the run is doing.
    pub phase: Phase,
    /// Steps done in this phase.
    pub step: u64,
    /// Master weights and moments.
    pub optimizer: AdamW,
    /// Master weights of the reference policy, while there is one.
    pub reference: Option<Vec<Vec<f32>>>,
    /// Entropy controller.
    pub entropy_band: Option<EntropyBand>,
    /// Memory of the reset policy.
    pub reset: ResetState,
    /// Rollouts of steps to come, sampled `policy_lag` versions ahead.
    pub pending: VecDeque<Sampled>,
    /// Evaluations so far.
    pub evaluations: Vec<Evaluation>,
}

/// An evaluation and when it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Phase of the run.
    pub phase: Phase,
    /// Steps done in that phase.
    pub step: u64,
    /// Result.
    pub report: EvalReport,
}

/// The part of [`State`] that is JSON in a checkpoint.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Scalars {
    config: RunConfig,
    phase: Phase,
    step: u64,
    moment_step: u64,
    update_count: u64,
    entropy_band: Option<EntropyBand>,
    reset: ResetState,
    pending: VecDeque<Sampled>,
    evaluations: Vec<Evaluation>,
}

const MASTER: &str = "master";
const FIRST_MOMENT: &str = "first_moment";
const SECOND_MOMENT: &str = "second_moment";
const REFERENCE: &str = "reference";

impl State {
    /// The state before the first step.
    pub fn new(config: &RunConfig, model: &ModelConfig) -> Self {
        let decays = shapes(model).into_iter().map(|s| s.rows > 1);
        let master = master_weights(model, config.seed);
        let tensors = master.into_iter().zip(decays).map(|(m, d)| TensorState::new(m, d));
        let mut state = Self {
            phase: Phase::Sft,
            step: 0,
            optimizer: AdamW::new(tensors.collect()),
            reference: None,
            entropy_band: None,
            reset: ResetState::default(),
            pending: VecDeque::new(),
            evaluations: Vec::new(),
        };
        if config.sft.is_none() {
            state.enter(Phase::Rl, config);
        }
        state
    }

    /// Begins a phase that has work to do, or ends the run.
    fn enter(&mut self, phase: Phase, config: &RunConfig) {
        self.step = 0;
        self.phase = match (phase, &config.rl) {
            (Phase::Rl, None) => Phase::Done,
            (phase, _) => phase,
        };
        let Some(rl) = config.rl.as_ref().filter(|_| self.phase == Phase::Rl) else { return };
        // A new objective: moments and schedule of the supervised phase do not carry over.
        self.optimizer.reset();
        self.optimizer.update_count = 0;
        self.reference = (rl.learn.loss.kl.beta > 0.0).then(|| self.master());
        self.entropy_band = rl.learn.entropy.as_ref().map(|c| c.start());
    }

    /// Copy of the master weights.
    pub fn master(&self) -> Vec<Vec<f32>> {
        self.optimizer.tensors.iter().map(|t| t.master.clone()).collect()
    }

    /// The files of a checkpoint, and its manifest.
    pub fn save(
        &self,
        config: &RunConfig,
        model: &ModelConfig,
    ) -> (Manifest, BTreeMap<String, Vec<u8>>) {
        let tensors = &self.optimizer.tensors;
        let group =
            |f: fn(&TensorState) -> &Vec<f32>| tensors.iter().map(|t| f(t).clone()).collect();
        let mut floats = BTreeMap::from([
            (MASTER.to_string(), group(|t| &t.master)),
            (FIRST_MOMENT.to_string(), group(|t| &t.first_moment)),
            (SECOND_MOMENT.to_string(), group(|t| &t.second_moment)),
        ]);
        if let Some(reference) = &self.reference {
            floats.insert(REFERENCE.to_string(), reference.clone());
        }
        let scalars = Scalars {
            config: config.clone(),
            phase: self.phase,
            step: self.step,
            moment_step: self.optimizer.moment_step,
            update_count: self.optimizer.update_count,
            entropy_band: self.entropy_band,
            reset: self.reset,
            pending: self.pending.clone(),
            evaluations: self.evaluations.clone(),
        };
        let weights = Weights::quantize(model, &self.master());
        let files = BTreeMap::from([
            (WEIGHTS_FILE.to_string(), encode_weights(&weights)),
            (OPTIMIZER_FILE.to_string(), encode_floats(model, &floats)),
            (
                STATE_FILE.to_string(),
                serde_json::to_vec_pretty(&scalars).expect("the state is plain data"),
            ),
        ]);
        (Manifest::new(self.optimizer.update_count, weights.hash(), &files), files)
    }

    /// Reads what [`Self::save`] wrote; hashes must have been checked.
    pub fn load(files: &BTreeMap<String, Vec<u8>>) -> Result<(RunConfig, Self), CheckpointError> {
        let file = |name: &str| {
            files.get(name).ok_or_else(|| CheckpointError::Missing { file: name.into() })
        };
        let malformed =
            |problem: String| CheckpointError::Malformed { file: STATE_FILE.into(), problem };
        let scalars: Scalars =
            serde_json::from_slice(file(STATE_FILE)?).map_err(|e| malformed(e.to_string()))?;
        scalars.config.validate().map_err(|e| malformed(e.to_string()))?;
        let model = scalars.config.model().map_err(|e| malformed(e.to_string()))?;
        let fits = |s: &Sampled| {
            s.is_consistent(model.vocabulary, model.context) && s.version <= scalars.update_count
        };
        if !scalars.pending.iter().all(fits) {
            return Err(malformed("pending rollouts do not fit the model".into()));
        }
        let mut floats = decode_floats(&model, file(OPTIMIZER_FILE)?)?;
        let mut group = |name: &str| {
            floats.remove(name).ok_or_else(|| CheckpointError::Tensor {
                file: OPTIMIZER_FILE.into(),
                tensor: name.into(),
                problem: "is missing".into(),
            })
        };
        let master = group(MASTER)?;
        let moments = group(FIRST_MOMENT)?.into_iter().zip(group(SECOND_MOMENT)?);
        let tensors = master.into_iter().zip(moments).zip(shapes(&model));
        let tensors = tensors.map(|((master, (first_moment, second_moment)), shape)| TensorState {
            master,
            first_moment,
            second_moment,
            decays: shape.rows > 1,
        });
        let state = Self {
            phase: scalars.phase,
            step: scalars.step,
            optimizer: AdamW {
                moment_step: scalars.moment_step,
                update_count: scalars.update_count,
                tensors: tensors.collect(),
            },
            reference: group(REFERENCE).ok(),
            entropy_band: scalars.entropy_band,
            reset: scalars.reset,
            pending: scalars.pending,
            evaluations: scalars.evaluations,
        };
        Ok((scalars.config, state))
    }
}

/// A run on an engine.
pub struct Trainer<'e, E: Engine> {
    pub(super) engine: &'e E,
    /// The run file.
    pub config: RunConfig,
    pub(super) problems: Problems,
    /// All that changes.
    pub state: State,
    pub(super) policy: Decoder<E>,
    pub(super) reference: Option<Decoder<E>>,
}

impl<'e, E: Engine> Trainer<'e, E> {
    /// A trainer in the given state. The engine was built for this model's constants.
    pub fn new(
        engine: &'e E,
        config: RunConfig,
        problems: Problems,
        state: State,
    ) -> Result<Self, RunConfigError> {
        config.validate()?;
        let model = config.model()?;
        let weights = Weights::quantize(&model, &state.master());
        let upload = |m: &Vec<Vec<f32>>| Decoder::new(engine, &Weights::quantize(&model, m));
        Ok(Self {
            engine,
            problems,
            policy: Decoder::new(engine, &weights),
            reference: state.reference.as_ref().map(upload),
            config,
            state,
        })
    }

    /// BLAKE3 hash of the current policy's weights.
    pub fn weights_hash(&self) -> blake3::Hash {
        Weights::quantize(&self.policy.config, &self.state.master()).hash()
    }

    /// Steps of the current phase; 0 when done.
    pub fn phase_steps(&self) -> u64 {
        match self.state.phase {
            Phase::Sft => self.config.sft.as_ref().map_or(0, |s| s.steps),
            Phase::Rl => self.config.rl.as_ref().map_or(0, |s| s.steps),
            Phase::Done => 0,
        }
    }

    /// Runs one step, or moves on to the next phase and returns `None` when one is complete.
    pub async fn step(
        &mut self,
        observer: &mut dyn FnMut(Progress),
    ) -> Result<Option<StepReport>, TrainError> {
        if self.state.step >= self.phase_steps() {
            let next = if self.state.phase == Phase::Sft { Phase::Rl } else { Phase::Done };
            self.state.enter(next, &self.config);
            self.upload_reference();
            return Ok(None);
        }
        let config = self.config.clone();
        let report = match (self.state.phase, &config.sft, &config.rl) {
            (Phase::Sft, Some(sft), _) => sft::step(self, sft, observer).await?,
            (Phase::Rl, _, Some(rl)) => rl::step(self, rl, observer).await?,
            _ => return Ok(None),
        };
        let count = report.saturations.values().sum();
        if count > SATURATIONS_MAX {
            let sites = format!("{:?}", report.saturations);
            let limit = SATURATIONS_MAX;
            return Err(TrainError::Saturated { step: report.step, count, sites, limit });
        }
        self.state.step += 1;
        Ok(Some(report))
    }

    /// Longest completion when evaluating.
    pub fn max_new_tokens(&self) -> usize {
        let context = self.policy.config.context;
        self.config.rl.as_ref().map_or(context / 2, |rl| rl.max_new_tokens)
    }

    /// Evaluates the current policy on held-out problems and remembers the result.
    pub async fn evaluate(
        &mut self,
        observer: &mut dyn FnMut(Progress),
    ) -> Result<EvalReport, TrainError> {
        observer(Progress::Begins(super::report::Part::Evaluate));
        let report = evaluate::evaluate(
            self.engine,
            &self.policy,
            self.weights_hash(),
            &self.problems,
            &self.config.eval,
            self.max_new_tokens(),
            self.config.seed,
            |n| observer(Progress::Tokens(n)),
        )
        .await?;
        let (phase, step) = (self.state.phase, self.state.step);
        self.state.evaluations.push(Evaluation { phase, step, report: report.clone() });
        Ok(report)
    }

    /// One optimizer update from integer gradients, and the next version on the engine.
    pub(super) fn update(
        &mut self,
        config: &AdamWConfig,
        grads: &[Cow<'_, [i64]>],
        scale: GradientScale,
    ) -> Result<UpdatePlan, OptimizerError> {
        let slices: Vec<&[i64]> = grads.iter().map(AsRef::as_ref).collect();
        let plan = self.state.optimizer.step(config, scale, &slices)?;
        let master = self.state.optimizer.tensors.iter().map(|t| t.master.as_slice());
        let weights = Weights::quantize(&self.policy.config, &master.collect::<Vec<_>>());
        self.policy = Decoder::new(self.engine, &weights);
        Ok(plan)
    }

    /// Makes the engine's reference follow the state's.
    pub(super) fn upload_reference(&mut self) {
        let model = &self.policy.config;
        let upload = |m: &Vec<Vec<f32>>| Decoder::new(self.engine, &Weights::quantize(model, m));
        self.reference = self.state.reference.as_ref().map(upload);
    }

    pub(super) async fn take_saturations(&self) -> Result<BTreeMap<String, u64>, EngineError> {
        Ok(saturation_map(&self.engine.take_saturations().await?))
    }
}
