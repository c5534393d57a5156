//! The run file of a simulation, what one machine makes of it, and the arithmetic of everybody.
//! Outputs are pure functions of weights and item, so each is computed once and remembered.

use std::collections::BTreeMap;
use std::sync::Arc;

use manyhands_core::engine::Saturations;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::tokenizer::Bytes;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::execute::execute;
use manyhands_core::run::pipeline::Advanced;
use manyhands_core::run::problems::{Imported, Problems};
use manyhands_core::run::report::StepReport;
use manyhands_core::run::state::State;
use manyhands_core::run::trainer::Trainer;
use manyhands_core::run::work::{Output, Values, Work};
use manyhands_core::swarm::delta;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::unit::Unit;
use pollster::block_on;

/// Two phases, mini-batches, a KL term and evaluations, on a model that a core trains in a second.
const RUN: &str = r#"
name = "simulated"
seed = 5
[model.shape]
vocabulary = 128
layers = 1
width = 32
heads = 2
kv_heads = 1
head_dim = 16
ffn = 48
context = 16
[[task]]
jsonl = "problems"
[sft]
steps = SFT_STEPS
batch = 8
[sft.optimizer]
learning_rate = 2e-2
[rl]
steps = RL_STEPS
prompts = 4
group_size = 4
max_new_tokens = 5
updates = 2
policy_lag = POLICY_LAG
[rl.learn.optimizer]
learning_rate = 3e-3
[rl.learn.loss.kl]
estimator = "k2"
beta = 1e-2
[eval]
problems = 3
samples = 2
k = [1]
every = 2
[checkpoint]
every = 3
[swarm]
unit_seconds = 0.3
newcomer_audits = 3
audit_probability_min = 0.2
audit_the_auditors = 0.1
silence_seconds = 2.0
"#;

/// How long a run is, and how far its rollouts are ahead.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Supervised steps.
    pub sft_steps: u64,
    /// Steps of reinforcement learning.
    pub rl_steps: u64,
    /// Steps between sampling and training.
    pub policy_lag: u64,
}

/// A run file and all that was ever computed for it.
pub struct Lab {
    /// The run file.
    pub config: RunConfig,
    /// What it trains on.
    pub problems: Problems,
    /// Its model.
    pub model: ModelConfig,
    /// The run's files by their names: problems, and an imported model.
    pub files: Vec<(String, Vec<u8>)>,
    /// Hash of the final weights of one machine on its own.
    pub solo: Hash,
    /// What that machine reported.
    pub reports: Vec<StepReport>,
    engine: Cpu,
    versions: BTreeMap<Hash, (Weights, Decoder<Cpu>)>,
    loader: Loader<Cpu>,
    outputs: BTreeMap<Hash, Output>,
}

impl Lab {
    /// Trains the run on one machine.
    pub fn new(shape: Shape) -> Self {
        Self::of(shape, None)
    }

    /// The same run with an adapter on a model that was made elsewhere.
    pub fn adapter(shape: Shape) -> Self {
        let config = Self::config(shape).model().expect("the shape is valid");
        Self::of(shape, Some(Weights::quantize(&config, &master_weights(&config, 77))))
    }

    fn config(shape: Shape) -> RunConfig {
        let text = RUN
            .replace("SFT_STEPS", &shape.sft_steps.to_string())
            .replace("RL_STEPS", &shape.rl_steps.to_string())
            .replace("POLICY_LAG", &shape.policy_lag.to_string());
        toml::from_str(&text).expect("the run file is TOML")
    }

    fn of(shape: Shape, imported: Option<Weights>) -> Self {
        let mut config = Self::config(shape);
        if let Some(weights) = &imported {
            config.model.import = Some("imported".into());
            config.model.base = Some(weights.hash().into());
            config.model.lora = toml::from_str("rank = 4\ntargets = [\"query\", \"up\"]").ok();
        }
        let line = |i: usize| format!("{{\"prompt\":\"{i}=\",\"answer\":\"{}\"}}\n", i % 2);
        let lines: String = (0..24).map(line).collect();
        let mut problems =
            Problems::open(&config, |_| Ok(lines.clone())).expect("problems are JSONL");
        let model = config.model().expect("the shape is valid");
        let mut files = vec![("problems".to_string(), lines.into_bytes())];
        if let Some(weights) = imported {
            files.push(("imported/weights".into(), delta::encode(None, &weights)));
            problems = problems.with_model(Self::imported(weights));
        }
        let engine = Cpu::new(model.constants(), 1, None);
        let state = State::new(&config, &model, None);
        let mut trainer = Trainer::new(&engine, config.clone(), problems.clone(), state)
            .expect("the run file is valid");
        let mut reports = Vec::new();
        while let Some(advanced) = block_on(trainer.advance(&mut |_| {})).expect("the run trains") {
            if let Advanced::Step(report) = advanced {
                reports.push(*report);
            }
        }
        let solo = trainer.weights_hash().into();
        drop(trainer);
        let (versions, outputs, loader) = (BTreeMap::new(), BTreeMap::new(), Loader::default());
        Self { config, problems, model, files, solo, reports, engine, versions, outputs, loader }
    }

    /// A model whose tokens are bytes, as if it had been imported.
    pub fn imported(weights: Weights) -> Imported {
        let language = Arc::new(Bytes { vocabulary: weights.config.vocabulary });
        Imported { weights: Arc::new(weights), language }
    }

    /// Learns the version that a blob makes; whatever its base is must be known.
    pub fn apply(&mut self, blob: &[u8]) -> Hash {
        let (base, result) = delta::hashes(blob).expect("the coordinator publishes versions");
        if !self.versions.contains_key(&result) {
            let base = base.map(|b| &self.versions.get(&b).expect("a base was published").0);
            let imported = self.problems.imported();
            let is_imported = imported.is_some_and(|i| Hash::from(i.hash()) == result);
            let model = if is_imported { self.model.frozen() } else { self.model.clone() };
            let weights = delta::apply(base, &model, blob).expect("a version applies");
            let imported = imported.map(AsRef::as_ref);
            let decoder = self.loader.load(&self.engine, &weights, imported);
            self.versions.insert(result, (weights, decoder));
        }
        result
    }

    /// Versions that were published so far, in the order of their hashes.
    pub fn versions(&self) -> impl Iterator<Item = Hash> {
        self.versions.keys().copied()
    }

    /// What a correct engine gives.
    pub fn compute(&mut self, unit: &Unit) -> Output {
        let parts: Vec<Output> = (0..unit.work.items())
            .map(|i| self.item(unit.weights, unit.work.slice(i..i + 1)))
            .collect();
        let mut parts = parts.into_iter();
        let mut all = parts.next().expect("a unit has items");
        for part in parts {
            all.saturations.merge(&part.saturations);
            match (&mut all.values, part.values) {
                (Values::Samples(all), Values::Samples(new)) => all.extend(new),
                (Values::Scores(all), Values::Scores(new)) => all.extend(new),
                (Values::Gradient(all, sum), Values::Gradient(new, share)) => {
                    all.extend(new);
                    sum.add(&share);
                }
                _ => unreachable!("items of one work have one kind of output"),
            }
        }
        all
    }

    fn item(&mut self, weights: Hash, work: Work) -> Output {
        let unit = Unit { weights, work };
        let hash = Hash::of(&unit.encode());
        if let Some(output) = self.outputs.get(&hash) {
            return output.clone();
        }
        let (_, decoder) = self.versions.get(&weights).expect("weights were published");
        let output = block_on(execute(&self.engine, decoder, &unit.work, |_| {}));
        let output = output.expect("the CPU does not fail");
        self.outputs.insert(hash, output.clone());
        output
    }

    /// A clean count of clamped values, for outputs that are made up.
    pub fn no_saturations() -> Saturations {
        Saturations::default()
    }
}
