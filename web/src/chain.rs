//! The ledger, checked in the tab: every hash and signature, and what makes which weights.
//!
//! The host shows records as JSON. A record has one encoding only, so that the bytes that were
//! signed can be made again from what is shown.

use std::collections::BTreeMap;

use manyhands_core::model::tokenizer;
use manyhands_core::run::config::RunConfig;
use manyhands_core::swarm::chain::{self, Verifier};
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::{Entry, Record};
use serde::Serialize;
use wasm_bindgen::prelude::*;

/// How weights are made.
struct Made {
    base: Hash,
    delta: Hash,
    full: Option<Hash>,
}

/// What has been read.
#[derive(Serialize)]
struct Outcome {
    ok: bool,
    records: u64,
    versions: usize,
    head: Option<Hash>,
    first_wrong: Option<Wrong>,
}

/// The version that the run goes on from.
#[derive(Serialize)]
struct Newest {
    weights: Hash,
    ordinal: u64,
}

/// What is loaded to compute under some weights, one after the other.
#[derive(Serialize)]
struct Load {
    want: Hash,
    base: Option<Hash>,
    blobs: Vec<Hash>,
}

/// An imported model's files, by their hashes.
#[derive(Serialize)]
struct Text {
    import: Option<Hash>,
    tokenizer: Option<Hash>,
    template: Option<Hash>,
}

#[derive(Clone, Serialize)]
struct Wrong {
    sequence: u64,
    why: String,
}

/// See the module.
#[wasm_bindgen]
#[derive(Default)]
pub struct Chain {
    verifier: Verifier,
    versions: BTreeMap<Hash, Made>,
    config: Option<RunConfig>,
    files: BTreeMap<String, Hash>,
    imported: Option<(Hash, Hash)>,
    steps: BTreeMap<u64, Hash>,
    head: Option<Hash>,
    wrong: Option<Wrong>,
}

#[wasm_bindgen]
impl Chain {
    /// Nothing read yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next records, as the host shows them. Returns how many there were; after the
    /// first that is wrong, none are taken.
    pub fn push(&mut self, page: &str) -> usize {
        let records = match serde_json::from_str::<Vec<Record>>(page) {
            Ok(records) => records,
            Err(error) => {
                let why = format!("not a page of the ledger: {error}");
                self.wrong = Some(Wrong { sequence: self.verifier.sequence(), why });
                return 0;
            }
        };
        for record in &records {
            let bytes = chain::encode(record);
            match self.verifier.push(&bytes) {
                Ok(record) => self.take(&record.entry),
                Err(broken) => {
                    let why = broken.error.to_string();
                    self.wrong = Some(Wrong { sequence: broken.sequence, why });
                    return 0;
                }
            }
            self.head = Some(chain::record_hash(&bytes));
        }
        records.len()
    }

    /// Records so far.
    pub fn records(&self) -> f64 {
        self.verifier.sequence() as f64
    }

    /// What was found, as JSON.
    pub fn outcome(&self) -> String {
        let outcome = Outcome {
            ok: self.wrong.is_none() && self.verifier.sequence() > 0,
            records: self.verifier.sequence(),
            versions: self.versions.len(),
            head: self.head,
            first_wrong: self.wrong.clone(),
        };
        serde_json::to_string(&outcome).unwrap_or_default()
    }

    /// The model of the run, as JSON.
    pub fn model(&self) -> Option<String> {
        serde_json::to_string(&self.config.as_ref()?.model().ok()?).ok()
    }

    /// The version that the run goes on from, as JSON: its weights' hash, and the steps behind it.
    pub fn newest(&self) -> Option<String> {
        let (&ordinal, &weights) = self.steps.last_key_value()?;
        serde_json::to_string(&Newest { weights, ordinal }).ok()
    }

    /// The files of the imported model that text needs, as JSON; nothing if the run trains none.
    pub fn text(&self) -> Option<String> {
        let model = &self.config.as_ref()?.model;
        let file = |name| self.files.get(&model.import_file(name)?).copied();
        model.import.as_ref()?;
        let [import, tokenizer, template] = TEXT_FILES.map(file);
        serde_json::to_string(&Text { import, tokenizer, template }).ok()
    }

    /// What makes weights, as JSON: the imported model if they adapt one, then they themselves,
    /// each with its blobs in order. Who has the weights `have` has what they adapt, and needs only
    /// what changed since.
    pub fn plan(&self, weights: &str, have: Option<String>) -> Option<String> {
        let weights = Hash::parse(weights)?;
        let have = have.and_then(|have| Hash::parse(&have));
        let mut loads = Vec::new();
        let is_adapter = self.config.as_ref()?.model.lora.is_some();
        if let Some((want, blob)) = self.imported.filter(|_| is_adapter && have.is_none()) {
            loads.push(Load { want, base: None, blobs: vec![blob] });
        }
        let (base, blobs) = self.blobs(weights, have)?;
        loads.push(Load { want: weights, base, blobs });
        serde_json::to_string(&loads).ok()
    }

    /// The blobs that make weights, applied in order to `have` or to nothing.
    fn blobs(&self, weights: Hash, have: Option<Hash>) -> Option<(Option<Hash>, Vec<Hash>)> {
        let (mut at, mut blobs) = (weights, Vec::new());
        for _ in 0..=self.versions.len() {
            let made = self.versions.get(&at)?;
            let base = have.filter(|have| *have == made.base && *have != at);
            blobs.push(if base.is_some() { made.delta } else { made.full.unwrap_or(made.delta) });
            if base.is_some() || made.full.is_some() {
                blobs.reverse();
                return Some((base, blobs));
            }
            at = made.base;
        }
        None
    }

    fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Open { config, files, weights, full, .. } => {
                self.config = serde_json::from_str(config).ok();
                self.files = files.iter().cloned().collect();
                let made = Made { base: *weights, delta: *full, full: Some(*full) };
                self.versions.insert(*weights, made);
                self.imported = entry.imported();
                self.steps.insert(0, *weights);
            }
            Entry::Version { ordinal, update, weights, delta, base, full, .. } => {
                let made = Made { base: *base, delta: *delta, full: *full };
                self.versions.entry(*weights).or_insert(made);
                if *update == 0 {
                    self.steps.insert(*ordinal, *weights);
                }
            }
            Entry::RolledBack { ordinal } => self.steps.retain(|step, _| step <= ordinal),
            _ => {}
        }
    }
}

/// Files of an imported model: its description, tokenizer and chat template.
const TEXT_FILES: [&str; 3] = ["import.json", "tokenizer.json", "chat_template.jinja"];

/// Tokens of a prompt to a model of this run that was trained from nothing.
#[wasm_bindgen]
pub fn encode_bytes(prompt: &str, vocabulary: usize) -> Result<Vec<u32>, JsError> {
    tokenizer::encode_prompt(prompt, vocabulary).map_err(|e| JsError::new(&e.to_string()))
}

/// Text of such a model's answer.
#[wasm_bindgen]
pub fn decode_bytes(tokens: &[u32]) -> String {
    tokenizer::decode(tokens)
}

/// The token that ends such a model's answer.
#[wasm_bindgen]
pub fn end_of_bytes() -> u32 {
    tokenizer::END
}

/// The hash of the weights under which a unit is computed, if the bytes are one.
#[wasm_bindgen]
pub fn unit_weights(unit: &[u8], model: &str) -> Option<String> {
    let model = serde_json::from_str(model).ok()?;
    let unit = manyhands_core::swarm::unit::Unit::decode(unit, &model).ok()?;
    Some(unit.weights.to_string())
}

/// BLAKE3 of some bytes: what names a unit, and its receipt.
#[wasm_bindgen]
pub fn hash_of(bytes: &[u8]) -> String {
    Hash::of(bytes).to_string()
}
