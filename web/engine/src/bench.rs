//! The engine of a tab, in a worker of its own: it proves itself, loads weights, computes units.

use std::collections::BTreeMap;
use std::sync::Arc;

use js_sys::{Array, Function, Promise, Uint8Array};
use manyhands_core::conformance::suite;
use manyhands_core::engine::{Batch, Engine};
use manyhands_core::engine::cpu::{Cpu, Path};
use manyhands_core::engine::gpu::Gpu;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::model::generate::draw;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::execute;
use manyhands_core::swarm::delta;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::unit::{Unit, encode_output};
use manyhands_shaders::twin::logits::temperature_scale;
use serde::{Deserialize, Serialize};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

use crate::adapter;
use crate::speed;

/// An engine with the weights that it has loaded.
struct Bench<E: Engine> {
    engine: E,
    loader: Loader<E>,
    weights: BTreeMap<Hash, (Arc<Weights>, Decoder<E>)>,
}

enum Any {
    Cpu(Box<Bench<Cpu>>),
    Gpu(Box<Bench<Gpu>>),
}

/// Runs `$body` with `$bench` bound to the bench of the concrete engine.
macro_rules! with_bench {
    ($any:expr, |$bench:ident| $body:expr) => {
        match $any {
            Any::Cpu($bench) => $body,
            Any::Gpu($bench) => $body,
        }
    };
}

/// What the conformance suite and the clock say of an engine.
#[derive(Serialize)]
struct Report {
    kind: &'static str,
    name: String,
    digest: String,
    pass: bool,
    problem: Option<String>,
    /// Multiply-adds a second.
    speed: f64,
}

/// See the module.
#[wasm_bindgen(js_name = Engine)]
pub struct TabEngine {
    any: Any,
    model: Option<ModelConfig>,
    report: String,
}

fn error(error: impl std::fmt::Display) -> JsError {
    JsError::new(&error.to_string())
}

fn hash(text: &str) -> Result<Hash, JsError> {
    Hash::parse(text).ok_or_else(|| JsError::new("not a hash"))
}

impl<E: Engine> Bench<E> {
    fn new(engine: E) -> Self {
        Self { engine, loader: Loader::default(), weights: BTreeMap::new() }
    }

    /// Runs the suite, and measures speed if it passes.
    async fn prove(&self, kind: &'static str, name: String) -> Result<Report, JsError> {
        let outcome = suite::run(&self.engine).await.map_err(error)?;
        let pass = outcome.passes();
        let wrong = outcome.first_difference().unwrap_or("the digest");
        let problem = format!("it does not compute the right bits: {wrong} differs");
        Ok(Report {
            kind,
            name,
            digest: outcome.digest.clone(),
            pass,
            problem: (!pass).then_some(problem),
            speed: 0.0,
        })
    }

    fn load(
        &mut self,
        want: Hash,
        base: Option<Hash>,
        blobs: &Array,
        model: &ModelConfig,
    ) -> Result<(), JsError> {
        let base = base.and_then(|b| self.weights.get(&b)).map(|(weights, _)| weights.clone());
        let blobs = blobs.iter().map(|blob| Uint8Array::from(blob).to_vec());
        if model.adapter.as_ref().is_some_and(|a| a.base == want) {
            let weights = delta::build(want, base, blobs, &model.frozen()).map_err(error)?;
            self.loader.set_base(&self.engine, Arc::unwrap_or_clone(weights));
            return Ok(());
        }
        let weights = delta::build(want, base, blobs, model).map_err(error)?;
        if model.adapter.is_some() && !self.loader.has_base() {
            return Err(error("an adapter came before the model that it adapts"));
        }
        let decoder = self.loader.load(&self.engine, &weights, None);
        self.weights.insert(want, (weights, decoder));
        Ok(())
    }

    async fn compute(&self, unit: &Unit, progress: impl FnMut(usize)) -> Result<Vec<u8>, JsError> {
        let (_, decoder) = self
            .weights
            .get(&unit.weights)
            .ok_or_else(|| error("a unit came before its weights"))?;
        let output = execute(&self.engine, decoder, &unit.work, progress).await.map_err(error)?;
        Ok(encode_output(&output))
    }

    /// Goes on from `prompt`, one token after the other, as `manyhands sample` does; `say` is told
    /// each token, and decides in its own time whether to go on.
    async fn answer(
        &self,
        weights: Hash,
        prompt: &[u32],
        ask: &Ask,
        say: &Function,
    ) -> Result<(), JsError> {
        let found = self.weights.get(&weights);
        let (_, decoder) = found.ok_or_else(|| error("a prompt came before the weights"))?;
        let config = &decoder.config;
        if prompt.is_empty() || prompt.iter().any(|t| *t as usize >= config.vocabulary) {
            return Err(error("the prompt has no tokens, or some that the model does not know"));
        }
        let room = config.context.saturating_sub(prompt.len());
        if room == 0 {
            let context = config.context;
            return Err(error(format!(
                "this is more than the model's context of {context} tokens; begin anew, or say less"
            )));
        }
        let mut caches = decoder.caches(&self.engine, 1, prompt.len() + room);
        let (mut next, mut position) = (prompt.to_vec(), 0);
        for i in 0..room {
            let mut batch = Batch::default();
            batch.push(0, position, &next);
            position += next.len();
            let h = decoder.states(&self.engine, &batch, &mut caches);
            let h = self.engine.rows(&h, &[next.len() as u32 - 1]);
            let logits = decoder.logits(&self.engine, &h);
            let draws = [(!ask.greedy).then(|| draw(ask.seed.into(), STREAM, i as u32))];
            let sampled = self.engine.sample(&logits, &draws, temperature_scale(1.0));
            let token = sampled.await.map_err(error)?[0].0;
            let told = say.call1(&JsValue::NULL, &token.into()).map_err(thrown)?;
            let goes_on = JsFuture::from(Promise::resolve(&told)).await.map_err(thrown)?;
            if token == ask.end || !goes_on.is_truthy() {
                break;
            }
            next = vec![token];
        }
        Ok(())
    }
}

/// How an answer is made.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    /// Always the most likely token, instead of a draw at temperature 1.
    greedy: bool,
    /// Of the draws.
    seed: u32,
    /// The token that ends it.
    end: u32,
}

/// The random stream of `manyhands sample`'s first prompt.
const STREAM: [u32; 3] = [0, 2 << 24, 0];

fn thrown(value: JsValue) -> JsError {
    error(format!("{value:?}"))
}

#[wasm_bindgen(js_class = Engine)]
impl TabEngine {
    /// Opens an engine, `webgpu` or `wasm`, runs the conformance suite on it and measures it.
    /// `name` is the adapter's, as the browser tells it.
    pub async fn open(kind: &str, name: String) -> Result<Self, JsError> {
        let probe = speed::probe();
        let (any, mut report, speed) = if kind == "webgpu" {
            let gpu = adapter::open(suite::constants()).await.map_err(error)?;
            let bench = Bench::new(gpu);
            let report = bench.prove("webgpu", name).await?;
            let gpu = bench.engine.for_model(probe.constants()).map_err(error)?;
            let speed = speed::measure(&gpu, &probe).await.map_err(error)?;
            (Any::Gpu(Box::new(bench)), report, speed)
        } else {
            let bench = Bench::new(Cpu::new(suite::constants(), 1, None));
            let report = bench.prove("wasm", Path::best().to_string()).await?;
            let cpu = Cpu::new(probe.constants(), 1, None);
            let speed = speed::measure(&cpu, &probe).await.map_err(error)?;
            (Any::Cpu(Box::new(bench)), report, speed)
        };
        report.speed = speed;
        let report = serde_json::to_string(&report).map_err(error)?;
        Ok(Self { any, model: None, report })
    }

    /// What the suite and the clock say, as JSON.
    pub fn report(&self) -> String {
        self.report.clone()
    }

    /// Forgets everything; this is the model of what follows.
    pub fn model(&mut self, config: &str) -> Result<(), JsError> {
        let model: ModelConfig = serde_json::from_str(config).map_err(error)?;
        let constants = model.constants();
        self.any = match &self.any {
            Any::Cpu(_) => Any::Cpu(Box::new(Bench::new(Cpu::new(constants, 1, None)))),
            Any::Gpu(bench) => {
                let gpu = bench.engine.for_model(constants).map_err(error)?;
                Any::Gpu(Box::new(Bench::new(gpu)))
            }
        };
        self.model = Some(model);
        Ok(())
    }

    /// Makes weights from blobs, applied in order to `base` or to nothing.
    pub fn load(&mut self, want: &str, base: Option<String>, blobs: &Array) -> Result<(), JsError> {
        let model = self.model.as_ref().ok_or_else(|| error("weights came before the model"))?;
        let (want, base) = (hash(want)?, base.as_deref().map(hash).transpose()?);
        with_bench!(&mut self.any, |bench| bench.load(want, base, blobs, model))
    }

    /// These weights are not needed any more.
    pub fn forget(&mut self, weights: &str) {
        let Some(hash) = Hash::parse(weights) else { return };
        with_bench!(&mut self.any, |bench| drop(bench.weights.remove(&hash)));
    }

    /// Answers a prompt under loaded weights. `ask` is JSON; `say` gets each token, and returns, or
    /// promises, whether to go on.
    pub async fn answer(
        &self,
        weights: &str,
        prompt: &[u32],
        ask: &str,
        say: &Function,
    ) -> Result<(), JsError> {
        let ask: Ask = serde_json::from_str(ask).map_err(error)?;
        let weights = hash(weights)?;
        with_bench!(&self.any, |bench| bench.answer(weights, prompt, &ask, say).await)
    }

    /// How long submissions to the graphics device took, as JSON; nothing for other engines.
    pub fn submissions(&self) -> Option<String> {
        match &self.any {
            Any::Cpu(_) => None,
            Any::Gpu(bench) => serde_json::to_string(&bench.engine.submission_times()).ok(),
        }
    }

    /// Computes a unit, and returns the bytes of its result. `progress` is told tokens so far.
    pub async fn compute(&self, unit: &[u8], progress: &Function) -> Result<Vec<u8>, JsError> {
        let model = self.model.as_ref().ok_or_else(|| error("a unit came before the model"))?;
        let unit = Unit::decode(unit, model).map_err(error)?;
        // Who listens is gone if it fails.
        let tell =
            |tokens: usize| drop(progress.call1(&JsValue::NULL, &JsValue::from(tokens as f64)));
        with_bench!(&self.any, |bench| bench.compute(&unit, tell).await)
    }
}
