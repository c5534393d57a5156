//! Open weights, read from files that other programs wrote, against what those programs compute.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;

use manyhands_core::engine::Batch;
use manyhands_core::engine::Engine;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::import::compare::compare;
use manyhands_core::import::exact::{Shifts, quantize, restore};
use manyhands_core::import::gguf::Gguf;
use manyhands_core::import::hf;
use manyhands_core::import::names::Source;
use manyhands_core::import::reference::Reference;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::weights::{Parameter, Weights};
use serde_json::Value;

const VECTORS: &[u8] = include_bytes!("../data/gguf/vectors.gguf");
const TINY: &[u8] = include_bytes!("../data/tiny/tiny.gguf");
const CONFIG: &[u8] = include_bytes!("../data/tiny/hub/config.json");
const SHARDS: [&[u8]; 2] = [
    include_bytes!("../data/tiny/hub/model-00001-of-00002.safetensors"),
    include_bytes!("../data/tiny/hub/model-00002-of-00002.safetensors"),
];
/// Largest difference of an f32 logit from the f64 reference, whose logits reach 10.
const F32_ERROR_MAX: f64 = 1e-4;
/// Largest relative error of a row of exact logits against f32 on the same rounded weights: eleven
/// bits of activations in fifteen products that follow each other.
const EXACT_ERROR_MAX: f64 = 0.01;
/// The same against the original's weights, which are rounded to ten bits a tile.
const WEIGHT_ERROR_MAX: f64 = 0.05;

fn shards() -> Vec<(String, Vec<u8>)> {
    SHARDS.iter().enumerate().map(|(i, b)| (format!("shard {i}"), b.to_vec())).collect()
}

fn reference() -> (Vec<u32>, Vec<usize>, Vec<Vec<f64>>) {
    let json: Value = serde_json::from_str(include_str!("../data/tiny/reference.json")).unwrap();
    let list = |v: &Value| v.as_array().unwrap().clone();
    let ids = list(&json["ids"]).iter().map(|v| v.as_u64().unwrap() as u32).collect();
    let positions = list(&json["positions"]).iter().map(|v| v.as_u64().unwrap() as usize).collect();
    let row = |r: &Value| list(r).iter().map(|v| v.as_f64().unwrap()).collect();
    (ids, positions, list(&json["logits"]).iter().map(row).collect())
}

/// Breaks if any number format is read otherwise than the reader in the `gguf` package does.
#[test]
fn gguf_formats_have_the_values_of_another_reader() {
    let file = Gguf::parse(VECTORS).unwrap();
    let mut formats = 0;
    for (name, view) in &file.tensors {
        let Some(expected) = file.tensors.get(format!("{name}.f32").as_str()) else { continue };
        let (got, expected) = (view.read(name).unwrap(), expected.read(name).unwrap());
        assert_eq!(view.encoding.name(), *name);
        assert_eq!(got.len(), expected.len());
        let wrong = (0..got.len()).find(|&i| got[i] != expected[i]);
        let values = wrong.map(|i| (i, got[i], expected[i]));
        assert_eq!(values, None, "{name}: index, got and expected");
        assert!(got.iter().filter(|x| **x != 0.0).count() > got.len() / 2);
        formats += 1;
    }
    assert_eq!(formats, 10);
}

/// Breaks if names, rotary pairs or the forward pass in f32 are wrong in either container.
#[test]
fn reference_computes_the_logits_of_another_program() {
    let (ids, positions, logits) = reference();
    let file = Gguf::parse(TINY).unwrap();
    let shards = shards();
    let tensors = hf::tensors(&shards).unwrap();
    for source in [Source::from_gguf(&file).unwrap(), Source::from_hf(CONFIG, tensors).unwrap()] {
        let reference = Reference::read(&source).unwrap();
        let states = reference.states(&ids);
        let got = reference.logits(&states.rows);
        assert!(states.peak > 0.0);
        for (position, expected) in positions.iter().zip(&logits) {
            let row = &got[position * source.config.vocabulary..][..source.config.vocabulary];
            for (i, (g, e)) in row.iter().zip(expected).enumerate() {
                let error = (f64::from(*g) - e).abs();
                assert!(error < F32_ERROR_MAX, "{position}, token {i}: {g}, expected {e}");
            }
        }
    }
}

fn tiny(residual_peak: f32) -> (Weights, Shifts, Vec<Vec<f32>>) {
    let file = Gguf::parse(TINY).unwrap();
    let source = Source::from_gguf(&file).unwrap();
    let shifts = Shifts::choose(&source, residual_peak).unwrap();
    let original = source.tensors.iter().map(|f| f.read().unwrap()).collect();
    (quantize(&source, &shifts).unwrap(), shifts, original)
}

/// The same numbers from two containers are the same weights.
#[test]
fn gguf_and_safetensors_import_to_the_same_hash() {
    let (weights, shifts, _) = tiny(1.0);
    let shards = shards();
    let source = Source::from_hf(CONFIG, hf::tensors(&shards).unwrap()).unwrap();
    assert_eq!(quantize(&source, &shifts).unwrap().hash(), weights.hash());
}

/// Moving powers of two changes exponents only: what the weights stand for stays, bit for bit.
#[test]
fn shifts_change_no_mantissa_and_are_taken_back() {
    let (plain, no_shift, original) = tiny(1.0);
    let (scaled, shifts, _) = tiny(60_000.0);
    assert_eq!((no_shift.residual, shifts.residual), (0, 3));
    assert!(shifts.norms["layers.0.attention_norm"].iter().all(|s| *s > 1), "{shifts:?}");
    assert_eq!(scaled.config.rms_epsilon, plain.config.rms_epsilon / 64.0);
    assert_eq!(restore(&scaled, &shifts), restore(&plain, &no_shift));
    for ((p, original), restored) in
        plain.parameters.iter().zip(&original).zip(restore(&plain, &no_shift))
    {
        // Half a step of 512 steps to a tile's maximum, or of 4096 to a gain of 1 to 2.
        let step = match p {
            Parameter::Matrix(_) => 1.0 / 512.0,
            Parameter::Gain(_) => 1.0 / 4096.0,
        };
        let max = original.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        for (r, o) in restored.iter().zip(original) {
            assert!((r - o).abs() <= max * step, "{r} for {o}");
        }
    }
}

/// The exact model is the original within what 10-bit weights cost, at either scale of its stream.
#[test]
fn exact_model_agrees_with_the_original() {
    let (ids, positions, logits) = reference();
    let file = Gguf::parse(TINY).unwrap();
    let source = Source::from_gguf(&file).unwrap();
    let reference = Reference::read(&source).unwrap();
    for peak in [1.0, 60_000.0] {
        let (weights, shifts, _) = tiny(peak);
        let engine = Cpu::new(weights.config.constants(), 2, None);
        let decoder = Decoder::new(&engine, &weights);
        let batch = Batch::sequences([ids.as_slice()]);
        let mut caches = decoder.caches(&engine, 1, ids.len());
        let rows: Vec<u32> = positions.iter().map(|p| *p as u32).collect();
        let h = engine.rows(&decoder.states(&engine, &batch, &mut caches), &rows);
        let exact = decoder.logits(&engine, &h);
        let exact = pollster::block_on(engine.read(&exact)).unwrap();
        let rounded = Reference::new(source.config.clone(), restore(&weights, &shifts));
        let states = rounded.states(&ids).rows;
        let rounded = rounded.logits(&states);
        let vocabulary = weights.config.vocabulary;
        for ((got, original), position) in exact.chunks(vocabulary).zip(&logits).zip(&positions) {
            let rounded = &rounded[position * vocabulary..][..vocabulary];
            let rounded: Vec<f64> = rounded.iter().map(|x| f64::from(*x)).collect();
            for (expected, error_max) in [(original, WEIGHT_ERROR_MAX), (&rounded, EXACT_ERROR_MAX)]
            {
                let squares = |f: fn(f64, f64) -> f64| -> f64 {
                    let pairs = got.iter().zip(expected);
                    pairs.map(|(g, e)| f(f64::from(*g) / 65_536.0, *e).powi(2)).sum()
                };
                let error = (squares(|g, e| g - e) / squares(|_, e| e)).sqrt();
                assert!(error < error_max, "relative error {error}, {position}, a peak of {peak}");
            }
        }
        let tokens: Vec<u32> = (0..300).map(|i| i * 37 % 264).collect();
        let report = compare(&reference, &engine, &decoder, &tokens, 100, |_| ());
        let report = pollster::block_on(report).unwrap();
        assert_eq!((report.positions, report.saturation.len()), (300, 0));
        assert!(report.kl > 0.0 && report.kl < 0.01, "{report:?}");
        assert!(report.top1 > 0.9, "{report:?}");
        let ratio = report.ppl_exact / report.ppl_source;
        assert!((ratio - 1.0).abs() < 0.02, "{report:?}");
    }
}

/// A stream that no power of two within the norms' range brings in, and a gain beyond Q3.12, are
/// refused, not clamped.
#[test]
fn what_the_formats_cannot_hold_is_refused() {
    let file = Gguf::parse(TINY).unwrap();
    let source = Source::from_gguf(&file).unwrap();
    assert!(Shifts::choose(&source, f32::INFINITY).is_err());
    let shifts = Shifts { residual: 4, norms: BTreeMap::new() };
    let error = quantize(&source, &shifts).unwrap_err().to_string();
    assert!(error.contains("rms_epsilon"), "{error}");
    let norms = BTreeMap::from([("layers.0.ffn_norm".to_string(), vec![12; 2])]);
    let error = quantize(&source, &Shifts { residual: 0, norms }).unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_norm.weight: gain"), "{error}");
}

/// `TINY` with the only occurrence of `from` replaced by `to`, of the same length.
fn patched(from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> =
        (0..TINY.len() - from.len()).filter(|i| TINY[*i..].starts_with(from)).collect();
    let [at] = places[..] else { panic!("{} places", places.len()) };
    let mut bytes = TINY.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    let file = match Gguf::parse(bytes) {
        Ok(file) => file,
        Err(e) => return e.to_string(),
    };
    let source = match Source::from_gguf(&file) {
        Ok(source) => source,
        Err(e) => return e.to_string(),
    };
    let read: Result<Vec<_>, _> = source.tensors.iter().map(|t| t.read()).collect();
    read.unwrap_err().to_string()
}

/// A length and a name, as GGUF writes a text.
fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Where the entry of a tensor of two dimensions lies: its dimensions, type and offset follow.
fn entry(name: &str) -> usize {
    let name = text(name);
    (0..TINY.len()).find(|i| TINY[*i..].starts_with(&name)).unwrap() + name.len() + 4
}

/// Every damage is named by what it hit.
#[test]
fn damaged_gguf_is_refused_by_name() {
    let with = |at: usize, value: u64| {
        let mut bytes = TINY.to_vec();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        refusal(&bytes)
    };
    let (key, head) = (entry("blk.1.attn_k.weight"), entry("output.weight"));
    let offset = |at: usize| u64::from_le_bytes(TINY[at + 20..at + 28].try_into().unwrap());
    let aligned = |value: u32| {
        let key = [&text("general.alignment"), &4_u32.to_le_bytes()[..], &value.to_le_bytes()];
        let mut bytes = TINY.to_vec();
        bytes[16] += 1;
        bytes.splice(24..24, key.concat());
        refusal(&bytes)
    };
    let cases = [
        (aligned(48), "general.alignment", "48 is no alignment"),
        (aligned(1 << 17), "general.alignment", "131072 is no alignment"),
        (with(24, 257), "key 0", "a name of 257 bytes"),
        (with(key - 4, 5 | 48 << 32), "blk.1.attn_k.weight", "5 dimensions"),
        (refusal(b"GGML"), "header", "not a GGUF file"),
        (with(8, 1 << 40), "header", "more than"),
        (with(16, u64::MAX), "header", "more than"),
        (with(24, u64::MAX), "key 0", "the file ends"),
        (with(key, 1 << 33), "blk.1.attn_k.weight", "a dimension is 8589934592"),
        (with(key, 96), "", "overlap"),
        (with(key + 8, 8), "blk.1.attn_k.weight", "shape is [8, 48]"),
        (with(key + 20, offset(key) + 1), "blk.1.attn_k.weight", "multiple of 32"),
        (with(key + 20, offset(head)), "", "overlap"),
        (with(head + 20, 1 << 40), "output.weight", "outside the file"),
        (with(head + 20, u64::MAX - 31), "output.weight", "outside the file"),
        (with(key + 16, 31), "blk.1.attn_k.weight", "its type 31 is not read"),
        (refusal(&patched(&text("llama"), &text("gemma"))), "general.architecture", "not computed"),
        (refusal(&patched(b"blk.1.ffn_up.w", b"blk.1.ffn_qp.w")), "blk.1.ffn_up", "missing"),
        (
            refusal(&patched(
                b"llama.block_count\x04\0\0\0\x02",
                b"llama.block_count\x04\0\0\0\x01",
            )),
            "blk.1",
            "no such tensor",
        ),
        (
            refusal(&patched(b"llama.embedding_length", b"llama.embedding_lengtH")),
            "embedding_length",
            "missing",
        ),
    ];
    for (error, subject, problem) in cases {
        assert!(
            error.contains(subject) && error.contains(problem),
            "{error:?}: {subject}, {problem}"
        );
    }
    let mut nan = TINY.to_vec();
    nan[TINY.len() - 1000..TINY.len() - 900].fill(0xff);
    assert!(refusal(&nan).contains("not finite"), "{}", refusal(&nan));
}

/// Cut anywhere, a file is refused, and nothing panics.
#[test]
fn truncated_files_are_refused() {
    for length in (0..TINY.len()).step_by(499) {
        assert!(Gguf::parse(&TINY[..length]).is_err(), "{length} bytes are a file");
    }
    for length in (0..SHARDS[1].len()).step_by(499) {
        let cut = vec![("half".to_string(), SHARDS[1][..length].to_vec())];
        let error = hf::tensors(&cut).unwrap_err().to_string();
        assert!(error.contains("half"), "{error}");
    }
}

/// What would change the function is refused, not passed over.
#[test]
fn hub_files_that_do_not_fit_are_refused_by_name() {
    let with = |change: &dyn Fn(&mut Value), drop: &str| {
        let mut config: Value = serde_json::from_slice(CONFIG).unwrap();
        change(&mut config);
        let shards = shards();
        let mut tensors = hf::tensors(&shards).unwrap();
        tensors.remove(drop);
        Source::from_hf(config.to_string().as_bytes(), tensors).map(|_| ()).unwrap_err().to_string()
    };
    let set = |key: &'static str, value: Value| move |c: &mut Value| c[key] = value.clone();
    let cases = [
        (with(&set("model_type", "gpt2".into()), ""), "model_type"),
        (with(&set("num_attention_heads", 0.into()), ""), "heads"),
        (with(&set("hidden_size", (1_u64 << 40).into()), ""), "width"),
        (with(&set("hidden_act", "gelu".into()), ""), "hidden_act"),
        (
            with(&set("rope_scaling", serde_json::json!({"rope_type": "llama3"})), ""),
            "rope_scaling",
        ),
        (with(&set("vocab_size", 265.into()), ""), "model.embed_tokens.weight"),
        (with(&set("num_hidden_layers", 3.into()), ""), "model.layers.2.input_layernorm.weight"),
        (with(&set("num_hidden_layers", 1.into()), ""), "model.layers.1."),
        (with(&|_| (), "model.norm.weight"), "model.norm.weight"),
    ];
    for (error, subject) in cases {
        assert!(error.contains(subject), "{error:?} does not name {subject}");
    }
    let twice = [shards(), shards()].concat();
    assert!(hf::tensors(&twice).unwrap_err().to_string().contains("in another file"));
}
