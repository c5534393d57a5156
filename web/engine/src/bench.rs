//! The engine of a tab, in a worker of its own: it proves itself, loads weights, computes units.

use std::collections::BTreeMap;
use std::sync::Arc;

use js_sys::{Array, Function, Uint8Array};
use manyhands_core::conformance::suite;
use manyhands_core::engine::Engine;
use manyhands_core::engine::cpu::{Cpu, Path};
use manyhands_core::engine::gpu::Gpu;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::execute;
use manyhands_core::swarm::delta;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::unit::{Unit, encode_output};
use serde::Serialize;
use wasm_bindgen::prelude::*;

use crate::adapter;
use crate::speed;

/// An engine with the weights that it has loaded.
struct Bench<E: Engine> {
    engine: E,
    weights: BTreeMap<Hash, (Arc<Weights>, Decoder<E>)>,
}

enum Any {
    Cpu(Bench<Cpu>),
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
        Self { engine, weights: BTreeMap::new() }
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
        let weights = delta::build(want, base, blobs, model).map_err(error)?;
        let decoder = Decoder::new(&self.engine, &weights);
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
            (Any::Cpu(bench), report, speed)
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
            Any::Cpu(_) => Any::Cpu(Bench::new(Cpu::new(constants, 1, None))),
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
