//! A volunteer's own signed receipts: one JSON line each, so that it can prove what it did.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use manyhands_core::swarm::ids::{Hash, Secret, Signature};
use manyhands_core::swarm::ledger::receipt_message;
use serde::{Deserialize, Serialize};

/// Name of the file in the directory of a volunteer.
pub const RECEIPTS_FILE: &str = "receipts.jsonl";
/// Receipts that wait for their place in the ledger.
const WAITING_MAX: usize = 1024;

/// A receipt, once the ledger has the unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The run.
    pub run: Hash,
    /// The unit.
    pub unit: Hash,
    /// Hash of the result.
    pub receipt: Hash,
    /// Size of the result.
    pub bytes: u64,
    /// The volunteer's signature.
    pub signature: Signature,
    /// Position in the ledger.
    pub sequence: u64,
}

/// The file, and what is not in it yet.
pub(super) struct Receipts {
    path: PathBuf,
    secret: Secret,
    waiting: BTreeMap<Hash, Receipt>,
    accepted: u64,
}

impl Receipts {
    pub(super) fn open(dir: &Path, secret: Secret) -> Result<Self> {
        let (path, waiting) = (dir.join(RECEIPTS_FILE), BTreeMap::new());
        Ok(Self { path, secret, waiting, accepted: 0 })
    }

    /// A result was announced.
    pub(super) fn keep(&mut self, run: Hash, unit: Hash, receipt: Hash, bytes: u64) -> Result<()> {
        let signature = self.secret.sign(&receipt_message(&run, &unit, &receipt, bytes));
        if self.waiting.len() >= WAITING_MAX {
            self.waiting.pop_first();
        }
        self.waiting.insert(unit, Receipt { run, unit, receipt, bytes, signature, sequence: 0 });
        Ok(())
    }

    /// The ledger has it.
    pub(super) fn accepted(&mut self, unit: Hash, sequence: u64) -> Result<()> {
        self.accepted += 1;
        let Some(receipt) = self.waiting.remove(&unit) else { return Ok(()) };
        let mut line = serde_json::to_vec(&Receipt { sequence, ..receipt })?;
        line.push(b'\n');
        let append = || -> std::io::Result<()> {
            OpenOptions::new().create(true).append(true).open(&self.path)?.write_all(&line)
        };
        append().with_context(|| {
            format!("cannot append to {}; free some disk space", self.path.display())
        })
    }

    pub(super) fn report(&self, elapsed: Duration) {
        eprintln!("{} units accepted in {:.0} s", self.accepted, elapsed.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results that no ledger takes are forgotten, and those that it takes are kept on disk.
    #[test]
    fn receipts_that_wait_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut receipts = Receipts::open(dir.path(), Secret::from_seed(&[1; 32])).unwrap();
        let unit = |i: usize| Hash::of(&i.to_le_bytes());
        for i in 0..WAITING_MAX + 100 {
            receipts.keep(unit(0), unit(i), unit(i), 7).unwrap();
            assert!(receipts.waiting.len() <= WAITING_MAX);
        }
        (0..WAITING_MAX + 100).for_each(|i| receipts.accepted(unit(i), i as u64).unwrap());
        let text = std::fs::read_to_string(dir.path().join(RECEIPTS_FILE)).unwrap();
        assert_eq!(text.lines().count(), WAITING_MAX);
    }
}
