//! All that a run's step reads and writes, and the files of a checkpoint.
//!
//! A run is a pure function of its file: a state that was saved and loaded goes on with the same
//! bits.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::config::RunConfig;
use super::report::{EvalReport, Phase};
use super::rollout::Sampled;
use crate::checkpoint::{
    CheckpointError, Manifest, OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE, decode_floats,
    encode_floats, encode_weights,
};
use crate::learn::entropy::EntropyBand;
use crate::learn::optimizer::{AdamW, TensorState};
use crate::learn::reset::ResetState;
use crate::model::config::ModelConfig;
use crate::model::init::master_weights;
use crate::model::weights::{Weights, shapes};

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
    /// The state before the first step. A run that trains an imported model itself begins with its
    /// weights, `initial`; all others with what their seed draws.
    pub fn new(config: &RunConfig, model: &ModelConfig, initial: Option<&Weights>) -> Self {
        let master = match initial {
            Some(weights) => weights.values(),
            None => master_weights(model, config.seed),
        };
        let tensors = master.into_iter().zip(shapes(model)).map(|(master, shape)| TensorState {
            scale_log2: shape.scale_log2,
            ..TensorState::new(master, shape.rows > 1)
        });
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
    pub(super) fn enter(&mut self, phase: Phase, config: &RunConfig) {
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

    /// Steps of all phases behind this state.
    pub fn ordinal(&self, config: &RunConfig) -> u64 {
        let sft = config.sft.as_ref().map_or(0, |s| s.steps);
        match self.phase {
            Phase::Sft => self.step,
            Phase::Rl => sft + self.step,
            Phase::Done => config.steps(),
        }
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
            scale_log2: shape.scale_log2,
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
