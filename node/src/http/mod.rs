//! The HTTP side of a coordination peer: dashboard, JSON, events, metrics, blobs, and the
//! operator's commands.
//!
//! Everything but `/api/admin` only shows what is public anyway. It decides nothing: status comes
//! in through a watch, events through [`Feed::publish`], commands go out through a queue. Start at
//! [`routes::router`]; limits on connections are in [`serve`].

mod blobs;
mod error;
mod feed;
mod metrics;
mod p2p;
mod routes;
mod seats;
mod serve;
mod token;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use axum::body::Bytes;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::Record;
use manyhands_core::swarm::status::Status;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

pub use blobs::BLOB_CHUNK_BYTES;
pub use feed::{
    EVALUATIONS_MAX, FEED_QUEUE_MAX, Feed, HEARTBEAT, SSE_CLIENTS_MAX, STEPS_MAX, StepLine,
};
pub use metrics::metrics_text;
pub use p2p::{TUNNELS_MAX, Tunnel};
pub use routes::{ADMIN_TIMEOUT, BODY_BYTES_MAX, PAGE_MAX, REQUEST_TIMEOUT, ROUTES, Route, router};
pub use seats::{CONNECTIONS_MAX, CONNECTIONS_PER_ADDRESS_MAX, Seat, Seats};
pub use serve::{HEADER_BYTES_MAX, HEADER_TIMEOUT, bind, serve};
pub use token::{AdminToken, TOKEN_FILE};

/// Commands of the operator that wait to be taken. A caller makes the queue of this size.
pub const ADMIN_QUEUE_MAX: usize = 8;

/// Reads decoded records of the ledger: from a sequence number, at most so many. May block.
pub type LedgerReader = Arc<dyn Fn(u64, usize) -> Result<Vec<Record>> + Send + Sync>;

/// Finds a blob by its hash. Must not block for long.
pub type BlobLookup = Arc<dyn Fn(&Hash) -> Option<Blob> + Send + Sync>;

/// What the routes read and where commands go.
#[derive(Clone)]
pub struct HttpState {
    /// The newest status.
    pub status: watch::Receiver<Arc<Status>>,
    /// Events and their history.
    pub feed: Arc<Feed>,
    /// The run's manifest, as JSON.
    pub manifest: Bytes,
    /// Reads the ledger.
    pub ledger: LedgerReader,
    /// Finds blobs.
    pub blob: BlobLookup,
    /// Takes the operator's commands.
    pub admin: mpsc::Sender<AdminCommand>,
    /// Who the operator is.
    pub token: Arc<AdminToken>,
    /// Where tabs are led, if there is a listener for them.
    pub p2p: Option<Arc<Tunnel>>,
}

/// Where a blob's bytes are.
#[derive(Clone, Debug)]
pub enum Blob {
    /// A file that holds exactly the blob.
    File(PathBuf),
    /// In memory.
    Bytes(Bytes),
}

/// What an operator can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdminAction {
    /// Hand out nothing new.
    Pause,
    /// Go on.
    Resume,
    /// Save and end the program.
    Stop,
}

/// A command and where to say what came of it.
#[derive(Debug)]
pub struct AdminCommand {
    /// What to do.
    pub action: AdminAction,
    /// `Err` says in plain words why it cannot be done now.
    pub reply: oneshot::Sender<Result<(), String>>,
}
