//! Bounds on what peers may cost, and the two clocks that enforce rates.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use manyhands_core::swarm::ids::PeerKey;
pub use manyhands_core::swarm::protocol::{REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX};
use tokio::time::Instant;

/// A request without a response fails after this; long polls last up to 30 s.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests in flight on one connection, both ways together.
pub const REQUESTS_A_CONNECTION_MAX: usize = 64;
/// Requests of this node that wait for responses.
pub const REQUESTS_OUT_MAX: usize = 1024;
/// Commands of handles that wait for the event loop.
pub const COMMANDS_MAX: usize = 256;
/// Events that wait for the program.
pub const EVENTS_MAX: usize = 256;
/// Requests above this many waiting events are dropped; other events are few a connection.
pub const EVENTS_WAITING_MAX: usize = 256;
/// Inbound streams of a connection that wait for the event loop.
pub const STREAMS_WAITING_MAX: usize = 16;
/// Addresses of one dial, and dials at once.
pub const DIALS_MAX: u32 = 16;
/// Keys on the block list; the oldest gives way.
pub const BANNED_MAX: usize = 65_536;
/// Results that one peer may be expected to upload.
pub const EXPECTED_A_PEER_MAX: usize = 256;
/// Results that all peers together may be expected to upload.
pub const EXPECTED_MAX: usize = 65_536;
/// Results that one peer uploads at once.
pub const UPLOADS_A_PEER_MAX: u32 = 4;
/// Bytes of results that are being received at once, of all peers.
pub const RECEIVING_BYTES_MAX: u64 = 1 << 30;
/// Uploads and downloads slower than this are given up.
pub const UPLOAD_BYTES_PER_SECOND_MIN: u64 = 16 << 10;
/// Blob streams that one peer is served at once.
pub const SERVES_A_PEER_MAX: u32 = 8;
/// Chunks in memory to be served, for all peers.
pub const SERVING_CHUNKS_MAX: usize = 64;

/// The bounds that an operator or a test may want to change.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections in all.
    pub connections_max: u32,
    /// Connections of one peer.
    pub connections_a_peer_max: u32,
    /// Inbound connections that have not proven their key yet.
    pub pending_inbound_max: u32,
    /// Requests and streams that one peer may open a second.
    pub requests_per_second_max: u32,
    /// How many may come at once after silence.
    pub requests_burst_max: u32,
    /// See [`UPLOAD_BYTES_PER_SECOND_MIN`].
    pub upload_bytes_per_second_min: u64,
    /// Time in which a transfer need not have moved anything.
    pub grace: Duration,
    /// See [`RECEIVING_BYTES_MAX`].
    pub receiving_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            connections_a_peer_max: 4,
            pending_inbound_max: 128,
            requests_per_second_max: 100,
            requests_burst_max: 1000,
            upload_bytes_per_second_min: UPLOAD_BYTES_PER_SECOND_MIN,
            grace: Duration::from_secs(20),
            receiving_bytes_max: RECEIVING_BYTES_MAX,
        }
    }
}

/// A token bucket: a rate with a burst.
#[derive(Debug)]
pub(super) struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    pub(super) fn full(limits: &Limits, now: Instant) -> Self {
        Self { tokens: limits.requests_burst_max.into(), filled: now }
    }

    /// Takes a token; false where there is none.
    pub(super) fn take(&mut self, limits: &Limits, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.filled).as_secs_f64();
        let gained = gained * f64::from(limits.requests_per_second_max);
        self.tokens = (self.tokens + gained).min(limits.requests_burst_max.into());
        self.filled = now;
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

/// The slowest acceptable transfer: nothing for the grace, then a least rate on average.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    started: Instant,
    grace: Duration,
    bytes_per_second_min: u64,
}

impl Pace {
    pub(super) fn start(limits: &Limits) -> Self {
        Self {
            started: Instant::now(),
            grace: limits.grace,
            bytes_per_second_min: limits.upload_bytes_per_second_min.max(1),
        }
    }

    /// When the byte after the first `moved` must have moved.
    pub(super) fn deadline(&self, moved: u64) -> Instant {
        let moving_ms = moved.saturating_mul(1000) / self.bytes_per_second_min;
        self.started + self.grace + Duration::from_millis(moving_ms)
    }
}

/// How many things of a kind each peer has going on.
#[derive(Clone, Debug, Default)]
pub(super) struct Slots {
    taken: Arc<Mutex<BTreeMap<PeerKey, u32>>>,
}

/// One of them; dropping it gives the slot back.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Slots,
    peer: PeerKey,
}

impl Slots {
    pub(super) fn take(&self, peer: PeerKey, max: u32) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(peer).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        drop(taken);
        Some(Slot { slots: self.clone(), peer })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let left = taken.get(&self.peer).copied().unwrap_or(0).saturating_sub(1);
        if left == 0 {
            taken.remove(&self.peer);
        } else {
            taken.insert(self.peer, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_over_its_rate_is_empty_until_time_passes() {
        let limits =
            Limits { requests_per_second_max: 10, requests_burst_max: 3, ..Limits::default() };
        let start = Instant::now();
        let mut bucket = Bucket::full(&limits, start);
        let taken = (0..5).filter(|_| bucket.take(&limits, start)).count();
        assert_eq!(taken, 3);
        let later = start + Duration::from_millis(250);
        assert_eq!((0..5).filter(|_| bucket.take(&limits, later)).count(), 2);
        let much_later = start + Duration::from_secs(1000);
        assert_eq!((0..5).filter(|_| bucket.take(&limits, much_later)).count(), 3);
    }

    #[test]
    fn pace_deadline_moves_with_the_bytes() {
        let limits = Limits { upload_bytes_per_second_min: 1000, ..Limits::default() };
        let pace = Pace::start(&limits);
        assert_eq!(pace.deadline(0), pace.started + limits.grace);
        assert_eq!(pace.deadline(5000) - pace.deadline(0), Duration::from_secs(5));
        // A length that a peer claims cannot overflow.
        let fastest = Limits { upload_bytes_per_second_min: 0, ..limits };
        Pace::start(&fastest).deadline(u64::MAX / 1000);
    }

    #[test]
    fn slots_of_one_peer_are_bounded_and_come_back() {
        let slots = Slots::default();
        let (a, b) = (PeerKey([1; 32]), PeerKey([2; 32]));
        let held: Vec<_> = (0..3).map(|_| slots.take(a, 2)).collect();
        assert_eq!(held.iter().flatten().count(), 2);
        assert!(slots.take(b, 2).is_some());
        drop(held);
        assert!(slots.take(a, 1).is_some());
        assert!(slots.taken.lock().unwrap().is_empty());
    }
}
