//! `manyhands eval`: pass@1 and pass@k of a checkpoint on held-out problems.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::tokenizer::{Bytes, Tokenizer};
use manyhands_core::run::config::{
    CheckpointSection, EvalSection, ModelSection, RunConfig, SwarmSection, TaskSection,
};
use manyhands_core::run::evaluate::evaluate;
use manyhands_core::run::pipeline::EVALUATED_TOKENS_MAX;
use manyhands_core::run::report::{EvalReport, PassReport};
use manyhands_core::tasks::Family;

use crate::cli::EngineArgs;
use crate::store::load_weights;
use crate::train::open_sources;
use crate::{engines, with_engine};

/// How the scorers read answers.
const INSTRUCTION: &str = "Think briefly. End your answer with # and the result alone.";

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A run's directory, or one of its checkpoints.
    checkpoint: PathBuf,
    /// Held-out problems [default: as the run file says].
    #[arg(long)]
    problems: Option<usize>,
    /// Completions a problem [default: as the run file says].
    #[arg(long)]
    samples: Option<usize>,
    /// The k of pass@k, separated by commas [default: as the run file says].
    #[arg(long, value_delimiter = ',')]
    k: Vec<usize>,
    /// Sampling temperature [default: as the run file says].
    #[arg(long)]
    temperature: Option<f64>,
    /// Longest completion in tokens [default: as in training; 256 of an imported model].
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// Evaluate on this family instead of the run's own tasks.
    #[arg(long)]
    family: Option<Family>,
    /// Difficulty of --family.
    #[arg(long, default_value_t = 1)]
    level: u32,
    /// Evaluate on this JSONL file of prompt and answer (its held-out eighth).
    #[arg(long, conflicts_with = "family")]
    jsonl: Option<String>,
    /// What an imported model is told after each problem [default: as in training; of an import, how
    /// the scorers read answers].
    #[arg(long)]
    instruction: Option<String>,
    /// The imported model that the run trains [default: where its run file says].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs `eval`.
pub fn run(args: &EvalArgs) -> Result<ExitCode> {
    let mut loaded = load_weights(&args.checkpoint, args.model.as_deref())?;
    let context = loaded.weights.config.context;
    let untrained = EVALUATED_TOKENS_MAX.min(context / 2);
    let mut config = match &loaded.config {
        Some(config) => config.clone(),
        None if args.family.is_none() && args.jsonl.is_none() => {
            bail!("an imported model has no tasks of its own; choose --family or --jsonl")
        }
        None => examination(&loaded.weights.config),
    };
    if args.family.is_some() || args.jsonl.is_some() {
        let level = args.family.map(|_| args.level);
        let (family, jsonl) = (args.family, args.jsonl.clone());
        config.tasks = vec![TaskSection { family, level, jsonl, weight: 1 }];
    }
    let instruction = match (&args.instruction, &loaded.config) {
        (Some(instruction), _) => instruction.clone(),
        (None, Some(config)) => config.model.instruction.clone(),
        (None, None) => INSTRUCTION.into(),
    };
    let language: Box<dyn Tokenizer> = match loaded.language.take() {
        Some(mut language) => {
            language.instruction = instruction;
            Box::new(language)
        }
        None => Box::new(Bytes { vocabulary: loaded.weights.config.vocabulary }),
    };
    let eval = &mut config.eval;
    eval.problems = args.problems.unwrap_or(eval.problems);
    eval.samples = args.samples.unwrap_or(eval.samples);
    eval.temperature = args.temperature.unwrap_or(eval.temperature);
    if args.k.is_empty() {
        eval.k.retain(|k| *k <= eval.samples);
    } else {
        eval.k.clone_from(&args.k);
    }
    config.validate()?;
    let problems = open_sources(&config, Path::new("."))?;
    let trained = config.rl.as_ref().map_or(untrained, |rl| rl.max_new_tokens);
    let max_new_tokens = args.max_new_tokens.unwrap_or(trained);
    if max_new_tokens == 0 || max_new_tokens >= context {
        bail!("--max-new-tokens must lie in 1 to {}", context - 1);
    }
    let engine = engines::choose(
        args.engine.engine,
        args.engine.threads,
        loaded.weights.config.constants(),
    )?;
    let report = with_engine!(&engine, |engine| {
        let engine = engine.as_ref();
        let decoder = loaded.decoder(engine);
        let (hash, seed) = (loaded.weights.hash(), config.seed);
        pollster::block_on(evaluate(
            engine,
            &decoder,
            hash,
            &problems,
            &*language,
            &config.eval,
            max_new_tokens,
            seed,
            |_| (),
        ))?
    });
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(ExitCode::SUCCESS)
}

/// The run file of a model without one: tasks are named on the command line.
fn examination(model: &ModelConfig) -> RunConfig {
    RunConfig {
        name: "imported".into(),
        seed: 0,
        model: ModelSection {
            preset: None,
            shape: Some(model.clone()),
            import: None,
            base: None,
            lora: None,
            instruction: String::new(),
            vocabulary: model.vocabulary,
            context: model.context,
        },
        tasks: Vec::new(),
        sft: None,
        rl: None,
        eval: EvalSection::default(),
        checkpoint: CheckpointSection::default(),
        swarm: SwarmSection::default(),
    }
}

/// A table for people.
pub fn table(report: &EvalReport) -> String {
    let mut out = String::new();
    let mut row = |name: &str, p: &PassReport| {
        out += &format!("{name:24} {:>5} problems x {}", p.problems, p.samples);
        for (k, i) in &p.pass_at_k {
            let (mean, low, high) = (100.0 * i.mean, 100.0 * i.low, 100.0 * i.high);
            out += &format!("   pass@{k} {mean:5.1}% [{low:.1}, {high:.1}]");
        }
        out += &format!("   {:.2} distinct\n", p.distinct_answers);
    };
    for (name, family) in &report.families {
        row(name, family);
    }
    row("overall", &report.overall);
    out += &format!(
        "temperature {}, greedy {:.1}%, token entropy {:.3} nats, answer entropy {:.3} nats, length {:.1}, cut off {:.1}%\nweights {}\n",
        report.temperature,
        100.0 * report.greedy,
        report.token_entropy,
        report.overall.answer_entropy,
        report.length,
        100.0 * report.truncated,
        report.weights,
    );
    out
}
