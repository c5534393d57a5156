//! `manyhands bench`: honest figures of this machine. Medians; ratios only within one run.
//!
//! Where a Python with numpy (and torch) is given, its products (and training steps) are measured
//! in the same run, alternating with ours.

mod audit;
mod blobs;
mod memory;
mod model;
mod peers;
mod products;
mod swarm;
mod training;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Exact matrix products of the CPU engine, against OpenBLAS.
    Products,
    /// Every graphics adapter: exact products against plain f32 WGSL, a step, decoding.
    Wgpu,
    /// Training steps, against PyTorch.
    Step,
    /// Batched decoding.
    Decode,
    /// Auditing rollouts by prefill, against generating them.
    Audit,
    /// A model of 135 million parameters: prompts and decoding, against llama.cpp, and the gradient
    /// of an adapter, against PyTorch.
    Model,
    /// Cost by model size, context and batch.
    Scale,
    /// Peak memory of a training step, and growth over many.
    Memory,
    /// Blobs on loopback, by each transport of the network, against plain TCP.
    Blobs,
    /// A host and volunteers on this machine, against one process.
    Swarm,
}

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure [default: everything].
    #[arg(value_enum)]
    sections: Vec<Section>,
    /// A Python with numpy and torch, for the yardsticks [default: none].
    #[arg(long, value_name = "PYTHON")]
    peer: Option<PathBuf>,
    /// llama.cpp as a yardstick: the directory of its shared libraries [default: none].
    #[arg(long, value_name = "DIR", requires_all = ["peer", "gguf"])]
    llama: Option<PathBuf>,
    /// The model that llama.cpp is measured with: SmolLM2-135M in 8 bits, for a fair comparison.
    #[arg(long, value_name = "FILE", requires = "llama")]
    gguf: Option<PathBuf>,
    /// Threads to measure with, separated by commas [default: 1 and all cores].
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// Rounds; the median over them is reported.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One figure. Field names are a stable interface.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// What was measured.
    name: String,
    /// Its shape or preset.
    shape: String,
    /// Threads used.
    threads: usize,
    /// cpu, wgpu, or the yardstick's name.
    engine: String,
    /// CPU path or graphics adapter.
    adapter: String,
    /// Median wall seconds of one unit of work.
    median_s: f64,
    /// Work per second.
    rate: f64,
    /// GOP/s (a multiply and an add are two), tokens/s, MiB or bytes.
    unit: &'static str,
    /// Rate over the yardstick's rate, measured in this run.
    ratio: Option<f64>,
    /// What the ratio is against, and other remarks.
    note: String,
}

/// Collects rows and shows them as they come.
struct Table {
    rows: Vec<Row>,
    json: bool,
}

impl Table {
    fn push(&mut self, row: Row) {
        if !self.json {
            let ratio = row.ratio.map_or(String::new(), |r| format!("{r:5.2}x"));
            println!(
                "{:10} {:28} {} thr  {:9} {:22} {:>11.4} ms {:>10.1} {:9} {ratio} {}",
                row.name,
                row.shape,
                row.threads,
                row.engine,
                row.adapter,
                row.median_s * 1e3,
                row.rate,
                row.unit,
                row.note
            );
        }
        self.rows.push(row);
    }
}

/// Runs `bench`.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let all = crate::engines::thread_count(0);
    let mut threads = args.threads.clone();
    if threads.is_empty() {
        threads = if all > 1 { vec![1, all] } else { vec![1] };
    }
    let mut table = Table { rows: Vec::new(), json: args.json };
    let wanted = |s: Section| args.sections.is_empty() || args.sections.contains(&s);
    let peer = args.peer.as_deref();
    // First: the peak of a process includes all that it did before.
    if wanted(Section::Memory) {
        memory::run(&mut table, all)?;
    }
    if wanted(Section::Products) {
        products::cpu(&mut table, &threads, args.rounds, peer)?;
    }
    if wanted(Section::Wgpu) {
        products::wgpu(&mut table, args.rounds)?;
        training::wgpu(&mut table)?;
    }
    if wanted(Section::Step) {
        training::steps(&mut table, &threads, args.rounds, peer)?;
    }
    if wanted(Section::Decode) {
        training::decode(&mut table, &threads, args.rounds)?;
    }
    if wanted(Section::Audit) {
        audit::run(&mut table, &threads, args.rounds)?;
    }
    if wanted(Section::Model) {
        let paths = args.llama.as_deref().zip(args.gguf.as_deref());
        let llama = paths.map(|(directory, model)| model::Llama { directory, model });
        model::cpu(&mut table, &threads, args.rounds, peer, llama.as_ref())?;
        model::wgpu(&mut table)?;
    }
    if wanted(Section::Scale) {
        training::scale(&mut table, all)?;
    }
    if wanted(Section::Blobs) {
        blobs::run(&mut table, all, args.rounds)?;
    }
    if wanted(Section::Swarm) {
        swarm::run(&mut table, all)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&table.rows)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// Median of a non-empty list.
fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

/// Seconds that `f` takes.
fn seconds<T>(f: impl FnOnce() -> T) -> f64 {
    let started = Instant::now();
    std::hint::black_box(f());
    started.elapsed().as_secs_f64()
}

/// Median seconds of one call, over `rounds` batches of about 30 ms each.
fn median_seconds(rounds: usize, mut f: impl FnMut()) -> f64 {
    f();
    let repeats = (0.03 / seconds(&mut f).max(1e-7)).clamp(1.0, 10_000.0) as usize;
    let batch = |_| {
        let f = &mut f;
        seconds(|| (0..repeats).for_each(|_| f())) / repeats as f64
    };
    median((0..rounds.max(1)).map(batch).collect())
}
