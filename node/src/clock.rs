//! Whether this machine's clock can be right. No result depends on it: the times in the ledger,
//! certificates and a donor's hours of work do.

use anyhow::{Result, ensure};
use jiff::fmt::rfc2822;
use jiff::{SignedDuration, Timestamp};

/// Clocks that differ by less are good enough for all that they are used for.
const SLACK: SignedDuration = SignedDuration::from_mins(5);
const ADVICE: &str = "set it (for example: sudo timedatectl set-ntp true)";

/// A ledger that goes on must not go back in time.
///
/// # Errors
/// When this clock stands before the newest record, which was written at `newest_ms` since 1970.
pub fn check_ledger(now: Timestamp, newest_ms: u64) -> Result<()> {
    let newest = Timestamp::from_millisecond(i64::try_from(newest_ms)?)?;
    let behind = now.duration_until(newest);
    ensure!(
        behind <= SLACK,
        "this machine's clock says {now:.0}, but the newest record of the ledger is of {newest:.0}; {ADVICE} and start again"
    );
    Ok(())
}

/// What to tell if the `Date` of another machine's answer differs from this clock.
pub fn difference(now: Timestamp, date: &str) -> Option<String> {
    let theirs = rfc2822::parse(date).ok()?.timestamp();
    let ahead = theirs.duration_until(now);
    (ahead.abs() > SLACK).then(|| {
        let (minutes, way) = (ahead.abs().as_mins(), if ahead.is_positive() { "ahead of" } else { "behind" });
        format!(
            "this machine's clock is {minutes} minutes {way} the host's; if yours is wrong, {ADVICE}: hours of work and certificates go by it"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-01-02T03:04:05Z";

    #[test]
    fn clock_before_the_newest_record_is_named() {
        let now: Timestamp = NOW.parse().unwrap();
        let ms = |minutes: i64| (now + SignedDuration::from_mins(minutes)).as_millisecond() as u64;
        for fine in [-100_000, 0, 5] {
            check_ledger(now, ms(fine)).unwrap();
        }
        let told = check_ledger(now, ms(6)).unwrap_err().to_string();
        assert!(told.contains("2026-01-02T03:04:05Z") && told.contains("03:10:05Z"), "{told}");
        assert!(check_ledger(now, u64::MAX).is_err());
    }

    #[test]
    fn clock_that_differs_from_the_hosts_is_told() {
        let now: Timestamp = NOW.parse().unwrap();
        let told = |date: &str| difference(now, date);
        assert_eq!(told("Fri, 02 Jan 2026 03:00:00 GMT"), None);
        assert_eq!(told("Fri, 02 Jan 2026 03:08:00 GMT"), None);
        assert_eq!(told("no date"), None);
        let ahead = told("Fri, 02 Jan 2026 01:04:05 GMT").unwrap();
        assert!(ahead.contains("120 minutes ahead"), "{ahead}");
        let behind = told("Sat, 03 Jan 2026 03:04:05 GMT").unwrap();
        assert!(behind.contains("1440 minutes behind"), "{behind}");
    }
}
