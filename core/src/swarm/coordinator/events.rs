//! What a coordinator is told, and what it wants done.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::checkpoint::Manifest;
use crate::run::job::Version;
use crate::run::pipeline::TrainError;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::protocol::{Request, Response};
use crate::swarm::scheduler::TaskId;
use crate::swarm::status::StatusEvent;

/// What happened to the bytes of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// They hash to the receipt.
    Whole(Vec<u8>),
    /// They do not.
    Differs,
    /// They came too slowly, or broke off.
    Failed,
}

/// Something that happened outside.
#[derive(Clone, Debug)]
pub enum Event {
    /// A request; the response goes to `token`.
    Request {
        /// Who asks.
        peer: PeerKey,
        /// Names the request.
        token: u64,
        /// What it asks.
        request: Request,
    },
    /// Bytes that are no request.
    Malformed {
        /// Whose.
        peer: PeerKey,
    },
    /// An upload that was expected came to an end.
    Result {
        /// From whom.
        peer: PeerKey,
        /// Of which unit.
        unit: Hash,
        /// What came.
        arrival: Arrival,
    },
    /// A connection ended.
    Left {
        /// Whose.
        peer: PeerKey,
    },
    /// More messages than allowed.
    Flooding {
        /// Whose.
        peer: PeerKey,
    },
    /// An audit that the coordination peer itself was to compute is done.
    Executed {
        /// Names the audit.
        audit: TaskId,
        /// The receipt that it found.
        receipt: Hash,
    },
    /// Time passes.
    Tick,
    /// The operator pauses the run, or lets it go on.
    Pause(bool),
}

/// An audit for the coordination peer's own engine.
#[derive(Clone, Debug)]
pub struct Execution {
    /// Names the audit.
    pub audit: TaskId,
    /// Blob of the unit.
    pub unit: Hash,
    /// Blob of the claimed result.
    pub result: Hash,
    /// Weights of the unit.
    pub weights: Hash,
    /// The same, if they are at hand.
    pub version: Option<Arc<Version>>,
    /// Blobs that make them from nothing, in order.
    pub plan: Vec<Hash>,
}

/// The files of a checkpoint.
pub type Files = (Manifest, BTreeMap<String, Vec<u8>>);

/// Something to be done outside, in order.
#[derive(Debug)]
pub enum Effect {
    /// Keep these blobs and then these ledger records, so that they survive a crash.
    Persist {
        /// Blobs by hash.
        blobs: Vec<(Hash, Vec<u8>)>,
        /// Records as bytes, in order.
        records: Vec<Vec<u8>>,
    },
    /// Keep a state to start again from.
    Snapshot {
        /// Steps of all phases.
        ordinal: u64,
        /// What to keep.
        files: Box<Files>,
    },
    /// Forget states after this one: they rest on a lie.
    DropSnapshots {
        /// Steps of all phases.
        after: u64,
    },
    /// Answer a request.
    Reply {
        /// Names the request.
        token: u64,
        /// The answer.
        response: Response,
    },
    /// Answer a request with records of the ledger.
    ReplyRecords {
        /// Names the request.
        token: u64,
        /// First record.
        from: u64,
        /// At most so many.
        limit: u32,
    },
    /// Let a peer upload a result.
    Expect {
        /// Who.
        peer: PeerKey,
        /// Of which unit.
        unit: Hash,
        /// What the bytes must hash to.
        receipt: Hash,
        /// How many they are.
        bytes: u64,
    },
    /// Do not serve this peer any more.
    Ban(PeerKey),
    /// Compute an audit.
    Execute(Execution),
    /// Tell whoever watches.
    Announce(Box<StatusEvent>),
    /// Start again from the ledger: the run was rolled back.
    Restart,
    /// The run is complete.
    Closed(Hash),
    /// The run cannot go on.
    Failed(TrainError),
}
