//! `/api/records`: the ledger backwards, by kind of record or by who is named.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use manyhands_core::swarm::chain;
use manyhands_core::swarm::ids::PeerKey;
use manyhands_core::swarm::ledger::{Entry, Record};
use serde::{Deserialize, Serialize};

use super::error::ApiError;
use super::routes::ledger_failed;
use super::{HttpState, LedgerReader};

/// Most records in one answer.
pub const RECORDS_MAX: usize = 100;
/// The same, when the caller does not say.
const RECORDS_DEFAULT: usize = 25;
/// Records that one request looks through.
pub const RECORDS_SCANNED_MAX: u64 = 5000;
/// Records that are decoded at once.
const CHUNK: u64 = 500;

/// What is asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Only records before this one; the newest come first.
    before: Option<u64>,
    limit: Option<usize>,
    kind: Option<Kind>,
    /// Only records that name this volunteer.
    by: Option<String>,
}

/// Kinds of records, as the entry's name in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Open,
    Unit,
    Audit,
    Expelled,
    Voided,
    Version,
    Final,
    RolledBack,
    Follower,
    Closed,
    Promoted,
}

/// One page, newest first.
#[derive(Debug, Serialize)]
struct RecordPage {
    records: Vec<Record>,
    /// What to ask for as `before` to go on; `None` at the beginning of the ledger.
    next: Option<u64>,
}

pub(super) async fn records(
    State(state): State<HttpState>,
    query: Result<Query<Wanted>, QueryRejection>,
) -> Result<Response, ApiError> {
    let bad = |text: String| ApiError::new(StatusCode::BAD_REQUEST, text);
    let Query(wanted) = query.map_err(|error| {
        bad(format!(
            "{}; ask with ?kind=KIND&by=VOLUNTEER&before=NUMBER&limit=NUMBER",
            error.body_text()
        ))
    })?;
    let by = match wanted.by.as_deref().map(PeerKey::parse) {
        Some(None) => return Err(bad("`by` is no identity: 64 hexadecimal digits".into())),
        found => found.flatten(),
    };
    let count = state.status.borrow().ledger_records;
    let before = wanted.before.unwrap_or(count).min(count);
    let limit = wanted.limit.unwrap_or(RECORDS_DEFAULT).clamp(1, RECORDS_MAX);
    let kind = wanted.kind;
    let matches = move |record: &Record| {
        kind.is_none_or(|kind| kind == kind_of(&record.entry))
            && by.is_none_or(|by| names(&record.entry, &by))
    };
    let read = tokio::task::spawn_blocking(move || page(&state.ledger, before, limit, matches));
    let page = read.await.map_err(|e| ledger_failed(&e.to_string()))?;
    Ok(Json(page.map_err(|e| ledger_failed(&format!("{e:#}")))?).into_response())
}

/// Looks backwards from `before`.
fn page(
    ledger: &LedgerReader,
    before: u64,
    limit: usize,
    matches: impl Fn(&Record) -> bool,
) -> anyhow::Result<RecordPage> {
    let mut records = Vec::new();
    let mut end = before;
    let stop = before.saturating_sub(RECORDS_SCANNED_MAX);
    while end > stop {
        let from = end.saturating_sub(CHUNK).max(stop);
        let mut chunk = ledger(from, (end - from) as usize)?;
        while let Some(record) = chunk.pop() {
            let record = chain::decode(&record)?;
            if !matches(&record) {
                continue;
            }
            let sequence = record.sequence;
            records.push(record);
            if records.len() == limit {
                return Ok(RecordPage { records, next: (sequence > 0).then_some(sequence) });
            }
        }
        end = from;
    }
    Ok(RecordPage { records, next: (end > 0).then_some(end) })
}

fn kind_of(entry: &Entry) -> Kind {
    match entry {
        Entry::Open { .. } => Kind::Open,
        Entry::Unit(_) => Kind::Unit,
        Entry::Audit { .. } => Kind::Audit,
        Entry::Expelled { .. } => Kind::Expelled,
        Entry::Voided { .. } => Kind::Voided,
        Entry::Version { .. } => Kind::Version,
        Entry::Final { .. } => Kind::Final,
        Entry::RolledBack { .. } => Kind::RolledBack,
        Entry::Follower { .. } => Kind::Follower,
        Entry::Closed { .. } => Kind::Closed,
        Entry::Promoted { .. } => Kind::Promoted,
    }
}

/// Whether an entry is about a volunteer.
fn names(entry: &Entry, peer: &PeerKey) -> bool {
    match entry {
        Entry::Unit(unit) => unit.volunteer == *peer,
        Entry::Audit { volunteer, auditor, .. } => volunteer == peer || auditor == peer,
        Entry::Expelled { volunteer, .. } | Entry::Voided { volunteer, .. } => volunteer == peer,
        _ => false,
    }
}
