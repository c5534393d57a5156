//! `manyhands demo`: from nothing to a model that reasons a little, in a few minutes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use manyhands_core::run::report::{EvalReport, Phase};

use crate::cli::{EngineArgs, program, runs_dir};
use crate::store::{RunDir, write_atomic};
use crate::train::{LogLine, PLOT, parse_run, read_log, train};

/// The run file of the demo.
pub const RUN: &str = include_str!("../runs/demo.toml");

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Seed of the run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Directory of the run [default: runs/demo-SEED].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write a summary to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs `demo`, or goes on with it.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let mut config = parse_run(RUN).context("in the demo's run file")?;
    config.seed = args.seed;
    config.name = format!("demo-{}", args.seed);
    let dir = args.dir.clone().unwrap_or_else(|| runs_dir().join(&config.name));
    let mut again = format!("{} demo --seed {}", program(), args.seed);
    if let Some(dir) = &args.dir {
        again += &format!(" --dir {}", dir.display());
    }
    let finished = train(&config, Path::new("."), &dir, &args.engine, &again)?;
    let Some(summary) = finished else { return Ok(ExitCode::from(130)) };
    let store = RunDir::open(&dir)?;
    println!("\n{}", table(&read_log(&store)?).unwrap_or_default());
    println!("weights   {}", summary.weights);
    println!("plot      {}", store.path(PLOT).display());
    println!("try it    {} sample {}", program(), dir.display());
    if let Some(path) = &args.json {
        write_atomic(path, &serde_json::to_vec_pretty(&summary)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// pass@k before and after reinforcement learning, as a table.
fn table(lines: &[LogLine]) -> Option<String> {
    let find = |phase: Phase| {
        lines.iter().rev().find_map(|line| match line {
            LogLine::Eval { evaluation: e, .. } if e.phase == phase && e.step == 0 => {
                Some(&e.report)
            }
            _ => None,
        })
    };
    let (before, after) = (find(Phase::Rl)?, find(Phase::Done)?);
    let problems = after.overall.problems;
    let samples = after.overall.samples;
    let mut out = format!(
        "{problems} held-out problems, {samples} samples each, temperature {}, 95% intervals\n\n",
        after.temperature
    );
    out += &format!("{:18} {:>22} {:>22} {:>8}\n", "", "before RL", "after RL", "gain");
    for (k, b) in &before.overall.pass_at_k {
        let Some(a) = after.overall.pass_at_k.get(k) else { continue };
        let show = |i: &manyhands_core::learn::passk::Interval| {
            format!("{:5.1}% [{:5.1}, {:5.1}]", 100.0 * i.mean, 100.0 * i.low, 100.0 * i.high)
        };
        let gain = 100.0 * (a.mean - b.mean);
        out +=
            &format!("{:18} {:>22} {:>22} {gain:>+8.1}\n", format!("pass@{k}"), show(b), show(a));
    }
    let mut row = |name: &str, value: fn(&EvalReport) -> f64, digits: usize| {
        let (b, a) = (value(before), value(after));
        out += &format!("{name:18} {b:>22.digits$} {a:>22.digits$} {:>+8.digits$}\n", a - b);
    };
    row("greedy, %", |r| 100.0 * r.greedy, 1);
    row("token entropy", |r| r.token_entropy, 3);
    row("answer entropy", |r| r.overall.answer_entropy, 3);
    row("distinct answers", |r| r.overall.distinct_answers, 2);
    row("length", |r| r.length, 1);
    Some(out)
}
