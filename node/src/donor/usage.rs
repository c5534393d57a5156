//! Bytes that a volunteer sent and received today, remembered over restarts.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::store::{read_bounded, write_atomic};

/// Name of the file in a volunteer's directory.
pub const USAGE_FILE: &str = "data-today.json";
/// Largest such file that is read.
const USAGE_FILE_BYTES_MAX: u64 = 4096;
/// Bytes that a kill may leave uncounted: the file is written once this many are new.
pub const UNSAVED_BYTES_MAX: u64 = 1 << 20;

/// A counter that begins again at local midnight.
#[derive(Debug)]
pub struct Usage {
    path: PathBuf,
    day: Day,
    saved: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Day {
    date: String,
    bytes: u64,
}

impl Usage {
    /// The counter of a volunteer's directory. A file that cannot be understood counts as none:
    /// it is worth less than a volunteer that starts.
    pub fn open(dir: &Path, date: &str) -> Result<Self> {
        let path = dir.join(USAGE_FILE);
        let day = if path.exists() {
            let bytes = read_bounded(&path, USAGE_FILE_BYTES_MAX)?;
            serde_json::from_slice::<Day>(&bytes).ok().filter(|day| day.date == date)
        } else {
            None
        };
        let day = day.unwrap_or_else(|| Day { date: date.into(), bytes: 0 });
        Ok(Self { path, saved: day.bytes, day })
    }

    /// Bytes counted on `date`.
    pub fn today(&self, date: &str) -> u64 {
        if self.day.date == date { self.day.bytes } else { 0 }
    }

    /// Counts bytes on `date`.
    pub fn count(&mut self, date: &str, bytes: u64) -> Result<()> {
        if self.day.date != date {
            self.day = Day { date: date.into(), bytes: 0 };
            self.saved = 0;
        }
        self.day.bytes = self.day.bytes.saturating_add(bytes);
        if self.day.bytes - self.saved >= UNSAVED_BYTES_MAX {
            self.save()?;
        }
        Ok(())
    }

    /// Writes the counter down.
    pub fn save(&mut self) -> Result<()> {
        write_atomic(&self.path, &serde_json::to_vec(&self.day)?)?;
        self.saved = self.day.bytes;
        Ok(())
    }
}

/// What was not written yet is written at the end of the program.
impl Drop for Usage {
    fn drop(&mut self) {
        if self.day.bytes != self.saved
            && let Err(error) = self.save()
        {
            tracing::warn!("the data of today cannot be remembered: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_remembered_and_begins_again_with_the_day() {
        let dir = tempfile::tempdir().unwrap();
        let mut usage = Usage::open(dir.path(), "2026-01-01").unwrap();
        usage.count("2026-01-01", 5).unwrap();
        usage.count("2026-01-01", 7).unwrap();
        drop(usage);
        let mut usage = Usage::open(dir.path(), "2026-01-01").unwrap();
        assert_eq!(usage.today("2026-01-01"), 12);
        assert_eq!(usage.today("2026-01-02"), 0);
        usage.count("2026-01-02", 3).unwrap();
        assert_eq!(usage.today("2026-01-02"), 3);
        drop(usage);
        assert_eq!(Usage::open(dir.path(), "2026-01-03").unwrap().today("2026-01-03"), 0);
    }

    /// A kill loses less than the bound.
    #[test]
    fn usage_is_written_before_much_is_unsaved() {
        let dir = tempfile::tempdir().unwrap();
        let mut usage = Usage::open(dir.path(), "d").unwrap();
        usage.count("d", UNSAVED_BYTES_MAX + 1).unwrap();
        usage.count("d", 1).unwrap();
        std::mem::forget(usage);
        let known = Usage::open(dir.path(), "d").unwrap().today("d");
        assert_eq!(known, UNSAVED_BYTES_MAX + 1);
    }

    #[test]
    fn usage_file_that_is_broken_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        for bad in [&b"{\"date\":\"d\",\"bytes\":-1}"[..], b"", b"{\"date\":\"d\"}", &[0xff; 9]] {
            std::fs::write(dir.path().join(USAGE_FILE), bad).unwrap();
            assert_eq!(Usage::open(dir.path(), "d").unwrap().today("d"), 0);
        }
        let mut usage = Usage::open(dir.path(), "d").unwrap();
        usage.count("d", u64::MAX).unwrap();
        usage.count("d", u64::MAX).unwrap();
        assert_eq!(usage.today("d"), u64::MAX);
    }
}
