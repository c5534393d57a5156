//! What a run reads beside its file: where its problems come from (procedural families and the
//! user's own files, by weight), and the imported model that it trains, if it does.

use std::fmt;
use std::sync::Arc;

use manyhands_shaders::x1::philox;

use super::config::{RunConfig, RunConfigError};
use crate::model::config::ModelConfig;
use crate::model::tokenizer::{Bytes, Tokenizer};
use crate::model::weights::Weights;
use crate::tasks::{Family, Problem, Split, jsonl};

/// Stream of the generator that picks sources.
const STREAM: u32 = 0x50_1CE5;

/// One source of problems.
#[derive(Clone, Debug)]
enum Source {
    Family(Family, u32),
    Fixed { name: String, train: Vec<Problem>, held_out: Vec<Problem> },
}

/// A problem and the source that scores it.
#[derive(Clone, Debug)]
pub struct Drawn {
    /// The problem.
    pub problem: Problem,
    source: usize,
}

/// A tokenizer that threads share.
pub type Language = Arc<dyn Tokenizer + Send + Sync>;

/// An imported model that a run trains.
#[derive(Clone)]
pub struct Imported {
    /// Its weights.
    pub weights: Arc<Weights>,
    /// What reads and writes its text.
    pub language: Language,
}

/// All sources of a run.
#[derive(Clone)]
pub struct Problems {
    seed: u64,
    sources: Vec<(Source, u32)>,
    weight_sum: u64,
    language: Language,
    imported: Option<Arc<Weights>>,
}

impl fmt::Debug for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Problems").field("sources", &self.sources).finish_non_exhaustive()
    }
}

impl Problems {
    /// Opens the sources of `config`. `read` returns the text of a JSONL file.
    pub fn open(
        config: &RunConfig,
        mut read: impl FnMut(&str) -> Result<String, String>,
    ) -> Result<Self, RunConfigError> {
        let mut sources = Vec::new();
        for (i, task) in config.tasks.iter().enumerate() {
            let source = match (&task.family, &task.jsonl) {
                (Some(family), _) => Source::Family(*family, task.level.unwrap_or(1)),
                (None, path) => {
                    let path = path.as_deref().unwrap_or_default();
                    let error = |problem: String| RunConfigError {
                        key: format!("task[{i}].jsonl"),
                        problem,
                    };
                    let text = read(path).map_err(error)?;
                    let problems =
                        jsonl::parse(&text).map_err(|e| error(format!("{path}: {e}")))?;
                    let (train, held_out) = jsonl::split(problems);
                    if train.is_empty() || held_out.is_empty() {
                        let (t, h) = (train.len(), held_out.len());
                        return Err(error(format!(
                            "{path}: {t} problems to train on and {h} held out; add more lines (about one in eight is held out)"
                        )));
                    }
                    Source::Fixed { name: path.into(), train, held_out }
                }
            };
            sources.push((source, task.weight));
        }
        let weight_sum = sources.iter().map(|(_, w)| u64::from(*w)).sum();
        let language = Arc::new(Bytes { vocabulary: config.model()?.vocabulary });
        Ok(Self { seed: config.seed, sources, weight_sum, language, imported: None })
    }

    /// For a run that trains an imported model.
    #[must_use]
    pub fn with_model(self, imported: Imported) -> Self {
        let Imported { weights, language } = imported;
        Self { imported: Some(weights), language, ..self }
    }

    /// What reads and writes the model's text.
    pub fn language(&self) -> &dyn Tokenizer {
        &*self.language
    }

    /// The imported model, if there is one.
    pub fn model(&self) -> Option<Imported> {
        let (weights, language) = (self.imported.clone()?, self.language.clone());
        Some(Imported { weights, language })
    }

    /// The imported weights, if the run trains them and no adapter.
    pub fn initial(&self, model: &ModelConfig) -> Option<&Weights> {
        self.imported.as_deref().filter(|_| model.adapter.is_none())
    }

    /// The weights of the imported model, if there is one.
    pub fn imported(&self) -> Option<&Arc<Weights>> {
        self.imported.as_ref()
    }

    /// Problem `index` of a split: a function of seed, split and index.
    pub fn draw(&self, index: u64, split: Split) -> Drawn {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let r = philox([index as u32, (index >> 32) as u32, split as u32, STREAM], key);
        let wide = |hi: u32, lo: u32| u64::from(hi) << 32 | u64::from(lo);
        let below = |r: u64, n: u64| ((u128::from(r) * u128::from(n)) >> 64) as u64;
        let mut at = below(wide(r[0], r[1]), self.weight_sum);
        let mut source = 0;
        while at >= u64::from(self.sources[source].1) {
            at -= u64::from(self.sources[source].1);
            source += 1;
        }
        let problem = match &self.sources[source].0 {
            Source::Family(family, level) => family.generate(self.seed, index, *level, split),
            Source::Fixed { train, held_out, .. } => {
                let all = if split == Split::Train { train } else { held_out };
                all[below(wide(r[2], r[3]), all.len() as u64) as usize].clone()
            }
        };
        Drawn { problem, source }
    }

    /// Reward of a completion: strict, 0 to 1.
    pub fn score(&self, drawn: &Drawn, completion: &str) -> f64 {
        match &self.sources[drawn.source].0 {
            Source::Family(family, _) => family.score(&drawn.problem, completion),
            Source::Fixed { .. } => drawn.problem.score_exact(completion),
        }
    }

    /// Name of a problem's source in reports.
    pub fn source_name(&self, drawn: &Drawn) -> String {
        match &self.sources[drawn.source].0 {
            Source::Family(family, level) => format!("{family}-{level}"),
            Source::Fixed { name, .. } => name.clone(),
        }
    }
}
