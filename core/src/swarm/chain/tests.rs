use super::*;
use crate::run::job::{JobPath, Stage};
use crate::swarm::ledger::{Offence, UnitEntry, Verdict};
use proptest::prelude::*;

/// A record a line: the kind of its entry and its bytes.
const GOLDEN: &str = include_str!("../testdata/records.txt");

fn hash(name: &str) -> Hash {
    Hash::of(name.as_bytes())
}

fn secret(seed: u8) -> Secret {
    Secret::from_seed(&[seed; 32])
}

fn open() -> Entry {
    Entry::Open {
        config: r#"{"name":"sample"}"#.into(),
        files: vec![("problems.jsonl".into(), hash("problems"))],
        digest: "x1-digest".into(),
        weights: hash("weights 0"),
        full: hash("full 0"),
        coordinator: secret(1).key(),
    }
}

fn unit(stage: Stage) -> Entry {
    Entry::Unit(UnitEntry {
        path: JobPath { ordinal: 300, stage },
        first: 16,
        count: 70_000,
        unit: hash("unit"),
        receipt: hash("receipt"),
        result_bytes: 1 << 40,
        volunteer: secret(3).key(),
        signature: secret(3).sign(b"receipt"),
        multiply_adds: 123_456_789,
    })
}

fn audit(verdict: Verdict) -> Entry {
    let (volunteer, auditor) = (secret(3).key(), secret(1).key());
    let (unit, receipt) = (hash("unit"), hash("audited"));
    Entry::Audit { unit, volunteer, auditor, verdict, receipt, multiply_adds: 250 }
}

fn version(update: u32, full: Option<Hash>) -> Entry {
    let (weights, delta, base) = (hash("weights 1"), hash("delta"), hash("weights 0"));
    Entry::Version { ordinal: 301, update, weights, delta, delta_bytes: 4096, base, full }
}

/// Every kind of entry with every kind of thing in it. The promotion is the last.
fn entries() -> Vec<Entry> {
    let volunteer = secret(3).key();
    let expelled = |offence, unit| Entry::Expelled { volunteer, offence, unit };
    vec![
        open(),
        unit(Stage::Evaluate),
        unit(Stage::EvaluateGreedy),
        unit(Stage::Rollout { draw: 2 }),
        unit(Stage::Proximal),
        unit(Stage::Reference),
        unit(Stage::Policy { update: 1 }),
        unit(Stage::Gradient { update: 0 }),
        audit(Verdict::Valid),
        audit(Verdict::Invalid),
        expelled(Offence::WrongResult, Some(hash("unit"))),
        expelled(Offence::BytesDifferFromReceipt, None),
        expelled(Offence::Malformed, None),
        expelled(Offence::BadSignature, None),
        expelled(Offence::LeaseHoarding, None),
        expelled(Offence::Flooding, None),
        Entry::Voided { unit: hash("unit"), volunteer },
        version(0, None),
        version(2, Some(hash("full"))),
        Entry::Final { ordinal: 300 },
        Entry::RolledBack { ordinal: 299 },
        Entry::Follower { coordinator: secret(2).key() },
        Entry::Closed { weights: hash("weights 1") },
        Entry::Promoted { coordinator: secret(2).key() },
    ]
}

/// Exhaustive, so that a new kind of entry asks for its golden bytes.
fn kind(entry: &Entry) -> &'static str {
    match entry {
        Entry::Open { .. } => "open",
        Entry::Unit(_) => "unit",
        Entry::Audit { .. } => "audit",
        Entry::Expelled { .. } => "expelled",
        Entry::Voided { .. } => "voided",
        Entry::Version { .. } => "version",
        Entry::Final { .. } => "final",
        Entry::RolledBack { .. } => "rolled_back",
        Entry::Follower { .. } => "follower",
        Entry::Closed { .. } => "closed",
        Entry::Promoted { .. } => "promoted",
    }
}

/// The chain of [`entries`]; the promoted peer goes on.
fn chain() -> Vec<(Record, Vec<u8>)> {
    let mut writer = Writer::new(secret(1));
    let mut verifier = Verifier::default();
    let mut out = vec![];
    for entry in entries() {
        if matches!(entry, Entry::Promoted { .. }) {
            writer = Writer::after(&verifier, secret(2));
        }
        let (record, bytes) = writer.append(1_700_000_000_000 + writer.sequence(), entry);
        verifier.push(&bytes).unwrap();
        out.push((record, bytes));
    }
    out.push(writer.append(0, Entry::Final { ordinal: 301 }));
    out
}

/// The index of the first record that is refused, and why.
fn first_wrong<'a>(records: impl IntoIterator<Item = &'a Vec<u8>>) -> Option<BrokenChain> {
    let mut verifier = Verifier::default();
    records.into_iter().find_map(|bytes| verifier.push(bytes).err())
}

fn bytes_of_chain() -> Vec<Vec<u8>> {
    chain().into_iter().map(|(_, bytes)| bytes).collect()
}

/// Changed bytes would make every ledger out there unreadable: a new format needs a new version.
#[test]
fn record_of_every_kind_has_its_golden_bytes() {
    let lines: Vec<&str> = GOLDEN.lines().collect();
    let chain = chain();
    assert_eq!(lines.len(), chain.len());
    for (line, (record, bytes)) in lines.iter().zip(&chain) {
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(*line, format!("{} {hex}", kind(&record.entry)));
        assert_eq!(decode(bytes).unwrap(), *record);
    }
    let mut kinds: Vec<&str> = chain.iter().map(|(record, _)| kind(&record.entry)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds.len(), 11, "{kinds:?}");
}

#[test]
fn chain_verified_knows_run_and_signer() {
    let chain = chain();
    let mut verifier = Verifier::default();
    assert_eq!((verifier.run(), verifier.signer()), (None, None));
    for (i, (record, bytes)) in chain.iter().enumerate() {
        assert_eq!(verifier.push(bytes).unwrap(), *record);
        assert_eq!(verifier.run(), Some(record_hash(&chain[0].1)));
        assert_eq!(verifier.sequence(), i as u64 + 1);
        let signer = if i < chain.len() - 2 { secret(1) } else { secret(2) };
        assert_eq!(verifier.signer(), Some(signer.key()), "record {i}");
    }
    let writer = Writer::after(&verifier, secret(2));
    assert_eq!(writer.run(), verifier.run());
    assert_eq!(Some(writer.coordinator()), verifier.signer());
}

/// One bit of every byte of every record, all in turn.
#[test]
fn chain_flipped_anywhere_names_the_first_wrong_record() {
    let chain = bytes_of_chain();
    let mut verifier = Verifier::default();
    for (sequence, good) in chain.iter().enumerate() {
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            let error = verifier.clone().push(&bad).unwrap_err();
            assert_eq!(error.sequence, sequence as u64, "byte {at}: {error}");
        }
        verifier.push(good).unwrap();
    }
}

#[test]
fn chain_dropped_repeated_or_swapped_record_is_named() {
    let good = bytes_of_chain();
    assert_eq!(first_wrong(&good), None);
    for i in 1..good.len() - 1 {
        let mut dropped = good.clone();
        dropped.remove(i);
        let broken = first_wrong(&dropped).unwrap();
        let error = ChainError::Sequence { got: i as u64 + 1 };
        assert_eq!(broken, BrokenChain { sequence: i as u64, error });
        let mut repeated = good.clone();
        repeated.insert(i, good[i - 1].clone());
        let error = ChainError::Sequence { got: i as u64 - 1 };
        assert_eq!(first_wrong(&repeated).unwrap(), BrokenChain { sequence: i as u64, error });
    }
    assert_eq!(first_wrong(&good[1..]).unwrap().sequence, 0);
}

/// A record that is not the writer's to write, though its bytes are well made.
#[test]
fn chain_wrong_author_or_history_is_refused() {
    let mut verifier = Verifier::default();
    let (_, first) = Writer::new(secret(1)).append(0, open());
    let (_, other) = Writer::new(secret(1)).append(1, open());
    verifier.push(&first).unwrap();

    let mut stranger = Writer::after(&verifier, secret(9));
    let error = |bytes: &[u8]| verifier.clone().push(bytes).unwrap_err().error;
    let signer = secret(1).key();
    let (_, bytes) = stranger.clone().append(0, Entry::Final { ordinal: 0 });
    assert_eq!(error(&bytes), ChainError::Signature { signer });
    // A promotion must be signed by whom it promotes, not by the predecessor nor by a third.
    let promoted = Entry::Promoted { coordinator: secret(2).key() };
    for author in [1, 9] {
        let (_, bytes) = Writer::after(&verifier, secret(author)).append(0, promoted.clone());
        assert_eq!(error(&bytes), ChainError::Signature { signer: secret(2).key() });
    }
    // After a promotion the predecessor's signature is worth nothing.
    let mut promoted_to_9 = verifier.clone();
    let (_, bytes) = stranger.append(0, Entry::Promoted { coordinator: secret(9).key() });
    promoted_to_9.push(&bytes).unwrap();
    let (_, bytes) =
        Writer::after(&promoted_to_9, secret(1)).append(0, Entry::Final { ordinal: 0 });
    let broken = promoted_to_9.push(&bytes).unwrap_err();
    let signer = secret(9).key();
    assert_eq!(broken, BrokenChain { sequence: 2, error: ChainError::Signature { signer } });

    let mut elsewhere = Verifier::default();
    elsewhere.push(&other).unwrap();
    let (_, bytes) = Writer::after(&elsewhere, secret(1)).append(0, Entry::Final { ordinal: 0 });
    let (expected, got) = (record_hash(&first), record_hash(&other));
    assert_eq!(error(&bytes), ChainError::Previous { expected, got });
}

#[test]
fn chain_opened_late_or_twice_is_refused() {
    let bare = Writer { run: None, secret: secret(1), sequence: 1, previous: Hash([0; 32]) };
    let unopened = Verifier { sequence: 1, ..Verifier::default() };
    let (_, bytes) = bare.clone().append(0, Entry::Final { ordinal: 0 });
    assert_eq!(unopened.clone().push(&bytes).unwrap_err().error, ChainError::NotOpen);

    let mut verifier = Verifier::default();
    verifier.push(&Writer::new(secret(1)).append(0, open()).1).unwrap();
    let signed_again = |record: &Record| {
        let mut record = record.clone();
        record.signature = secret(1).sign(&message(&encode(&record)));
        encode(&record)
    };
    let (mut record, _) =
        Writer::after(&verifier, secret(1)).append(0, Entry::Final { ordinal: 0 });
    verifier.clone().push(&signed_again(&record)).unwrap();
    record.entry = open();
    assert_eq!(verifier.push(&signed_again(&record)).unwrap_err().error, ChainError::OpenAgain);
}

/// The largest record that may be written can be read; one byte more cannot.
#[test]
fn record_at_its_bound_is_read_and_beyond_it_is_not() {
    let text = |n: usize| {
        let mut entry = open();
        if let Entry::Open { config, .. } = &mut entry {
            *config = "x".repeat(n);
        }
        entry
    };
    // Lengths of 2^16 and more have the same prefix.
    let (mut record, small) = Writer::new(secret(1)).append(0, text(1 << 16));
    let most = (1 << 16) + RECORD_BYTES_MAX - small.len();
    let (_, largest) = Writer::new(secret(1)).append(0, text(most));
    assert_eq!(largest.len(), RECORD_BYTES_MAX);
    Verifier::default().push(&largest).unwrap();
    record.entry = text(most + 1);
    let length = RECORD_BYTES_MAX as u64 + 1;
    assert_eq!(decode(&encode(&record)), Err(ChainError::TooLong(length)));
}

#[test]
fn record_padded_or_respelled_is_refused() {
    let (record, bytes) = Writer::new(secret(1)).append(0, open());
    assert_eq!(decode(&[&bytes[..], &[0]].concat()), Err(ChainError::NotCanonical));
    // Sequence number 0 written in three bytes.
    let respelled = [&[251, 0, 0][..], &bytes[1..]].concat();
    assert_eq!(decode(&respelled), Err(ChainError::NotCanonical));
    assert!(matches!(decode(&bytes[..bytes.len() - 1]), Err(ChainError::Malformed(_))));
    // A text and a list that claim to fill all memory.
    let before_text = bytes.iter().position(|b| *b == b'{').unwrap() - 1;
    let claim = [&bytes[..before_text], &[253], &[0xff; 8], &bytes[before_text + 1..]].concat();
    assert!(matches!(decode(&claim), Err(ChainError::Malformed(_))));
    let before_list = before_text + 1 + r#"{"name":"sample"}"#.len();
    let claim = [&bytes[..before_list], &[253], &[0x7f; 8], &bytes[before_list + 1..]].concat();
    assert!(matches!(decode(&claim), Err(ChainError::Malformed(_))));
    assert_eq!(decode(&bytes).unwrap(), record);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn chain_flipped_bit_names_its_record(
        record in any::<proptest::sample::Index>(), bit in any::<proptest::sample::Index>(),
    ) {
        let mut chain = bytes_of_chain();
        let record = record.index(chain.len());
        let bit = bit.index(chain[record].len() * 8);
        chain[record][bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(first_wrong(&chain).unwrap().sequence, record as u64);
    }

    #[test]
    fn record_any_bytes_never_panic(
        start in any::<proptest::sample::Index>(), cut in 0_usize..400,
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        let golden = bytes_of_chain();
        let head = &golden[start.index(golden.len())];
        for bytes in [bytes.clone(), [&head[..cut.min(head.len())], &bytes].concat()] {
            if let Ok(record) = decode(&bytes) {
                prop_assert_eq!(encode(&record), bytes.clone());
            }
            prop_assert!(Verifier::default().push(&bytes).is_err() || bytes == golden[0]);
        }
    }
}
