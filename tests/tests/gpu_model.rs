//! The whole decoder on the GPU engine: the oracle's integers, the twin's bits, and the
//! invariances that decoding, batching and sharing gradients rely on.

mod gpu_support;

use gpu_support::{Random, Scenario, Trace, same, whole, with_gpu};
use manyhands_core::conformance::oracle::Vectors;
use manyhands_core::engine::gpu::{Gpu, MatmulVariant};
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Batch, Engine, SeedRow};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, DeviceGradients, Keep};
use manyhands_core::model::weights::{Gradients, Weights, shapes};
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

fn config() -> ModelConfig {
    ModelConfig {
        vocabulary: 70,
        layers: 2,
        width: 96,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn: 80,
        context: 80,
        rope_base: 10_000.0,
        rms_epsilon: 1e-5,
        tied: false,
        bias: false,
        adapter: None,
    }
}

fn weights(config: &ModelConfig, seed: u64) -> Weights {
    let mut r = Random(seed);
    let mut one = |scale: f32| (r.next() as i32 as f32) * 2_f32.powi(-31) * scale;
    let tensor = |s: &manyhands_core::model::weights::Shape| {
        let scale = 2.0 / (s.cols as f32).sqrt();
        let gain = s.rows == 1;
        (0..s.rows * s.cols).map(|_| if gain { 1.0 + one(0.3) } else { one(scale) }).collect()
    };
    let master: Vec<Vec<f32>> = shapes(config).iter().map(tensor).collect();
    Weights::quantize(config, &master)
}

fn sequences(config: &ModelConfig, lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut r = Random(lengths.len() as u64);
    let mut tokens = |n: usize| (0..n).map(|_| r.below(config.vocabulary) as u32).collect();
    lengths.iter().map(|&n| tokens(n)).collect()
}

fn batch(sequences: &[Vec<u32>]) -> Batch {
    Batch::sequences(sequences.iter().map(Vec::as_slice))
}

/// A seed a row that depends on the row's token only, so that it is the same in any batch.
fn seeds(batch: &Batch) -> Vec<SeedRow> {
    let seed = |&token: &u32| SeedRow {
        target: (token * 7 + 3) % 70,
        weight: if token.is_multiple_of(5) { 0 } else { 65_536 - 3000 * token.cast_signed() },
        entropy_weight: if token.is_multiple_of(3) { 2000 } else { 0 },
        entropy_center: 4 << 16,
    };
    batch.tokens.iter().map(seed).collect()
}

async fn logits_and_gradients<E: Engine>(
    e: &E,
    weights: &Weights,
    batch: &Batch,
) -> (Vec<i32>, Gradients) {
    let decoder = Decoder::new(e, weights);
    let forward = decoder.forward(e, batch, Keep::All);
    let all = batch.pieces(usize::MAX).remove(0);
    let head = decoder.head_forward(e, &forward.states, all);
    let logits = e.read(&head.logits).await.expect("read");
    let mut grads = DeviceGradients::zeros(e, &weights.config);
    let scale = temperature_scale(1.0);
    let dh = decoder.head_backward(e, head, &seeds(batch), scale, &mut grads);
    decoder.backward(e, batch, forward, dh, &mut grads);
    (logits, grads.read(e).await.expect("read"))
}

/// Forward and backward of ragged sequences.
struct Model(Weights, Batch);

impl Scenario for Model {
    async fn run<E: Engine>(&self, e: &E, out: &mut Trace) {
        let (logits, grads) = logits_and_gradients(e, &self.0, &self.1).await;
        out.integers("logits", logits.into_iter().map(i64::from).collect());
        for (shape, grad) in shapes(&self.0.config).iter().zip(grads.0) {
            assert!(grad.iter().any(|&g| g != 0), "the gradient of {} is zero", shape.name);
            out.integers(&shape.name, grad);
        }
        out.saturations(e, "model").await;
    }
}

fn for_model(gpu: &Gpu) -> Gpu {
    gpu.for_model(config().constants()).expect("buffers fit")
}

/// Breaks if any operation's place in the model is wrong on the GPU, by whatever product kernel.
#[test]
fn model_forward_and_backward_equal_twin() {
    with_gpu(|gpu| {
        let batch = batch(&sequences(&config(), &[33, 1, 64, 20]));
        let model = Model(weights(&config(), 1), batch);
        let expected = block_on(whole(&Twin::new(config().constants()), &model));
        let gpu = for_model(gpu);
        for variant in MatmulVariant::ALL {
            gpu.set_matmul_variant(variant);
            same(&format!("{variant:?}"), &expected, &block_on(whole(&gpu, &model)));
        }
    });
}

/// Breaks if the oracle's logits, totals or gradients are not reproduced to the last bit.
#[test]
fn oracle_gpu_reproduces_every_integer() {
    with_gpu(|gpu| {
        for file in [
            &include_bytes!("../data/oracle/vectors-1.safetensors")[..],
            &include_bytes!("../data/oracle/vectors-2.safetensors")[..],
        ] {
            let vectors = Vectors::parse(file).expect("a vector file");
            let gpu = gpu.for_model(vectors.config().constants()).expect("buffers fit");
            block_on(vectors.check(&gpu)).expect("equal");
        }
    });
}

/// Breaks if sampling through the caches sees other logits than training does.
#[test]
fn model_prefill_and_decode_equal_full_forward() {
    with_gpu(|gpu| {
        let (gpu, config) = (for_model(gpu), config());
        let sequences = sequences(&config, &[50, 37]);
        let decoder = Decoder::new(&gpu, &weights(&config, 2));
        let full = decoder.forward(&gpu, &batch(&sequences), Keep::All);
        let full = block_on(gpu.read(&decoder.logits(&gpu, &full.states))).expect("read");
        let row = |sequence: usize, position: usize| {
            let first = if sequence == 0 { 0 } else { 50 };
            &full[(first + position) * config.vocabulary..][..config.vocabulary]
        };
        let mut caches = decoder.caches(&gpu, 2, 50);
        let prefill = 30;
        for position in prefill - 1..37 {
            let from = if position < prefill { 0 } else { position };
            let mut step = Batch::default();
            for (slot, tokens) in sequences.iter().enumerate() {
                step.push(slot, from, &tokens[from..=position]);
            }
            let each = position - from + 1;
            let last = [each as u32 - 1, 2 * each as u32 - 1];
            let h = gpu.rows(&decoder.states(&gpu, &step, &mut caches), &last);
            let logits = decoder.logits(&gpu, &h);
            let logits = block_on(gpu.read(&logits)).expect("read");
            for (i, logits) in logits.chunks(config.vocabulary).enumerate() {
                assert_eq!(logits, row(i, position), "sequence {i}, position {position}");
            }
        }
    });
}

/// Breaks if batching changes a sequence's logits, or gradients are not additive.
#[test]
fn model_batch_equals_its_sequences() {
    with_gpu(|gpu| {
        let (gpu, config) = (for_model(gpu), config());
        let weights = weights(&config, 3);
        let sequences = sequences(&config, &[40, 7, 33]);
        let (logits, grads) = block_on(logits_and_gradients(&gpu, &weights, &batch(&sequences)));
        let mut sum = Gradients::zeros(&config);
        let mut alone = Vec::new();
        for sequence in &sequences {
            let one = batch(std::slice::from_ref(sequence));
            let (logits, grads) = block_on(logits_and_gradients(&gpu, &weights, &one));
            alone.extend(logits);
            sum.add(&grads);
        }
        assert_eq!(logits, alone);
        assert_eq!(grads, sum);
    });
}
