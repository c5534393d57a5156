//! Measures what a gradient share and a version of the weights cost in bytes and time, on real
//! gradients of a small model, untrained and trained for some steps.
//!
//! `cargo run --release -p manyhands-core --example codec [PRESET] [STEPS]`; default `micro 60`.
//! For the speed of one core, set `RAYON_NUM_THREADS=1`.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement for people")]

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use manyhands_core::engine::SeedRow;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::learn::optimizer::AdamWConfig;
use manyhands_core::learn::weights::GradientScale;
use manyhands_core::model::decoder::{Decoder, DeviceGradients};
use manyhands_core::model::tokenizer::{END, encode, encode_prompt};
use manyhands_core::model::weights::{Gradients, Weights, shapes};
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::execute::accumulate;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::state::State;
use manyhands_core::run::trainer::Trainer;
use manyhands_core::swarm::{delta, share};
use manyhands_core::tasks::Split;
use manyhands_shaders::twin::logits::temperature_scale;

/// Times that a measurement is made; the fastest counts.
const REPEATS: usize = 5;

fn main() {
    let preset = std::env::args().nth(1).unwrap_or("micro".into());
    let steps: u64 = std::env::args().nth(2).map_or(60, |n| n.parse().unwrap());
    let config: RunConfig = serde_json::from_value(serde_json::json!({
        "name": "codec", "seed": 5,
        "model": { "preset": preset },
        "task": [{ "family": "countdown", "level": 1 }],
        "sft": { "steps": steps, "batch": 32, "optimizer": { "learning_rate": 2e-3 } },
        "eval": { "problems": 1, "samples": 1, "k": [1] },
    }))
    .unwrap();
    let model = config.model().unwrap();
    let engine = Cpu::new(model.constants(), 2, None);
    let problems = Problems::open(&config, |_| Err("there are no files".into())).unwrap();
    let state = State::new(&config, &model, None);
    let mut trainer = Trainer::new(&engine, config, problems.clone(), state).unwrap();
    for done in [0, steps] {
        while trainer.state().step < done {
            ready(trainer.advance(&mut |_| {})).unwrap();
        }
        println!("{preset} after {done} steps");
        measure(
            &engine,
            trainer.state(),
            &Weights::quantize(&model, &trainer.state().master()),
            &problems,
        );
    }
}

fn measure(engine: &Cpu, state: &State, weights: &Weights, problems: &Problems) {
    measure_delta("from nothing", None, weights);
    for sequences in [4, 64] {
        let (gradients, tokens) = gradients(engine, weights, problems, sequences);
        measure_share(&gradients, tokens);
        if sequences < 64 {
            continue;
        }
        for learning_rate in [2e-3, 1e-4, 1e-5] {
            let mut optimizer = state.optimizer.clone();
            let config = AdamWConfig { learning_rate, ..AdamWConfig::default() };
            let scale = GradientScale { loss_scale_log2: 0, divisor: tokens as f64 };
            let tensors: Vec<&[i64]> = gradients.0.iter().map(Vec::as_slice).collect();
            optimizer.step(&config, scale, &tensors).unwrap();
            let master: Vec<_> = optimizer.tensors.into_iter().map(|t| t.master).collect();
            let next = Weights::quantize(&weights.config, &master);
            measure_delta(&format!("a step at {learning_rate:e}"), Some(weights), &next);
        }
    }
}

fn measure_share(gradients: &Gradients, tokens: usize) {
    let count: usize = gradients.0.iter().map(Vec::len).sum();
    let (bytes, encode_s) = fastest(|| share::encode(gradients));
    let mut sums = Gradients(gradients.0.iter().map(|t| vec![0; t.len()]).collect());
    let (_, add_s) = fastest(|| share::add_decoded(&bytes, &mut sums).unwrap());
    println!(
        "  share of {tokens} tokens: {} bytes, {:.2} bits a value; {:.0} and {:.0} million values/s",
        bytes.len(),
        bytes.len() as f64 * 8.0 / count as f64,
        count as f64 / 1e6 / encode_s,
        count as f64 / 1e6 / add_s,
    );
}

fn measure_delta(name: &str, base: Option<&Weights>, next: &Weights) {
    let count: usize = shapes(&next.config).iter().map(|s| s.rows * s.cols).sum();
    let (bytes, encode_s) = fastest(|| delta::encode(base, next));
    let (made, apply_s) = fastest(|| delta::apply(base, &next.config, &bytes).unwrap());
    assert_eq!(&made, next);
    println!(
        "  version, {name}: {} bytes, {:.3} bits a value; {:.0} and {:.0} million values/s",
        bytes.len(),
        bytes.len() as f64 * 8.0 / count as f64,
        count as f64 / 1e6 / encode_s,
        count as f64 / 1e6 / apply_s,
    );
}

/// Sums of the gradients of worked traces, and their tokens.
fn gradients(
    engine: &Cpu,
    weights: &Weights,
    problems: &Problems,
    count: u64,
) -> (Gradients, usize) {
    let vocabulary = weights.config.vocabulary;
    let (mut sequences, mut seeds) = (vec![], vec![]);
    for i in 0..count {
        let problem = problems.draw(1_000_000 + i, Split::Train).problem;
        let mut sequence = encode_prompt(&problem.prompt, vocabulary).unwrap();
        let prompt = sequence.len();
        sequence.extend(encode(&problem.trace, vocabulary).unwrap());
        sequence.push(END);
        let row = |t: usize| {
            let weight = if t + 1 >= prompt { 1 << 16 } else { 0 };
            SeedRow { target: sequence[t + 1], weight, ..SeedRow::default() }
        };
        seeds.push((0..sequence.len() - 1).map(row).collect::<Vec<_>>());
        sequences.push(sequence);
    }
    let decoder = Decoder::new(engine, weights);
    let mut sums = DeviceGradients::zeros(engine, &weights.config);
    let scale = temperature_scale(1.0);
    let all = accumulate(engine, &decoder, &sequences, &seeds, scale, &mut sums, |_| {});
    ready(all).unwrap();
    (ready(sums.read(engine)).unwrap(), sequences.iter().map(Vec::len).sum())
}

/// The last result, and the seconds of the fastest of [`REPEATS`].
fn fastest<T>(mut f: impl FnMut() -> T) -> (T, f64) {
    let mut seconds = f64::MAX;
    let mut run = || {
        let start = Instant::now();
        let out = f();
        seconds = seconds.min(start.elapsed().as_secs_f64());
        out
    };
    for _ in 1..REPEATS {
        run();
    }
    let out = run();
    (out, seconds)
}

/// The output of a future that never waits, as those of the CPU engine.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(out) => out,
        Poll::Pending => panic!("the CPU engine never waits"),
    }
}
