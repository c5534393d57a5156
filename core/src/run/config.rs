//! The run file: every setting of a run, typed, documented and validated before anything starts.

use serde::{Deserialize, Serialize};

use crate::learn::config::LearnConfig;
use crate::learn::optimizer::AdamWConfig;
use crate::model::adapter::{Adapter, Projection};
use crate::model::config::ModelConfig;
use crate::model::tokenizer::ASCII_VOCABULARY;
use crate::swarm::ids::Hash;
use crate::tasks::{Family, LEVEL_MAX};

/// A whole run. In TOML: `name`, `seed`, `[model]`, `[[task]]`, `[sft]`, `[rl]`, `[eval]`,
/// `[checkpoint]`, `[swarm]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run and of its directory: letters, digits, `-` and `_`.
    pub name: String,
    /// Seed of initialisation, problems and sampling.
    #[serde(default)]
    pub seed: u64,
    /// The decoder.
    pub model: ModelSection,
    /// What is trained on, and held out for evaluation.
    #[serde(rename = "task")]
    pub tasks: Vec<TaskSection>,
    /// Supervised phase on worked traces; left out for none.
    pub sft: Option<SftSection>,
    /// Reinforcement learning; left out for none.
    pub rl: Option<RlSection>,
    /// Evaluation on held-out problems.
    #[serde(default)]
    pub eval: EvalSection,
    /// When the state is saved.
    #[serde(default)]
    pub checkpoint: CheckpointSection,
    /// How work is shared and verified; changes no bit of the result.
    #[serde(default)]
    pub swarm: SwarmSection,
}

/// A preset, or a shape of one's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Name of a preset: nano, micro, tiny, small, medium, base, smollm2-135m.
    pub preset: Option<String>,
    /// A shape, instead of a preset; of an imported model its own, which is filled in.
    pub shape: Option<ModelConfig>,
    /// Directory of an imported model, instead of either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import: Option<String>,
    /// Hash of the imported weights; what the directory holds is filled in, or must be this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Hash>,
    /// Trains an adapter on the imported model, instead of the model itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSection>,
    /// What an imported model is told after each problem.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub instruction: String,
    /// Vocabulary of a preset: 128 covers ASCII, 256 every byte.
    #[serde(default = "default_vocabulary")]
    pub vocabulary: usize,
    /// Longest sequence of a preset, in tokens.
    #[serde(default = "default_context")]
    pub context: usize,
}

/// LoRA: see [`crate::model::adapter`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraSection {
    /// Rank of the factors.
    #[serde(default = "default_rank")]
    pub rank: usize,
    /// The product of the factors counts `alpha / rank`, a power of two; default twice the rank.
    pub alpha: Option<usize>,
    /// Which matrices of every layer: query, key, value, output, gate, up, down; default all.
    #[serde(default = "default_targets")]
    pub targets: Vec<Projection>,
}

fn default_rank() -> usize {
    16
}

fn default_targets() -> Vec<Projection> {
    Projection::ALL.to_vec()
}

fn default_vocabulary() -> usize {
    ASCII_VOCABULARY
}

fn default_context() -> usize {
    96
}

/// One source of problems.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskSection {
    /// A procedural family.
    pub family: Option<Family>,
    /// Difficulty of the family, from 1.
    pub level: Option<u32>,
    /// A JSONL file of prompt and answer, instead of a family.
    pub jsonl: Option<String>,
    /// Share of the problems, relative to the other sources.
    #[serde(default = "default_weight")]
    pub weight: u32,
}

fn default_weight() -> u32 {
    1
}

/// Supervised fine-tuning on worked traces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftSection {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences a step.
    pub batch: usize,
    /// AdamW; rate and schedule included.
    #[serde(default)]
    pub optimizer: AdamWConfig,
}

/// Reinforcement learning with verifiable rewards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RlSection {
    /// Rollout steps.
    pub steps: u64,
    /// Groups (prompts) a step.
    pub prompts: usize,
    /// Rollouts a prompt, G.
    pub group_size: usize,
    /// Sampling temperature, also of every log-probability that is trained.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
    /// Longest completion in tokens.
    pub max_new_tokens: usize,
    /// Optimizer updates a step: the groups are split into this many mini-batches.
    #[serde(default = "default_updates")]
    pub updates: usize,
    /// Version of the trainer minus the version that sampled, in steps.
    #[serde(default)]
    pub policy_lag: usize,
    /// Objective, advantages, KL, resets, entropy, length, dynamic sampling, optimizer.
    #[serde(default)]
    pub learn: LearnConfig,
}

fn default_temperature() -> f64 {
    1.0
}

fn default_updates() -> usize {
    1
}

/// Evaluation: `samples` completions of each of `problems` held-out problems.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalSection {
    /// Held-out problems.
    pub problems: usize,
    /// Completions a problem, n.
    pub samples: usize,
    /// The k of pass@k, each at most n.
    pub k: Vec<usize>,
    /// Sampling temperature.
    pub temperature: f64,
    /// Steps between evaluations in training; 0 for only before and after each phase.
    pub every: u64,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self { problems: 200, samples: 16, k: vec![1, 4, 16], temperature: 1.0, every: 0 }
    }
}

/// Sharing work with volunteers, and verifying it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwarmSection {
    /// Seconds that a unit of work should take a volunteer.
    pub unit_seconds: f64,
    /// Valid units in a row before a volunteer is trusted; until then every unit is audited
    /// before it counts.
    pub newcomer_audits: u32,
    /// Lowest probability that a unit of a trusted volunteer is audited. Above it the probability
    /// is one in the number of valid audits in a row.
    pub audit_probability_min: f64,
    /// Share of the audits done by other volunteers that the coordination peer does once more.
    pub audit_the_auditors: f64,
    /// Seconds without a sign of life after which a volunteer's units are given to others.
    pub silence_seconds: f64,
}

impl Default for SwarmSection {
    fn default() -> Self {
        Self {
            unit_seconds: 10.0,
            newcomer_audits: 10,
            audit_probability_min: 0.02,
            audit_the_auditors: 0.1,
            silence_seconds: 30.0,
        }
    }
}

impl SwarmSection {
    fn validate(&self) -> Result<(), RunConfigError> {
        let within = |key: &str, value: f64, low: f64, high: f64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            error(&format!("swarm.{key}"), format!("{value} is outside {low} to {high}"))
        };
        within("unit_seconds", self.unit_seconds, 0.05, 600.0)?;
        within("newcomer_audits", f64::from(self.newcomer_audits), 1.0, 1e6)?;
        within("audit_probability_min", self.audit_probability_min, 0.0, 1.0)?;
        within("audit_the_auditors", self.audit_the_auditors, 0.0, 1.0)?;
        within("silence_seconds", self.silence_seconds, 1.0, 3600.0)
    }
}

/// Saving the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSection {
    /// Steps between checkpoints.
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every: 25, keep: 2 }
    }
}

/// A run file that cannot work: which key, and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct RunConfigError {
    /// Path of the key in the file.
    pub key: String,
    /// What is wrong and how to mend it.
    pub problem: String,
}

fn error<T>(key: &str, problem: impl Into<String>) -> Result<T, RunConfigError> {
    Err(RunConfigError { key: key.into(), problem: problem.into() })
}

fn within(key: &str, value: usize, low: usize, high: usize) -> Result<(), RunConfigError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    error(key, format!("{value} is outside {low} to {high}"))
}

impl RunConfig {
    /// The shape of the model.
    pub fn model(&self) -> Result<ModelConfig, RunConfigError> {
        let m = &self.model;
        let config = match (&m.preset, &m.shape, &m.import) {
            (Some(name), None, None) => match ModelConfig::preset(name, m.vocabulary, m.context) {
                Some(config) => config,
                None => {
                    let names: Vec<&str> = ModelConfig::preset_names().collect();
                    let names = names.join(", ");
                    return error(
                        "model.preset",
                        format!("no preset {name:?}; use one of {names}"),
                    );
                }
            },
            (None, Some(shape), None) => shape.clone(),
            (None, Some(shape), Some(_)) => m.adapted(shape)?,
            (None, None, Some(import)) => {
                let problem = format!("{import:?} has not been read; the program fills it in");
                return error("model.import", problem);
            }
            _ => return error("model", "give one of preset, [model.shape] and import"),
        };
        if m.import.is_none() && (m.lora.is_some() || m.base.is_some()) {
            return error("model.lora", "an adapter needs a model to adapt: name one by import");
        }
        if config.bias && config.adapter.is_none() {
            let problem = "the model has biases, which are not trained: train an adapter to it";
            return error("model.lora", problem);
        }
        match config.validate() {
            Ok(()) => Ok(config),
            Err(e) => error(&format!("model.{}", e.key), e.problem),
        }
    }

    /// Steps of all phases.
    pub fn steps(&self) -> u64 {
        self.sft.as_ref().map_or(0, |s| s.steps) + self.rl.as_ref().map_or(0, |s| s.steps)
    }

    /// Checks everything that can be checked without reading other files.
    pub fn validate(&self) -> Result<(), RunConfigError> {
        let letters = self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if self.name.is_empty() || self.name.len() > 64 || !letters {
            return error("name", "use 1 to 64 letters, digits, `-` or `_`");
        }
        let model = self.model()?;
        if self.model.import.is_none() && model.vocabulary < ASCII_VOCABULARY {
            return error(
                "model.vocabulary",
                format!("byte tokens need {ASCII_VOCABULARY} or more"),
            );
        }
        if self.tasks.is_empty() {
            return error("task", "add at least one [[task]] section");
        }
        for (i, task) in self.tasks.iter().enumerate() {
            task.validate(i)?;
        }
        if let Some(sft) = &self.sft {
            within("sft.batch", sft.batch, 1, 1 << 16)?;
            if let Err(e) = sft.optimizer.validate() {
                return error("sft", e.to_string());
            }
        }
        if let Some(rl) = &self.rl {
            rl.validate(&model)?;
        }
        self.eval.validate()?;
        self.swarm.validate()?;
        within("checkpoint.keep", self.checkpoint.keep, 1, 1000)?;
        if self.checkpoint.every == 0 {
            return error("checkpoint.every", "must be at least 1");
        }
        Ok(())
    }
}

/// The imported weights among a run's files: as a blob that makes them from nothing.
pub const IMPORTED_WEIGHTS: &str = "weights";

impl ModelSection {
    /// Path of a file of the imported model, as a run's files name it.
    pub fn import_file(&self, name: &str) -> Option<String> {
        self.import.as_ref().map(|dir| format!("{dir}/{name}"))
    }

    /// The imported model of this shape, with its adapter if one is trained.
    fn adapted(&self, shape: &ModelConfig) -> Result<ModelConfig, RunConfigError> {
        let (Some(base), None) = (self.base, &shape.adapter) else {
            return error("model.base", "an imported model has a hash, and no adapter of its own");
        };
        let Some(lora) = &self.lora else { return Ok(shape.clone()) };
        let mut targets = lora.targets.clone();
        targets.sort_unstable();
        let alpha = lora.alpha.unwrap_or(lora.rank.saturating_mul(2));
        let adapter = Adapter { base, rank: lora.rank, alpha, targets };
        Ok(ModelConfig { adapter: Some(adapter), ..shape.clone() })
    }
}

impl TaskSection {
    fn validate(&self, index: usize) -> Result<(), RunConfigError> {
        let key = |name: &str| format!("task[{index}].{name}");
        match (&self.family, &self.jsonl) {
            (Some(_), None) => {
                let level = self.level.unwrap_or(1);
                if !(1..=LEVEL_MAX).contains(&level) {
                    return error(&key("level"), format!("{level} is outside 1 to {LEVEL_MAX}"));
                }
            }
            (None, Some(_)) if self.level.is_none() => {}
            (None, Some(_)) => {
                return error(&key("level"), "a JSONL file has no levels; remove it");
            }
            _ => return error(&key("family"), "give either family or jsonl"),
        }
        if self.weight == 0 {
            return error(
                &key("weight"),
                "must be at least 1; remove the section to switch it off",
            );
        }
        Ok(())
    }
}

impl RlSection {
    fn validate(&self, model: &ModelConfig) -> Result<(), RunConfigError> {
        within("rl.prompts", self.prompts, 1, 1 << 14)?;
        within("rl.group_size", self.group_size, 2, 1 << 12)?;
        within("rl.max_new_tokens", self.max_new_tokens, 1, model.context - 1)?;
        within("rl.updates", self.updates, 1, self.prompts)?;
        within("rl.policy_lag", self.policy_lag, 0, 16)?;
        if !(0.05..=20.0).contains(&self.temperature) {
            return error("rl.temperature", format!("{} is outside 0.05 to 20", self.temperature));
        }
        match self.learn.validate() {
            Ok(()) => Ok(()),
            Err(e) => error("rl.learn", e.to_string()),
        }
    }
}

impl EvalSection {
    fn validate(&self) -> Result<(), RunConfigError> {
        within("eval.problems", self.problems, 1, 100_000)?;
        within("eval.samples", self.samples, 1, 100_000)?;
        if self.k.is_empty() || self.k.iter().any(|&k| k == 0 || k > self.samples) {
            return error(
                "eval.k",
                format!("each k must lie in 1 to eval.samples = {}", self.samples),
            );
        }
        if !(0.05..=20.0).contains(&self.temperature) {
            return error(
                "eval.temperature",
                format!("{} is outside 0.05 to 20", self.temperature),
            );
        }
        Ok(())
    }
}
