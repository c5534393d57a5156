//! Files of a run, written so that no crash, kill or full disk can lose what was saved.
//!
//! A checkpoint is a directory `checkpoints/<phase>-<step>`: its files are written and synced in a
//! hidden sibling, the manifest last, and the directory is renamed into place.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use manyhands_core::checkpoint::{
    JSON_BYTES_MAX, MANIFEST_FILE, Manifest, WEIGHTS_FILE, decode_weights,
};
use manyhands_core::engine::Engine;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::model::weights::Weights;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::state::State;

use crate::import::{self, IMPORT_FILE};
use crate::imported;
use manyhands_core::language::Language;

/// Largest checkpoint file that is read.
const FILE_BYTES_MAX: u64 = 64 << 30;

/// Reads a file of at most `max` bytes.
pub fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(max + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() as u64 > max {
        bail!("{} is larger than {max} bytes, which it should never be", path.display());
    }
    Ok(bytes)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| {
        format!("cannot write {}; nothing saved before is affected, free some disk space and start again to resume", path.display())
    })
}

/// Replaces a file atomically.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    write_synced(&temporary, bytes)?;
    fs::rename(&temporary, path).with_context(|| format!("cannot replace {}", path.display()))
}

/// Syncs a directory, so that a rename in it survives a power cut.
fn sync_dir(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path)
            .and_then(|d| d.sync_all())
            .with_context(|| format!("cannot sync {}", path.display()))?;
    }
    Ok(())
}

/// The directory of one run.
#[derive(Clone, Debug)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// Opens or makes the directory.
    pub fn open(root: &Path) -> Result<Self> {
        let checkpoints = root.join("checkpoints");
        fs::create_dir_all(&checkpoints)
            .with_context(|| format!("cannot make {}", checkpoints.display()))?;
        Ok(Self { root: root.into() })
    }

    /// Path of a file of the run.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Complete checkpoints, oldest first.
    fn list(&self) -> Result<Vec<PathBuf>> {
        let dir = self.checkpoints();
        let entries =
            fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?;
        let mut found: Vec<PathBuf> = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", dir.display()))?.path();
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            if !hidden && path.join(MANIFEST_FILE).is_file() {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }

    /// Saves a checkpoint under an ordinal that orders checkpoints, keeps the newest `keep`.
    pub fn save(
        &self,
        ordinal: u64,
        manifest: &Manifest,
        files: &BTreeMap<String, Vec<u8>>,
        keep: usize,
    ) -> Result<PathBuf> {
        let target = self.checkpoint_dir(ordinal);
        write_checkpoint(&target, manifest, files)?;
        let all = self.list()?;
        for old in &all[..all.len().saturating_sub(keep)] {
            fs::remove_dir_all(old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        Ok(target)
    }

    /// The files of every checkpoint that is whole, newest first.
    pub fn load_files(&self) -> Result<Vec<BTreeMap<String, Vec<u8>>>> {
        let all = self.list()?;
        Ok(all.iter().rev().filter_map(|path| checkpoint_files(path).ok()).collect())
    }

    /// Removes checkpoints that come after this number.
    pub fn remove_after(&self, ordinal: u64) -> Result<()> {
        let last = self.checkpoint_dir(ordinal);
        for path in self.list()?.iter().filter(|path| **path > last) {
            fs::remove_dir_all(path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// The number of the oldest checkpoint.
    pub fn oldest(&self) -> Result<Option<u64>> {
        let all = self.list()?;
        let name = all.first().and_then(|path| path.file_name()?.to_str()?.strip_prefix("step-"));
        Ok(name.and_then(|digits| digits.parse().ok()))
    }

    fn checkpoint_dir(&self, ordinal: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{ordinal:010}"))
    }

    /// The newest checkpoint that is whole, or `None`. Damaged ones are named and passed over.
    pub fn load_latest(&self) -> Result<Option<(RunConfig, State)>> {
        for path in self.list()?.iter().rev() {
            match load_checkpoint(path) {
                Ok(loaded) => return Ok(Some(loaded)),
                Err(error) => {
                    eprintln!(
                        "warning: {} cannot be used: {error:#}; trying an older one",
                        path.display()
                    );
                }
            }
        }
        Ok(None)
    }

    /// Cuts a JSONL log back to its lines before `keep` says stop, so that a resumed run does not
    /// log steps twice. A broken last line (a kill in mid-write) goes too.
    pub fn truncate_log(
        &self,
        name: &str,
        keep: impl Fn(&serde_json::Value) -> bool,
    ) -> Result<()> {
        let path = self.path(name);
        if !path.exists() {
            return Ok(());
        }
        let bytes = read_bounded(&path, FILE_BYTES_MAX)?;
        let text = String::from_utf8_lossy(&bytes);
        let mut kept = String::new();
        for line in text.lines() {
            let Ok(value) = serde_json::from_str(line) else { break };
            if !keep(&value) {
                break;
            }
            kept.push_str(line);
            kept.push('\n');
        }
        write_atomic(&path, kept.as_bytes())
    }

    /// Appends one JSON line to a log of the run.
    pub fn append(&self, name: &str, value: &impl serde::Serialize) -> Result<()> {
        let path = self.path(name);
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let append = || -> std::io::Result<()> {
            OpenOptions::new().create(true).append(true).open(&path)?.write_all(&line)
        };
        append().with_context(|| format!("cannot append to {}", path.display()))
    }
}

/// Writes a checkpoint as a whole: nobody ever finds a part of it. One that is there is replaced.
pub fn write_checkpoint(
    target: &Path,
    manifest: &Manifest,
    files: &BTreeMap<String, Vec<u8>>,
) -> Result<()> {
    let manifest = serde_json::to_vec_pretty(manifest)?;
    let files = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    // The manifest comes last.
    write_directory(target, files.chain([(MANIFEST_FILE, manifest.as_slice())]))
}

/// Writes a directory of files as a whole: nobody ever finds a part of it. One that is there is
/// replaced.
pub fn write_directory<'a>(
    target: &Path,
    files: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> Result<()> {
    let name = target.file_name().context("the directory to write has no name")?;
    let dir = target.parent().filter(|d| *d != Path::new("")).unwrap_or(Path::new("."));
    let temporary = dir.join(format!(".{}.tmp", name.to_string_lossy()));
    if temporary.exists() {
        fs::remove_dir_all(&temporary)
            .with_context(|| format!("cannot clear {}", temporary.display()))?;
    }
    fs::create_dir_all(&temporary)
        .with_context(|| format!("cannot make {}", temporary.display()))?;
    let written = (|| {
        for (name, bytes) in files {
            write_synced(&temporary.join(name), bytes)?;
        }
        sync_dir(&temporary)
    })();
    if let Err(error) = written {
        // Give the space back; the error itself is what matters.
        let _ = fs::remove_dir_all(&temporary);
        return Err(error);
    }
    if target.exists() {
        // The same step again, after a restart: equal by construction.
        fs::remove_dir_all(target)
            .with_context(|| format!("cannot replace {}", target.display()))?;
    }
    fs::rename(&temporary, target)
        .with_context(|| format!("cannot move {} into place", temporary.display()))?;
    sync_dir(dir)
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    Ok(Manifest::parse(&read_bounded(&dir.join(MANIFEST_FILE), JSON_BYTES_MAX as u64)?)?)
}

fn read_checked(dir: &Path, manifest: &Manifest, name: &str) -> Result<Vec<u8>> {
    if name.contains(['/', '\\']) || name.starts_with('.') {
        bail!("{}: the file name {name:?} is not allowed", dir.display());
    }
    let bytes = read_bounded(&dir.join(name), FILE_BYTES_MAX)?;
    manifest.check(name, &bytes)?;
    Ok(bytes)
}

fn checkpoint_files(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let manifest = read_manifest(dir)?;
    let mut files = BTreeMap::new();
    for name in manifest.files.keys() {
        files.insert(name.clone(), read_checked(dir, &manifest, name)?);
    }
    Ok(files)
}

fn load_checkpoint(dir: &Path) -> Result<(RunConfig, State)> {
    Ok(State::load(&checkpoint_files(dir)?)?)
}

/// Finds the newest checkpoint below `path`: a run's directory, a checkpoint, or a weights file.
fn newest(path: &Path) -> Result<PathBuf> {
    if path.join(MANIFEST_FILE).is_file() {
        return Ok(path.into());
    }
    if !path.is_dir() {
        bail!(
            "{} is no run directory and no checkpoint; train one with `manyhands demo`, or import one with `manyhands import`",
            path.display()
        );
    }
    let run = RunDir { root: path.into() };
    let all = if run.checkpoints().is_dir() { run.list()? } else { Vec::new() };
    all.last().cloned().with_context(|| {
        format!("{} has no checkpoint yet; `manyhands train` makes them", path.display())
    })
}

/// A checkpoint's weights, and what they need.
pub struct Loaded {
    /// The weights; of a run that trains an adapter, the adapter's.
    pub weights: Weights,
    /// The run file; an import has none.
    pub config: Option<RunConfig>,
    /// What an adapter adapts.
    pub base: Option<Weights>,
    /// What reads and writes the text of an imported model.
    pub language: Option<Language>,
}

impl Loaded {
    /// The weights on an engine.
    pub fn decoder<E: Engine>(&self, engine: &E) -> Decoder<E> {
        Loader::default().load(engine, &self.weights, self.base.as_ref())
    }
}

/// Weights and files of a checkpoint, whole and as its manifest says.
pub fn load_files(path: &Path) -> Result<(Weights, BTreeMap<String, Vec<u8>>)> {
    let dir = newest(path)?;
    let load = || -> Result<_> {
        let mut files = checkpoint_files(&dir)?;
        let Some(weights) = files.remove(WEIGHTS_FILE) else { bail!("{WEIGHTS_FILE} is missing") };
        let weights = decode_weights(&weights)?;
        if weights.hash().to_hex().as_str() != read_manifest(&dir)?.weights {
            bail!("the weights do not have the hash that the manifest states");
        }
        Ok((weights, files))
    };
    load().with_context(|| format!("cannot load {}", dir.display()))
}

/// Loads the weights of a run, of a checkpoint or of an import. A run on an imported model needs
/// that too: from `model`, else from where its run file says.
pub fn load_weights(path: &Path, model: Option<&Path>) -> Result<Loaded> {
    let (weights, files) = load_files(path)?;
    let parse = || -> Result<_> {
        if files.contains_key(IMPORT_FILE) {
            let (_, language) = import::open(&files, weights.config.vocabulary)?;
            return Ok((None, None, Some(language)));
        }
        let config = State::load(&files)?.0;
        let Some(from) = &config.model.import else { return Ok((Some(config), None, None)) };
        let dir = model.map_or_else(|| PathBuf::from(from), Path::to_path_buf);
        let (base, language) = imported::read(&config, &dir).with_context(|| {
            format!("the run trains the imported model {from}; say with --model where it is")
        })?;
        let base = weights.config.adapter.is_some().then_some(base);
        Ok((Some(config), base, Some(language)))
    };
    let (config, base, language) =
        parse().with_context(|| format!("cannot load {}", path.display()))?;
    Ok(Loaded { weights, config, base, language })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_over_its_bound_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, [7; 100]).unwrap();
        assert_eq!(read_bounded(&path, 100).unwrap(), [7; 100]);
        let error = read_bounded(&path, 99).unwrap_err().to_string();
        assert!(error.contains("larger than 99 bytes"), "{error}");
    }
}
