//! A model of SmolLM2-135M's size: prompts, decoding, and the gradient of an adapter, with the
//! memory that they take.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::gpu::TimedProduct;
use manyhands_core::engine::{Batch, Engine};
use manyhands_core::model::adapter::{Adapter, Projection};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::model::generate::Request;
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::execute;
use manyhands_shaders::twin::logits::temperature_scale;

use super::memory::status;
use super::{Row, Table, median, peers, training};
use crate::{engines, tuning};

/// Tokens of the prompt, and of each sequence of a gradient.
const LENGTH: usize = 512;
/// Sequences of a gradient unit.
const SEQUENCES: usize = 4;
/// Tokens that each sequence of a decoding batch gets.
const NEW: usize = 64;
/// Sequences decoded at once.
const BATCHES: [usize; 2] = [16, 1];
/// Of the adapter on all matrices.
const RANK: usize = 16;

/// llama.cpp: the directory of its libraries, and a model for it.
pub(super) struct Llama<'a> {
    pub(super) directory: &'a Path,
    pub(super) model: &'a Path,
}

/// The model's two versions: frozen, and an adapter on it.
fn versions() -> Result<[Weights; 2]> {
    let config = ModelConfig::preset("smollm2-135m", 49_152, 1024).context("no such preset")?;
    let base = Weights::quantize(&config, &master_weights(&config, 0));
    let targets = Projection::ALL.to_vec();
    let adapter = Adapter { base: base.hash().into(), rank: RANK, alpha: RANK, targets };
    let config = ModelConfig { adapter: Some(adapter), ..config };
    let adapter = Weights::quantize(&config, &master_weights(&config, 1));
    Ok([base, adapter])
}

fn token(model: &ModelConfig, i: usize) -> u32 {
    (100 + i * 7919 % (model.vocabulary - 100)) as u32
}

/// Seconds until the first token after a prompt.
fn prefill<E: Engine>(engine: &E, decoder: &Decoder<E>) -> Result<f64> {
    let tokens: Vec<u32> = (0..LENGTH).map(|i| token(&decoder.config, i)).collect();
    let started = Instant::now();
    let mut caches = decoder.caches(engine, 1, LENGTH);
    let h = decoder.states(engine, &Batch::sequences([&tokens[..]]), &mut caches);
    let last = engine.rows(&h, &[LENGTH as u32 - 1]);
    let logits = decoder.logits(engine, &last);
    pollster::block_on(engine.sample(&logits, &[None], temperature_scale(1.0)))?;
    Ok(started.elapsed().as_secs_f64())
}

/// Seconds of decoding `new` tokens of `count` sequences at once, prompts not counted.
fn decode<E: Engine>(engine: &E, decoder: &Decoder<E>, count: usize, new: usize) -> Result<f64> {
    let prompt = |s: usize| (0..16).map(|i| token(&decoder.config, s + i * 31)).collect();
    let request = |s: usize| Request { prompt: prompt(s), stream: [s as u32, 0, 0] };
    let requests: Vec<Request> = (0..count).map(request).collect();
    let work = training::samples(requests, new + 1);
    let mut first = None;
    // The first token of each comes with the prompts.
    let report = |_| {
        first.get_or_insert_with(Instant::now);
    };
    pollster::block_on(execute(engine, decoder, &work, report))?;
    Ok(first.context("nothing was decoded")?.elapsed().as_secs_f64())
}

/// Seconds of the gradient of a unit.
fn gradient<E: Engine>(engine: &E, decoder: &Decoder<E>) -> Result<f64> {
    let token = |s: usize, i: usize| token(&decoder.config, s * 31 + i);
    let sequence = |s: usize| (0..=LENGTH).map(|i| token(s, i)).collect();
    let work = training::cross_entropy((0..SEQUENCES).map(sequence));
    let started = Instant::now();
    pollster::block_on(execute(engine, decoder, &work, |_| ()))?;
    Ok(started.elapsed().as_secs_f64())
}

fn median_of(rounds: usize, mut f: impl FnMut() -> Result<f64>) -> Result<f64> {
    f()?;
    Ok(median((0..rounds.max(1)).map(|_| f()).collect::<Result<_>>()?))
}

fn row(name: &str, shape: String, seconds: f64, tokens: usize) -> Row {
    Row {
        name: name.into(),
        shape,
        threads: 0,
        engine: "cpu".into(),
        adapter: String::new(),
        median_s: seconds,
        rate: tokens as f64 / seconds,
        unit: "tokens/s",
        ratio: None,
        note: String::new(),
    }
}

/// Adds a row of ours, and before it that of the yardstick.
fn against(table: &mut Table, ours: Row, theirs: Option<(&str, &str, f64)>) {
    let Some((engine, adapter, rate)) = theirs else { return table.push(ours) };
    let median_s = ours.rate * ours.median_s / rate;
    let (engine, adapter) = (engine.to_string(), adapter.to_string());
    let note = String::new();
    table.push(Row { engine: engine.clone(), adapter, median_s, rate, note, ..ours.clone() });
    let note = format!("against {engine}; {}", ours.note);
    table.push(Row { ratio: Some(ours.rate / rate), note, ..ours });
}

/// Measures the CPU engine.
pub(super) fn cpu(
    table: &mut Table,
    threads: &[usize],
    rounds: usize,
    peer: Option<&Path>,
    llama: Option<&Llama<'_>>,
) -> Result<()> {
    let [base, adapter] = versions()?;
    for &threads in threads {
        let engine = Cpu::new(base.config.constants(), threads, None);
        let named = |row: Row| Row { threads, adapter: engine.path().to_string(), ..row };
        let share = |row: Row, rows: usize, multiply_adds: f64| {
            let ceiling = super::products::ceiling(threads, rows, base.config.width);
            let share = 100.0 * 2.0 * multiply_adds * row.rate / ceiling;
            Row { note: format!("{share:.0}% of the product ceiling at {rows} rows"), ..row }
        };
        let mut loader = Loader::default();
        let decoder = Decoder::new(&engine, &base);
        let llama = match (llama, peer) {
            (Some(llama), Some(peer)) => {
                Some(peers::llama(peer, llama, threads, [LENGTH, NEW], &BATCHES)?)
            }
            _ => None,
        };
        let theirs = |i: usize| llama.as_ref().map(|rates| ("llama.cpp", "its fastest", rates[i]));
        let seconds = median_of(rounds, || prefill(&engine, &decoder))?;
        // The head sees one row only.
        let layers = base.config.multiply_adds(LENGTH / 2);
        let layers = (layers - (base.config.width * base.config.vocabulary) as u64) as f64;
        let out =
            share(named(row("prompt", format!("1x{LENGTH}"), seconds, LENGTH)), LENGTH, layers);
        against(table, out, theirs(0));
        for (i, count) in BATCHES.into_iter().enumerate() {
            let seconds = median_of(rounds, || decode(&engine, &decoder, count, NEW))?;
            let out = named(row("decode", format!("{count}x{NEW}"), seconds, count * NEW));
            let out = share(out, count, base.config.multiply_adds(16 + NEW / 2) as f64);
            against(table, out, theirs(i + 1));
        }
        drop(decoder);
        let decoder = loader.load(&engine, &adapter, Some(&base));
        let seconds = median_of(rounds.div_ceil(2), || gradient(&engine, &decoder))?;
        let shape = format!("r={RANK} {SEQUENCES}x{LENGTH}");
        let mut out = named(row("gradient", shape, seconds, SEQUENCES * LENGTH));
        if let Some(bytes) = status("VmHWM") {
            out.note = format!("peak of this process {} MiB", bytes >> 20);
        }
        let sizes = [rounds.div_ceil(2) + 1, SEQUENCES, LENGTH, RANK];
        let theirs = peer.map(|peer| peers::torch_lora(peer, threads, sizes)).transpose()?;
        against(table, out, theirs.map(|rate| ("pytorch", "f32", rate)));
    }
    Ok(())
}

/// Measures every graphics adapter.
pub(super) fn wgpu(table: &mut Table) -> Result<()> {
    let [base, adapter] = versions()?;
    for graphics in engines::adapters() {
        let info = graphics.get_info();
        let engine = engines::open_gpu(&graphics, base.config.constants())?;
        let variant = tuning::pick(&engine, &info)?;
        let mut loader = Loader::default();
        let decoder = loader.load(&engine, &adapter, Some(&base));
        let shape = [LENGTH, base.config.ffn, base.config.width];
        let seconds = tuning::seconds(&engine, TimedProduct::Exact(variant), shape, 2)?;
        let ceiling = super::products::operations(shape) / seconds;
        let mut push = |out: Row, multiply_adds: f64| {
            let (memory, times) = (engine.memory(), engine.submission_times());
            let note = format!(
                "{variant:?}, {:.0}% of the rate of its products, {} MiB of buffers, the largest {} MiB, 99% of submissions within {:.0} ms, the longest {:.0} ms ({})",
                100.0 * 2.0 * multiply_adds * out.rate / ceiling,
                memory.peak >> 20,
                memory.largest >> 20,
                times.p99_ms,
                times.max_ms,
                times.longest.as_deref().unwrap_or("none"),
            );
            table.push(Row { engine: "wgpu".into(), adapter: info.name.clone(), note, ..out });
        };
        let forward = base.config.multiply_adds(LENGTH / 2) as f64;
        let seconds = decode(&engine, &decoder, BATCHES[0], 8)?;
        push(row("decode", format!("{}x8", BATCHES[0]), seconds, BATCHES[0] * 8), forward);
        let seconds = gradient(&engine, &decoder)?;
        let shape = format!("r={RANK} {SEQUENCES}x{LENGTH}");
        let work = decoder.config.gradient_multiply_adds(LENGTH / 2) as f64;
        push(row("gradient", shape, seconds, SEQUENCES * LENGTH), work);
    }
    Ok(())
}
