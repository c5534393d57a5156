//! `manyhands demo`: a swarm of separate processes on this machine trains a tiny model from nothing;
//! one of the volunteers lies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::report::{EvalReport, Phase};
use serde_json::{Value, json};

use crate::cli::{EngineArgs, program, runs_dir};
use crate::host::read_run;
use crate::local_swarm::LocalSwarm;
use crate::store::{RunDir, write_atomic};
use crate::train::{LogLine, PLOT, parse_run, read_log, train};

/// The run file of the demo.
pub const RUN: &str = include_str!("../runs/demo.toml");
/// What the other one does, in a build that can.
const ATTACK: Option<&str> = if cfg!(feature = "attacks") { Some("sign-flip") } else { None };

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Another run file, instead of the demo's own.
    #[arg(long, value_name = "FILE", conflicts_with = "seed")]
    run: Option<PathBuf>,
    /// Seed of the run.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Honest volunteers.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=64))]
    volunteers: u8,
    /// Directory of the run [default: runs/demo-SEED, or runs/NAME with --run].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write a summary to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Train in this process alone, without a swarm.
    #[arg(long)]
    solo: bool,
    /// Do not run it once more with a single volunteer to compare the weights.
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs `demo`, or goes on with it.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let (config, base) = match &args.run {
        Some(file) => (read_run(file)?, file.parent().unwrap_or(Path::new("."))),
        None => {
            let mut config = parse_run(RUN, Path::new(".")).context("in the demo's run file")?;
            config.seed = args.seed;
            config.name = format!("demo-{}", args.seed);
            (config, Path::new("."))
        }
    };
    let dir = args.dir.clone().unwrap_or_else(|| runs_dir().join(&config.name));
    let honest = usize::from(args.volunteers);
    let again = || {
        let mut again = match &args.run {
            Some(file) => format!("{} demo --run {}", program(), file.display()),
            None => format!("{} demo --seed {}", program(), args.seed),
        };
        if let Some(dir) = &args.dir {
            again += &format!(" --dir {}", dir.display());
        }
        again + if args.solo { " --solo" } else { "" }
    };
    let summary = if args.solo {
        let finished = train(&config, base, &dir, &args.engine, &again())?;
        let Some(summary) = finished else { return Ok(ExitCode::from(130)) };
        serde_json::to_value(&summary)?
    } else {
        eprintln!("{honest} honest volunteers{}", ATTACK.map_or("", |_| " and one that lies"));
        let Some(mut summary) = swarm(&config, &dir, honest, ATTACK, args)? else {
            eprintln!("saved in {}; go on with: {}", dir.display(), again());
            return Ok(ExitCode::from(130));
        };
        if !args.no_check {
            eprintln!("\nthe same run with one honest volunteer, to compare the weights");
            let other = dir.join("alone");
            let Some(alone) = swarm(&config, &other, 1, None, args)? else {
                return Ok(ExitCode::from(130));
            };
            // Gigabytes of results that nobody will replay.
            fs::remove_dir_all(&other)
                .with_context(|| format!("cannot remove {}", other.display()))?;
            let equal = alone["weights"] == summary["weights"];
            summary["alone"] = json!({"weights": alone["weights"], "equal": equal});
        }
        summary
    };
    println!("\n{}", table(&read_log(&RunDir::open(&dir)?)?).unwrap_or_default());
    if !args.solo {
        println!("{}", volunteers(&summary));
    }
    println!("weights   {}", summary["weights"].as_str().unwrap_or_default());
    if let Some(alone) = summary["alone"]["weights"].as_str() {
        println!("alone     {alone}");
        ensure!(summary["alone"]["equal"] == true, "the weights depend on who took part: a bug");
    }
    println!("plot      {}", dir.join(PLOT).display());
    if !args.solo {
        println!("replay    {} replay {}", program(), dir.display());
    }
    println!("try it    {} sample {}", program(), dir.display());
    if let Some(path) = &args.json {
        write_atomic(path, &serde_json::to_vec_pretty(&summary)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A host and its volunteers. `None`: interrupted.
fn swarm(
    config: &RunConfig,
    dir: &Path,
    honest: usize,
    attack: Option<&str>,
    args: &DemoArgs,
) -> Result<Option<Value>> {
    let mut engine = args.engine.clone();
    if honest > 1 {
        // Several volunteers share this machine.
        engine.threads = 1;
    }
    let mut summary = LocalSwarm { honest, attack, engine, shows: true }.run(config, dir)?;
    if let Some(summary) = &mut summary {
        explain(summary, attack);
    }
    Ok(summary)
}

/// Adds to a host's summary what scripts ask for first.
fn explain(summary: &mut Value, attack: Option<&str>) {
    let all = summary["status"]["volunteers"].as_array().cloned().unwrap_or_default();
    let fields = |v: &Value| json!({"peer": v["peer"], "units": v["units"], "credit": v["credit"]});
    summary["volunteers"] = all.iter().map(fields).collect();
    let expelled = all.iter().filter(|v| v["standing"] == "expelled").map(|v| {
        json!({
            "peer": v["peer"], "attack": attack, "offence": v["expelled_for"],
            "after_units": v["units"],
        })
    });
    summary["expelled"] = expelled.collect();
    summary["audits"] = summary["status"]["verification"].clone();
    summary["bytes"] = summary["status"]["bytes"].clone();
}

/// Who did what, as a table.
fn volunteers(summary: &Value) -> String {
    let mut out = format!(
        "{:10} {:>9} {:>7} {:>8} {:>16}\n",
        "volunteer", "", "units", "audited", "credit (G)"
    );
    for v in summary["status"]["volunteers"].as_array().into_iter().flatten() {
        let peer = v["peer"].as_str().and_then(|p| p.get(..8)).unwrap_or_default();
        let standing = v["standing"].as_str().unwrap_or_default();
        let credit = v["credit"].as_u64().unwrap_or(0) as f64 / 1e9;
        out += &format!(
            "{peer:10} {standing:>9} {:>7} {:>8} {credit:>16.1}\n",
            v["units"].as_u64().unwrap_or(0),
            v["audited"].as_u64().unwrap_or(0),
        );
    }
    let overhead = summary["audits"]["overhead_fraction"].as_f64().unwrap_or(0.0);
    out + &format!("audits cost {:.1}% of the work\n", 100.0 * overhead)
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
