//! `manyhands sample`: a checkpoint answers, token by token.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use manyhands_core::engine::Engine;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::{Completion, Request, Sampling, generate};
use manyhands_core::model::tokenizer::{END, decode, encode_prompt};
use manyhands_core::run::rollout::logprob;
use manyhands_core::tasks::Split;
use manyhands_shaders::twin::logits::temperature_scale;

use crate::cli::EngineArgs;
use crate::store::load_weights;
use crate::train::open_problems;
use crate::{engines, with_engine};

/// Marks the random streams of samples that people ask for.
const STREAM: u32 = 2 << 24;

/// Arguments of `sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// A run's directory, or one of its checkpoints.
    checkpoint: PathBuf,
    /// The prompt [default: held-out problems of the run].
    #[arg(long)]
    prompt: Option<String>,
    /// How many completions, or how many held-out problems.
    #[arg(long, default_value_t = 3)]
    count: u32,
    /// Sampling temperature.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Always take the most likely token.
    #[arg(long)]
    greedy: bool,
    /// Seed of the draws: the same seed gives the same text on every machine.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Longest completion in tokens [default: what fits the context].
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// Print one JSON line a completion, with tokens and log-probabilities.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs `sample`.
pub fn run(args: &SampleArgs) -> Result<ExitCode> {
    if !(0.05..=20.0).contains(&args.temperature) {
        bail!("--temperature must lie in 0.05 to 20; use --greedy for the most likely text");
    }
    let (weights, config) = load_weights(&args.checkpoint)?;
    let mut prompts: Vec<(String, Option<manyhands_core::run::problems::Drawn>)> = Vec::new();
    let problems = match &args.prompt {
        Some(prompt) => {
            prompts.resize(args.count as usize, (prompt.clone(), None));
            None
        }
        None => {
            let problems = open_problems(&config, Path::new("."))?;
            for i in 0..args.count {
                let drawn = problems.draw(u64::from(i) + args.seed, Split::HeldOut);
                prompts.push((drawn.problem.prompt.clone(), Some(drawn)));
            }
            Some(problems)
        }
    };
    let engine =
        engines::choose(args.engine.engine, args.engine.threads, weights.config.constants())?;
    with_engine!(&engine, |engine| {
        let engine = engine.as_ref();
        let decoder = Decoder::new(engine, &weights);
        for (i, (prompt, drawn)) in prompts.iter().enumerate() {
            let stream = [i as u32, STREAM, 0];
            let completion = answer(engine, &decoder, prompt, stream, args)?;
            let text = decode(&completion.tokens);
            let correct =
                drawn.as_ref().zip(problems.as_ref()).map(|(d, p)| p.score(d, &text) >= 1.0);
            if args.json {
                let logprobs: Vec<f64> = completion.stats.iter().map(logprob).collect();
                let line = serde_json::json!({
                    "prompt": prompt, "text": text, "tokens": completion.tokens,
                    "logprobs": logprobs, "correct": correct,
                });
                println!("{line}");
            } else {
                let verdict = correct.map_or("", |c| if c { "   (right)" } else { "   (wrong)" });
                println!("{verdict}");
            }
        }
    });
    Ok(ExitCode::SUCCESS)
}

fn answer<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    prompt: &str,
    stream: [u32; 3],
    args: &SampleArgs,
) -> Result<Completion> {
    let tokens = encode_prompt(prompt, decoder.config.vocabulary)?;
    let room = decoder.config.context.saturating_sub(tokens.len());
    if room == 0 {
        bail!("the prompt fills the context of {} tokens", decoder.config.context);
    }
    let sampling = Sampling {
        seed: args.seed,
        temperature_scale: (!args.greedy).then(|| temperature_scale(args.temperature)),
        max_new_tokens: args.max_new_tokens.unwrap_or(room).clamp(1, room),
        end: END,
        slots: 1,
    };
    let mut out = std::io::stdout();
    if !args.json {
        write!(out, "{prompt}")?;
    }
    let stream_out = |_: usize, done: &[Completion]| {
        let newest = done[0].tokens.last().copied().unwrap_or(END);
        // A reader that went away (a closed pipe) ends the text.
        args.json || write!(out, "{}", decode(&[newest])).and_then(|()| out.flush()).is_ok()
    };
    let requests = [Request { prompt: tokens, stream }];
    let all = generate(engine, decoder, &requests, &sampling, stream_out);
    pollster::block_on(all)?.into_iter().next().context("one request gives one completion")
}
