//! The conformance suite: one digest over tables, kernels, a gradient and a short rollout.
//!
//! Inputs are fixed by a counter generator and reach the extremes of range, so that every clamp is
//! driven. An engine whose digest is not [`DIGEST`] does not compute format X1 and must never
//! contribute. The sections are hashed one by one, so that a failure names the first wrong one.

use manyhands_shaders::tables::{EXP2, SIGMOID};
use manyhands_shaders::twin::logits::temperature_scale;
use manyhands_shaders::x1::{FORMAT, LIM, philox};

use crate::engine::{Batch, Constants, Engine, EngineError, RowStats, Saturations, SeedRow};
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, DeviceGradients, Keep};
use crate::model::generate::{Request, Sampling, generate};
use crate::model::init::master_weights;
use crate::model::weights::{Parameter, Weights, layer_tensors, shapes};

/// The digest of format X1, computed by the twin.
pub const DIGEST: &str = "3bf411113519454cead5cb57a458e11e";

/// Digests of the sections, in order: name and the first 16 hexadecimal digits.
pub const SECTIONS: [(&str, &str); 6] = [
    ("constants", "424bbac9573ca0bf"),
    ("norm", "2831f2746587f82e"),
    ("swiglu", "ddaf1edc1cf80d34"),
    ("logits", "b43d8bfe4f8dea44"),
    ("gradient", "c31a7a007684cf28"),
    ("rollout", "73eb471660c5c05b"),
];

/// What an engine produced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// BLAKE3 over all sections, hexadecimal.
    pub digest: String,
    /// Digests of the sections.
    pub sections: Vec<(&'static str, String)>,
}

impl Outcome {
    /// Whether the engine computes format X1.
    pub fn passes(&self) -> bool {
        self.digest == DIGEST
    }

    /// The first section that differs, or `None`.
    pub fn first_difference(&self) -> Option<&'static str> {
        let wrong = self.sections.iter().zip(SECTIONS).find(|((_, got), (_, want))| got != want);
        wrong.map(|((name, _), _)| *name)
    }
}

/// The suite's model: grouped queries, a head size that is no block, ragged tiles, two layers.
pub fn model() -> ModelConfig {
    ModelConfig {
        vocabulary: 77,
        layers: 2,
        width: 80,
        heads: 4,
        kv_heads: 2,
        head_dim: 20,
        ffn: 72,
        context: 80,
        rope_base: 10_000.0,
        rms_epsilon: 1e-5,
        tied: false,
        bias: false,
        adapter: None,
    }
}

/// Constants that an engine must be built with to run the suite.
pub fn constants() -> Constants {
    model().constants()
}

/// A section's hash.
struct Section(blake3::Hasher);

impl Section {
    fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    fn i32s(&mut self, x: &[i32]) {
        for v in x {
            self.0.update(&v.to_le_bytes());
        }
    }

    fn u64s(&mut self, x: impl IntoIterator<Item = u64>) {
        for v in x {
            self.0.update(&v.to_le_bytes());
        }
    }

    fn stats(&mut self, x: &[RowStats]) {
        for s in x {
            self.u64s([s.t as u64, s.total, s.moment, u64::from(s.greedy)]);
        }
    }

    fn saturations(&mut self, s: Saturations) {
        self.u64s(s.0);
    }

    fn finish(self) -> String {
        self.0.finalize().to_hex()[..16].to_string()
    }
}

/// A tensor that spans all magnitudes: `2^0` to `LIM`, zero rows, single outliers.
fn wild(rows: usize, cols: usize, seed: u32) -> Vec<i32> {
    let value = |i: usize| {
        let r = philox([i as u32, seed, 0, 0xC0F0], [1, 2]);
        let row = i / cols;
        let magnitude = match row % 4 {
            0 => return 0,
            1 => r[1] % 31,
            2 => 16 + (row as u32 % 8),
            _ if r[1].is_multiple_of(29) => 30,
            _ => 12,
        };
        let v = (r[0] & ((1 << magnitude) - 1)).min(LIM as u32).cast_signed();
        if r[2] & 1 == 1 { -v } else { v }
    };
    (0..rows * cols).map(value).collect()
}

/// Runs the suite on `engine`, which must have been built for [`constants`].
pub async fn run<E: Engine>(engine: &E) -> Result<Outcome, EngineError> {
    engine.take_saturations().await?;
    let sections = vec![
        ("constants", constants_section()),
        ("norm", norm(engine).await?),
        ("swiglu", swiglu(engine).await?),
        ("logits", logits(engine).await?),
        ("gradient", gradient(engine).await?),
        ("rollout", rollout(engine).await?),
    ];
    let mut all = blake3::Hasher::new();
    for (_, digest) in &sections {
        all.update(digest.as_bytes());
    }
    Ok(Outcome { digest: all.finalize().to_hex()[..32].to_string(), sections })
}

fn constants_section() -> String {
    let mut s = Section::new();
    s.0.update(FORMAT.as_bytes());
    s.i32s(&EXP2);
    s.i32s(&SIGMOID);
    let c = constants();
    s.i32s(&c.rope.cos);
    s.i32s(&c.rope.sin);
    s.i32s(&[c.attention.score_scale, c.attention.inverse_root, c.norm.inverse_width]);
    s.u64s([c.norm.epsilon, u64::from(c.norm.root)]);
    s.0.update(weights().hash().as_bytes());
    s.finish()
}

/// Weights with outliers: some tiles are large enough to overflow products.
fn weights() -> Weights {
    let config = model();
    let mut master = master_weights(&config, 11);
    for (tensor, shape) in master.iter_mut().zip(shapes(&config)) {
        if shape.rows == 1 {
            for (i, g) in tensor.iter_mut().enumerate() {
                *g = 0.25 + (i % 7) as f32 * 0.3;
            }
        } else {
            tensor[17] *= 40.0;
        }
    }
    Weights::quantize(&config, &master)
}

async fn norm<E: Engine>(engine: &E) -> Result<String, EngineError> {
    let (n, c) = (13, model().width);
    let gain: Vec<i32> = (0..c as i32).map(|i| 4096 + (i % 5 - 2) * 1700).collect();
    let device_gain = engine.gain(&gain);
    let h = engine.tensor(&wild(n, c, 1), c);
    let (blocks, norm) = engine.rmsnorm(&h, &device_gain);
    // Blocks are read through a product.
    let weights = weights();
    let decoder = Decoder::new(engine, &weights);
    let [y] = engine.linear(&blocks, [decoder.head()]);
    let mut grad = engine.gradient(1, c);
    let dn = engine.tensor(&wild(n, c, 2), c);
    let dh = engine.tensor(&wild(n, c, 3), c);
    let dh = engine.rmsnorm_backward(&dn, &norm, &device_gain, Some(&mut grad), Some(dh));
    let mut s = Section::new();
    s.i32s(&engine.read(&y).await?);
    s.i32s(&engine.read(&dh).await?);
    s.u64s(engine.read_gradient(&grad).await?.iter().map(|g| g.cast_unsigned()));
    s.saturations(engine.take_saturations().await?);
    Ok(s.finish())
}

async fn swiglu<E: Engine>(engine: &E) -> Result<String, EngineError> {
    let (n, f) = (11, model().ffn);
    let up: Vec<i32> = wild(n, f, 5).into_iter().rev().collect();
    let gate_up = [engine.tensor(&wild(n, f, 4), f), engine.tensor(&up, f)];
    let blocks = engine.swiglu(&gate_up);
    // The first layer's down projection.
    let Parameter::Matrix(tiles) = &weights().parameters[layer_tensors(&model())] else {
        unreachable!("a projection is a matrix")
    };
    let mut h = engine.tensor(&wild(n, model().width, 6), model().width);
    engine.linear_add(&blocks, &engine.weight(tiles), &mut h);
    let da = engine.tensor(&wild(n, f, 7), f);
    let [dg, du] = engine.swiglu_backward(&da, &gate_up);
    let mut s = Section::new();
    for x in [&h, &dg, &du] {
        s.i32s(&engine.read(x).await?);
    }
    s.saturations(engine.take_saturations().await?);
    Ok(s.finish())
}

async fn logits<E: Engine>(engine: &E) -> Result<String, EngineError> {
    let (n, v) = (16, model().vocabulary);
    let x = engine.tensor(&wild(n, v, 8), v);
    let mut s = Section::new();
    for temperature in [0.3, 1.0, 1.7] {
        let scale = temperature_scale(temperature);
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 5 % v as u32).collect();
        let stats = engine.stats(&x, &targets, scale).await?;
        s.stats(&stats);
        let draws: Vec<Option<u64>> = (0..n as u64)
            .map(|i| match i % 4 {
                0 => None,
                1 => Some(u64::MAX),
                _ => Some(i.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            })
            .collect();
        for (token, stats) in engine.sample(&x, &draws, scale).await? {
            s.u64s([u64::from(token)]);
            s.stats(&[stats]);
        }
        let seeds: Vec<SeedRow> = (0..n)
            .map(|i| SeedRow {
                target: targets[i],
                weight: [0, 65_536, -300_000, LIM][i % 4],
                entropy_weight: [0, 0, 9_000, -9_000, LIM][i % 5],
                entropy_center: (stats[i].moment / stats[i].total) as i32,
            })
            .collect();
        let d = engine.seed(&x, &seeds, scale);
        s.i32s(&engine.read(&d).await?);
    }
    s.saturations(engine.take_saturations().await?);
    Ok(s.finish())
}

async fn gradient<E: Engine>(engine: &E) -> Result<String, EngineError> {
    let config = model();
    let weights = weights();
    let decoder = Decoder::new(engine, &weights);
    let token = |i: usize| philox([i as u32, 9, 0, 0xC0F0], [1, 2])[0] % config.vocabulary as u32;
    let lengths = [1, 31, 33, 64, 7];
    let sequences: Vec<Vec<u32>> = lengths
        .iter()
        .enumerate()
        .map(|(s, &n)| (0..n).map(|i| token(s * 100 + i)).collect())
        .collect();
    let batch = Batch::sequences(sequences.iter().map(Vec::as_slice));
    let targets: Vec<u32> = (0..batch.rows()).map(|i| token(i + 1000)).collect();
    let scale = temperature_scale(1.0);
    let forward = decoder.forward(engine, &batch, Keep::All);
    let all = batch.pieces(usize::MAX).remove(0);
    let head = decoder.head_forward(engine, &forward.states, all);
    let stats = engine.stats(&head.logits, &targets, scale).await?;
    let seeds: Vec<SeedRow> = (0..batch.rows())
        .map(|i| SeedRow {
            target: targets[i],
            weight: (i as i32 % 9 - 4) * 30_000,
            entropy_weight: if i % 3 == 0 { 5_000 } else { 0 },
            entropy_center: (stats[i].moment / stats[i].total) as i32,
        })
        .collect();
    let mut s = Section::new();
    s.i32s(&engine.read(&head.logits).await?);
    s.stats(&stats);
    let mut grads = DeviceGradients::zeros(engine, &config);
    let dh = decoder.head_backward(engine, head, &seeds, scale, &mut grads);
    decoder.backward(engine, &batch, forward, dh, &mut grads);
    for g in grads.read(engine).await?.0 {
        s.u64s(g.into_iter().map(i64::cast_unsigned));
    }
    s.saturations(engine.take_saturations().await?);
    Ok(s.finish())
}

async fn rollout<E: Engine>(engine: &E) -> Result<String, EngineError> {
    let decoder = Decoder::new(engine, &weights());
    let requests: Vec<Request> = (0..5_u32)
        .map(|i| Request { prompt: (0..=i * 9).map(|t| t % 77).collect(), stream: [i, 0, 0] })
        .collect();
    let sampling = Sampling {
        seed: 3,
        temperature_scale: Some(temperature_scale(1.2)),
        max_new_tokens: 12,
        end: 2,
        slots: 3,
    };
    let mut s = Section::new();
    let generated = generate(engine, &decoder, &requests, &sampling, |_, _| true).await?;
    for c in generated.completions {
        s.u64s(c.tokens.iter().map(|&t| u64::from(t)));
        s.stats(&c.stats);
    }
    s.saturations(generated.saturations);
    Ok(s.finish())
}
