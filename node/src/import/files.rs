//! Finds and reads the files of a foreign model.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::import::gguf::{Gguf, Value};
use manyhands_core::import::hf::{CONFIG_FILE, tensors};
use manyhands_core::import::names::Source;
use serde_json::Value as Json;

use super::tokenizer;
use crate::store::read_bounded;
use manyhands_core::language::{Marks, TEMPLATE_FILE, TOKENIZER_FILE};

/// Largest file of weights.
const WEIGHTS_BYTES_MAX: u64 = 64 << 30;
/// Largest file of anything else.
const TEXT_BYTES_MAX: u64 = 64 << 20;
/// Settings of the tokenizer: the marks and, in older models, the chat template.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// The bytes of a foreign model.
#[derive(Debug)]
pub enum Files {
    /// One GGUF file.
    Gguf(Vec<u8>),
    /// A directory as the hub keeps it.
    Hub {
        /// `config.json`.
        config: Vec<u8>,
        /// `tokenizer.json`.
        tokenizer: Vec<u8>,
        /// `tokenizer_config.json`, or an empty object.
        settings: Json,
        /// `chat_template.jinja`.
        template: Option<String>,
        /// Safetensors files: name and bytes.
        shards: Vec<(String, Vec<u8>)>,
    },
}

/// What reads and writes a foreign model's text.
#[derive(Debug)]
pub struct TextFiles {
    /// `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// Chat template.
    pub template: Option<String>,
    /// Begin and end.
    pub marks: Marks,
    /// Licence, where the file names it.
    pub license: Option<String>,
}

impl Files {
    /// Reads a GGUF file, a directory with one, or a directory with `config.json` and safetensors.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_dir() && path.join(CONFIG_FILE).is_file() {
            return Self::read_hub(path);
        }
        let file = if path.is_dir() { only_gguf(path)? } else { path.to_path_buf() };
        let bytes = read_bounded(&file, WEIGHTS_BYTES_MAX)?;
        if Gguf::is(&bytes) {
            return Ok(Self::Gguf(bytes));
        }
        let is_safetensors = file.extension().is_some_and(|e| e == "safetensors");
        match file.parent() {
            Some(dir) if is_safetensors && dir.join(CONFIG_FILE).is_file() => Self::read_hub(dir),
            _ => bail!(
                "{} is no GGUF file; give one, or a directory with {CONFIG_FILE}, {TOKENIZER_FILE} and safetensors files",
                file.display()
            ),
        }
    }

    fn read_hub(dir: &Path) -> Result<Self> {
        let text = |name: &str| read_bounded(&dir.join(name), TEXT_BYTES_MAX);
        let optional = |name: &str| dir.join(name).is_file().then(|| text(name)).transpose();
        let mut shards = Vec::new();
        for path in listed(dir, "safetensors")? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            shards.push((name, read_bounded(&path, WEIGHTS_BYTES_MAX)?));
        }
        ensure!(!shards.is_empty(), "{} has no safetensors file", dir.display());
        let settings = match optional(TOKENIZER_CONFIG_FILE)? {
            Some(bytes) => serde_json::from_slice(&bytes).context(TOKENIZER_CONFIG_FILE)?,
            None => Json::Object(serde_json::Map::new()),
        };
        let template = optional(TEMPLATE_FILE)?.map(String::from_utf8).transpose();
        Ok(Self::Hub {
            config: text(CONFIG_FILE)?,
            tokenizer: text(TOKENIZER_FILE)?,
            settings,
            template: template.context(TEMPLATE_FILE)?,
            shards,
        })
    }

    /// BLAKE3 over all weights' files in the order of their names: what the import was made of.
    pub fn hash(&self) -> String {
        let mut hash = blake3::Hasher::new();
        match self {
            Self::Gguf(bytes) => drop(hash.update(bytes)),
            Self::Hub { shards, .. } => shards.iter().for_each(|(_, bytes)| {
                hash.update(bytes);
            }),
        }
        hash.finalize().to_hex().to_string()
    }

    /// Parses the files and hands on what is in them.
    pub fn parse<T>(&self, then: impl FnOnce(Source<'_>, TextFiles) -> Result<T>) -> Result<T> {
        match self {
            Self::Gguf(bytes) => {
                let file = Gguf::parse(bytes)?;
                let source = Source::from_gguf(&file)?;
                let (tokenizer, marks) = tokenizer::convert(&file)?;
                let text = |key: &str| match file.keys.get(key) {
                    Some(Value::Text(text)) => Some((*text).to_string()),
                    _ => None,
                };
                let template = text("tokenizer.chat_template");
                let license = text("general.license");
                then(source, TextFiles { tokenizer, template, marks, license })
            }
            Self::Hub { config, tokenizer, settings, template, shards } => {
                let source = Source::from_hf(config, tensors(shards)?)?;
                let marks = marks(config, tokenizer, settings)?;
                let template = template.clone().or_else(|| template_of(settings));
                let tokenizer = tokenizer.clone();
                then(source, TextFiles { tokenizer, template, marks, license: None })
            }
        }
    }
}

/// Files with an extension, in the order of their names.
fn listed(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
        if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn only_gguf(dir: &Path) -> Result<PathBuf> {
    let mut found = listed(dir, "gguf")?;
    match (found.pop(), found.len()) {
        (Some(path), 0) => Ok(path),
        (None, _) => bail!("{} has neither {CONFIG_FILE} nor a GGUF file", dir.display()),
        _ => bail!("{} has several GGUF files; name one of them", dir.display()),
    }
}

/// The template among the tokenizer's settings: a text, or the one that is called `default`.
fn template_of(settings: &Json) -> Option<String> {
    let template = settings.get("chat_template")?;
    let named = || {
        let default = |t: &&Json| t.get("name").is_some_and(|n| n == "default");
        template.as_array()?.iter().find(default)?.get("template")?.as_str()
    };
    template.as_str().or_else(named).map(str::to_string)
}

/// Begin and end by the tokenizer's settings, else by the numbers in `config.json`.
fn marks(config: &[u8], tokenizer: &[u8], settings: &Json) -> Result<Marks> {
    let config: Json = serde_json::from_slice(config).context(CONFIG_FILE)?;
    let tokenizer: Json = serde_json::from_slice(tokenizer).context(TOKENIZER_FILE)?;
    let mark = |name: &str, number: &str| -> Option<u32> {
        let setting = settings.get(name);
        let content = setting.and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
        let by_name = content.and_then(|content| {
            let added = tokenizer.get("added_tokens")?.as_array()?;
            let token = added.iter().find(|t| t.get("content").is_some_and(|c| c == content));
            let id = token.and_then(|t| t.get("id"));
            id.or_else(|| tokenizer.pointer("/model/vocab")?.get(content))
        });
        let by_number = || {
            let id = config.get(number)?;
            // Models that end in several ways name the main one first.
            id.as_array().map_or(Some(id), |ids| ids.first())
        };
        by_name.or_else(by_number)?.as_u64().and_then(|id| u32::try_from(id).ok())
    };
    let end = mark("eos_token", "eos_token_id");
    let end = end.with_context(|| {
        format!("neither {TOKENIZER_CONFIG_FILE} nor {CONFIG_FILE} names an end token (eos_token)")
    })?;
    Ok(Marks { begin: mark("bos_token", "bos_token_id"), end })
}
