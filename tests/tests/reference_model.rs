//! The integer decoder against a small f64 one: logits, and gradients by finite differences.
//!
//! The f64 decoder here is written from the papers' formulas and shares nothing with the engines
//! but the dequantised weights. What differs is therefore the exact arithmetic's rounding alone.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Batch, Engine, RowStats, SeedRow};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, DeviceGradients};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::{Gradients, LAYER_TENSORS, Parameter, Weights, shapes};
use manyhands_shaders::twin::logits::temperature_scale;
use manyhands_shaders::x1::philox;
use pollster::block_on;

/// Error of the logits relative to their deviation: activations have 11 bits, keys and values 10,
/// and large scores amplify it. Measured: 6e-3.
const LOGIT_ERROR: f64 = 1e-2;
/// Error of a directional derivative relative to the derivative's own size; gradients enter
/// products with 10 bits.
const GRADIENT_ERROR: f64 = 0.02;
/// Step of the central differences, relative to a tensor's norm.
const STEP: f64 = 1e-4;
/// Random directions a tensor, next to the gradient's own.
const DIRECTIONS: u32 = 4;

/// Grouped queries, a head size that is no block, ragged tiles, its own head.
fn config(tied: bool) -> ModelConfig {
    ModelConfig {
        vocabulary: 45,
        layers: 2,
        width: 48,
        heads: 4,
        kv_heads: 2,
        head_dim: 20,
        ffn: 72,
        context: 48,
        rope_base: 10_000.0,
        rms_epsilon: 1e-5,
        tied,
    }
}

/// Uniform in (-1, 1).
fn draw(stream: u32, i: usize) -> f64 {
    let r = philox([i as u32, stream, 0, 0xf64], [1, 2]);
    f64::from(r[0].cast_signed()) / 2_147_483_648.0
}

/// Initial weights with spread gains and an outlier in every matrix.
fn weights(config: &ModelConfig) -> Weights {
    let mut master = master_weights(config, 21);
    for (t, (tensor, shape)) in master.iter_mut().zip(shapes(config)).enumerate() {
        if shape.rows == 1 {
            for (i, g) in tensor.iter_mut().enumerate() {
                *g = (1.0 + 0.5 * draw(t as u32, i)) as f32;
            }
        } else {
            tensor[shape.cols + 3] *= 6.0;
            if shape.name.ends_with("query") || shape.name.ends_with("key") {
                tensor.iter_mut().for_each(|w| *w *= 2.0);
            }
        }
        if shape.name == "embedding" {
            tensor.iter_mut().for_each(|w| *w *= 6.0);
        }
    }
    Weights::quantize(config, &master)
}

/// The published weights as f64, row-major.
fn dequantized(weights: &Weights) -> Vec<Vec<f64>> {
    let value = |p: &Parameter| match p {
        Parameter::Gain(g) => g.iter().map(|&g| f64::from(g) / 4096.0).collect(),
        Parameter::Matrix(t) => {
            let rows = 0..t.rows;
            rows.flat_map(|r| (0..t.cols).map(move |c| (r, c)))
                .map(|(r, c)| t.value(r, c))
                .collect()
        }
    };
    weights.parameters.iter().map(value).collect()
}

/// `x` (C) times the transpose of `w` (O, C).
fn linear(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

fn rmsnorm(x: &[f64], gain: &[f64], epsilon: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let rms = (mean + epsilon).sqrt();
    x.iter().zip(gain).map(|(x, g)| x / rms * g).collect()
}

fn rotate(x: &mut [f64], head_dim: usize, position: usize, base: f64) {
    let half = head_dim / 2;
    for head in x.chunks_exact_mut(head_dim) {
        for i in 0..half {
            let angle = position as f64 * base.powf(-(i as f64) / half as f64);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + half] = b * angle.cos() + a * angle.sin();
        }
    }
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::MIN, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|e| e / total).collect()
}

fn add(to: &mut [f64], x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(t, x)| *t += x);
}

/// Logits (T, V) of one sequence.
fn logits(c: &ModelConfig, p: &[Vec<f64>], tokens: &[u32]) -> Vec<Vec<f64>> {
    let (w, d) = (c.width, c.head_dim);
    let mut h: Vec<Vec<f64>> =
        tokens.iter().map(|&t| p[0][t as usize * w..(t as usize + 1) * w].to_vec()).collect();
    for layer in p[1..].chunks_exact(LAYER_TENSORS).take(c.layers) {
        let (mut keys, mut values): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
        for (t, h) in h.iter_mut().enumerate() {
            let x = rmsnorm(h, &layer[0], c.rms_epsilon);
            let (mut q, mut k) = (linear(&layer[1], &x), linear(&layer[2], &x));
            rotate(&mut q, d, t, c.rope_base);
            rotate(&mut k, d, t, c.rope_base);
            keys.push(k);
            values.push(linear(&layer[3], &x));
            let mut out = Vec::new();
            for (head, q) in q.chunks_exact(d).enumerate() {
                let kv = head / (c.heads / c.kv_heads) * d;
                let score = |k: &Vec<f64>| -> f64 {
                    let dot: f64 = q.iter().zip(&k[kv..kv + d]).map(|(a, b)| a * b).sum();
                    dot / (d as f64).sqrt()
                };
                let weights = softmax(&keys.iter().map(score).collect::<Vec<_>>());
                let mut mixed = vec![0.0; d];
                for (weight, v) in weights.iter().zip(&values) {
                    mixed.iter_mut().zip(&v[kv..kv + d]).for_each(|(m, v)| *m += weight * v);
                }
                out.extend(mixed);
            }
            add(h, &linear(&layer[4], &out));
            let x = rmsnorm(h, &layer[5], c.rms_epsilon);
            let gate = linear(&layer[6], &x);
            let up = linear(&layer[7], &x);
            let act: Vec<f64> =
                gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(h, &linear(&layer[8], &act));
        }
    }
    let last = 1 + c.layers * LAYER_TENSORS;
    let head = if c.tied { &p[0] } else { &p[last + 1] };
    h.iter().map(|h| linear(head, &rmsnorm(h, &p[last], c.rms_epsilon))).collect()
}

/// What one row contributes: `weight * -log p(target) - alpha H`.
#[derive(Clone, Copy)]
struct RowLoss {
    target: usize,
    weight: f64,
    alpha: f64,
}

/// Rows with weights of both signs, masked rows, rows with an entropy bonus only.
fn row_loss(config: &ModelConfig, i: usize) -> RowLoss {
    let weight = [1.0, -0.75, 0.0, 2.0, 0.5, 0.0, -1.5][i % 7];
    let alpha = [0.0, 0.2, 0.0, 0.0, -0.1][i % 5];
    let target = (draw(77, i).abs() * config.vocabulary as f64) as usize;
    RowLoss { target, weight, alpha }
}

/// The loss of all sequences; logits are divided by the temperature, the loss is multiplied by it
/// as the engines' callers do.
fn loss(c: &ModelConfig, p: &[Vec<f64>], sequences: &[Vec<u32>], temperature: f64) -> f64 {
    let mut total = 0.0;
    let mut row = 0;
    for sequence in sequences {
        for x in logits(c, p, sequence) {
            let r = row_loss(c, row);
            let p = softmax(&x.iter().map(|x| x / temperature).collect::<Vec<_>>());
            let entropy: f64 = -p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
            total += -r.weight * p[r.target].ln() - r.alpha * entropy;
            row += 1;
        }
    }
    total * temperature
}

/// Sequences shorter, as long as, and longer than a block of tokens.
fn sequences(config: &ModelConfig) -> Vec<Vec<u32>> {
    let token =
        |s: usize, i: usize| (draw(50 + s as u32, i).abs() * config.vocabulary as f64) as u32;
    let lengths = [1, 9, 32, 41];
    let sequence = |(s, &n): (usize, &usize)| (0..n).map(|i| token(s, i)).collect();
    lengths.iter().enumerate().map(sequence).collect()
}

fn seed(r: RowLoss, stats: RowStats) -> SeedRow {
    SeedRow {
        target: r.target as u32,
        weight: (r.weight * 65536.0) as i32,
        entropy_weight: (r.alpha * std::f64::consts::LN_2 * 65536.0).round() as i32,
        entropy_center: ((stats.moment + stats.total / 2) / stats.total) as i32,
    }
}

/// Integer logits and gradients; nothing may clamp.
async fn run<E: Engine>(
    engine: &E,
    weights: &Weights,
    sequences: &[Vec<u32>],
    temperature: f64,
) -> (Vec<i32>, Gradients) {
    let decoder = Decoder::new(engine, weights);
    let batch = Batch::sequences(sequences.iter().map(Vec::as_slice));
    let scale = temperature_scale(temperature);
    let forward = decoder.forward(engine, &batch);
    let logits = engine.read(&forward.logits).await.unwrap();
    let rows: Vec<RowLoss> = (0..batch.rows()).map(|i| row_loss(&weights.config, i)).collect();
    let targets: Vec<u32> = rows.iter().map(|r| r.target as u32).collect();
    let stats = engine.stats(&forward.logits, &targets, scale).await.unwrap();
    let seeds: Vec<SeedRow> = rows.into_iter().zip(stats).map(|(r, s)| seed(r, s)).collect();
    let mut grads = DeviceGradients::zeros(engine, &weights.config);
    decoder.backward(engine, &batch, forward, &seeds, scale, &mut grads);
    let grads = grads.read(engine).await.unwrap();
    let saturations = engine.take_saturations().await.unwrap();
    assert_eq!(saturations.total(), 0, "realistic weights must not clamp: {saturations:?}");
    (logits, grads)
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn check_logits(c: &ModelConfig, p: &[Vec<f64>], sequences: &[Vec<u32>], got: &[i32]) {
    let want: Vec<f64> = sequences.iter().flat_map(|s| logits(c, p, s)).flatten().collect();
    assert_eq!(got.len(), want.len());
    let mean = want.iter().sum::<f64>() / want.len() as f64;
    let deviation = norm(&want.iter().map(|x| x - mean).collect::<Vec<_>>());
    assert!(deviation / (want.len() as f64).sqrt() > 0.3, "the logits must be spread");
    let got: Vec<f64> = got.iter().map(|&x| f64::from(x) / 65536.0).collect();
    let errors: Vec<f64> = got.iter().zip(&want).map(|(a, b)| a - b).collect();
    let error = norm(&errors) / deviation;
    eprintln!("logits: relative error {error:.2e}");
    assert!(error < LOGIT_ERROR, "relative error {error}");
    let unit = deviation / (want.len() as f64).sqrt();
    let bad = |i: &usize| errors[*i].abs() > 10.0 * LOGIT_ERROR * unit;
    let count = (0..got.len()).filter(bad).count();
    if let Some(i) = (0..got.len()).find(bad) {
        let (row, token) = (i / c.vocabulary, i % c.vocabulary);
        panic!("row {row} token {token}: {} instead of {}, {count} differ", got[i], want[i]);
    }
}

/// The derivative of the f64 loss along `direction` in tensor `t`.
fn derivative(
    c: &ModelConfig,
    p: &mut [Vec<f64>],
    sequences: &[Vec<u32>],
    temperature: f64,
    t: usize,
    direction: &[f64],
) -> f64 {
    let saved = p[t].clone();
    let step = STEP * norm(&saved) / norm(direction);
    let mut at = |step: f64| {
        for ((x, s), d) in p[t].iter_mut().zip(&saved).zip(direction) {
            *x = s + step * d;
        }
        loss(c, p, sequences, temperature)
    };
    let slope = (at(step) - at(-step)) / (2.0 * step);
    p[t] = saved;
    slope
}

/// A sign, a scale, a forgotten branch or a transposed product moves a derivative by far more than
/// rounding does.
fn check_gradients(
    c: &ModelConfig,
    p: &mut [Vec<f64>],
    sequences: &[Vec<u32>],
    temperature: f64,
    grads: &Gradients,
) {
    for (t, shape) in shapes(c).iter().enumerate() {
        let g: Vec<f64> = grads.0[t].iter().map(|&g| g as f64 / 65536.0).collect();
        let size = norm(&g);
        assert!(size > 1e-2, "{}: the gradient is trivially zero", shape.name);
        let nonzero = g.iter().filter(|g| **g != 0.0).count();
        assert!(nonzero * 2 > g.len(), "{}: {nonzero} of {} not zero", shape.name, g.len());
        // The slope along the integer gradient is the true gradient's length times their cosine.
        let own = derivative(c, p, sequences, temperature, t, &g) / size;
        let error = (own - size).abs() / size;
        assert!(error < GRADIENT_ERROR, "{}: length {size}, slope {own}", shape.name);
        for d in 0..DIRECTIONS {
            let stream = 1000 + t as u32 * DIRECTIONS + d;
            let random: Vec<f64> = (0..g.len()).map(|i| draw(stream, i)).collect();
            let want = derivative(c, p, sequences, temperature, t, &random) / norm(&random);
            let dot: f64 = g.iter().zip(&random).map(|(a, b)| a * b).sum();
            let got = dot / norm(&random);
            // A random direction sees a share of 1 / sqrt(n) of the gradient's length.
            let bound = GRADIENT_ERROR * size / (g.len() as f64).sqrt() * 3.0;
            assert!((got - want).abs() < bound, "{} direction {d}: {got} for {want}", shape.name);
        }
    }
}

/// One case: config, temperature, engine.
fn check(tied: bool, temperature: f64, use_twin: bool) {
    let c = config(tied);
    let weights = weights(&c);
    let mut p = dequantized(&weights);
    let sequences = sequences(&c);
    let (logits, grads) = if use_twin {
        block_on(run(&Twin::new(c.constants()), &weights, &sequences, temperature))
    } else {
        block_on(run(&Cpu::new(c.constants(), 2, None), &weights, &sequences, temperature))
    };
    check_logits(&c, &p, &sequences, &logits);
    check_gradients(&c, &mut p, &sequences, temperature, &grads);
}

#[test]
fn decoder_untied_twin_agrees_with_f64() {
    check(false, 1.0, true);
}

#[test]
fn decoder_tied_cpu_at_a_temperature_agrees_with_f64() {
    check(true, 0.7, false);
}

/// Every element of every tensor: the cosine against the full gradient by finite differences.
#[test]
fn decoder_gradient_cosine_is_near_one_for_every_tensor() {
    /// Measured: 0.99995 and better.
    const COSINE_MIN: f64 = 0.999;
    let c = ModelConfig {
        vocabulary: 19,
        layers: 1,
        width: 16,
        heads: 2,
        kv_heads: 1,
        head_dim: 8,
        ffn: 18,
        ..config(false)
    };
    let weights = weights(&c);
    let mut p = dequantized(&weights);
    let sequences = vec![sequences(&config(false))[1].iter().map(|t| t % 19).collect::<Vec<_>>()];
    let engine = Twin::new(c.constants());
    let (_, grads) = block_on(run(&engine, &weights, &sequences, 1.0));
    for (t, shape) in shapes(&c).iter().enumerate() {
        let n = shape.rows * shape.cols;
        let want: Vec<f64> = (0..n)
            .map(|i| {
                let unit: Vec<f64> = (0..n).map(|j| f64::from(i == j)).collect();
                derivative(&c, &mut p, &sequences, 1.0, t, &unit)
            })
            .collect();
        let got: Vec<f64> = grads.0[t].iter().map(|&g| g as f64 / 65536.0).collect();
        let dot: f64 = got.iter().zip(&want).map(|(a, b)| a * b).sum();
        let cosine = dot / (norm(&got) * norm(&want));
        let length = norm(&got) / norm(&want);
        eprintln!("{}: cosine {cosine:.6}, length {length:.5}", shape.name);
        assert!(cosine > COSINE_MIN, "{}: cosine {cosine}", shape.name);
        assert!((length - 1.0).abs() < GRADIENT_ERROR, "{}: length {length}", shape.name);
    }
}
