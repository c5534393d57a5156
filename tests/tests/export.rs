//! Exact weights written for other programs, and read again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;

use manyhands_core::export::numbers::Precision;
use manyhands_core::export::{Model, gguf, hub};
use manyhands_core::import::exact::{Shifts, quantize};
use manyhands_core::import::gguf::{Gguf, Value};
use manyhands_core::import::hf;
use manyhands_core::import::names::Source;
use manyhands_core::import::reference::Reference;
use manyhands_core::model::adapter::{Adapter, Projection};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::weights::{Parameter, Shape, Weights, shapes};

const TINY: &[u8] = include_bytes!("../data/tiny/tiny.gguf");
/// Residual streams that stay as they are, and that are divided by eight.
const PEAKS: [f32; 2] = [1.0, 60_000.0];
const RANK: usize = 4;

/// The tiny model, and the powers of two that its import moved.
fn imported(peak: f32) -> (Weights, Shifts) {
    read(&Source::from_gguf(&Gguf::parse(TINY).unwrap()).unwrap(), peak)
}

fn read(source: &Source<'_>, peak: f32) -> (Weights, Shifts) {
    let shifts = Shifts::choose(source, peak).unwrap();
    (quantize(source, &shifts).unwrap(), shifts)
}

/// An adapter to these weights, and factors from a sequence of no meaning.
fn adapted(weights: &Weights, targets: &[Projection]) -> (Adapter, Weights) {
    let base = weights.hash().into();
    let adapter = Adapter { base, rank: RANK, alpha: 8, targets: targets.to_vec() };
    let config = ModelConfig { adapter: Some(adapter.clone()), ..weights.config.clone() };
    let mut state = 7_u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / f32::from(1_u16 << 15) / 512.0 - 0.5
    };
    let values = |s: &Shape| (0..s.rows * s.cols).map(|_| draw() * 0.2).collect();
    let master: Vec<Vec<f32>> = shapes(&config).iter().map(values).collect();
    (adapter, Weights::quantize(&config, &master))
}

/// s B A of one matrix, in f64.
fn product(adapter: &Adapter, a: &[f32], b: &[f32], cols: usize) -> Vec<f64> {
    let scale = adapter.alpha as f64 / adapter.rank as f64;
    let at = |o: usize, c: usize| -> f64 {
        (0..RANK).map(|r| f64::from(b[o * RANK + r]) * f64::from(a[r * cols + c])).sum::<f64>()
    };
    (0..b.len() / RANK * cols).map(|i| scale * at(i / cols, i % cols)).collect()
}

/// Breaks if a container loses a bit, a name, a row's place, or a power of two.
#[test]
fn exported_models_import_to_the_same_hash() {
    for peak in PEAKS {
        let (weights, shifts) = imported(peak);
        let model = Model::new(&weights, &shifts);
        assert_eq!(model.config.rms_epsilon, 1e-5);
        for precision in [Precision::Exact, Precision::F32, Precision::F16] {
            let file = gguf::model(&model, Vec::new(), precision).unwrap();
            let parsed = Gguf::parse(&file.bytes).unwrap();
            let source = Source::from_gguf(&parsed).unwrap();
            let (again, same) = read(&source, peak);
            assert_eq!((again.hash(), same), (weights.hash(), shifts.clone()), "{precision:?}");
            let formats: Vec<_> = source.encodings().into_iter().collect();
            let expected =
                if precision == Precision::F32 { &["F32"][..] } else { &["F16", "F32"][..] };
            assert_eq!((&*formats, file.tensors, file.rounded), (expected, 21, 0));
        }
        let config = hub::config(&model.config, Some(1), 2, Precision::F32).to_string();
        let file = hub::model(&model, Precision::F32).unwrap();
        let shards = [("model.safetensors".to_string(), file.bytes)];
        let tensors = hf::tensors(&shards).unwrap();
        let (again, same) = read(&Source::from_hf(config.as_bytes(), tensors).unwrap(), peak);
        assert_eq!((again.hash(), same), (weights.hash(), shifts));
    }
}

/// Half precision holds matrices but not these gains, and says how many it rounded.
#[test]
fn rounding_is_counted() {
    let (mut weights, shifts) = imported(1.0);
    let Parameter::Gain(gain) = &mut weights.parameters[1] else { panic!("no norm") };
    gain[..3].copy_from_slice(&[4097, 8191, 4096]);
    let model = Model::new(&weights, &shifts);
    assert_eq!(hub::model(&model, Precision::F16).unwrap().rounded, 2);
    assert_eq!(hub::model(&model, Precision::F32).unwrap().rounded, 0);
}

/// Breaks if a factor keeps a power of two that the import moved, or takes back one too many: the
/// adapter then changes the original otherwise than it changed what it was trained on.
#[test]
fn merged_adapter_does_to_the_original_what_it_does_to_the_import() {
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 264).collect();
    let logits = |config: ModelConfig, values: Vec<Vec<f32>>| {
        let reference = Reference::new(config, values);
        reference.logits(&reference.states(&tokens).rows)
    };
    for peak in PEAKS {
        let (weights, shifts) = imported(peak);
        let plain = logits(weights.config.clone(), weights.values());
        for target in Projection::ALL {
            let (adapter, factors) = adapted(&weights, &[target]);
            // On the import's own scale, as the run computes it.
            let mut values = weights.values();
            let trained: BTreeMap<String, Vec<f32>> =
                shapes(&factors.config).into_iter().map(|s| s.name).zip(factors.values()).collect();
            for (shape, values) in shapes(&weights.config).iter().zip(&mut values) {
                let Some(a) = trained.get(&format!("{}.a", shape.name)) else { continue };
                let b = &trained[&format!("{}.b", shape.name)];
                let sum = product(&adapter, a, b, shape.cols);
                values.iter_mut().zip(sum).for_each(|(w, s)| *w = (f64::from(*w) + s) as f32);
            }
            let expected = logits(weights.config.clone(), values);
            let mut model = Model::new(&weights, &shifts);
            model.merge(&adapter, &Model::new(&factors, &shifts).tensors);
            let got = logits(model.config, model.tensors.into_iter().map(|t| t.values).collect());
            let difference = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max)
            };
            assert!(difference(&got, &expected) < 1e-4, "{target:?}, a peak of {peak}");
            assert!(difference(&plain, &expected) > 0.05, "{target:?} adapts nothing");
        }
    }
}

/// Breaks if an adapter alone does something else than the merged model: PEFT's names and factors.
#[test]
fn peft_factors_add_to_the_exported_model() {
    let (weights, shifts) = imported(60_000.0);
    let (adapter, factors) = adapted(&weights, &Projection::ALL);
    let factors = Model::new(&factors, &shifts);
    let mut model = Model::new(&weights, &shifts);
    let base = hub::model(&model, Precision::F32).unwrap().bytes;
    model.merge(&adapter, &factors.tensors);
    let merged = hub::model(&model, Precision::F32).unwrap().bytes;
    let file = hub::adapter(&factors).unwrap();
    let [base, merged, file] = [base, merged, file.bytes].map(|b| [(String::new(), b)]);
    let [base, merged, file] = [&base, &merged, &file].map(|f| hf::tensors(f).unwrap());
    let mut adapted = 0;
    for (name, view) in &merged {
        let (got, base) = (view.read(name).unwrap(), base[name].read(name).unwrap());
        let matrix = name.strip_suffix(".weight").unwrap();
        let factor = |own: &str| {
            file.get(&format!("base_model.model.{matrix}.lora_{own}.weight"))
                .map(|view| (view.dims.clone(), view.read(own).unwrap()))
        };
        let Some(((a_dims, a), (b_dims, b))) = factor("A").zip(factor("B")) else {
            assert_eq!(got, base, "{name}");
            continue;
        };
        let [rows, cols] = view.dims[..] else { panic!("{name} is no matrix") };
        assert_eq!((a_dims, b_dims), (vec![RANK, cols], vec![rows, RANK]), "{name}");
        for ((got, base), add) in got.iter().zip(&base).zip(product(&adapter, &a, &b, cols)) {
            assert_eq!(*got, (f64::from(*base) + add) as f32, "{name}");
        }
        assert_ne!(got, base, "{name}");
        adapted += 1;
    }
    assert_eq!((adapted, file.len()), (14, 28));
    let config = hub::adapter_config(&adapter, "owner/name", None);
    assert_eq!((&config["r"], &config["lora_alpha"]), (&4.into(), &8.into()));
    assert_eq!(config["target_modules"][0], "q_proj");
    assert_eq!(config["target_modules"][6], "down_proj");
}

/// The same of llama.cpp's adapter, whose rows lie in pairs as its model's do.
#[test]
fn gguf_factors_add_to_the_exported_model() {
    let (weights, shifts) = imported(60_000.0);
    let (adapter, factors) = adapted(&weights, &[Projection::Query, Projection::Key]);
    let factors = Model::new(&factors, &shifts);
    let mut model = Model::new(&weights, &shifts);
    let base = gguf::model(&model, Vec::new(), Precision::F32).unwrap().bytes;
    model.merge(&adapter, &factors.tensors);
    let merged = gguf::model(&model, Vec::new(), Precision::F32).unwrap().bytes;
    let file = gguf::adapter(&factors, &adapter).unwrap().bytes;
    let [base, merged, file] = [&base, &merged, &file].map(|b| Gguf::parse(b).unwrap());
    for (key, value) in [
        ("general.type", Value::Text("adapter")),
        ("general.architecture", Value::Text("llama")),
        ("adapter.type", Value::Text("lora")),
        ("adapter.lora.alpha", Value::Float(8.0)),
    ] {
        assert_eq!(file.keys[key], value, "{key}");
    }
    assert_eq!(file.tensors.len(), 8);
    for name in ["blk.0.attn_q", "blk.0.attn_k", "blk.1.attn_q", "blk.1.attn_k"] {
        let weight = format!("{name}.weight");
        let read = |file: &Gguf<'_>, name: &str| file.tensors[name].read(name).unwrap();
        let a = read(&file, &format!("{weight}.lora_a"));
        let b = read(&file, &format!("{weight}.lora_b"));
        let (base, got) = (read(&base, &weight), read(&merged, &weight));
        for ((got, base), add) in got.iter().zip(base).zip(product(&adapter, &a, &b, 48)) {
            assert_eq!(*got, (f64::from(base) + add) as f32, "{name}");
        }
    }
}
