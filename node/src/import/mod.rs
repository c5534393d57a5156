//! `manyhands import`: open weights become a checkpoint in the exact formats.
//!
//! [`files`] and [`hub`] find the bytes, `manyhands_core::import` reads and rounds them, and this
//! module measures the cost and writes the checkpoint.

pub mod files;
pub mod hub;
pub mod tokenizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use manyhands_core::checkpoint::{Manifest, WEIGHTS_FILE, encode_weights};
use manyhands_core::engine::Engine;
use manyhands_core::import::compare::{Comparison, compare};
use manyhands_core::import::exact::{Shifts, quantize};
use manyhands_core::import::names::Source;
use manyhands_core::import::reference::Reference;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::weights::Weights;
use serde::{Deserialize, Serialize};

use crate::cli::EngineArgs;
use crate::store::{read_bounded, write_checkpoint};
use crate::{engines, with_engine};
use files::{Files, TextFiles};
use manyhands_core::language::{Language, Marks, Message, TEMPLATE_FILE, TOKENIZER_FILE};

/// Where an imported checkpoint says what it was made of.
pub const IMPORT_FILE: &str = "import.json";
/// The text that the residual stream is measured on, and by default the comparison: the beginning
/// of "The Adventure of the Engineer's Thumb" by Arthur Conan Doyle (1892, public domain), from
/// Project Gutenberg's "The Adventures of Sherlock Holmes", with lines joined.
const TEXT: &str = include_str!("text.txt");
/// Tokens of a window in which the residual stream is measured: every window begins anew, the
/// first one as a chat does, because what comes first in a sequence is what grows large.
const PEAK_WINDOW: usize = 64;
/// Largest text to compare on.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Arguments of `import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A GGUF file, a directory with config.json, tokenizer.json and safetensors files, or
    /// hf:OWNER/NAME[@REVISION] and hf:OWNER/NAME/FILE.gguf on the Hugging Face hub.
    source: String,
    /// Directory of the checkpoint [default: models/NAME].
    #[arg(long)]
    out: Option<PathBuf>,
    /// Compare with the original on this text [default: a built-in one of 1,200 tokens].
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of the text that are compared at once, within the model's context: the longest context
    /// that is measured.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Do not compare with the original.
    #[arg(long)]
    no_report: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What an imported checkpoint was made of, and what that cost: `import.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Imported {
    /// What was imported, as it was named.
    pub source: String,
    /// BLAKE3 of the source's weights' files.
    pub source_blake3: String,
    /// Architecture, as the source names it.
    pub architecture: String,
    /// Number formats of the source.
    pub formats: Vec<String>,
    /// Licence, where the source names it.
    pub license: Option<String>,
    /// Begin and end.
    pub marks: Marks,
    /// Powers of two that were moved between tensors.
    pub shifts: Shifts,
    /// Exact against original.
    pub report: Option<Comparison>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Summary<'a> {
    dir: &'a Path,
    weights: String,
    parameters: usize,
    tensors: usize,
    formats: &'a [String],
    residual_shift: i32,
    kl: Option<f64>,
    top1: Option<f64>,
    ppl_source: Option<f64>,
    ppl_exact: Option<f64>,
    saturation: Option<&'a BTreeMap<String, u64>>,
    report: &'a Option<Comparison>,
    seconds: f64,
}

/// Runs `import`.
pub fn run(args: &ImportArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let say = |text: &str| {
        if !args.json {
            eprintln!("{:6.1} s  {text}", started.elapsed().as_secs_f64());
        }
    };
    let path = match args.source.strip_prefix(hub::SCHEME) {
        Some(name) => {
            say("fetching from the hub");
            hub::fetch(&hub::Name::parse(name)?)?
        }
        None => PathBuf::from(&args.source),
    };
    let out = args.out.clone().unwrap_or_else(|| default_dir(&args.source));
    ensure!(
        !out.exists(),
        "{} exists already; remove it or name another directory with --out",
        out.display()
    );
    let text = match &args.text {
        Some(file) => String::from_utf8(read_bounded(file, TEXT_BYTES_MAX)?)
            .ok()
            .with_context(|| format!("{} is not UTF-8", file.display()))?,
        None => TEXT.into(),
    };
    say("reading");
    let files = Files::read(&path)?;
    let hash = files.hash();
    let import = |source: Source<'_>, text_files: TextFiles| {
        convert(args, &source, text_files, &text, hash, &say)
    };
    let (imported, weights, written) =
        files.parse(import).with_context(|| format!("cannot import {}", args.source))?;
    let manifest = Manifest::new(0, weights.hash(), &written);
    write_checkpoint(&out, &manifest, &written)?;
    let report = &imported.report;
    let summary = Summary {
        dir: &out,
        weights: manifest.weights.clone(),
        parameters: weights.config.parameter_count(),
        tensors: weights.parameters.len(),
        formats: &imported.formats,
        residual_shift: imported.shifts.residual,
        kl: report.as_ref().map(|r| r.kl),
        top1: report.as_ref().map(|r| r.top1),
        ppl_source: report.as_ref().map(|r| r.ppl_source),
        ppl_exact: report.as_ref().map(|r| r.ppl_exact),
        saturation: report.as_ref().map(|r| &r.saturation),
        report,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{}", describe(&summary));
    }
    Ok(ExitCode::SUCCESS)
}

/// Rounds a model, compares it, and makes the checkpoint's files.
fn convert(
    args: &ImportArgs,
    source: &Source<'_>,
    text_files: TextFiles,
    text: &str,
    source_blake3: String,
    say: &impl Fn(&str),
) -> Result<(Imported, Weights, BTreeMap<String, Vec<u8>>)> {
    let TextFiles { tokenizer, template, marks, license } = text_files;
    let vocabulary = source.config.vocabulary;
    let language = Language::new(&tokenizer, template.clone(), marks, vocabulary)?;
    let formats: Vec<String> = source.encodings().into_iter().map(str::to_string).collect();
    say(&format!(
        "{} {} tensors of {}",
        source.tensors.len(),
        source.architecture,
        formats.join(", ")
    ));
    let reference = Reference::read(source)?;
    say("measuring the residual stream");
    let mut tokens = language.encode(TEXT)?;
    if language.chats() {
        tokens.splice(0..0, language.encode_chat(&[Message::user(&TEXT[..42])])?);
    }
    let windows = tokens.chunks(PEAK_WINDOW.min(source.config.context));
    let peak = windows.map(|w| reference.states(w).peak).fold(0.0, f32::max);
    let shifts = Shifts::choose(source, peak)?;
    say(&format!("it reaches {peak:.0}, scaled by 2^-{}; rounding", shifts.residual));
    let weights = quantize(source, &shifts)?;
    let report = match args.no_report {
        true => None,
        false => Some(measure(args, &reference, &weights, &language.encode(text)?, say)?),
    };
    let imported = Imported {
        source: args.source.clone(),
        source_blake3,
        architecture: source.architecture.clone(),
        formats,
        license,
        marks,
        shifts,
        report,
    };
    let mut files = BTreeMap::from([
        (WEIGHTS_FILE.to_string(), encode_weights(&weights)),
        (TOKENIZER_FILE.to_string(), tokenizer),
        (IMPORT_FILE.to_string(), serde_json::to_vec_pretty(&imported)?),
    ]);
    if let Some(template) = template {
        files.insert(TEMPLATE_FILE.into(), template.into_bytes());
    }
    Ok((imported, weights, files))
}

fn measure(
    args: &ImportArgs,
    reference: &Reference,
    weights: &Weights,
    tokens: &[u32],
    say: &impl Fn(&str),
) -> Result<Comparison> {
    ensure!(args.window >= 2, "--window must be at least 2");
    let window = args.window.min(weights.config.context);
    ensure!(tokens.len() >= 2, "the text has fewer than two tokens; give a longer --text");
    let engine =
        engines::choose(args.engine.engine, args.engine.threads, weights.config.constants())?;
    say(&format!("comparing with the original on {} tokens, {}", tokens.len(), engine.describe()));
    let report = with_engine!(&engine, |engine| {
        let decoder = Decoder::new(engine.as_ref(), weights);
        on(engine.as_ref(), reference, &decoder, tokens, window)?
    });
    ensure!(
        report.kl.is_finite() && report.ppl_source.is_finite(),
        "the original's logits are not finite on this text"
    );
    Ok(report)
}

fn on<E: Engine>(
    engine: &E,
    reference: &Reference,
    decoder: &Decoder<E>,
    tokens: &[u32],
    window: usize,
) -> Result<Comparison> {
    Ok(pollster::block_on(compare(reference, engine, decoder, tokens, window, |_| ()))?)
}

/// `models/` and the source's own name.
fn default_dir(source: &str) -> PathBuf {
    let name = source.rsplit(['/', ':']).find(|part| !part.is_empty()).unwrap_or("model");
    let name = name.split('@').next().unwrap_or(name);
    PathBuf::from("models").join(name.strip_suffix(".gguf").unwrap_or(name))
}

/// The summary for people.
fn describe(s: &Summary<'_>) -> String {
    let mut out = format!(
        "{} parameters in {} tensors, from {}\n",
        s.parameters,
        s.tensors,
        s.formats.join(", ")
    );
    if let Some(r) = s.report {
        let change = 100.0 * (r.ppl_exact / r.ppl_source - 1.0);
        out += &format!(
            "against the original in f32, over {} positions in windows of {}:\n  mean KL {:.5} nats (largest {:.4}), same likeliest token {:.2}%\n  perplexity {:.3}, was {:.3} ({change:+.2}%)\n  {} values clamped, {} block terms so large that a sum of them might overflow\n",
            r.positions,
            r.window,
            r.kl,
            r.kl_max,
            100.0 * r.top1,
            r.ppl_exact,
            r.ppl_source,
            r.clamped(),
            r.saturation.get("matmul").unwrap_or(&0),
        );
        if r.clamped() > 0 {
            out += "warning: values left their range; do not build on this import\n";
        }
    }
    let dir = s.dir.display();
    out + &format!(
        "weights {}\n{dir} in {:.0} s; try\n  {} sample {dir}\n",
        s.weights,
        s.seconds,
        crate::cli::program()
    )
}

/// The parts of an imported checkpoint that are not weights: its description and its language.
pub fn open(files: &BTreeMap<String, Vec<u8>>, vocabulary: usize) -> Result<(Imported, Language)> {
    let Some(import) = files.get(IMPORT_FILE) else { bail!("{IMPORT_FILE} is missing") };
    let imported: Imported = serde_json::from_slice(import).context(IMPORT_FILE)?;
    let Some(tokenizer) = files.get(TOKENIZER_FILE) else { bail!("{TOKENIZER_FILE} is missing") };
    let template = files.get(TEMPLATE_FILE).cloned().map(String::from_utf8).transpose();
    let template = template.context(TEMPLATE_FILE)?;
    let language = Language::new(tokenizer, template, imported.marks, vocabulary)?;
    Ok((imported, language))
}
