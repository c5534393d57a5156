//! `manyhands export`: a model in the formats that other programs read.
//!
//! `manyhands_core::export` writes the bytes; this module finds the model with its text files and
//! puts the files in place.

mod tokenizer;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use manyhands_core::export::gguf::{self, Keys, text};
use manyhands_core::export::hub::{self, adapter_config};
use manyhands_core::export::numbers::Precision;
use manyhands_core::export::{File, Model};
use manyhands_core::import::hf::CONFIG_FILE;
use manyhands_core::model::adapter::Adapter;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::state::State;
use serde::Serialize;
use serde_json::{Value, json};

use crate::import::files::TOKENIZER_CONFIG_FILE;
use crate::import::hub::{Name, SCHEME};
use crate::import::{self, IMPORT_FILE, Imported};
use crate::imported;
use crate::store::{load_files, write_atomic, write_directory};
use manyhands_core::language::{Language, TEMPLATE_FILE, TOKENIZER_FILE};

/// How a text is generated, by the hub's libraries.
const GENERATION_FILE: &str = "generation_config.json";

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A directory as the Hugging Face hub keeps models; an adapter is merged.
    Safetensors,
    /// A file for llama.cpp; an adapter is merged.
    Gguf,
    /// A directory with a run's adapter alone, for PEFT.
    Lora,
    /// A file with a run's adapter alone, for llama.cpp's --lora.
    GgufLora,
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// Single precision, which holds all exact weights.
    F32,
    /// Half precision, which may round.
    F16,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// An imported model, or the directory or a checkpoint of a run on one.
    checkpoint: PathBuf,
    /// What to write.
    #[arg(long, value_enum)]
    format: Format,
    /// The file or directory to make.
    #[arg(long)]
    out: PathBuf,
    /// The imported model that the run trains [default: where its run file says].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Numbers of a whole model; an adapter's are f32 [default: f32; of GGUF f16 for each matrix
    /// that it holds exactly].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Summary<'a> {
    out: &'a Path,
    format: Format,
    tensors: usize,
    bytes: usize,
    rounded: u64,
    seconds: f64,
}

/// Runs `export`.
pub fn run(args: &ExportArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let out = &args.out;
    ensure!(
        !out.exists(),
        "{} exists already; remove it or name another place with --out",
        out.display()
    );
    let opened = Opened::read(&args.checkpoint, args.model.as_deref())
        .with_context(|| format!("cannot export {}", args.checkpoint.display()))?;
    let (file, others) = match args.format {
        Format::Safetensors => opened.safetensors(args.dtype)?,
        Format::Gguf => (opened.gguf(out, args.dtype)?, None),
        Format::Lora => opened.lora()?,
        Format::GgufLora => (opened.gguf_lora()?, None),
    };
    if let Some((name, texts)) = &others {
        let texts = texts.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
        write_directory(out, texts.chain([(*name, file.bytes.as_slice())]))?;
    } else {
        if let Some(dir) = out.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        write_atomic(out, &file.bytes)?;
    }
    let summary = Summary {
        out,
        format: args.format,
        tensors: file.tensors,
        bytes: file.bytes.len(),
        rounded: file.rounded,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        let Summary { tensors, rounded, seconds, .. } = summary;
        let exact = match rounded {
            0 => "every value exactly".to_string(),
            n => format!("{n} values rounded to half precision"),
        };
        let megabytes = summary.bytes as f64 / 1e6;
        let out = out.display();
        println!("{out}: {tensors} tensors, {megabytes:.1} MB, {exact}, in {seconds:.1} s");
    }
    Ok(ExitCode::SUCCESS)
}

/// Texts beside the tensors of a directory, by name.
type Texts = BTreeMap<&'static str, Vec<u8>>;
/// The name of a directory's file of tensors, and the other files.
type Others = Option<(&'static str, Texts)>;

/// A model to export.
struct Opened {
    /// A whole model.
    weights: Weights,
    /// Factors to adapt it by.
    factors: Option<(Adapter, Weights)>,
    imported: Imported,
    language: Language,
    tokenizer: Vec<u8>,
    template: Option<String>,
}

impl Opened {
    /// Reads an import, or a run on one that `model` says the place of.
    fn read(path: &Path, model: Option<&Path>) -> Result<Self> {
        let (weights, files) = load_files(path)?;
        if files.contains_key(IMPORT_FILE) {
            return Self::new(weights, None, files);
        }
        let config = State::load(&files)?.0;
        let Some(from) = &config.model.import else {
            bail!(
                "the run trains a model of its own, with byte tokens that no other program has; only imports and runs on them are exported"
            )
        };
        let dir = model.unwrap_or(Path::new(from));
        let (base, files) = imported::load(&config, dir).with_context(|| {
            format!("the run trains the imported model {from}; say with --model where it is")
        })?;
        match weights.config.adapter.clone() {
            Some(adapter) => Self::new(base, Some((adapter, weights)), files),
            None => Self::new(weights, None, files),
        }
    }

    fn new(
        weights: Weights,
        factors: Option<(Adapter, Weights)>,
        mut files: BTreeMap<String, Vec<u8>>,
    ) -> Result<Self> {
        let (imported, language) = import::open(&files, weights.config.vocabulary)?;
        let tokenizer = files.remove(TOKENIZER_FILE).unwrap_or_default();
        let template = files.remove(TEMPLATE_FILE).map(String::from_utf8).transpose()?;
        Ok(Self { weights, factors, imported, language, tokenizer, template })
    }

    /// The whole model, with its adapter merged.
    fn merged(&self) -> Model {
        let mut model = Model::new(&self.weights, &self.imported.shifts);
        if let Some((adapter, factors)) = &self.factors {
            model.merge(adapter, &Model::new(factors, &self.imported.shifts).tensors);
        }
        model
    }

    fn factors(&self) -> Result<(&Adapter, Model)> {
        let Some((adapter, factors)) = &self.factors else {
            bail!(
                "there is no adapter: an import has none, and this run trained all weights; export safetensors or gguf"
            )
        };
        Ok((adapter, Model::new(factors, &self.imported.shifts)))
    }

    fn safetensors(&self, dtype: Option<Dtype>) -> Result<(File, Others)> {
        let precision = match dtype {
            Some(Dtype::F16) => Precision::F16,
            _ => Precision::F32,
        };
        let model = self.merged();
        let marks = self.imported.marks;
        let config = hub::config(&model.config, marks.begin, marks.end, precision);
        let generation = json!({"bos_token_id": marks.begin, "eos_token_id": marks.end});
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": marks.begin.and_then(|t| self.language.name(t)),
            "eos_token": self.language.name(marks.end),
            "chat_template": self.template,
            "model_max_length": model.config.context,
            "clean_up_tokenization_spaces": false,
        });
        let texts = Texts::from([
            (CONFIG_FILE, pretty(&config)?),
            (GENERATION_FILE, pretty(&generation)?),
            (TOKENIZER_CONFIG_FILE, pretty(&settings)?),
            (TOKENIZER_FILE, self.tokenizer.clone()),
        ]);
        Ok((hub::model(&model, precision)?, Some(("model.safetensors", texts))))
    }

    fn gguf(&self, out: &Path, dtype: Option<Dtype>) -> Result<File> {
        let precision = match dtype {
            Some(Dtype::F32) => Precision::F32,
            Some(Dtype::F16) => Precision::F16,
            None => Precision::Exact,
        };
        let name = out.file_stem().unwrap_or_default().to_string_lossy();
        let license = self.imported.license.iter().map(|l| text("general.license", l));
        let template = self.template.iter().map(|t| text("tokenizer.chat_template", t));
        let about = [text("general.name", name)].into_iter().chain(license).chain(template);
        let marks = self.imported.marks;
        // A tokenizer that adds the begin token does so to an empty text too.
        let adds_begin =
            marks.begin.is_some_and(|b| self.language.encode("").ok() == Some(vec![b]));
        let vocabulary = self.weights.config.vocabulary;
        let tokens = tokenizer::keys(&self.tokenizer, marks, adds_begin, vocabulary)?;
        let about: Keys = about.chain(tokens).collect();
        Ok(gguf::model(&self.merged(), about, precision)?)
    }

    fn lora(&self) -> Result<(File, Others)> {
        let (adapter, factors) = self.factors()?;
        let source = &self.imported.source;
        let named = source.strip_prefix(SCHEME).map(Name::parse).transpose()?;
        let config = match named {
            Some(hub) => adapter_config(adapter, &hub.repository, Some(&hub.revision)),
            None => adapter_config(adapter, source, None),
        };
        let texts = Texts::from([("adapter_config.json", pretty(&config)?)]);
        Ok((hub::adapter(&factors)?, Some(("adapter_model.safetensors", texts))))
    }

    fn gguf_lora(&self) -> Result<File> {
        let (adapter, factors) = self.factors()?;
        Ok(gguf::adapter(&factors, adapter)?)
    }
}

fn pretty(json: &Value) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec_pretty(json)?)
}
