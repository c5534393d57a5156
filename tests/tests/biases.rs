//! Qwen2: queries, keys and values with biases, read, computed, adapted and written again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod gpu_support;

use gpu_support::with_gpu;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Batch, Engine, SeedRow};
use manyhands_core::export::numbers::Precision;
use manyhands_core::export::{Model, gguf, hub};
use manyhands_core::import::exact::{Shifts, quantize, restore};
use manyhands_core::import::gguf::Gguf;
use manyhands_core::import::hf;
use manyhands_core::import::names::Source;
use manyhands_core::import::reference::Reference;
use manyhands_core::model::adapter::{Adapter, Projection};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{DeviceGradients, Loader};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::{Gradients, Weights};
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::execute::accumulate;
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;
use serde_json::Value;

const CONFIG: &[u8] = include_bytes!("../data/biased/config.json");
const TENSORS: &[u8] = include_bytes!("../data/biased/model.safetensors");
/// Largest difference of an f32 logit from those of transformers.
const F32_ERROR_MAX: f64 = 1e-4;
/// Largest relative error of exact logits against f32 on the same rounded weights: a key has ten
/// bits for its bias and for what differs between tokens.
const EXACT_ERROR_MAX: f64 = 0.03;

fn shards() -> Vec<(String, Vec<u8>)> {
    vec![("model.safetensors".into(), TENSORS.to_vec())]
}

fn imported() -> (Weights, Shifts) {
    let shards = shards();
    let source = Source::from_hf(CONFIG, hf::tensors(&shards).unwrap()).unwrap();
    let shifts = Shifts::choose(&source, 1.0).unwrap();
    (quantize(&source, &shifts).unwrap(), shifts)
}

fn ids(reference: &Value) -> Vec<u32> {
    reference["ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Breaks if a bias goes astray, is added after the rotation, or loses bits: those of keys are ten
/// times those of values.
#[test]
fn logits_are_those_of_transformers() {
    let reference: Value =
        serde_json::from_str(include_str!("../data/biased/reference.json")).unwrap();
    let ids = ids(&reference);
    let shards = shards();
    let source = Source::from_hf(CONFIG, hf::tensors(&shards).unwrap()).unwrap();
    let original = Reference::read(&source).unwrap();
    let f32_logits = original.logits(&original.states(&ids).rows);

    let (weights, shifts) = imported();
    let restored = restore(&weights, &shifts);
    let read = source.tensors.iter().map(|t| (t, t.read().unwrap()));
    let biases = read.zip(&restored).filter(|((t, _), _)| t.shape.is_bias());
    let exact = biases.inspect(|((t, read), restored)| assert_eq!(read, *restored, "{}", t.name));
    assert_eq!(exact.count(), 6);
    let rounded = Reference::new(weights.config.clone(), restored);
    let rounded = rounded.logits(&rounded.states(&ids).rows);
    let engine = Cpu::new(weights.config.constants(), 2, None);
    let decoder = Loader::default().load(&engine, &weights, None);
    let mut caches = decoder.caches(&engine, 1, ids.len());
    let states = decoder.states(&engine, &Batch::sequences([&ids[..]]), &mut caches);
    let exact = block_on(engine.read(&decoder.logits(&engine, &states))).unwrap();
    assert_eq!(block_on(engine.take_saturations()).unwrap().total(), 0);

    let vocabulary = weights.config.vocabulary;
    let rows = reference["positions"]
        .as_array()
        .unwrap()
        .iter()
        .zip(reference["logits"].as_array().unwrap());
    for (position, expected) in rows {
        let at = position.as_u64().unwrap() as usize * vocabulary;
        for (i, e) in expected.as_array().unwrap().iter().enumerate() {
            let (got, e) = (f64::from(f32_logits[at + i]), e.as_f64().unwrap());
            assert!((got - e).abs() < F32_ERROR_MAX, "{position}, token {i}: {got}, expected {e}");
        }
        let pairs = exact[at..][..vocabulary].iter().zip(&rounded[at..][..vocabulary]);
        let (mut error, mut size) = (0.0, 0.0);
        for (got, expected) in pairs {
            let expected = f64::from(*expected);
            error += (f64::from(*got) / 65_536.0 - expected).powi(2);
            size += expected.powi(2);
        }
        let error = (error / size).sqrt();
        assert!(error < EXACT_ERROR_MAX, "{position}: relative error {error}");
    }
}

/// Breaks if a container loses a bias: as a Qwen2, whose rotary halves GGUF does not pair.
#[test]
fn exported_models_import_to_the_same_hash() {
    let (weights, shifts) = imported();
    let model = Model::new(&weights, &shifts);
    let file = gguf::model(&model, Vec::new(), Precision::Exact).unwrap();
    let parsed = Gguf::parse(&file.bytes).unwrap();
    assert_eq!(parsed.text("general.architecture").unwrap(), "qwen2");
    let source = Source::from_gguf(&parsed).unwrap();
    assert_eq!(quantize(&source, &shifts).unwrap().hash(), weights.hash());
    let config = hub::config(&model.config, None, 2, Precision::F32).to_string();
    let shards =
        [("model.safetensors".to_string(), hub::model(&model, Precision::F32).unwrap().bytes)];
    let source = Source::from_hf(config.as_bytes(), hf::tensors(&shards).unwrap()).unwrap();
    assert_eq!(source.architecture, "qwen2");
    assert_eq!(quantize(&source, &shifts).unwrap().hash(), weights.hash());
}

fn gradient<E: Engine>(engine: &E, adapter: &Weights, base: &Weights) -> Gradients {
    let decoder = Loader::default().load(engine, adapter, Some(base));
    let sequences: Vec<Vec<u32>> =
        [33, 7].map(|n| (0..n).map(|i| (i * 37 + n) % 264).collect()).into();
    let seed = |t: &u32| SeedRow { target: *t, weight: 50_000, ..Default::default() };
    let seeds: Vec<Vec<SeedRow>> =
        sequences.iter().map(|s: &Vec<u32>| s[1..].iter().map(seed).collect()).collect();
    let mut grads = DeviceGradients::zeros(engine, &decoder.config);
    let scale = temperature_scale(1.0);
    block_on(accumulate(engine, &decoder, &sequences, &seeds, scale, &mut grads, |_| ())).unwrap();
    block_on(grads.read(engine)).unwrap()
}

/// Breaks if an engine adds biases otherwise than the twin.
#[test]
fn gradients_of_an_adapter_are_the_same_on_all_engines() {
    let (base, _) = imported();
    let targets = vec![Projection::Query, Projection::Key, Projection::Down];
    let adapter = Adapter { base: base.hash().into(), rank: 4, alpha: 8, targets };
    let config = ModelConfig { adapter: Some(adapter), ..base.config.clone() };
    let mut master = master_weights(&config, 3);
    let every =
        |m: &mut Vec<f32>| m.iter_mut().enumerate().for_each(|(i, x)| *x += (i % 5) as f32 / 50.0);
    master.iter_mut().for_each(every);
    let adapter = Weights::quantize(&config, &master);
    let constants = base.config.constants();
    let expected = gradient(&Twin::new(constants.clone()), &adapter, &base);
    assert!(expected.0.iter().all(|g| g.iter().any(|x| *x != 0)), "a gradient is trivially zero");
    assert!(gradient(&Cpu::new(constants.clone(), 2, None), &adapter, &base) == expected);
    with_gpu(|gpu| {
        let gpu = gpu.for_model(constants).unwrap();
        assert!(gradient(&gpu, &adapter, &base) == expected);
    });
}

/// Biases are not trained; a run that would leave them behind says so before it begins.
#[test]
fn training_all_of_a_model_with_biases_is_refused() {
    let text = r#"
        name = "full"
        [model]
        import = "qwen"
        [[task]]
        family = "gcd"
        [sft]
        steps = 1
        batch = 1
    "#;
    let mut run: RunConfig = toml::from_str(text).unwrap();
    let weights = imported().0;
    run.model.base = Some(weights.hash().into());
    run.model.shape = Some(weights.config);
    let error = run.model().unwrap_err().to_string();
    assert!(error.contains("model.lora") && error.contains("biases"), "{error}");
}
