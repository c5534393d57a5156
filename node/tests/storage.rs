//! Storage of a coordination peer against kills, damage, full disks and second processes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::io::{BufRead, BufReader, Error, ErrorKind};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use manyhands_node::storage::{
    META_MAX, NAME_BYTES_MAX, RECORDS_APPEND_MAX, RECORDS_READ_BYTES_MAX, RECORDS_READ_MAX,
    SNAPSHOTS_MAX, STORAGE_FILE, Storage, VALUE_BYTES_MAX,
};
use redb::StorageBackend;

/// Contents of record `sequence`: long enough that records span pages.
fn record(sequence: u64) -> Vec<u8> {
    sequence.to_le_bytes().repeat(1 + sequence as usize % 100)
}

fn records(range: std::ops::Range<u64>) -> Vec<(u64, Vec<u8>)> {
    range.map(|i| (i, record(i))).collect()
}

fn bytes_of(range: std::ops::Range<u64>) -> Vec<Vec<u8>> {
    range.map(record).collect()
}

fn message<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.unwrap_err())
}

#[test]
fn storage_reopened_holds_everything() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(dir.path()).unwrap();
    assert!(storage.is_empty().unwrap());
    storage.append(&records(0..10)).unwrap();
    storage.append(&[]).unwrap();
    storage.append(&records(10..11)).unwrap();
    storage.set_meta("height", b"1").unwrap();
    storage.set_meta("height", b"2").unwrap();
    storage.set_snapshot("step-2", b"two").unwrap();
    storage.set_snapshot("step-1", b"one").unwrap();
    drop(storage);
    let storage = Storage::open(dir.path()).unwrap();
    assert_eq!(storage.len().unwrap(), 11);
    assert_eq!(storage.records(0, 100).unwrap(), bytes_of(0..11));
    assert_eq!(storage.records(4, 3).unwrap(), bytes_of(4..7));
    assert!(storage.records(11, 3).unwrap().is_empty());
    assert_eq!(storage.meta("height").unwrap().unwrap(), b"2");
    assert!(storage.meta("depth").unwrap().is_none());
    assert_eq!(storage.snapshots().unwrap(), ["step-1", "step-2"]);
    assert_eq!(storage.snapshot("step-2").unwrap().unwrap(), b"two");
    assert!(storage.remove_snapshot("step-1").unwrap());
    assert!(!storage.remove_snapshot("step-1").unwrap());
    assert_eq!(storage.snapshots().unwrap(), ["step-2"]);
}

/// A ledger with a hole could not be checked; one that was overwritten would be a lie.
#[test]
fn append_with_gap_or_overlap_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(dir.path()).unwrap();
    assert!(message(storage.append(&records(1..2))).contains("goes on at 0"));
    storage.append(&records(0..3)).unwrap();
    for bad in [records(2..3), records(4..5), vec![(3, vec![]), (5, vec![])]] {
        assert!(message(storage.append(&bad)).contains("does not follow"));
    }
    assert_eq!(storage.records(0, 9).unwrap(), bytes_of(0..3));
    storage.append(&records(3..4)).unwrap();
}

#[test]
fn storage_bounds_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(dir.path()).unwrap();
    let large = vec![7; VALUE_BYTES_MAX];
    let larger = vec![7; VALUE_BYTES_MAX + 1];
    assert!(storage.append(&[(0, larger.clone())]).is_err());
    assert!(storage.set_meta("x", &larger).is_err());
    assert!(storage.set_snapshot("x", &larger).is_err());
    assert!(storage.set_meta(&"x".repeat(NAME_BYTES_MAX + 1), b"").is_err());
    storage.set_meta(&"x".repeat(NAME_BYTES_MAX), b"").unwrap();

    let many = RECORDS_APPEND_MAX as u64;
    assert!(storage.append(&records(0..many + 1)).is_err());
    assert_eq!(storage.len().unwrap(), 0);
    storage.append(&records(0..many)).unwrap();
    storage.append(&records(many..many + 2)).unwrap();
    assert_eq!(storage.records(0, usize::MAX).unwrap().len(), RECORDS_READ_MAX);

    let next = many + 2;
    let enough = RECORDS_READ_BYTES_MAX.div_ceil(VALUE_BYTES_MAX) as u64;
    for i in 0..=enough {
        storage.append(&[(next + i, large.clone())]).unwrap();
    }
    assert_eq!(storage.records(next, usize::MAX).unwrap().len() as u64, enough);
}

#[test]
fn names_over_their_count_are_refused() {
    let storage = Storage::with_backend(Disk::default(), PathBuf::from("disk")).unwrap();
    (0..SNAPSHOTS_MAX).for_each(|i| storage.set_snapshot(&i.to_string(), b"").unwrap());
    (0..META_MAX).for_each(|i| storage.set_meta(&i.to_string(), b"").unwrap());
    assert!(message(storage.set_snapshot("more", b"")).contains("one more"));
    assert!(message(storage.set_meta("more", b"")).contains("one more"));
    storage.set_snapshot("0", b"changed").unwrap();
    assert_eq!(storage.snapshots().unwrap().len(), SNAPSHOTS_MAX);
}

#[test]
fn storage_opened_twice_says_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = Storage::open(dir.path()).unwrap();
    let text = message(Storage::open(dir.path()));
    assert!(text.contains("another process") && text.contains("--dir"), "{text}");
    drop(first);
    Storage::open(dir.path()).unwrap();
}

#[test]
fn storage_of_something_else_is_called_damaged() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(STORAGE_FILE), [1; 10_000]).unwrap();
    let text = message(Storage::open(dir.path()));
    assert!(text.contains("is damaged"), "{text}");
}

/// Bits that rot anywhere in the file give an error, or hit a part that holds nothing: never a
/// panic and never other records.
#[test]
fn storage_with_flipped_bytes_is_refused_or_whole() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(dir.path()).unwrap();
    storage.append(&records(0..200)).unwrap();
    drop(storage);
    let path = dir.path().join(STORAGE_FILE);
    let whole = fs::read(&path).unwrap();
    let mut refused = 0;
    for i in 0..64 {
        let mut bytes = whole.clone();
        let at = i * bytes.len() / 64 + 17;
        bytes[at] ^= 0x55;
        fs::write(&path, &bytes).unwrap();
        match Storage::open(dir.path()) {
            Ok(storage) => assert_eq!(storage.records(0, 999).unwrap(), bytes_of(0..200)),
            Err(error) => {
                assert!(format!("{error:#}").contains("damaged"), "{error:#}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "no flipped byte was noticed");
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(message(Storage::open(dir.path())).contains("damaged"));
}

/// Names the directory in which [`killed_writer`] writes; without it that test does nothing.
const WRITER_DIR: &str = "MANYHANDS_TEST_WRITER_DIR";

/// Not a test of its own: the process that the next test kills.
#[test]
fn killed_writer() {
    let Some(dir) = std::env::var_os(WRITER_DIR) else { return };
    let storage = Storage::open(&PathBuf::from(dir)).unwrap();
    let mut next = storage.len().unwrap();
    loop {
        let end = next + 1 + next % 7;
        storage.append(&records(next..end)).unwrap();
        next = end;
        println!("acknowledged {next}");
    }
}

#[test]
fn storage_of_a_killed_process_holds_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = 0;
    for round in 1..=5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["killed_writer", "--exact", "--nocapture"])
            .env(WRITER_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // The harness may print its own words on the same line.
        let acknowledged = lines.map_while(Result::ok).filter_map(|line| {
            line.rsplit_once("acknowledged ").and_then(|(_, n)| n.parse::<u64>().ok())
        });
        let last = acknowledged.take(3 * round).last().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let storage = Storage::open(dir.path()).unwrap();
        let len = storage.len().unwrap();
        assert!(len >= last && last > before, "{last} acknowledged, {len} there");
        assert_eq!(storage.records(0, 4096).unwrap(), bytes_of(0..len));
        before = len;
    }
}

/// A disk in memory that can be full, and that keeps only what was synced.
#[derive(Clone, Debug, Default)]
struct Disk {
    live: Arc<Mutex<Vec<u8>>>,
    synced: Arc<Mutex<Vec<u8>>>,
    /// Writes that still succeed, counted from 1; 0 is no limit.
    writes_left: Arc<AtomicU64>,
}

impl Disk {
    /// What is left after a power cut.
    fn after_power_cut(&self) -> Self {
        let synced = self.synced.lock().unwrap().clone();
        let live = Arc::new(Mutex::new(synced.clone()));
        Self { live, synced: Arc::new(Mutex::new(synced)), ..Default::default() }
    }

    fn spend(&self) -> Result<(), Error> {
        match self.writes_left.load(Ordering::SeqCst) {
            0 => Ok(()),
            1 => Err(ErrorKind::StorageFull.into()),
            n => {
                self.writes_left.store(n - 1, Ordering::SeqCst);
                Ok(())
            }
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, Error> {
        Ok(self.live.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let live = self.live.lock().unwrap();
        let at = offset as usize;
        let bytes = live.get(at..at + out.len()).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), Error> {
        self.spend()?;
        self.live.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), Error> {
        self.spend()?;
        *self.synced.lock().unwrap() = self.live.lock().unwrap().clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.spend()?;
        let mut live = self.live.lock().unwrap();
        let end = offset as usize + data.len();
        if live.len() < end {
            live.resize(end, 0);
        }
        live[offset as usize..end].copy_from_slice(data);
        Ok(())
    }
}

/// At whichever write the disk becomes full, the append fails with words about it, and all that
/// was acknowledged is there afterwards: in the same process, and after a power cut.
#[test]
fn append_on_a_full_disk_fails_and_keeps_the_old_state() {
    let big = || (5..25).map(|i| (i, vec![9; 100_000])).collect::<Vec<_>>();
    let mut failures = 0;
    for limit in 1..60 {
        let disk = Disk::default();
        let storage = Storage::with_backend(disk.clone(), PathBuf::from("disk")).unwrap();
        storage.append(&records(0..5)).unwrap();
        disk.writes_left.store(limit, Ordering::SeqCst);
        let result = storage.append(&big());
        let appended = result.is_ok();
        if !appended {
            let text = message(result);
            assert!(text.contains("is full"), "{text}");
            let text = message(storage.append(&big()));
            assert!(text.contains("start again"), "{text}");
            failures += 1;
        }
        drop(storage);
        let again = Storage::with_backend(disk.after_power_cut(), PathBuf::from("disk")).unwrap();
        assert_eq!(again.records(0, 5).unwrap(), bytes_of(0..5), "limit {limit}");
        let len = again.len().unwrap();
        // A commit whose last sync failed may have reached the disk: whole or not at all.
        assert!(len == 25 || (len == 5 && !appended), "limit {limit}: {len} records");
        if appended {
            return assert!(failures > 3);
        }
    }
    panic!("the append never succeeded");
}

#[cfg(unix)]
#[test]
fn storage_in_a_place_that_is_no_directory_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(message(Storage::open(&file.join("below"))).contains("cannot make"));
}
