//! A ledger and its blobs derive the run's weights again, and whatever was changed in them is found
//! and named: by outsiders, and by a coordination peer that is dishonest itself.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod replay_support;

use std::collections::BTreeMap;

use manyhands_core::engine::cpu::Cpu;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::state::State;
use manyhands_core::run::trainer::Trainer;
use manyhands_core::swarm::chain::{self, Verifier, Writer};
use manyhands_core::swarm::ids::{Hash, Secret};
use manyhands_core::swarm::ledger::Entry;
use manyhands_core::swarm::replay::{Recompute, Replay, Sources, replay};
use pollster::block_on;
use replay_support::{Attack, Blobs, Host, Machine, config, file, honest, turncoat, volunteers};

/// A complete run with honest volunteers.
fn completed() -> (Vec<Vec<u8>>, Blobs, Hash) {
    let mut host = Host::new();
    host.run(&volunteers(honest));
    let weights = host.coordinator.pipeline().version().hash().into();
    (host.ledger, host.blobs, weights)
}

fn check(ledger: &[Vec<u8>], blobs: &Blobs, recompute: Recompute) -> Replay {
    let mut machine = Machine::new();
    let sources = Sources {
        files: &mut |_| Ok(file()),
        import: &mut |_, _| unreachable!("nothing is imported"),
        blobs,
        recompute,
        execute: &mut |_, version, work| Ok(machine.execute(version, work)),
        progress: &mut |_, _| {},
    };
    replay(&mut ledger.iter().cloned(), sources).unwrap()
}

const NONE: Recompute = Recompute::Some { count: 0, seed: 0 };

/// Writes the entries again, signed by the coordination peer itself.
fn signed_again(ledger: &[Vec<u8>], mut change: impl FnMut(u64, &mut Entry)) -> Vec<Vec<u8>> {
    let mut writer = Writer::new(Secret::from_seed(&[1; 32]));
    let again = ledger.iter().map(|bytes| {
        let record = chain::decode(bytes).unwrap();
        let mut entry = record.entry;
        change(record.sequence, &mut entry);
        writer.append(record.time_ms, entry).1
    });
    again.collect()
}

fn entries(ledger: &[Vec<u8>]) -> Vec<Entry> {
    ledger.iter().map(|bytes| chain::decode(bytes).unwrap().entry).collect()
}

/// One engine alone.
fn alone() -> Hash {
    let config = config();
    let problems = Problems::open(&config, |_| Ok(file())).unwrap();
    let engine = Cpu::new(config.model().unwrap().constants(), 1, None);
    let state = State::new(&config, &config.model().unwrap(), None);
    let mut trainer = Trainer::new(&engine, config, problems, state).unwrap();
    while block_on(trainer.advance(&mut |_| {})).unwrap().is_some() {}
    trainer.weights_hash().into()
}

/// The whole claim: volunteers, ledger, replay and one machine alone give the same weights.
#[test]
fn replay_of_an_honest_run_gives_the_weights_of_one_machine() {
    let (ledger, blobs, weights) = completed();
    let found = check(&ledger, &blobs, Recompute::All);
    assert_eq!(found.first_wrong, None);
    assert!(found.ok && found.entries == ledger.len() as u64);
    assert_eq!((found.weights, weights), (Some(weights), alone()));
    let units = entries(&ledger).iter().filter(|e| matches!(e, Entry::Unit(_))).count();
    assert_eq!(found.recomputed, units as u64);
    let some = check(&ledger, &blobs, Recompute::Some { count: 5, seed: 1 });
    assert_eq!((some.ok, some.recomputed), (true, 5));
}

/// A ledger that ends anywhere is a run under way, not a wrong one.
#[test]
fn replay_of_every_prefix_finds_nothing_wrong() {
    let (ledger, blobs, _) = completed();
    for end in 1..ledger.len() {
        let found = check(&ledger[..end], &blobs, NONE);
        assert_eq!(found.first_wrong, None, "the first {end} records");
    }
}

/// A byte of any record is covered by its signature, and the record is named.
#[test]
fn replay_flipped_byte_anywhere_is_named() {
    let (ledger, blobs, _) = completed();
    for (i, at) in (0..ledger.len()).map(|i| (i, i * 37 % ledger[i].len())) {
        let mut changed = ledger.clone();
        changed[i][at] ^= 1 << (i % 8);
        let (sequence, why) = check(&changed, &blobs, NONE).first_wrong.unwrap();
        // A first record with another identity in it makes every signature another's.
        assert_eq!(sequence, i as u64, "byte {at} of record {i}: {why}");
    }
}

/// The order of entries is part of what is signed.
#[test]
fn replay_swapped_entries_are_named() {
    let (mut ledger, blobs, _) = completed();
    let middle = ledger.len() / 2;
    ledger.swap(middle, middle + 1);
    assert_eq!(check(&ledger, &blobs, NONE).first_wrong.unwrap().0, middle as u64);
}

/// Blobs are checked against their receipts; what a host dropped is what the unit computes.
#[test]
fn replay_changed_blob_is_named_and_a_lost_one_computed_again() {
    let (ledger, blobs, weights) = completed();
    // Different units may have the same result.
    let mut first = BTreeMap::new();
    for (i, entry) in entries(&ledger).into_iter().enumerate() {
        if let Entry::Unit(unit) = entry {
            first.entry(unit.receipt).or_insert(i as u64);
        }
    }
    for (receipt, sequence) in first.into_iter().step_by(3) {
        let mut changed = blobs.clone();
        let blob = changed.get_mut(&receipt).unwrap();
        let at = blob.len() / 2;
        blob[at] ^= 4;
        assert_eq!(check(&ledger, &changed, NONE).first_wrong.unwrap().0, sequence);
        changed.remove(&receipt);
        let found = check(&ledger, &changed, NONE);
        assert!(found.ok && found.recomputed > 0, "{:?}", found.first_wrong);
    }
    let found = check(&ledger, &Blobs::new(), Recompute::Some { count: 7, seed: 0 });
    let units = entries(&ledger).iter().filter(|e| matches!(e, Entry::Unit(_))).count();
    assert_eq!((found.ok, found.weights), (true, Some(weights)), "{:?}", found.first_wrong);
    assert_eq!(found.recomputed, units as u64);
}

/// Signatures prove who wrote, not that it is true: each claim of a dishonest coordination peer
/// is derived again.
#[test]
fn replay_false_claim_signed_by_the_coordination_peer_is_named() {
    let (ledger, blobs, _) = completed();
    let all = entries(&ledger);
    let last = |is: fn(&Entry) -> bool| all.iter().rposition(is).unwrap() as u64;
    let version = last(|e| matches!(e, Entry::Version { .. }));
    let unit = last(|e| matches!(e, Entry::Unit(_)));
    let closed = last(|e| matches!(e, Entry::Closed { .. }));
    for target in [version, unit, closed, 0] {
        let changed = signed_again(&ledger, |sequence, entry| {
            if sequence != target {
                return;
            }
            match entry {
                Entry::Version { weights, .. }
                | Entry::Closed { weights }
                | Entry::Open { weights, .. } => weights.0[0] ^= 1,
                Entry::Unit(unit) => unit.multiply_adds += 1,
                _ => unreachable!("a target is one of these"),
            }
        });
        // With another first record the run has another name, which no volunteer signed.
        let (sequence, why) = check(&changed, &blobs, NONE).first_wrong.unwrap();
        assert_eq!(sequence, target, "{why}");
    }
}

/// A coordination peer that invents a result with a volunteer's key of its own: everything in the
/// ledger fits, and only computing the unit again shows it.
#[test]
fn replay_false_unit_of_a_dishonest_coordinator_is_found_by_computing_all() {
    let lie: Attack = |sent, output| {
        if sent == 0 {
            turncoat(8, output);
        }
    };
    let mut host = Host::new();
    host.is_complicit = true;
    host.run(&[(Secret::from_seed(&[10; 32]), lie)]);
    assert_ne!(Hash::from(host.coordinator.pipeline().version().hash()), alone());
    let all = entries(&host.ledger);
    // One volunteer: its units enter in the order in which it sent them, gradients first.
    let mut units = all.iter().enumerate().filter(|(_, e)| matches!(e, Entry::Unit(_)));
    let (lied, _) = units.next().unwrap();
    assert!(check(&host.ledger, &host.blobs, NONE).ok);
    let found = check(&host.ledger, &host.blobs, Recompute::All);
    let (sequence, why) = found.first_wrong.unwrap();
    assert_eq!(sequence, lied as u64, "{why}");
    assert!(why.contains("the result is false"), "{why}");
}

/// A trusted volunteer lies, is caught, and the run goes on from before the lie: the ledger keeps
/// all of it, and what stands gives the honest weights.
#[test]
fn replay_of_a_rolled_back_run_gives_the_honest_weights() {
    let mut host = Host::new();
    host.run(&volunteers(turncoat));
    let all = entries(&host.ledger);
    let rolled_back = all.iter().any(|e| matches!(e, Entry::RolledBack { .. }));
    assert!(rolled_back, "the lie was caught before it entered: choose another seed");
    let found = check(&host.ledger, &host.blobs, Recompute::All);
    assert_eq!(found.first_wrong, None);
    assert_eq!(found.weights, Some(alone()));
}

/// Only who was named as a follower may go on with the ledger.
#[test]
fn replay_promotion_of_a_stranger_is_named() {
    let (ledger, blobs, _) = completed();
    let half = ledger.len() / 2;
    let mut verifier = Verifier::default();
    for bytes in &ledger[..half] {
        verifier.push(bytes).unwrap();
    }
    let stranger = Secret::from_seed(&[9; 32]);
    let mut writer = Writer::after(&verifier, stranger.clone());
    let mut changed = ledger[..half].to_vec();
    changed.push(writer.append(0, Entry::Promoted { coordinator: stranger.key() }).1);
    assert_eq!(check(&changed, &blobs, NONE).first_wrong.unwrap().0, half as u64);
}

/// Another problem file makes another run.
#[test]
fn replay_with_another_problem_file_is_refused() {
    let (ledger, blobs, _) = completed();
    let sources = Sources {
        files: &mut |_| Ok(file() + "\n"),
        import: &mut |_, _| unreachable!("nothing is imported"),
        blobs: &blobs,
        recompute: NONE,
        execute: &mut |_, _, _| unreachable!("nothing is computed"),
        progress: &mut |_, _| {},
    };
    let found = replay(&mut ledger.into_iter(), sources).unwrap();
    let (sequence, why) = found.first_wrong.unwrap();
    assert!(sequence == 0 && why.contains("hashes to"), "{why}");
}
