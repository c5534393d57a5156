//! Bytes in and out, by kind. Payloads are counted, not the encryption around them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Bytes since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Requests and responses received.
    pub requests_in_bytes: u64,
    /// Requests and responses sent.
    pub requests_out_bytes: u64,
    /// Results received.
    pub results_in_bytes: u64,
    /// Results sent.
    pub results_out_bytes: u64,
    /// Chunks of blobs received.
    pub blobs_in_bytes: u64,
    /// Chunks of blobs sent.
    pub blobs_out_bytes: u64,
}

/// What moved.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    RequestsIn,
    RequestsOut,
    ResultsIn,
    ResultsOut,
    BlobsIn,
    BlobsOut,
}

/// The counters that every task adds to.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters(Arc<[AtomicU64; 6]>);

impl Counters {
    pub(super) fn add(&self, kind: Kind, bytes: usize) {
        self.0[kind as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Traffic {
        let of = |kind: Kind| self.0[kind as usize].load(Ordering::Relaxed);
        Traffic {
            requests_in_bytes: of(Kind::RequestsIn),
            requests_out_bytes: of(Kind::RequestsOut),
            results_in_bytes: of(Kind::ResultsIn),
            results_out_bytes: of(Kind::ResultsOut),
            blobs_in_bytes: of(Kind::BlobsIn),
            blobs_out_bytes: of(Kind::BlobsOut),
        }
    }
}
