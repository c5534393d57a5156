//! `manyhands train`: the training loop around the pure trainer, with checkpoints and logs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use manyhands_core::engine::Engine;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::pipeline::Advanced;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::report::{Part, Phase, StepReport};
use manyhands_core::run::state::{Evaluation, State};
use manyhands_core::run::trainer::Trainer;
use serde::{Deserialize, Serialize};

use crate::cli::{EngineArgs, program, runs_dir};
use crate::store::{RunDir, read_bounded, write_atomic};
use crate::view::{View, eval_line, phase_name};
use crate::{engines, imported, plot, with_engine};

/// Log of steps and evaluations in a run's directory.
pub const LOG: &str = "log.jsonl";
/// Plot of the log.
pub const PLOT: &str = "run.svg";
/// Largest run file, and largest file of problems.
const TEXT_BYTES_MAX: u64 = 256 << 20;
/// Exit code after Ctrl-C, as shells expect it.
const INTERRUPTED: u8 = 130;

/// Set by Ctrl-C: stop after the step at hand.
static STOP: AtomicBool = AtomicBool::new(false);

/// Arguments of `train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The run file (TOML).
    run: PathBuf,
    /// Directory of checkpoints and logs [default: runs/NAME].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write a summary of the finished run to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LogLine {
    /// An optimizer step.
    Step {
        /// What the trainer reports.
        report: Box<StepReport>,
        /// Wall seconds by part.
        seconds: BTreeMap<Part, f64>,
        /// Tokens sampled and trained on, a second.
        tokens_per_second: f64,
    },
    /// An evaluation on held-out problems.
    Eval {
        /// Phase, step and result.
        evaluation: Box<Evaluation>,
        /// Wall seconds.
        seconds: f64,
    },
}

/// The finished run, for scripts. Field names are a stable interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// BLAKE3 hash of the final weights.
    pub weights: String,
    /// Optimizer steps by phase.
    pub steps: BTreeMap<String, u64>,
    /// pass@1 before and after reinforcement learning.
    pub pass_at_1: BeforeAfter,
    /// pass@k before and after, by k.
    pub pass_at_k: BTreeMap<usize, BeforeAfter>,
    /// Wall seconds by part.
    pub wall_s: BTreeMap<String, f64>,
    /// Clamped values by site, over the whole run.
    pub saturations: BTreeMap<String, u64>,
}

/// A measure with its 95% interval, before and after reinforcement learning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BeforeAfter {
    /// Before.
    pub before: Option<manyhands_core::learn::passk::Interval>,
    /// After.
    pub after: Option<manyhands_core::learn::passk::Interval>,
}

/// Parses and validates a run file; paths in it start from `base`.
pub fn parse_run(text: &str, base: &Path) -> Result<RunConfig> {
    let config = imported::resolve(toml::from_str(text)?, base)?;
    config.validate()?;
    Ok(config)
}

/// Runs `train`.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    let text = read_bounded(&args.run, TEXT_BYTES_MAX)?;
    let text = String::from_utf8(text).context("the run file is not UTF-8")?;
    let base = args.run.parent().unwrap_or(Path::new("."));
    let config = parse_run(&text, base).with_context(|| format!("in {}", args.run.display()))?;
    let dir = args.dir.clone().unwrap_or_else(|| runs_dir().join(&config.name));
    let again = format!("{} train {}", program(), args.run.display());
    let finished = train(&config, base, &dir, &args.engine, &again)?;
    let Some(summary) = finished else { return Ok(ExitCode::from(INTERRUPTED)) };
    println!("weights {}", summary.weights);
    println!("sample from it: {} sample {}", program(), dir.display());
    if let Some(path) = &args.json {
        write_atomic(path, &serde_json::to_vec_pretty(&summary)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the problems of a run; paths of JSONL files start from `base`.
pub fn open_sources(config: &RunConfig, base: &Path) -> Result<Problems> {
    let read = |path: &str| {
        let path = base.join(path);
        let bytes = read_bounded(&path, TEXT_BYTES_MAX).map_err(|e| format!("{e:#}"))?;
        String::from_utf8(bytes).map_err(|_| format!("{} is not UTF-8", path.display()))
    };
    Ok(Problems::open(config, read)?)
}

/// Opens the problems of a run, and the imported model that it trains.
pub fn open_problems(config: &RunConfig, base: &Path) -> Result<Problems> {
    let problems = open_sources(config, base)?;
    Ok(match imported::open(config, base)? {
        Some(imported) => problems.with_model(imported),
        None => problems,
    })
}

/// Trains to the end, from the newest checkpoint in `dir` if there is one. `None`: interrupted,
/// with everything saved; `again` is the command that goes on.
pub fn train(
    config: &RunConfig,
    base: &Path,
    dir: &Path,
    engine: &EngineArgs,
    again: &str,
) -> Result<Option<Summary>> {
    let problems = open_problems(config, base)?;
    let store = RunDir::open(dir)?;
    let model = config.model()?;
    let (state, resumed) = match store.load_latest()? {
        Some((stored, _)) if stored != *config => bail!(
            "{} holds another run (its settings differ from this run file); give this one another name or --dir, or remove that directory",
            dir.display()
        ),
        Some((_, state)) => (state, true),
        None => (State::new(config, &model, problems.initial(&model)), false),
    };
    // A second handler (a second run in one process) is no error: the flag is the same.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
    });
    store.truncate_log(LOG, |line| {
        let line: Option<LogLine> = serde_json::from_value(line.clone()).ok();
        line.is_some_and(|line| line.precedes(&state))
    })?;
    let engine = engines::choose(engine.engine, engine.threads, model.constants())?;
    eprintln!(
        "run {}: {} parameters, {} on {}",
        config.name,
        model.parameter_count(),
        match resumed {
            true => format!("resuming at {} step {}", phase_name(state.phase), state.step),
            false => "starting".into(),
        },
        engine.describe()
    );
    let done = with_engine!(&engine, |engine| {
        let trainer = Trainer::new(engine.as_ref(), config.clone(), problems, state)?;
        run_trainer(trainer, &store)?
    });
    let Some(hash) = done else {
        eprintln!("saved in {}; go on with: {again}", dir.display());
        return Ok(None);
    };
    let lines = read_log(&store)?;
    plot::write(&store.path(PLOT), &lines)?;
    Ok(Some(summary(&lines, hash)))
}

impl LogLine {
    /// Whether a state has this line behind it; one that has not will write it again.
    pub(crate) fn precedes(&self, state: &State) -> bool {
        match self {
            Self::Step { report, .. } => {
                (report.phase as u8, report.step) <= (state.phase as u8, state.step)
            }
            Self::Eval { evaluation, .. } => state.evaluations.contains(evaluation.as_ref()),
        }
    }
}

/// Reads the log of a run.
pub fn read_log(store: &RunDir) -> Result<Vec<LogLine>> {
    let path = store.path(LOG);
    let text = String::from_utf8(read_bounded(&path, 1 << 32)?).context("the log is not UTF-8")?;
    let parse = |line: &str| serde_json::from_str(line);
    text.lines()
        .map(parse)
        .collect::<Result<_, _>>()
        .with_context(|| format!("in {}", path.display()))
}

/// Orders checkpoints: phases after each other, steps within.
fn ordinal(state: &State) -> u64 {
    state.phase as u64 * 1_000_000_000 + state.step
}

/// The loop. Returns the final hash, or `None` when interrupted.
fn run_trainer<E: Engine>(
    mut trainer: Trainer<'_, E>,
    store: &RunDir,
) -> Result<Option<blake3::Hash>> {
    let mut view = View::new();
    let model = trainer.pipeline.model().clone();
    let config = trainer.pipeline.config.clone();
    let save = |state: &State| {
        let (manifest, files) = state.save(&config, &model);
        store.save(ordinal(state), &manifest, &files, config.checkpoint.keep)
    };
    let mut started = Instant::now();
    view.phase(trainer.state().phase, trainer.state().step, trainer.pipeline.phase_steps());
    loop {
        if STOP.load(Ordering::SeqCst) {
            view.finish();
            save(trainer.state())?;
            return Ok(None);
        }
        let advanced = pollster::block_on(trainer.advance(&mut |p| view.observe(p)));
        let advanced = advanced.context(
            "training stopped; the last checkpoint is whole, start again to resume from it",
        )?;
        let elapsed = started.elapsed().as_secs_f64();
        started = Instant::now();
        let seconds = view.take_seconds();
        match advanced {
            None => {
                view.finish();
                save(trainer.state())?;
                return Ok(Some(trainer.weights_hash()));
            }
            Some(Advanced::Phase(phase)) => {
                view.phase(phase, 0, trainer.pipeline.phase_steps());
                save(trainer.state())?;
            }
            Some(Advanced::Evaluation(evaluation)) => {
                view.say(&eval_line(&evaluation.report));
                store.append(LOG, &LogLine::Eval { evaluation, seconds: elapsed })?;
                save(trainer.state())?;
            }
            Some(Advanced::Step(report)) => {
                let tokens = (report.trained_tokens + report.sampled_tokens) as f64;
                let tokens_per_second = tokens / elapsed;
                view.step(&report, trainer.pipeline.phase_steps(), tokens_per_second);
                store.append(LOG, &LogLine::Step { report, seconds, tokens_per_second })?;
                if trainer.state().step.is_multiple_of(config.checkpoint.every) {
                    save(trainer.state())?;
                }
            }
        }
    }
}

/// What a log adds up to.
pub fn summary(lines: &[LogLine], weights: blake3::Hash) -> Summary {
    let (mut steps, mut wall_s, mut saturations) =
        (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let (mut before, mut after) = (None, None);
    for line in lines {
        match line {
            LogLine::Step { report, seconds, .. } => {
                *steps.entry(phase_name(report.phase).to_string()).or_default() += 1;
                for (part, s) in seconds {
                    *wall_s.entry(format!("{part:?}").to_lowercase()).or_default() += s;
                }
                for (site, n) in &report.saturations {
                    *saturations.entry(site.clone()).or_default() += n;
                }
            }
            LogLine::Eval { evaluation, seconds } => {
                *wall_s.entry("evaluate".into()).or_default() += seconds;
                if evaluation.phase == Phase::Rl && evaluation.step == 0 {
                    before = Some(&evaluation.report.overall.pass_at_k);
                }
                if evaluation.phase == Phase::Done {
                    after = Some(&evaluation.report.overall.pass_at_k);
                }
            }
        }
    }
    let of = |k: usize| BeforeAfter {
        before: before.and_then(|p| p.get(&k).copied()),
        after: after.and_then(|p| p.get(&k).copied()),
    };
    let ks = after.into_iter().chain(before).flat_map(|p| p.keys().copied());
    Summary {
        weights: weights.to_hex().to_string(),
        steps,
        pass_at_1: of(1),
        pass_at_k: ks.map(|k| (k, of(k))).collect(),
        wall_s,
        saturations,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A run file that does not parse would greet every newcomer.
    #[test]
    fn shipped_run_files_are_valid() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
        let mut count = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let parsed: RunConfig = toml::from_str(&text).unwrap();
            if parsed.model.import.is_none() {
                let config = parse_run(&text, Path::new("."));
                let config = config.unwrap_or_else(|e| panic!("{}: {e:#}", path.display()));
                open_problems(&config, Path::new(".")).unwrap();
            }
            count += 1;
        }
        assert!(count >= 3);
    }

    proptest! {
        /// Whatever a run file holds, it is refused with a reason or it is valid.
        #[test]
        fn parse_run_never_panics(text in any::<String>(), at in any::<prop::sample::Index>(), len in 0_usize..40) {
            let _ = parse_run(&text, Path::new("."));
            let mut broken = crate::demo::RUN.to_string();
            let start = at.index(broken.len());
            let end = broken.len().min(start + len);
            if broken.is_char_boundary(start) && broken.is_char_boundary(end) {
                broken.replace_range(start..end, &text);
            }
            if let Ok(config) = parse_run(&broken, Path::new(".")) {
                prop_assert!(config.validate().is_ok());
            }
        }
    }
}
