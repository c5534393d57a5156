//! The ledger, checked in the tab: every hash and signature, and what makes which weights.
//!
//! The host shows records as JSON. A record has one encoding only, so that the bytes that were
//! signed can be made again from what is shown.

use std::collections::BTreeMap;

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
    model: Option<String>,
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
        self.model.clone()
    }

    /// Blobs that make weights from nothing, in order.
    pub fn plan(&self, weights: &str) -> Option<Vec<String>> {
        let (mut at, mut blobs) = (Hash::parse(weights)?, Vec::new());
        for _ in 0..=self.versions.len() {
            let made = self.versions.get(&at)?;
            blobs.push(made.full.unwrap_or(made.delta).to_string());
            if made.full.is_some() {
                blobs.reverse();
                return Some(blobs);
            }
            at = made.base;
        }
        None
    }

    fn take(&mut self, entry: &Entry) {
        match entry {
            Entry::Open { config, weights, full, .. } => {
                let model = serde_json::from_str::<RunConfig>(config).ok();
                let model = model.and_then(|config| config.model().ok());
                self.model = model.and_then(|model| serde_json::to_string(&model).ok());
                let made = Made { base: *weights, delta: *full, full: Some(*full) };
                self.versions.insert(*weights, made);
            }
            Entry::Version { weights, delta, base, full, .. } => {
                let made = Made { base: *base, delta: *delta, full: *full };
                self.versions.entry(*weights).or_insert(made);
            }
            _ => {}
        }
    }
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
