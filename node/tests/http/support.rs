//! A coordination peer's HTTP side with made-up contents, and short ways to ask it.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, Request, Response, StatusCode};
use manyhands_core::learn::weights::BatchStats;
use manyhands_core::run::report::{EvalReport, PassReport, Phase, RlReport, StepReport};
use manyhands_core::run::state::Evaluation;
use manyhands_core::swarm::ids::{Hash, Signature};
use manyhands_core::swarm::ledger::{Entry, Offence, Record};
use manyhands_core::swarm::status::{Standing, Status, StatusEvent, VolunteerStatus};
use manyhands_node::http::{
    ADMIN_QUEUE_MAX, AdminCommand, AdminToken, BLOB_CHUNK_BYTES, Blob, Feed, HttpState, router,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;

pub(crate) const RECORDS: u64 = 5000;
pub(crate) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A coordination peer's HTTP side, and the other ends of what it holds.
pub(crate) struct Peer {
    pub(crate) state: HttpState,
    pub(crate) commands: mpsc::Receiver<AdminCommand>,
    pub(crate) status: watch::Sender<Arc<Status>>,
    pub(crate) dir: TempDir,
}

pub(crate) fn record(sequence: u64) -> Record {
    Record {
        sequence,
        previous: Hash([1; 32]),
        time_ms: 0,
        entry: Entry::Final { ordinal: sequence },
        signature: Signature([2; 64]),
    }
}

pub(crate) fn file_blob() -> Vec<u8> {
    (0..BLOB_CHUNK_BYTES * 2 + 1234).map(|i| (i * 31 % 251) as u8).collect()
}

pub(crate) fn peer() -> Peer {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blob");
    std::fs::write(&path, file_blob()).unwrap();
    let gone = dir.path().join("gone");
    let (status, receiver) = watch::channel(Arc::new(example_status()));
    let (admin, commands) = mpsc::channel(ADMIN_QUEUE_MAX);
    let file = Hash::of(&file_blob());
    let state = HttpState {
        status: receiver,
        feed: Arc::new(Feed::default()),
        manifest: Bytes::from_static(b"{\"run\":\"ab\"}"),
        ledger: Arc::new(|from, limit| {
            anyhow::ensure!(from != 4_000_000, "the disk at /secret is gone");
            Ok((from..RECORDS).take(limit).map(record).collect())
        }),
        blob: Arc::new(move |hash| match hash {
            h if *h == file => Some(Blob::File(path.clone())),
            h if *h == Hash::of(b"small") => Some(Blob::Bytes(Bytes::from_static(b"small"))),
            h if *h == Hash::of(b"gone") => Some(Blob::File(gone.clone())),
            _ => None,
        }),
        admin,
        token: Arc::new(AdminToken::open(dir.path()).unwrap()),
        p2p: None,
    };
    Peer { state, commands, status, dir }
}

pub(crate) fn example_status() -> Status {
    let volunteer = VolunteerStatus {
        peer: "cd".repeat(32),
        standing: Standing::Trusted,
        agent: "manyhands \"0.1\"\n".into(),
        connected: true,
        expelled_for: Some(Offence::Flooding),
        ..Default::default()
    };
    Status {
        run: "ab".repeat(32),
        name: "first \"run\"\nwith a line".into(),
        ordinal: 7,
        steps: 90,
        volunteers: vec![volunteer],
        bytes: BTreeMap::from([("weights".into(), 12)]),
        last_step: Some(step(7)),
        last_evaluation: Some(evaluation(6)),
        ..Default::default()
    }
}

pub(crate) fn step(n: u64) -> StepReport {
    let rl = RlReport {
        reward: 0.25,
        length: 8.0,
        truncated: 0.0,
        entropy: 1.0,
        entropy_coefficient: 0.0,
        groups_sampled: 4,
        groups_kept: 3,
        groups_all_wrong: 1,
        groups_all_right: 0,
        policy_lag: 1,
        sampler_mismatch: 0.0,
        batch: BatchStats::default(),
        reset: None,
    };
    StepReport {
        phase: Phase::Rl,
        step: n,
        policy_version: n,
        loss: 0.5,
        grad_norm: 1.0,
        learning_rate: 1e-3,
        trained_tokens: 10,
        sampled_tokens: 20,
        saturations: BTreeMap::new(),
        rl: Some(rl),
    }
}

pub(crate) fn evaluation(n: u64) -> Evaluation {
    let overall = PassReport {
        problems: 4,
        samples: 4,
        correct: 5,
        pass_at_k: BTreeMap::new(),
        answer_entropy: 0.0,
        distinct_answers: 1.0,
    };
    let report = EvalReport {
        temperature: 1.0,
        overall,
        families: BTreeMap::new(),
        greedy: 0.5,
        token_entropy: 0.1,
        length: 3.0,
        truncated: 0.0,
        weights: "ef".into(),
    };
    Evaluation { phase: Phase::Rl, step: n, report }
}

pub(crate) fn step_event(n: u64) -> StatusEvent {
    StatusEvent::Step { ordinal: n, report: Box::new(step(n)) }
}

pub(crate) fn evaluation_event(n: u64) -> StatusEvent {
    StatusEvent::Evaluation { ordinal: n, evaluation: Box::new(evaluation(n)) }
}

impl Peer {
    pub(crate) fn router(&self) -> Router {
        router(self.state.clone())
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router().oneshot(request).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, HeaderMap, Vec<u8>) {
        split(self.send(Request::get(path).body(Body::empty()).unwrap()).await).await
    }

    pub(crate) async fn json(&self, path: &str) -> Value {
        let (status, headers, body) = self.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert_eq!(headers["content-type"], "application/json", "{path}");
        serde_json::from_slice(&body).unwrap()
    }

    /// Status code and message of an error.
    pub(crate) async fn error(&self, request: Request<Body>) -> (StatusCode, String) {
        let (status, _, body) = split(self.send(request).await).await;
        let json: Value = serde_json::from_slice(&body).unwrap();
        (status, json["error"].as_str().unwrap().to_string())
    }

    pub(crate) async fn get_error(&self, path: &str) -> (StatusCode, String) {
        self.error(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) fn admin(&self, action: &str, authorization: &str) -> Request<Body> {
        Request::post(format!("/api/admin/{action}"))
            .header("authorization", authorization)
            .body(Body::empty())
            .unwrap()
    }

    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.state.token.text())
    }
}

pub(crate) async fn split(response: Response<Body>) -> (StatusCode, HeaderMap, Vec<u8>) {
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, ANSWER_BYTES_MAX).await.unwrap();
    (parts.status, parts.headers, bytes.to_vec())
}
