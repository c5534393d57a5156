//! `manyhands receipts`: checks what a volunteer did against a host's ledger.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use manyhands_core::swarm::chain::Verifier;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::ledger::{Entry, UnitEntry, Verdict, receipt_message};
use serde::{Deserialize, Serialize};

use crate::donor;
use crate::join::receipts::{RECEIPTS_FILE, Receipt};
use crate::ledger_pages::LedgerPages;
use crate::replay::{Records, open_ledger};
use crate::store::read_bounded;

/// Largest file of receipts.
const RECEIPTS_BYTES_MAX: u64 = 1 << 30;

/// Arguments of `receipts`.
#[derive(Debug, Args)]
pub struct ReceiptsArgs {
    /// A volunteer's directory [default: in the user's state directory].
    dir: Option<PathBuf>,
    /// The address of a host, as it printed it, or the directory of one that is not running: its
    /// ledger is checked, and then searched.
    #[arg(long, value_name = "URL|DIR")]
    ledger: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What became of a receipt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The unit.
    pub unit: Hash,
    /// Position in the ledger, if it is there.
    pub sequence: Option<u64>,
    /// Multiply-adds that it is worth; 0 if it is not there.
    pub multiply_adds: u64,
    /// Whether an audit stands behind it.
    pub is_verified: bool,
    /// Why it counts for nothing.
    pub problem: Option<String>,
}

/// All receipts of a volunteer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// One a receipt, in the order of the file.
    pub receipts: Vec<Finding>,
    /// Multiply-adds that an audit stands behind.
    pub verified: u64,
    /// Multiply-adds in the ledger.
    pub total: u64,
}

/// Runs `receipts`.
pub fn run(args: &ReceiptsArgs) -> Result<ExitCode> {
    let dir = args.dir.clone().unwrap_or_else(donor::default_dir);
    let receipts = read(&dir.join(RECEIPTS_FILE))?;
    let is_url = args.ledger.starts_with("http://") || args.ledger.starts_with("https://");
    let found = if is_url {
        let mut pages = LedgerPages::of(&args.ledger);
        let found = check(&receipts, &mut pages);
        // Why the ledger ended matters more than what is missing then.
        pages.finish()?;
        found?
    } else {
        let storage = open_ledger(Path::new(&args.ledger))?;
        let mut records = Records { storage: &storage, next: 0, page: Vec::new(), error: None };
        let found = check(&receipts, &mut records);
        if let Some(error) = records.error {
            return Err(error.context("cannot read the ledger"));
        }
        found?
    };
    if args.json {
        println!("{}", serde_json::to_string(&found)?);
    } else {
        for f in &found.receipts {
            let place = f.sequence.map_or("-".into(), |s| s.to_string());
            let note = match &f.problem {
                Some(problem) => problem.as_str(),
                None if f.is_verified => "verified",
                None => "no audit yet",
            };
            println!("{}  {place:>8}  {:>16}  {note}", f.unit.short(), f.multiply_adds);
        }
        println!("{} multiply-adds, {} of them verified", found.total, found.verified);
    }
    let ok = found.receipts.iter().all(|f| f.problem.is_none());
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read(path: &Path) -> Result<Vec<Receipt>> {
    let text = String::from_utf8(read_bounded(path, RECEIPTS_BYTES_MAX)?)
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    let parse = |(i, line)| {
        serde_json::from_str(line).with_context(|| format!("{}, line {}", path.display(), i + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

/// Looks receipts up in a ledger, whose chain is checked on the way.
fn check(receipts: &[Receipt], records: &mut dyn Iterator<Item = Vec<u8>>) -> Result<Findings> {
    let mut verifier = Verifier::default();
    let mut wanted: BTreeMap<(Hash, Hash), Vec<(u64, UnitEntry)>> =
        receipts.iter().map(|r| ((r.unit, r.receipt), Vec::new())).collect();
    // Units by volunteer, and up to where an audit stands behind them.
    let mut sequences: BTreeMap<(Hash, PeerKey), u64> = BTreeMap::new();
    let mut settled: BTreeMap<PeerKey, u64> = BTreeMap::new();
    let mut voided: BTreeMap<(Hash, PeerKey), u64> = BTreeMap::new();
    for bytes in records {
        let record = verifier.push(&bytes)?;
        match record.entry {
            Entry::Unit(unit) => {
                sequences.insert((unit.unit, unit.volunteer), record.sequence);
                if let Some(found) = wanted.get_mut(&(unit.unit, unit.receipt)) {
                    found.push((record.sequence, unit));
                }
            }
            Entry::Audit { unit, volunteer, verdict: Verdict::Valid, .. } => {
                if let Some(&sequence) = sequences.get(&(unit, volunteer)) {
                    let newest = settled.entry(volunteer).or_default();
                    *newest = sequence.max(*newest);
                }
            }
            Entry::Voided { unit, volunteer } => {
                voided.insert((unit, volunteer), record.sequence);
            }
            _ => {}
        }
    }
    let run = verifier.run().context("the ledger is empty")?;
    ensure!(
        receipts.is_empty() || receipts.iter().any(|r| r.run == run),
        "none of the receipts is of the ledger's run {run}"
    );
    let finding = |r: &Receipt| {
        let message = receipt_message(&r.run, &r.unit, &r.receipt, r.bytes);
        let entries = wanted.get(&(r.unit, r.receipt)).into_iter().flatten();
        let own = entries.filter(|(_, u)| u.signature == r.signature).collect::<Vec<_>>();
        let lost = |problem: &str| Finding {
            unit: r.unit,
            sequence: None,
            multiply_adds: 0,
            is_verified: false,
            problem: Some(problem.into()),
        };
        let Some((sequence, unit)) = own.first() else {
            return lost(if r.run == run { "not in the ledger" } else { "of another run" });
        };
        if !unit.volunteer.verifies(&message, &r.signature) {
            return lost("the signature is not the volunteer's");
        }
        if voided.get(&(unit.unit, unit.volunteer)).is_some_and(|at| at > sequence) {
            return lost("found false and voided");
        }
        Finding {
            unit: r.unit,
            sequence: Some(*sequence),
            multiply_adds: unit.multiply_adds,
            is_verified: settled.get(&unit.volunteer).is_some_and(|newest| newest >= sequence),
            problem: None,
        }
    };
    let receipts: Vec<Finding> = receipts.iter().map(finding).collect();
    let sum = |verified: bool| {
        let counted = receipts.iter().filter(|f| !verified || f.is_verified);
        counted.map(|f| f.multiply_adds).sum()
    };
    let (verified, total) = (sum(true), sum(false));
    Ok(Findings { receipts, verified, total })
}

#[cfg(test)]
mod tests {
    use manyhands_core::run::job::{JobPath, Stage};
    use manyhands_core::swarm::chain::Writer;
    use manyhands_core::swarm::ids::Secret;

    use super::*;

    const COST: u64 = 1000;

    /// A ledger with the units 0 and 1, the first one audited, and receipts for 0, 1 and 2.
    fn example() -> (Vec<Vec<u8>>, Vec<Receipt>) {
        let (host, volunteer) = (Secret::from_seed(&[1; 32]), Secret::from_seed(&[2; 32]));
        let mut writer = Writer::new(host.clone());
        let open = Entry::Open {
            config: "{}".into(),
            files: Vec::new(),
            digest: String::new(),
            weights: Hash::of(b"weights"),
            full: Hash::of(b"full"),
            coordinator: host.key(),
        };
        let mut ledger = vec![writer.append(0, open).1];
        let run = writer.run().unwrap();
        let receipt = |i: u8| {
            let (unit, receipt) = (Hash::of(&[i]), Hash::of(&[i, i]));
            let signature = volunteer.sign(&receipt_message(&run, &unit, &receipt, 7));
            Receipt { run, unit, receipt, bytes: 7, signature, sequence: u64::from(i) + 1 }
        };
        let receipts: Vec<Receipt> = (0..3).map(receipt).collect();
        for r in &receipts[..2] {
            let entry = UnitEntry {
                path: JobPath { ordinal: 0, stage: Stage::Evaluate },
                first: 0,
                count: 1,
                unit: r.unit,
                receipt: r.receipt,
                result_bytes: r.bytes,
                volunteer: volunteer.key(),
                signature: r.signature,
                multiply_adds: COST,
            };
            ledger.push(writer.append(0, Entry::Unit(entry)).1);
        }
        let audit = Entry::Audit {
            unit: receipts[0].unit,
            volunteer: volunteer.key(),
            auditor: host.key(),
            verdict: Verdict::Valid,
            receipt: receipts[0].receipt,
            multiply_adds: COST,
        };
        ledger.push(writer.append(0, audit).1);
        (ledger, receipts)
    }

    #[test]
    fn receipts_are_found_where_the_ledger_has_them() {
        let (ledger, receipts) = example();
        let found = check(&receipts, &mut ledger.into_iter()).unwrap();
        let places: Vec<_> =
            found.receipts.iter().map(|f| (f.sequence, f.is_verified, f.multiply_adds)).collect();
        assert_eq!(places, [(Some(1), true, COST), (Some(2), false, COST), (None, false, 0)]);
        assert_eq!((found.verified, found.total), (COST, 2 * COST));
        assert_eq!(found.receipts[2].problem.as_deref(), Some("not in the ledger"));
    }

    /// Whoever copies a receipt's hashes out of the ledger has no credit of it.
    #[test]
    fn receipt_with_another_signature_counts_for_nothing() {
        let (ledger, mut receipts) = example();
        receipts[0].signature.0[3] ^= 1;
        let found = check(&receipts[..1], &mut ledger.into_iter()).unwrap();
        assert_eq!((found.total, found.receipts[0].sequence), (0, None));
    }

    #[test]
    fn receipts_against_a_broken_ledger_are_refused() {
        let (mut ledger, receipts) = example();
        ledger[2][40] ^= 1;
        let error = check(&receipts, &mut ledger.into_iter()).unwrap_err();
        assert!(error.to_string().contains("record 2"), "{error}");
    }
}
