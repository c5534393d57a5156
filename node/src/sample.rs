//! `manyhands sample`: a checkpoint answers, token by token.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use manyhands_core::engine::Engine;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::{Completion, Request, Sampling, generate};
use manyhands_core::model::tokenizer::{Bytes, END, Tokenizer, decode};
use manyhands_core::run::problems::{Drawn, Problems};
use manyhands_core::run::rollout::logprob;
use manyhands_core::tasks::Split;
use manyhands_shaders::twin::logits::temperature_scale;

use crate::cli::EngineArgs;
use crate::store::load_weights;
use crate::train::open_sources;
use crate::{chat, engines, with_engine};
use manyhands_core::language::{Language, Message, Role};

/// Marks the random streams of samples that people ask for.
const STREAM: u32 = 2 << 24;
/// An end that no vocabulary has.
const NO_END: u32 = u32::MAX;

/// Arguments of `sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// A run's directory, one of its checkpoints, or an imported model.
    checkpoint: PathBuf,
    /// The prompt, or several [default: held-out problems of the run; a chat with an imported
    /// model].
    #[arg(long)]
    prompt: Vec<String>,
    /// The prompt as token ids, separated by commas.
    #[arg(long, value_delimiter = ',', conflicts_with = "prompt")]
    prompt_ids: Vec<u32>,
    /// Chat, with a run on an imported model.
    #[arg(long, conflicts_with_all = ["prompt", "prompt_ids", "json"])]
    chat: bool,
    /// The imported model that the run trains [default: where its run file says].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Continue the prompt as it is, without an imported model's chat template.
    #[arg(long)]
    raw: bool,
    /// What an imported model is told before the chat.
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// How many completions of each prompt, or how many held-out problems.
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
    /// Go on after the token that ends a completion.
    #[arg(long)]
    ignore_end: bool,
    /// Print one JSON line a completion, with tokens and log-probabilities.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// One completion to make.
struct Prompt {
    text: Option<String>,
    tokens: Vec<u32>,
    problem: Option<Drawn>,
}

/// What reads and writes the text.
enum Text {
    Bytes(Bytes),
    Imported(Box<Language>),
}

impl Text {
    fn tokenizer(&self) -> &dyn Tokenizer {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Imported(language) => language.as_ref(),
        }
    }

    /// Text of tokens as they come.
    fn stream(&self) -> Box<dyn FnMut(u32) -> String + '_> {
        match self {
            Self::Bytes(_) => Box::new(|token| decode(&[token])),
            Self::Imported(language) => Box::new(language.stream()),
        }
    }
}

/// Runs `sample`.
pub fn run(args: &SampleArgs) -> Result<ExitCode> {
    if !(0.05..=20.0).contains(&args.temperature) {
        bail!("--temperature must lie in 0.05 to 20; use --greedy for the most likely text");
    }
    let mut loaded = load_weights(&args.checkpoint, args.model.as_deref())?;
    let vocabulary = loaded.weights.config.vocabulary;
    let text = match loaded.language.take() {
        Some(language) => Text::Imported(Box::new(language)),
        None => Text::Bytes(Bytes { vocabulary }),
    };
    let given = !args.prompt.is_empty() || !args.prompt_ids.is_empty() || args.chat;
    let run = loaded.config.as_ref().filter(|_| !given);
    let problems = run.map(|config| open_sources(config, Path::new("."))).transpose()?;
    let prompts = prompts(args, &text, problems.as_ref(), vocabulary)?;
    let engine = engines::choose(
        args.engine.engine,
        args.engine.threads,
        loaded.weights.config.constants(),
    )?;
    with_engine!(&engine, |engine| {
        let engine = engine.as_ref();
        let decoder = loaded.decoder(engine);
        if let (true, Text::Imported(language)) = (prompts.is_empty(), &text) {
            chat::run(engine, &decoder, language, args)?;
        }
        for (i, prompt) in prompts.iter().enumerate() {
            if let (false, Some(text)) = (args.json, &prompt.text) {
                print!("{text}");
            }
            let stream = [i as u32, STREAM, 0];
            let say = (!args.json).then(|| text.stream());
            let end = text.tokenizer().end();
            let completion = answer(engine, &decoder, &prompt.tokens, stream, end, args, say)?;
            report(args, &text, prompt, problems.as_ref(), &completion);
        }
    });
    Ok(ExitCode::SUCCESS)
}

/// The prompts that the arguments ask for; none for a chat.
fn prompts(
    args: &SampleArgs,
    text: &Text,
    problems: Option<&Problems>,
    vocabulary: usize,
) -> Result<Vec<Prompt>> {
    let mut found = Vec::new();
    if !args.prompt_ids.is_empty() {
        let unknown = args.prompt_ids.iter().find(|t| **t as usize >= vocabulary);
        if let Some(token) = unknown {
            bail!("--prompt-ids: {token} is outside the vocabulary of {vocabulary}");
        }
        found.push((None, args.prompt_ids.clone()));
    }
    for prompt in &args.prompt {
        let tokens = match text {
            Text::Imported(language) if language.chats() && !args.raw => {
                language.encode_chat(&conversation(args, prompt))?
            }
            Text::Imported(language) => language.encode(prompt)?,
            Text::Bytes(bytes) => bytes.encode_prompt(prompt)?,
        };
        ensure!(!tokens.is_empty(), "the prompt has no tokens");
        found.push((Some(prompt.clone()), tokens));
    }
    if found.is_empty()
        && let Some(problems) = problems
    {
        let problem = |i: u32| {
            let drawn = problems.draw(u64::from(i) + args.seed, Split::HeldOut);
            let prompt = drawn.problem.prompt.clone();
            let tokens = text.tokenizer().encode_prompt(&prompt)?;
            Ok(Prompt { text: Some(prompt), tokens, problem: Some(drawn) })
        };
        return (0..args.count).map(problem).collect();
    }
    ensure!(!(found.is_empty() && args.json), "--json needs --prompt or --prompt-ids");
    let prompts = found.iter().flat_map(|(text, tokens)| {
        let prompt = || Prompt { text: text.clone(), tokens: tokens.clone(), problem: None };
        (0..args.count).map(move |_| prompt())
    });
    Ok(prompts.collect())
}

/// The system's and the user's first message.
pub(crate) fn conversation(args: &SampleArgs, prompt: &str) -> Vec<Message> {
    let system = args.system.iter().map(|s| Message { role: Role::System, content: s.clone() });
    system.chain([Message::user(prompt)]).collect()
}

fn report(
    args: &SampleArgs,
    text: &Text,
    prompt: &Prompt,
    problems: Option<&Problems>,
    completion: &Completion,
) {
    let answer = text.tokenizer().decode(&completion.tokens);
    let correct = prompt.problem.as_ref().zip(problems).map(|(d, p)| p.score(d, &answer) >= 1.0);
    if args.json {
        let logprobs: Vec<f64> = completion.stats.iter().map(logprob).collect();
        let line = serde_json::json!({
            "prompt": prompt.text, "prompt_ids": prompt.tokens, "text": answer,
            "tokens": completion.tokens, "logprobs": logprobs, "correct": correct,
        });
        println!("{line}");
    } else {
        println!("{}", correct.map_or("", |c| if c { "   (right)" } else { "   (wrong)" }));
    }
}

/// Completes a prompt; `say` turns each token into text for the terminal as it comes.
pub(crate) fn answer<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    tokens: &[u32],
    stream: [u32; 3],
    end: u32,
    args: &SampleArgs,
    mut say: Option<impl FnMut(u32) -> String>,
) -> Result<Completion> {
    let room = decoder.config.context.saturating_sub(tokens.len());
    if room == 0 {
        bail!("the prompt fills the context of {} tokens", decoder.config.context);
    }
    let sampling = Sampling {
        seed: args.seed,
        temperature_scale: (!args.greedy).then(|| temperature_scale(args.temperature)),
        max_new_tokens: args.max_new_tokens.unwrap_or(room).clamp(1, room),
        end: if args.ignore_end { NO_END } else { end },
        slots: 1,
    };
    let mut out = std::io::stdout();
    let stream_out = |_: usize, done: &[Completion]| {
        let newest = done[0].tokens.last().copied().unwrap_or(END);
        // A reader that went away (a closed pipe) ends the text.
        say.as_mut()
            .is_none_or(|say| write!(out, "{}", say(newest)).and_then(|()| out.flush()).is_ok())
    };
    let requests = [Request { prompt: tokens.to_vec(), stream }];
    let all = generate(engine, decoder, &requests, &sampling, stream_out);
    pollster::block_on(all)?
        .completions
        .into_iter()
        .next()
        .context("one request gives one completion")
}
