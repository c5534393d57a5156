//! Useful work of a swarm on this machine: a host and volunteers of one thread each, against one
//! process with as many threads, for the same run.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::blobs::Scratch;
use super::{Row, Table};
use crate::cli::EngineArgs;
use crate::engines::EngineChoice;
use crate::local_swarm::LocalSwarm;
use crate::train::{parse_run, train};

/// Steps that take long against the units that they are cut into, and volunteers that have earned
/// trust for most of the run, as in a real one.
const RUN: &str = r#"
name = "bench-swarm"
[model]
preset = "micro"
vocabulary = 128
context = 96
[[task]]
family = "spell_backward"
level = 4
[sft]
steps = 32
batch = 3072
[rl]
steps = 16
prompts = 192
group_size = 16
max_new_tokens = 64
policy_lag = 1
[rl.learn.dynamic_sampling]
draws_max = 1
[eval]
problems = 8
samples = 2
k = [1]
[checkpoint]
every = 8
[swarm]
unit_seconds = 1.0
newcomer_audits = 4
"#;

/// Makes the run twice; the weights must be equal.
pub(super) fn run(table: &mut Table, threads: usize) -> Result<()> {
    let config = parse_run(RUN, Path::new(".")).context("in the bench's run file")?;
    let scratch = Scratch::new()?;
    let engine = |threads| EngineArgs { engine: EngineChoice::Cpu, threads };
    let started = Instant::now();
    let solo = train(&config, Path::new("."), &scratch.path.join("solo"), &engine(threads), "")?;
    let solo_s = started.elapsed().as_secs_f64();
    let solo = solo.context("interrupted")?;
    let swarm = LocalSwarm { honest: threads, attack: None, engine: engine(1), shows: false };
    let started = Instant::now();
    let summary = swarm.run(&config, &scratch.path.join("swarm"))?.context("interrupted")?;
    let swarm_s = started.elapsed().as_secs_f64();
    ensure!(
        summary["weights"].as_str() == Some(&solo.weights),
        "the weights depend on who took part: a bug"
    );
    let audits = summary["status"]["verification"]["overhead_fraction"].as_f64();
    let audits = 100.0 * audits.unwrap_or(0.0);
    let row = |engine: &str, seconds: f64, ratio, note: String| Row {
        name: "swarm".into(),
        shape: "micro, 32 SFT and 16 RL steps".into(),
        threads,
        engine: engine.into(),
        adapter: String::new(),
        median_s: seconds,
        rate: 48.0 / seconds,
        unit: "steps/s",
        ratio,
        note,
    };
    table.push(row("solo", solo_s, None, String::new()));
    let note = format!(
        "of one process; host and {threads} volunteers of one thread, start-up included, audits {audits:.1}% of the work"
    );
    table.push(row("swarm", swarm_s, Some(solo_s / swarm_s), note));
    Ok(())
}
