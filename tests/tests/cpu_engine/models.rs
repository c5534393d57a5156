//! Whole models: training steps, the oracle's vectors, decoding, sums of sequences.

use manyhands_core::conformance::oracle::Vectors;
use manyhands_core::engine::cpu::{Cpu, Path};
use manyhands_core::engine::{Batch, Engine, SeedRow};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, DeviceGradients, Keep};
use manyhands_core::model::weights::{Gradients, Weights, shapes};
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

use super::{Program, Random, Record, batch, check, compare, config, read, read_saturations};

/// Random weights; at a scale of 1 activations stay in range.
pub(crate) fn model(config: &ModelConfig, seed: u64, scale: f32) -> Weights {
    let mut r = Random(seed);
    let master: Vec<Vec<f32>> = shapes(config)
        .iter()
        .map(|s| {
            let spread = if s.rows == 1 { 0.2 } else { 2.0 * scale / (s.cols as f32).sqrt() };
            let offset = if s.rows == 1 { 1.0 } else { 0.0 };
            let value = |_| offset + r.integer(16) as f32 / 65536.0 * spread;
            (0..s.rows * s.cols).map(value).collect()
        })
        .collect();
    Weights::quantize(config, &master)
}

/// A training step: logits, statistics, gradients, counts.
struct Step<'a> {
    weights: &'a Weights,
    batch: Batch,
    scale: i32,
}

impl Step<'_> {
    fn gradients<E: Engine>(&self, e: &E, out: &mut Record) -> Gradients {
        let config = &self.weights.config;
        let decoder = Decoder::new(e, self.weights);
        let forward = decoder.forward(e, &self.batch, Keep::All);
        let all = self.batch.pieces(usize::MAX).remove(0);
        let head = decoder.head_forward(e, &forward.states, all);
        read(e, out, "logits", &head.logits);
        // Seeds depend on the tokens alone, so that a sequence has the same in any batch.
        let token = |i: usize| self.batch.tokens[i];
        let seeds: Vec<SeedRow> = (0..self.batch.rows())
            .map(|i| SeedRow {
                target: (token(i) * 7 + 3) % config.vocabulary as u32,
                weight: (token(i) as i32 % 5 - 2) * 40_000,
                entropy_weight: token(i) as i32 % 3 * 300,
                entropy_center: 100_000,
            })
            .collect();
        let mut grads = DeviceGradients::zeros(e, config);
        let dh = decoder.head_backward(e, head, &seeds, self.scale, &mut grads);
        decoder.backward(e, &self.batch, forward, dh, &mut grads);
        block_on(grads.read(e)).expect("gradients")
    }
}

impl Program for Step<'_> {
    fn run<E: Engine>(&self, e: &E) -> Record {
        let mut out = Record::new();
        let grads = self.gradients(e, &mut out);
        for (shape, grad) in shapes(&self.weights.config).iter().zip(grads.0) {
            out.push((shape.name.clone(), grad));
        }
        read_saturations(e, &mut out, "a step");
        out
    }
}

/// The whole decoder, forward and backward.
#[test]
fn cpu_engine_training_step_equals_the_twin() {
    for (i, (config, lengths)) in [
        (config(64, 4, 2, 16, 96, 50, 2), vec![33, 1, 40, 20]),
        (config(96, 3, 3, 32, 100, 65, 1), vec![64, 64]),
        (config(48, 2, 1, 64, 64, 20, 2), vec![70]),
    ]
    .into_iter()
    .enumerate()
    {
        let weights = model(&config, 7 + i as u64, 1.0);
        let batch = batch(&lengths, config.vocabulary, &mut Random(40 + i as u64));
        let step = Step { weights: &weights, batch, scale: temperature_scale(1.0) };
        let record = check(&format!("step {i}"), &config.constants(), &step);
        for (name, x) in &record {
            assert!(name.starts_with("sat") || x.iter().any(|&x| x != 0), "{name} is all zero");
        }
    }
}

/// The oracle's own vectors, on every variant.
#[test]
fn cpu_engine_reproduces_the_oracle() {
    let files: [&[u8]; 2] = [
        include_bytes!("../../data/oracle/vectors-1.safetensors"),
        include_bytes!("../../data/oracle/vectors-2.safetensors"),
    ];
    for file in files {
        let vectors = Vectors::parse(file).expect("a vector file");
        for path in Path::available() {
            for threads in [1, 2] {
                let engine = Cpu::new(vectors.config().constants(), threads, Some(path));
                block_on(vectors.check(&engine)).expect("equal");
            }
        }
    }
}

/// Prefill in ragged pieces and decoding in batches give the logits of the full forward pass.
#[test]
fn cpu_engine_decoding_through_caches_equals_the_full_forward() {
    let config = config(64, 4, 2, 16, 96, 50, 2);
    let weights = model(&config, 3, 1.0);
    let whole = batch(&[75, 40, 66], config.vocabulary, &mut Random(9));
    for path in Path::available() {
        for threads in [1, 2] {
            let e = Cpu::new(config.constants(), threads, Some(path));
            let decoder = Decoder::new(&e, &weights);
            let full = decoder.forward(&e, &whole, Keep::All).states;
            let full = block_on(e.read(&decoder.logits(&e, &full))).expect("logits");
            let mut caches = decoder.caches(&e, 3, 80);
            // Fill the caches with something else first: stale content must not show.
            let stale = batch(&[80, 80, 80], config.vocabulary, &mut Random(10));
            decoder.states(&e, &stale, &mut caches);
            let mut at = [0; 3];
            for step in 0.. {
                let mut part = Batch::default();
                let mut rows = Vec::new();
                for (i, s) in whole.segments.iter().enumerate() {
                    let n = [[31, 2, 1], [1, 7, 33], [5, 5, 1]][i][step.min(2)];
                    let n = n.min(s.rows - at[i]);
                    if n > 0 {
                        let first = s.first_row + at[i];
                        part.push(s.slot, at[i], &whole.tokens[first..first + n]);
                        rows.extend(first..first + n);
                        at[i] += n;
                    }
                }
                if rows.is_empty() {
                    break;
                }
                let logits = decoder.logits(&e, &decoder.states(&e, &part, &mut caches));
                let logits = block_on(e.read(&logits)).expect("logits");
                for (row, got) in rows.iter().zip(logits.chunks_exact(config.vocabulary)) {
                    let expected = &full[row * config.vocabulary..][..config.vocabulary];
                    assert_eq!(expected, got, "row {row} at step {step}, {path}, {threads}");
                }
            }
        }
    }
}

/// A sequence alone equals the sequence in a batch; gradients of a batch are sums of those alone.
#[test]
fn cpu_engine_batches_are_sums_of_their_sequences() {
    let config = config(64, 4, 2, 16, 96, 50, 2);
    let weights = model(&config, 5, 1.0);
    let whole = batch(&[33, 64, 1, 45], config.vocabulary, &mut Random(11));
    let scale = temperature_scale(1.0);
    for path in Path::available() {
        let e = Cpu::new(config.constants(), 2, Some(path));
        let mut together = Record::new();
        let step = Step { weights: &weights, batch: whole.clone(), scale };
        let expected = step.gradients(&e, &mut together);
        let mut sum = Gradients::zeros(&config);
        let mut logits = Vec::new();
        for s in &whole.segments {
            let tokens = &whole.tokens[s.first_row..s.first_row + s.rows];
            let mut out = Record::new();
            let batch = Batch::sequences([tokens]);
            sum.add(&Step { weights: &weights, batch, scale }.gradients(&e, &mut out));
            logits.extend_from_slice(&out[0].1);
        }
        compare(&format!("{path}"), &together, &vec![("logits".into(), logits)]);
        assert!(expected == sum, "{path}: gradients are not additive");
        let moved = expected.0.iter().all(|g| g.iter().any(|&x| x != 0));
        assert!(moved, "{path}: some gradient is zero");
    }
}
