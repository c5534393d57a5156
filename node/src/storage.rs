//! Durable storage of a coordination peer: the ledger's records, snapshots and a few settings.
//!
//! What a call acknowledged survives a kill and a power cut. The ledger is append-only: nothing
//! here can change or remove a record. Bytes are opaque; chains and signatures are checked by
//! their reader. Calls block on the disk: use `spawn_blocking` on an async runtime.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, bail, ensure};
use manyhands_core::swarm::ids::Hash;
use redb::{
    Builder, Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageBackend,
    TableDefinition, WriteTransaction,
};

/// Name of the file in the directory of a coordination peer.
pub const STORAGE_FILE: &str = "coordinator.redb";
/// Largest record, snapshot description or setting.
pub const VALUE_BYTES_MAX: usize = 16 << 20;
/// Longest name of a snapshot or setting.
pub const NAME_BYTES_MAX: usize = 128;
/// Most records that one call returns.
pub const RECORDS_READ_MAX: usize = 4096;
/// One call returns no further record once it has this many bytes.
pub const RECORDS_READ_BYTES_MAX: usize = 64 << 20;
/// Most records that one call appends.
pub const RECORDS_APPEND_MAX: usize = 4096;
/// Most snapshots that are kept.
pub const SNAPSHOTS_MAX: usize = 1024;
/// Most settings that are kept.
pub const META_MAX: usize = 1024;
/// Memory for pages of the file.
const CACHE_BYTES: usize = 32 << 20;

const RECORDS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("records");
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const BLOBS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("blobs");
/// Setting that counts the bytes of all blobs.
const BLOB_BYTES: &str = "blob-bytes";

/// The storage of one coordination peer. One process at a time has it open.
#[derive(Debug)]
pub struct Storage {
    database: Database,
    path: PathBuf,
}

impl Storage {
    /// Opens or makes the storage in a directory. The whole file is checked against its checksums.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let path = dir.join(STORAGE_FILE);
        let database = builder().create(&path).map_err(|e| explain(&path, e.into()))?;
        sync_dir(dir)?;
        Self::prepare(database, path)
    }

    /// Storage in something else than a file, named `path` in errors.
    pub fn with_backend(backend: impl StorageBackend, path: PathBuf) -> Result<Self> {
        let created = builder().create_with_backend(backend);
        let database = created.map_err(|e| explain(&path, e.into()))?;
        Self::prepare(database, path)
    }

    fn prepare(database: Database, path: PathBuf) -> Result<Self> {
        let storage = Self { database, path };
        storage.in_context(|| {
            let write = storage.database.begin_write()?;
            write.open_table(RECORDS)?;
            write.open_table(SNAPSHOTS)?;
            write.open_table(META)?;
            write.open_table(BLOBS)?;
            Ok(write.commit()?)
        })?;
        let gap = storage.in_context(|| {
            let records = storage.database.begin_read()?.open_table(RECORDS)?;
            let next = records.last()?.map_or(0, |(last, _)| last.value() + 1);
            Ok(next != records.len()?)
        })?;
        ensure!(!gap, "{}", damaged(&storage.path, "records are missing"));
        Ok(storage)
    }

    fn in_context<T>(&self, act: impl FnOnce() -> Result<T, redb::Error>) -> Result<T> {
        act().map_err(|e| explain(&self.path, e))
    }

    /// Appends records that follow the last one without a gap. All of them, or on an error none.
    pub fn append(&self, records: &[(u64, Vec<u8>)]) -> Result<()> {
        self.persist(&[], records)
    }

    /// As [`Self::append`], with blobs of at most [`VALUE_BYTES_MAX`] in the same transaction, so
    /// that a record never outlives what it names and small results cost one sync together.
    pub fn persist(&self, blobs: &[(Hash, Vec<u8>)], records: &[(u64, Vec<u8>)]) -> Result<()> {
        ensure!(
            records.len() <= RECORDS_APPEND_MAX,
            "{} records at once are more than {RECORDS_APPEND_MAX}",
            records.len()
        );
        for (sequence, bytes) in records {
            check_value(bytes).with_context(|| format!("record {sequence}"))?;
        }
        for (hash, bytes) in blobs {
            check_value(bytes).with_context(|| format!("blob {hash}"))?;
        }
        if records.is_empty() && blobs.is_empty() {
            return Ok(());
        }
        let expected = self.in_context(|| {
            let write = self.database.begin_write()?;
            let mut table = write.open_table(BLOBS)?;
            let mut added = 0;
            for (hash, bytes) in blobs {
                if table.insert(hash.0.as_slice(), bytes.as_slice())?.is_none() {
                    added += bytes.len() as u64;
                }
            }
            drop(table);
            count_blobs(&write, |bytes| bytes + added)?;
            let mut table = write.open_table(RECORDS)?;
            let first = table.len()?;
            for ((sequence, bytes), expected) in records.iter().zip(first..) {
                if *sequence != expected {
                    // Dropping the transaction undoes what it did.
                    return Ok(Some((*sequence, expected)));
                }
                table.insert(sequence, bytes.as_slice())?;
            }
            drop(table);
            write.commit()?;
            Ok(None)
        })?;
        if let Some((sequence, expected)) = expected {
            bail!("record {sequence} does not follow the ledger, which goes on at {expected}");
        }
        Ok(())
    }

    /// A blob.
    pub fn blob(&self, hash: &Hash) -> Result<Option<Vec<u8>>> {
        self.in_context(|| {
            let table = self.database.begin_read()?.open_table(BLOBS)?;
            Ok(table.get(hash.0.as_slice())?.map(|value| value.value().to_vec()))
        })
    }

    /// Bytes of all blobs.
    pub fn blob_bytes(&self) -> Result<u64> {
        let bytes = self.meta(BLOB_BYTES)?;
        Ok(bytes.map_or(0, |b| read_count(&b)))
    }

    /// Forgets blobs, and keeps a setting in the same transaction.
    pub fn remove_blobs(&self, hashes: &[Hash], key: &str, value: &[u8]) -> Result<()> {
        self.in_context(|| {
            let write = self.database.begin_write()?;
            let mut table = write.open_table(BLOBS)?;
            let mut removed = 0;
            for hash in hashes {
                if let Some(bytes) = table.remove(hash.0.as_slice())? {
                    removed += bytes.value().len() as u64;
                }
            }
            drop(table);
            count_blobs(&write, |bytes| bytes.saturating_sub(removed))?;
            write.open_table(META)?.insert(key, value)?;
            Ok(write.commit()?)
        })
    }

    /// Records from sequence number `from`, in order; at most `limit`, [`RECORDS_READ_MAX`], and
    /// about [`RECORDS_READ_BYTES_MAX`] bytes.
    pub fn records(&self, from: u64, limit: usize) -> Result<Vec<Vec<u8>>> {
        self.in_context(|| {
            let table = self.database.begin_read()?.open_table(RECORDS)?;
            let mut found = Vec::new();
            let mut bytes = 0;
            for record in table.range(from..)?.take(limit.min(RECORDS_READ_MAX)) {
                let (_, value) = record?;
                found.push(value.value().to_vec());
                bytes += value.value().len();
                if bytes >= RECORDS_READ_BYTES_MAX {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Number of records, which is the next sequence number.
    pub fn len(&self) -> Result<u64> {
        self.in_context(|| Ok(self.database.begin_read()?.open_table(RECORDS)?.len()?))
    }

    /// Whether there is no record yet.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Keeps a setting, in place of the one of the same name.
    pub fn set_meta(&self, key: &str, value: &[u8]) -> Result<()> {
        self.put(META, META_MAX, key, value)
    }

    /// A setting.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.get(META, key)
    }

    /// Keeps the description of a snapshot, in place of the one of the same name.
    pub fn set_snapshot(&self, name: &str, description: &[u8]) -> Result<()> {
        self.put(SNAPSHOTS, SNAPSHOTS_MAX, name, description)
    }

    /// The description of a snapshot.
    pub fn snapshot(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.get(SNAPSHOTS, name)
    }

    /// Names of all snapshots, in order of their bytes.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        self.in_context(|| {
            let table = self.database.begin_read()?.open_table(SNAPSHOTS)?;
            let names = table.iter()?.map(|entry| Ok(entry?.0.value().to_string()));
            names.collect()
        })
    }

    /// Forgets a snapshot. Whether there was one.
    pub fn remove_snapshot(&self, name: &str) -> Result<bool> {
        self.in_context(|| {
            let write = self.database.begin_write()?;
            let removed = write.open_table(SNAPSHOTS)?.remove(name)?.is_some();
            write.commit()?;
            Ok(removed)
        })
    }

    fn put(&self, table: Named, count_max: usize, name: &str, value: &[u8]) -> Result<()> {
        check_value(value).with_context(|| name.to_string())?;
        ensure!(
            name.len() <= NAME_BYTES_MAX,
            "the name {name:?} is longer than {NAME_BYTES_MAX} bytes"
        );
        let full = self.in_context(|| {
            let write = self.database.begin_write()?;
            let mut table = write.open_table(table)?;
            table.insert(name, value)?;
            if table.len()? > count_max as u64 {
                return Ok(true);
            }
            drop(table);
            write.commit()?;
            Ok(false)
        })?;
        ensure!(!full, "{name:?} would be one more than the {count_max} that are kept");
        Ok(())
    }

    fn get(&self, table: Named, name: &str) -> Result<Option<Vec<u8>>> {
        self.in_context(|| {
            let table = self.database.begin_read()?.open_table(table)?;
            Ok(table.get(name)?.map(|value| value.value().to_vec()))
        })
    }
}

/// Changes the count of the bytes of all blobs.
fn count_blobs(
    write: &WriteTransaction,
    change: impl FnOnce(u64) -> u64,
) -> Result<(), redb::Error> {
    let mut table = write.open_table(META)?;
    let before = table.get(BLOB_BYTES)?.map_or(0, |b| read_count(b.value()));
    table.insert(BLOB_BYTES, change(before).to_le_bytes().as_slice())?;
    Ok(())
}

fn read_count(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// Tables from names to bytes.
type Named = TableDefinition<'static, &'static str, &'static [u8]>;

fn builder() -> Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

fn check_value(bytes: &[u8]) -> Result<()> {
    ensure!(
        bytes.len() <= VALUE_BYTES_MAX,
        "{} bytes are more than {VALUE_BYTES_MAX}",
        bytes.len()
    );
    Ok(())
}

/// A new file survives a power cut only when its directory was synced too.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        fs::File::open(dir)
            .and_then(|d| d.sync_all())
            .with_context(|| format!("cannot sync {}", dir.display()))?;
    }
    Ok(())
}

fn damaged(path: &Path, why: &str) -> String {
    format!(
        "{} is damaged ({why}); put a copy of it back, or start in an empty directory: another coordination peer of the run can send the ledger again",
        path.display()
    )
}

/// Says what happened to the file, and what to do about it.
fn explain(path: &Path, error: redb::Error) -> Error {
    let name = path.display();
    let text = match &error {
        redb::Error::DatabaseAlreadyOpen => format!(
            "another process has {name} open; stop it first, or choose another directory with --dir"
        ),
        redb::Error::Corrupted(why) => damaged(path, why),
        redb::Error::RepairAborted => damaged(path, "it could not be repaired"),
        redb::Error::UpgradeRequired(_) => {
            format!("{name} was written by another version of this program")
        }
        redb::Error::Io(io) => match io.kind() {
            ErrorKind::InvalidData | ErrorKind::UnexpectedEof => damaged(path, &io.to_string()),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => format!(
                "the disk of {name} is full; nothing saved before is affected, free some space and start again"
            ),
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                format!("{name} cannot be written; check who owns it and that its disk is writable")
            }
            _ => format!("cannot read or write {name}; nothing saved before is affected"),
        },
        redb::Error::PreviousIo => format!(
            "an earlier write to {name} failed; nothing saved before is affected, see to the disk and start again"
        ),
        _ => format!("cannot use {name}"),
    };
    Error::new(error).context(text)
}
