//! Training steps, decoding, and how they scale.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use manyhands_core::engine::Engine;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::learn::optimizer::{AdamW, AdamWConfig, TensorState};
use manyhands_core::learn::weights::GradientScale;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::Request;
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::{Weights, shapes};
use manyhands_core::run::execute::execute;
use manyhands_core::run::work::{Scored, Seed, Seeded, Values, Work};
use manyhands_shaders::twin::logits::temperature_scale;

use super::{Row, Table, median, peers};
use crate::{engines, tuning};

/// A model and the batch it trains on.
#[derive(Clone)]
pub(super) struct Workload {
    pub(super) name: String,
    pub(super) model: ModelConfig,
    /// Sequences.
    pub(super) batch: usize,
    /// Tokens a sequence.
    pub(super) length: usize,
}

impl Workload {
    fn new(preset: &str, vocabulary: usize, length: usize, batch: usize) -> Result<Self> {
        let model = ModelConfig::preset(preset, vocabulary, length);
        Ok(Self { name: preset.into(), model: model.context("no such preset")?, batch, length })
    }

    pub(super) fn tokens(&self) -> usize {
        self.batch * self.length
    }

    fn shape(&self) -> String {
        format!("{} {}x{}", self.name, self.batch, self.length)
    }

    /// Sequences with one more token than inputs.
    fn sequences(&self, seed: usize) -> Vec<Vec<u32>> {
        let v = self.model.vocabulary;
        let token = |s: usize, i: usize| ((s * 7919 + i * 104_729 + seed * 31) % v) as u32;
        (0..self.batch).map(|s| (0..=self.length).map(|i| token(s, i)).collect()).collect()
    }
}

/// The gradient of cross-entropy on every token but the first.
pub(super) fn cross_entropy(sequences: impl Iterator<Item = Vec<u32>>) -> Work {
    let seed = Seed { weight: 1 << 16, ..Default::default() };
    let seeded =
        |tokens: Vec<u32>| Seeded { first: 1, seeds: vec![seed; tokens.len() - 1], tokens };
    Work::Gradient {
        temperature_scale: temperature_scale(1.0),
        sequences: sequences.map(seeded).collect(),
    }
}

/// `new` tokens of every request, whatever they are.
pub(super) fn samples(requests: Vec<Request>, new: usize) -> Work {
    Work::Sample {
        seed: 1,
        temperature_scale: Some(temperature_scale(1.0)),
        max_new_tokens: new as u32,
        end: u32::MAX,
        requests,
    }
}

/// A training loop: the same work as `peers/torch_step.py`.
pub(super) struct Loop<'e, E: Engine> {
    engine: &'e E,
    workload: Workload,
    optimizer: AdamW,
    decoder: Decoder<E>,
    steps: usize,
}

impl<'e, E: Engine> Loop<'e, E> {
    pub(super) fn new(engine: &'e E, workload: &Workload) -> Self {
        let master = master_weights(&workload.model, 0);
        let decoder = Decoder::new(engine, &Weights::quantize(&workload.model, &master));
        let decays = shapes(&workload.model).into_iter().map(|s| s.rows > 1);
        let tensors = master.into_iter().zip(decays).map(|(m, d)| TensorState::new(m, d));
        let optimizer = AdamW::new(tensors.collect());
        Self { engine, workload: workload.clone(), optimizer, decoder, steps: 0 }
    }

    /// Forward, cross-entropy on every token, backward, AdamW, next version on the engine.
    pub(super) fn step(&mut self) -> Result<()> {
        let sequences = self.workload.sequences(self.steps);
        self.steps += 1;
        let work = cross_entropy(sequences.into_iter());
        let output = pollster::block_on(execute(self.engine, &self.decoder, &work, |_| ()))?;
        let Values::Gradient(_, grads) = output.values else { bail!("not a gradient") };
        let slices: Vec<&[i64]> = grads.0.iter().map(AsRef::as_ref).collect();
        let config = AdamWConfig { learning_rate: 3e-4, ..Default::default() };
        let divisor = self.workload.tokens() as f64;
        self.optimizer.step(&config, GradientScale { loss_scale_log2: 0, divisor }, &slices)?;
        let master: Vec<&[f32]> =
            self.optimizer.tensors.iter().map(|t| t.master.as_slice()).collect();
        self.decoder = Decoder::new(self.engine, &Weights::quantize(&self.workload.model, &master));
        Ok(())
    }

    /// Median seconds of a step, after one for warmth.
    fn median(&mut self, steps: usize) -> Result<f64> {
        self.step()?;
        let mut seconds = Vec::new();
        for _ in 0..steps {
            let started = Instant::now();
            self.step()?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        Ok(median(seconds))
    }
}

fn row(name: &str, shape: String, cpu: &Cpu, median_s: f64, rate: f64) -> Row {
    Row {
        name: name.into(),
        shape,
        threads: cpu.threads(),
        engine: "cpu".into(),
        adapter: cpu.path().to_string(),
        median_s,
        rate,
        unit: "tokens/s",
        ratio: None,
        note: String::new(),
    }
}

/// Training steps of the yardstick's presets.
pub(super) fn steps(
    table: &mut Table,
    threads: &[usize],
    rounds: usize,
    peer: Option<&Path>,
) -> Result<()> {
    let workloads = [Workload::new("tiny", 64, 64, 64)?, Workload::new("small", 256, 128, 8)?];
    for workload in &workloads {
        for &threads in threads {
            let engine = Cpu::new(workload.model.constants(), threads, None);
            // The optimizer takes the threads of the pool that it runs in.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let mut training = Loop::new(&engine, workload);
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for _ in 0..rounds.div_ceil(2) {
                ours.push(pool.install(|| training.median(5))?);
                if let Some(peer) = peer {
                    theirs.push(peers::torch_step(peer, threads, &workload.name)?);
                }
            }
            let ours = median(ours);
            let tokens = workload.tokens() as f64;
            let mut out = row("step", workload.shape(), &engine, ours, tokens / ours);
            if !theirs.is_empty() {
                let rate = median(theirs);
                table.push(Row {
                    engine: "pytorch".into(),
                    adapter: "f32".into(),
                    ..row("step", workload.shape(), &engine, tokens / rate, rate)
                });
                out.ratio = Some(tokens / ours / rate);
                out.note = "against PyTorch f32".into();
            }
            table.push(out);
        }
    }
    Ok(())
}

/// Batched decoding of 64 sequences with a key-value cache.
pub(super) fn decode(table: &mut Table, threads: &[usize], rounds: usize) -> Result<()> {
    const SEQUENCES: usize = 64;
    const NEW: usize = 64;
    for preset in ["tiny", "small", "medium"] {
        let workload = Workload::new(preset, 256, 96, SEQUENCES)?;
        let weights = Weights::quantize(&workload.model, &master_weights(&workload.model, 0));
        for &threads in threads {
            let engine = Cpu::new(workload.model.constants(), threads, None);
            let decoder = Decoder::new(&engine, &weights);
            let request = |i: usize| Request { prompt: vec![5; 16], stream: [i as u32, 0, 0] };
            let requests: Vec<Request> = (0..SEQUENCES).map(request).collect();
            let work = samples(requests, NEW);
            let mut times = Vec::new();
            for _ in 0..=rounds {
                let started = Instant::now();
                pollster::block_on(execute(&engine, &decoder, &work, |_| ()))?;
                times.push(started.elapsed().as_secs_f64());
            }
            times.remove(0);
            let median_s = median(times);
            let rate = (SEQUENCES * NEW) as f64 / median_s;
            let shape = format!("{preset} {SEQUENCES}x(16+{NEW})");
            let mut out = row("decode", shape, &engine, median_s, rate);
            let ceiling = super::products::ceiling(threads, SEQUENCES, workload.model.width);
            let operations = 2.0 * workload.model.multiply_adds(16 + NEW / 2) as f64 * rate;
            let share = 100.0 * operations / ceiling;
            out.note = format!("{share:.0}% of the product ceiling at {SEQUENCES} rows");
            table.push(out);
        }
    }
    Ok(())
}

/// A training step and decoding on every graphics adapter, with the dispatches they take.
pub(super) fn wgpu(table: &mut Table) -> Result<()> {
    const SEQUENCES: usize = 8;
    const NEW: usize = 16;
    let workload = Workload::new("micro", 128, 64, SEQUENCES)?;
    for adapter in engines::adapters() {
        let info = adapter.get_info();
        let engine = engines::open_gpu(&adapter, workload.model.constants())?;
        let variant = tuning::pick(&engine, &info)?;
        let layers = workload.model.layers as f64;
        let out = |name: &str, shape: String, median_s: f64, rate: f64, note: String| Row {
            name: name.into(),
            shape,
            threads: 0,
            engine: "wgpu".into(),
            adapter: info.name.clone(),
            median_s,
            rate,
            unit: "tokens/s",
            ratio: None,
            note,
        };
        let mut training = Loop::new(&engine, &workload);
        let step_s = training.median(3)?;
        let before = engine.dispatch_count();
        training.step()?;
        let per_layer = (engine.dispatch_count() - before) as f64 / layers;
        let note = format!("{variant:?}, {per_layer:.0} dispatches a layer");
        let rate = workload.tokens() as f64 / step_s;
        table.push(out("step", workload.shape(), step_s, rate, note));

        let request = |i: usize| Request { prompt: vec![5; 16], stream: [i as u32, 0, 0] };
        let requests: Vec<Request> = (0..SEQUENCES).map(request).collect();
        let work = samples(requests, NEW);
        let run = || -> Result<(f64, u64)> {
            let (before, started) = (engine.dispatch_count(), Instant::now());
            pollster::block_on(execute(&engine, &training.decoder, &work, |_| ()))?;
            Ok((started.elapsed().as_secs_f64(), engine.dispatch_count() - before))
        };
        run()?;
        let (seconds, dispatches) = run()?;
        let per_layer = dispatches as f64 / NEW as f64 / layers;
        let note =
            format!("{per_layer:.1} dispatches a layer and step, logits and sampling included");
        let shape = format!("{} {SEQUENCES}x(16+{NEW})", workload.name);
        table.push(out("decode", shape, seconds, (SEQUENCES * NEW) as f64 / seconds, note));
    }
    Ok(())
}

/// Tokens per second of scoring and training by model size, context and batch.
pub(super) fn scale(table: &mut Table, threads: usize) -> Result<()> {
    let mut workloads = Vec::new();
    for preset in ["nano", "micro", "tiny", "small", "medium", "base"] {
        workloads.push(Workload::new(preset, 256, 128, 8)?);
    }
    workloads.push(Workload::new("smollm2-135m", 49_152, 64, 2)?);
    for length in [64, 256, 1024] {
        workloads.push(Workload::new("small", 256, length, 2048 / length)?);
    }
    for batch in [1, 4, 16] {
        workloads.push(Workload::new("small", 256, 128, batch)?);
    }
    for workload in &workloads {
        let engine = Cpu::new(workload.model.constants(), threads, None);
        let mut training = Loop::new(&engine, workload);
        let repeats = if workload.model.parameter_count() > 20_000_000 { 1 } else { 3 };
        let train = training.median(repeats)?;
        let scored = |tokens| Scored { tokens, first: 1 };
        let sequences = workload.sequences(0).into_iter().map(scored).collect();
        let work = Work::Score { temperature_scale: temperature_scale(1.0), sequences };
        let mut times = Vec::new();
        for _ in 0..repeats {
            let started = Instant::now();
            pollster::block_on(execute(&engine, &training.decoder, &work, |_| ()))?;
            times.push(started.elapsed().as_secs_f64());
        }
        let score_s = median(times);
        let tokens = workload.tokens() as f64;
        let mut out = row("scale", workload.shape(), &engine, train, tokens / train);
        let parameters = workload.model.parameter_count() as f64 / 1e6;
        out.note =
            format!("{parameters:.2} M parameters, scoring {:.0} tokens/s", tokens / score_s);
        table.push(out);
    }
    Ok(())
}
