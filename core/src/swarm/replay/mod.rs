//! Deriving a run again from its ledger and blobs: whoever has both can check every claim of a
//! coordination peer, without trusting it.
//!
//! The first reading checks chain, signatures and that entries agree with each other; then the
//! weights are derived from the first record on, by what stands, and compared with every version
//! that the ledger names. That a result is what its unit computes is checked for as many units as
//! the caller wants computed again. Outputs are held no longer than the run itself holds them.

mod reading;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::coordinator::Blobs;
use super::delta;
use super::ids::Hash;
use super::ledger::UnitEntry;
use super::past::{ByPath, NoOutput, is_missing, output_of, read_output, unit_of};
use super::unit::{Unit, encode_output};
use crate::engine::EngineError;
use crate::run::config::RunConfig;
use crate::run::job::Version;
use crate::run::pipeline::{Advanced, Pipeline};
use crate::run::problems::{Imported, Problems};
use crate::run::state::State;
use crate::run::work::{Output, Work};
use reading::{Opened, Published, Reading};

/// Which units are computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// So many, by a draw from a seed.
    Some {
        /// How many.
        count: u64,
        /// Seed of the choice.
        seed: u64,
    },
    /// All that stand.
    All,
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// Whether everything is as the ledger says.
    pub ok: bool,
    /// Records of the unbroken chain.
    pub entries: u64,
    /// Versions that were derived and are those of the ledger.
    pub versions: u64,
    /// Hash of the last weights that were derived.
    pub weights: Option<Hash>,
    /// Units that were computed again.
    pub recomputed: u64,
    /// The first record that is wrong, and why.
    pub first_wrong: Option<(u64, String)>,
}

/// Computes a work under some weights, of a run that may adapt an imported model.
pub type Execute<'a> =
    dyn FnMut(&Problems, &Arc<Version>, &Work) -> Result<Output, EngineError> + 'a;

/// Reads an imported model.
pub type ReadImport<'a> =
    dyn FnMut(&RunConfig, &dyn Fn(&str) -> Option<Vec<u8>>) -> Result<Imported, String> + 'a;

/// What a replay needs besides the ledger.
pub struct Sources<'a> {
    /// Text of a problem file that the run file names and that is no blob.
    pub files: &'a mut dyn FnMut(&str) -> Result<String, String>,
    /// Reads the imported model of a run that trains one: weights and language, from files by the
    /// names that the run's first record gives them.
    pub import: &'a mut ReadImport<'a>,
    /// Blobs of units' results.
    pub blobs: &'a dyn Blobs,
    /// Which units are computed again.
    pub recompute: Recompute,
    /// Computes a work under some weights.
    pub execute: &'a mut Execute<'a>,
    /// Is told the steps of all phases that were derived, and how many the run has.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// The wrong record with the smallest number.
#[derive(Debug, Default)]
struct FirstWrong(Option<(u64, String)>);

impl FirstWrong {
    fn note(&mut self, sequence: u64, why: String) {
        if self.0.as_ref().is_none_or(|(first, _)| sequence < *first) {
            self.0 = Some((sequence, why));
        }
    }
}

/// Checks a ledger against its blobs, from the first record on. An error is one of the engine.
pub fn replay(
    records: &mut dyn Iterator<Item = Vec<u8>>,
    sources: Sources<'_>,
) -> Result<Replay, EngineError> {
    let mut wrong = FirstWrong::default();
    let reading = Reading::of(records, &mut wrong);
    if reading.entries == 0 {
        wrong.note(0, "the ledger is empty".into());
    }
    let mut out = Replay {
        ok: false,
        entries: reading.entries,
        versions: 0,
        weights: None,
        recomputed: 0,
        first_wrong: None,
    };
    let begun =
        reading.opened.as_ref().map(|o| begin(o, sources.files, sources.import, sources.blobs));
    match begun {
        Some(Ok(pipeline)) => {
            let mut derivation = Derivation::new(pipeline, reading, sources, wrong);
            derivation.run()?;
            out.versions = derivation.versions;
            out.weights = Some(derivation.pipeline.version().hash().into());
            out.recomputed = derivation.recomputed;
            wrong = derivation.wrong;
        }
        Some(Err(why)) => wrong.note(0, why),
        None => {}
    }
    out.ok = wrong.0.is_none();
    out.first_wrong = wrong.0;
    Ok(out)
}

/// The run before its first step.
fn begin(
    opened: &Opened,
    files: &mut dyn FnMut(&str) -> Result<String, String>,
    import: &mut ReadImport<'_>,
    blobs: &dyn Blobs,
) -> Result<Pipeline, String> {
    let config = opened.config.clone();
    let read = |path: &str| {
        let named = opened.files.iter().find(|(name, _)| name == path);
        let (_, expected) = named.ok_or("the ledger does not name the file")?;
        let text = match blobs.get(expected) {
            Some(bytes) => String::from_utf8(bytes).map_err(|e| e.to_string())?,
            None => files(path)?,
        };
        let got = Hash::of(text.as_bytes());
        if got != *expected {
            return Err(format!("the file hashes to {got}, the run's to {expected}"));
        }
        Ok(text)
    };
    let mut problems = Problems::open(&config, read).map_err(|e| e.to_string())?;
    if config.model.import.is_some() {
        let find = |path: &str| {
            let (_, hash) = opened.files.iter().find(|(name, _)| name == path)?;
            blobs.get(hash).filter(|bytes| Hash::of(bytes) == *hash)
        };
        problems = problems.with_model(import(&config, &find)?);
    }
    let model = config.model().map_err(|e| e.to_string())?;
    let state = State::new(&config, &model, problems.initial(&model));
    let pipeline = Pipeline::new(config, problems, state).map_err(|e| e.to_string())?;
    if Hash::from(pipeline.version().hash()) != opened.weights {
        return Err("the run file begins with other weights".into());
    }
    if Hash::of(&delta::encode(None, &pipeline.version().weights)) != opened.full {
        return Err("the first blob makes other weights".into());
    }
    Ok(pipeline)
}

/// The run under way.
struct Derivation<'a> {
    pipeline: Pipeline,
    reading: Reading,
    sources: Sources<'a>,
    /// Units that have not been asked for.
    by_path: ByPath,
    /// Units to be computed again, if not all are.
    chosen: BTreeSet<u64>,
    wrong: FirstWrong,
    versions: u64,
    recomputed: u64,
}

impl<'a> Derivation<'a> {
    fn new(pipeline: Pipeline, reading: Reading, sources: Sources<'a>, wrong: FirstWrong) -> Self {
        let mut by_path = ByPath::new();
        for (sequence, unit) in reading.past.standing() {
            by_path.entry(unit.path).or_default().push((*sequence, *unit));
        }
        let chosen = choose(sources.recompute, &reading);
        Self { pipeline, reading, sources, by_path, chosen, wrong, versions: 1, recomputed: 0 }
    }

    fn run(&mut self) -> Result<(), EngineError> {
        let broken = self.wrong.0.as_ref().map(|(sequence, _)| *sequence);
        self.reading.versions.remove(&(0, 0));
        let mut failure = None;
        loop {
            let (before, ordinal) = (self.pipeline.version().clone(), self.pipeline.ordinal());
            let advanced = match self.pipeline.advance() {
                Ok(advanced) => advanced,
                Err(error) => {
                    failure = Some(error.to_string());
                    break;
                }
            };
            if matches!(advanced, Some(Advanced::Step(_))) {
                // Updates whose step was held back are the step's own weights.
                self.compare(&before, (ordinal, 1), (ordinal, u32::MAX));
                self.compare(&before, (ordinal + 1, 0), (ordinal + 1, 0));
                (self.sources.progress)(ordinal + 1, self.pipeline.config.steps());
            } else if !Arc::ptr_eq(&before, self.pipeline.version()) {
                let key = (ordinal, self.pipeline.updates_in_step());
                self.compare(&before, key, key);
            }
            let supplied = self.supply()?;
            let stop = self.wrong.0.is_some() && self.wrong.0.as_ref().map(|w| w.0) != broken;
            if stop || (advanced.is_none() && !supplied) {
                break;
            }
        }
        self.finish(failure);
        Ok(())
    }

    /// Compares the versions with these keys with the one that was derived.
    fn compare(&mut self, before: &Version, from: (u64, u32), to: (u64, u32)) {
        let version = self.pipeline.version();
        let weights = Hash::from(version.hash());
        let found = self.reading.versions.range(from..=to).map(|(key, p)| (*key, *p));
        for (key, published) in found.collect::<Vec<_>>() {
            self.reading.versions.remove(&key);
            self.versions += 1;
            if let Err(why) = check_version(&published, before, version, weights) {
                self.versions -= 1;
                self.wrong.note(published.sequence, why);
            }
        }
    }

    /// Supplies everything that stands to the jobs that are open. Whether there was anything.
    fn supply(&mut self) -> Result<bool, EngineError> {
        let open: Vec<_> = self.pipeline.jobs().map(|j| j.job.path).collect();
        let mut any = false;
        for path in open {
            for (sequence, entry) in self.by_path.remove(&path).into_iter().flatten() {
                any = true;
                let firm = self.reading.is_firm(sequence, path.ordinal);
                let Some(unit) = unit_of(&self.pipeline, &entry) else {
                    if firm {
                        self.wrong.note(sequence, "the run asks for no such unit".into());
                    }
                    continue;
                };
                match self.unit(sequence, &entry, &unit)? {
                    Err(why) if firm => self.wrong.note(sequence, why),
                    _ => {}
                }
            }
        }
        Ok(any)
    }

    /// Checks a unit that the run asks for; it enters if it is the first of its items.
    fn unit(
        &mut self,
        sequence: u64,
        entry: &UnitEntry,
        unit: &Unit,
    ) -> Result<Result<(), String>, EngineError> {
        let (output, is_computed) = match output_of(&self.pipeline, entry, unit, self.sources.blobs)
        {
            Ok(output) => (output, false),
            Err(NoOutput::Wrong(why)) => return Ok(Err(why)),
            // A host drops old results: what they were is what the unit computes.
            Err(NoOutput::Lost) => match self.compute(entry, unit, &unit.work)? {
                Ok(output) => (output, true),
                Err(why) => return Ok(Err(why)),
            },
        };
        if unit.work.multiply_adds(&output, self.pipeline.model()) != entry.multiply_adds {
            return Ok(Err("the credit is not what the unit costs".into()));
        }
        let is_chosen = self.sources.recompute == Recompute::All || self.chosen.contains(&sequence);
        if is_chosen && !is_computed {
            let work = unit.work.audit(&output);
            if let Err(why) = self.compute(entry, unit, &work)? {
                return Ok(Err(why));
            }
        }
        if !is_missing(&self.pipeline, entry) {
            return Ok(Ok(()));
        }
        let (first, count) = (entry.first as usize, entry.count as usize);
        let supplied = self.pipeline.supply(entry.path, first, count, output);
        Ok(supplied.map_err(|e| e.to_string()))
    }

    /// Computes a unit, by itself or as an audit: its output, if the entry's receipt is that.
    fn compute(
        &mut self,
        entry: &UnitEntry,
        unit: &Unit,
        work: &Work,
    ) -> Result<Result<Output, String>, EngineError> {
        let Some(job) = self.pipeline.job(entry.path) else {
            return Ok(Err("the run asks for no such unit".into()));
        };
        let (problems, version) = (self.pipeline.problems(), &job.job.version);
        let again = encode_output(&(self.sources.execute)(problems, version, work)?);
        self.recomputed += 1;
        let receipt = Hash::of(&again);
        if receipt != entry.receipt {
            let why =
                format!("the result is false: the unit computes {receipt}, not {}", entry.receipt);
            return Ok(Err(why));
        }
        Ok(read_output(&self.pipeline, entry, unit, &again))
    }

    /// What the ledger says and the run did not come to.
    fn finish(&mut self, failure: Option<String>) {
        if self.wrong.0.is_some() {
            return;
        }
        let reason = failure.map_or(String::new(), |f| format!(": {f}"));
        if let Some((_, p)) = self.reading.versions.iter().min_by_key(|(_, p)| p.sequence) {
            let why = format!("the units before it do not lead to these weights{reason}");
            self.wrong.note(p.sequence, why);
        }
        let left = self.by_path.values().flatten();
        let firm =
            |(sequence, u): &&(u64, UnitEntry)| self.reading.is_firm(*sequence, u.path.ordinal);
        if let Some(sequence) = left.filter(firm).map(|(sequence, _)| *sequence).min() {
            self.wrong.note(sequence, format!("the run does not come to this unit{reason}"));
        }
        let Some((sequence, weights)) = self.reading.closed else { return };
        if !self.pipeline.is_done() {
            self.wrong.note(sequence, format!("the run is not complete{reason}"));
        } else if Hash::from(self.pipeline.version().hash()) != weights {
            self.wrong.note(sequence, "the run ends with other weights".into());
        }
    }
}

fn check_version(
    published: &Published,
    before: &Version,
    version: &Version,
    weights: Hash,
) -> Result<(), String> {
    if published.weights != weights {
        return Err(format!("the units before it lead to the weights {weights}"));
    }
    // A step that was held back is published again, from itself.
    let base = if published.base == weights { version } else { before };
    if published.base != Hash::from(base.hash()) {
        return Err("it is made from weights that are not those before it".into());
    }
    if published.delta != Hash::of(&delta::encode(Some(&base.weights), &version.weights)) {
        return Err("its blob makes other weights".into());
    }
    match published.full {
        Some(full) if full != Hash::of(&delta::encode(None, &version.weights)) => {
            Err("its full blob makes other weights".into())
        }
        _ => Ok(()),
    }
}

/// The sequence numbers of the units to compute again.
fn choose(recompute: Recompute, reading: &Reading) -> BTreeSet<u64> {
    let Recompute::Some { count, seed } = recompute else { return BTreeSet::new() };
    let standing = reading.past.standing().filter(|(s, u)| reading.is_firm(*s, u.path.ordinal));
    let lot = |sequence: u64| {
        let bytes = [seed.to_le_bytes(), sequence.to_le_bytes()].concat();
        (Hash::of(&bytes), sequence)
    };
    let mut lots = BTreeSet::new();
    for (sequence, _) in standing {
        lots.insert(lot(*sequence));
        if lots.len() as u64 > count {
            lots.pop_last();
        }
    }
    lots.into_iter().map(|(_, sequence)| sequence).collect()
}
