//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::engines::EngineChoice;
use crate::{
    bench, demo, doctor, donor, eval, export, host, import, join, receipts, replay, sample, train,
};

/// Train reasoning models together, in exact arithmetic: every machine computes the same bits.
#[derive(Debug, Parser)]
#[command(name = "manyhands", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the arithmetic runs.
#[derive(Clone, Debug, Args)]
pub struct EngineArgs {
    /// Engine: auto takes a real GPU if it passes the conformance suite, else the CPU.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto, global = true)]
    pub engine: EngineChoice,
    /// Threads of the CPU engine; 0 takes all cores.
    #[arg(long, default_value_t = 0, global = true)]
    pub threads: usize,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model from a run file, or resume where it stopped.
    Train(train::TrainArgs),
    /// Measure pass@1 and pass@k of a checkpoint on held-out problems.
    Eval(eval::EvalArgs),
    /// Bring open weights (Llama family, GGUF or safetensors) into the exact formats.
    Import(import::ImportArgs),
    /// Hand a model back: safetensors, GGUF for llama.cpp, or a LoRA adapter by itself.
    Export(export::ExportArgs),
    /// Let a checkpoint answer, token by token, or chat with an imported model.
    Sample(sample::SampleArgs),
    /// Check that this machine's engines give the right bits.
    Doctor(doctor::DoctorArgs),
    /// Measure speed and memory.
    Bench(bench::BenchArgs),
    /// Train a tiny model from nothing and show what reinforcement learning adds.
    Demo(demo::DemoArgs),
    /// Start or resume a run that others can join: a coordination peer.
    Host(host::HostArgs),
    /// Contribute to a run until told to stop.
    Join(join::JoinArgs),
    /// Derive a run again from a host's ledger and blobs: is everything as it says?
    Replay(replay::ReplayArgs),
    /// Look up in a ledger what a volunteer's receipts are worth.
    Receipts(receipts::ReceiptsArgs),
    /// Let this machine's volunteer take no more work for now.
    Pause(donor::ControlArgs),
    /// Let this machine's volunteer work again.
    Resume(donor::ControlArgs),
}

/// Parses the command line and runs it.
pub fn run() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Sample(args) => sample::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Host(args) => host::run(&args),
        Command::Join(args) => join::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Receipts(args) => receipts::run(&args),
        Command::Pause(args) => donor::run_pause(&args),
        Command::Resume(args) => donor::run_resume(&args),
    }
}

/// How this program was called, for commands that a person can paste.
pub fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "manyhands".into())
}

/// Default directory of runs.
pub fn runs_dir() -> PathBuf {
    PathBuf::from("runs")
}
