//! The imported model that a run trains: in the directory that the run file names, or among the
//! blobs of a run that somebody else opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use manyhands_core::model::weights::Weights;
use manyhands_core::run::config::{IMPORTED_WEIGHTS, RunConfig};
use manyhands_core::run::problems::Imported;
use manyhands_core::swarm::delta;

use crate::import::{self, IMPORT_FILE};
use crate::store::load_files;
use manyhands_core::language::{Language, TEMPLATE_FILE, TOKENIZER_FILE};

/// What its text needs, beside the weights.
const TEXT_FILES: [&str; 3] = [IMPORT_FILE, TOKENIZER_FILE, TEMPLATE_FILE];

/// A file of a run: its name there, and its bytes.
type NamedFile = (String, Vec<u8>);

/// Where the imported model of a run file in `base` is: paths start there or in the working
/// directory.
fn place(import: &str, base: &Path) -> PathBuf {
    let beside = base.join(import);
    if beside.exists() { beside } else { PathBuf::from(import) }
}

/// Fills in what the directory of the imported model says: shape and hash.
pub fn resolve(mut config: RunConfig, base: &Path) -> Result<RunConfig> {
    let Some(name) = &config.model.import else { return Ok(config) };
    let dir = place(name, base);
    let (weights, _) = load_files(&dir).context("model.import")?;
    let hash = weights.hash().into();
    if let Some(expected) = config.model.base {
        ensure!(
            hash == expected,
            "model.base: the run trains {expected}, but {} holds {hash}; import the model that the run was made for",
            dir.display()
        );
    }
    ensure!(
        weights.config.adapter.is_none(),
        "model.import: {} holds an adapter; name the model that `manyhands import` made",
        dir.display()
    );
    config.model.base = Some(hash);
    config.model.shape = Some(weights.config);
    Ok(config)
}

/// The imported model of a run, if it has one.
pub fn open(config: &RunConfig, base: &Path) -> Result<Option<Imported>> {
    let Some(name) = &config.model.import else { return Ok(None) };
    let (weights, language) = read(config, &place(name, base)).context("model.import")?;
    Ok(Some(Imported { weights: Arc::new(weights), language: Arc::new(language) }))
}

/// The weights of a run's imported model and its other files, from a directory.
pub fn load(config: &RunConfig, dir: &Path) -> Result<(Weights, BTreeMap<String, Vec<u8>>)> {
    let (weights, files) = load_files(dir)?;
    ensure!(
        config.model.base == Some(weights.hash().into()),
        "{} holds other weights than the run trains; import the model that it was made for",
        dir.display()
    );
    Ok((weights, files))
}

/// The imported model of a run, from a directory.
pub fn read(config: &RunConfig, dir: &Path) -> Result<(Weights, Language)> {
    let (weights, files) = load(config, dir)?;
    let language = language(config, &files, weights.config.vocabulary)?;
    Ok((weights, language))
}

/// The files by which others read the imported model, as the run names them.
pub fn files(config: &RunConfig, base: &Path, imported: &Imported) -> Result<Vec<NamedFile>> {
    let Some(name) = &config.model.import else { return Ok(Vec::new()) };
    let (_, mut files) = load_files(&place(name, base))?;
    let weights = delta::encode(None, &imported.weights);
    let text = TEXT_FILES.iter().filter_map(|name| Some((*name, files.remove(*name)?)));
    let all = text.chain([(IMPORTED_WEIGHTS, weights)]);
    Ok(all.filter_map(|(name, bytes)| Some((config.model.import_file(name)?, bytes))).collect())
}

/// The imported model of a run, from its files. `find` knows them by the names in [`files`].
pub fn from_blobs(config: &RunConfig, find: &dyn Fn(&str) -> Option<Vec<u8>>) -> Result<Imported> {
    let find = |name: &str| find(&config.model.import_file(name)?);
    let model = config.model()?.frozen();
    let weights = find(IMPORTED_WEIGHTS);
    let weights = weights.context("the imported weights are not there")?;
    let base = config.model.base.context("the run names no imported weights")?;
    let weights = delta::build(base, None, [weights], &model)
        .with_context(|| format!("the imported weights {base} cannot be made"))?;
    let text = TEXT_FILES.iter().filter_map(|name| Some((name.to_string(), find(name)?)));
    let language = language(config, &text.collect(), model.vocabulary)?;
    Ok(Imported { weights, language: Arc::new(language) })
}

/// What reads and writes the text of the run's model.
fn language(
    config: &RunConfig,
    files: &BTreeMap<String, Vec<u8>>,
    vocabulary: usize,
) -> Result<Language> {
    let (_, mut language) = import::open(files, vocabulary)?;
    language.instruction.clone_from(&config.model.instruction);
    Ok(language)
}
