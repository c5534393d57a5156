//! The HTTP side of a coordination peer: every route, every bound, every refusal.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, Request, Response, StatusCode};
use futures::StreamExt;
use manyhands_core::learn::weights::BatchStats;
use manyhands_core::run::report::{EvalReport, PassReport, Phase, RlReport, StepReport};
use manyhands_core::run::state::Evaluation;
use manyhands_core::swarm::ids::{Hash, Signature};
use manyhands_core::swarm::ledger::{Entry, Offence, Record};
use manyhands_core::swarm::status::{Standing, Status, StatusEvent, VolunteerStatus};
use manyhands_node::http::{
    ADMIN_QUEUE_MAX, AdminAction, AdminCommand, AdminToken, BLOB_CHUNK_BYTES, BODY_BYTES_MAX, Blob,
    CONNECTIONS_MAX, FEED_QUEUE_MAX, Feed, HttpState, PAGE_MAX, ROUTES, SSE_CLIENTS_MAX, STEPS_MAX,
    bind, metrics_text, router, serve,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tower::ServiceExt;

const RECORDS: u64 = 5000;
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A coordination peer's HTTP side, and the other ends of what it holds.
struct Peer {
    state: HttpState,
    commands: mpsc::Receiver<AdminCommand>,
    status: watch::Sender<Arc<Status>>,
    dir: TempDir,
}

fn record(sequence: u64) -> Record {
    Record {
        sequence,
        previous: Hash([1; 32]),
        time_ms: 0,
        entry: Entry::Final { ordinal: sequence },
        signature: Signature([2; 64]),
    }
}

fn file_blob() -> Vec<u8> {
    (0..BLOB_CHUNK_BYTES * 2 + 1234).map(|i| (i * 31 % 251) as u8).collect()
}

fn peer() -> Peer {
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
    };
    Peer { state, commands, status, dir }
}

fn example_status() -> Status {
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

fn step(n: u64) -> StepReport {
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

fn evaluation(n: u64) -> Evaluation {
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

fn step_event(n: u64) -> StatusEvent {
    StatusEvent::Step { ordinal: n, report: Box::new(step(n)) }
}

fn evaluation_event(n: u64) -> StatusEvent {
    StatusEvent::Evaluation { ordinal: n, evaluation: Box::new(evaluation(n)) }
}

impl Peer {
    fn router(&self) -> Router {
        router(self.state.clone())
    }

    async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router().oneshot(request).await.unwrap()
    }

    async fn get(&self, path: &str) -> (StatusCode, HeaderMap, Vec<u8>) {
        split(self.send(Request::get(path).body(Body::empty()).unwrap()).await).await
    }

    async fn json(&self, path: &str) -> Value {
        let (status, headers, body) = self.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert_eq!(headers["content-type"], "application/json", "{path}");
        serde_json::from_slice(&body).unwrap()
    }

    /// Status code and message of an error.
    async fn error(&self, request: Request<Body>) -> (StatusCode, String) {
        let (status, _, body) = split(self.send(request).await).await;
        let json: Value = serde_json::from_slice(&body).unwrap();
        (status, json["error"].as_str().unwrap().to_string())
    }

    async fn get_error(&self, path: &str) -> (StatusCode, String) {
        self.error(Request::get(path).body(Body::empty()).unwrap()).await
    }

    fn admin(&self, action: &str, authorization: &str) -> Request<Body> {
        Request::post(format!("/api/admin/{action}"))
            .header("authorization", authorization)
            .body(Body::empty())
            .unwrap()
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.state.token.text())
    }
}

async fn split(response: Response<Body>) -> (StatusCode, HeaderMap, Vec<u8>) {
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, ANSWER_BYTES_MAX).await.unwrap();
    (parts.status, parts.headers, bytes.to_vec())
}

#[tokio::test]
async fn routes_that_are_listed_all_answer() {
    let peer = peer();
    let listed = peer.json("/api").await;
    assert_eq!(listed.as_array().unwrap().len(), ROUTES.len());
    for route in ROUTES {
        let path = route.path.replace("{hash}", &Hash::of(b"small").to_string());
        let request =
            Request::builder().method(route.method).uri(&path).body(Body::empty()).unwrap();
        let response = peer.send(request).await;
        let expected =
            if path.starts_with("/api/admin") { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        assert_eq!(response.status(), expected, "{path}");
        let headers = response.headers();
        assert!(headers["content-security-policy"].to_str().unwrap().contains("'self'"), "{path}");
        assert_eq!(headers["x-content-type-options"], "nosniff", "{path}");
        let shared = headers.contains_key("access-control-allow-origin");
        assert_eq!(shared, path.starts_with("/api") && !path.contains("admin"), "{path}");
    }
}

/// The page works without any other host, and what it asks for exists.
#[tokio::test]
async fn dashboard_needs_nothing_from_elsewhere() {
    let peer = peer();
    let (_, _, page) = peer.get("/").await;
    let page = String::from_utf8(page).unwrap();
    let mut texts = vec![page];
    for asset in ["dashboard.js", "charts.js", "dashboard.css"] {
        let (status, headers, body) = peer.get(&format!("/assets/{asset}")).await;
        assert_eq!(status, StatusCode::OK);
        let kind = if asset.ends_with("js") { "text/javascript" } else { "text/css" };
        assert!(headers["content-type"].to_str().unwrap().starts_with(kind));
        texts.push(String::from_utf8(body).unwrap());
    }
    let links = |t: &String| t.matches("https:").count() + t.matches("http:").count();
    // The one address is the name of SVG's namespace, which is never fetched.
    assert_eq!(texts.iter().map(links).sum::<usize>(), 1);
    assert!(!texts.iter().any(|t| t.contains("innerHTML")), "peers' words must stay text");
    // Every id that the script asks for is on the page.
    for id in texts[1].split("$(\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert!(texts[0].contains(&format!("id=\"{id}\"")), "{id}");
    }
}

#[tokio::test]
async fn status_follows_the_watch() {
    let peer = peer();
    let status: Status = serde_json::from_value(peer.json("/api/status").await).unwrap();
    assert_eq!(status, example_status());
    peer.status.send(Arc::new(Status { ordinal: 8, ..example_status() })).unwrap();
    assert_eq!(peer.json("/api/status").await["ordinal"], 8);
    assert_eq!(peer.json("/api/manifest").await["run"], "ab");
}

#[tokio::test]
async fn ledger_pages_are_bounded_and_complete() {
    let peer = peer();
    let page = peer.json("/api/ledger?from=4990&limit=7").await;
    let records: Vec<Record> = serde_json::from_value(page).unwrap();
    assert_eq!(records, (4990..4997).map(record).collect::<Vec<_>>());
    let page = peer.json("/api/ledger?limit=999999999").await;
    assert_eq!(page.as_array().unwrap().len(), PAGE_MAX);
    assert_eq!(peer.json("/api/ledger?from=5000").await, Value::Array(vec![]));
    for bad in ["from=-1", "from=x", "limit=1e3", "form=1", "from=18446744073709551616"] {
        let (status, text) = peer.get_error(&format!("/api/ledger?{bad}")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{bad}");
        assert!(text.contains("?from=NUMBER"), "{text}");
    }
}

/// What went wrong inside is for the operator's log.
#[tokio::test]
async fn ledger_that_cannot_be_read_does_not_leak_paths() {
    let (status, text) = peer().get_error("/api/ledger?from=4000000").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(!text.contains("secret"), "{text}");
}

#[tokio::test]
async fn blob_is_streamed_whole_or_in_part() {
    let peer = peer();
    let hash = Hash::of(&file_blob());
    let (status, headers, body) = peer.get(&format!("/api/blobs/{hash}")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(headers["content-length"], file_blob().len().to_string());
    assert_eq!(headers["etag"], format!("\"{hash}\""));
    assert_eq!(Hash::of(&body), hash);

    let first = BLOB_CHUNK_BYTES - 5;
    let request = Request::get(format!("/api/blobs/{hash}"))
        .header("range", format!("bytes={first}-{}", first + 9));
    let (status, headers, body) =
        split(peer.send(request.body(Body::empty()).unwrap()).await).await;
    assert_eq!(status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(body, &file_blob()[first..first + 10]);
    let range = format!("bytes {first}-{}/{}", first + 9, file_blob().len());
    assert_eq!(headers["content-range"], range);

    let request = Request::get(format!("/api/blobs/{hash}")).header("range", "bytes=99999999-");
    let (status, text) = peer.error(request.body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::RANGE_NOT_SATISFIABLE, "{text}");

    let (_, headers, body) = peer.get(&format!("/api/blobs/{}", Hash::of(b"small"))).await;
    assert_eq!(
        (body.as_slice(), headers["content-length"].to_str().unwrap()),
        (&b"small"[..], "5")
    );
}

#[tokio::test]
async fn blob_of_a_bad_or_unknown_hash_is_refused() {
    let peer = peer();
    for bad in ["00", &"zz".repeat(32), "..%2Fadmin-token", &"0".repeat(4000)] {
        let (status, text) = peer.get_error(&format!("/api/blobs/{bad}")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{bad}");
        assert!(text.contains("64 hexadecimal digits"), "{text}");
    }
    for absent in [Hash::of(b"unknown"), Hash::of(b"gone")] {
        let (status, text) = peer.get_error(&format!("/api/blobs/{absent}")).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{text}");
    }
    assert_eq!(peer.get_error("/api/blobs/../../etc/passwd").await.0, StatusCode::NOT_FOUND);
    assert_eq!(peer.get_error("/nowhere").await.0, StatusCode::NOT_FOUND);
    let request = Request::delete("/api/status").body(Body::empty()).unwrap();
    assert_eq!(peer.error(request).await.0, StatusCode::METHOD_NOT_ALLOWED);
}

/// After a rollback the steps that were taken back are no history.
#[tokio::test]
async fn steps_and_evaluations_follow_events_and_rollbacks() {
    let peer = peer();
    (1..=5).for_each(|n| peer.state.feed.publish(&step_event(n)));
    [2, 4].into_iter().for_each(|n| peer.state.feed.publish(&evaluation_event(n)));
    let lines = peer.json("/api/steps?from=2&limit=2").await;
    let ordinals = |v: &Value| -> Vec<u64> {
        v.as_array().unwrap().iter().map(|l| l["ordinal"].as_u64().unwrap()).collect()
    };
    assert_eq!(ordinals(&lines), [2, 3]);
    assert_eq!(lines[0]["reward"], 0.25);
    assert_eq!(lines[0]["loss"], 0.5);
    let evaluations = peer.json("/api/evaluations").await;
    assert_eq!(ordinals(&evaluations), [2, 4]);
    assert_eq!(evaluations[0]["report"]["greedy"], 0.5);
    peer.state.feed.publish(&StatusEvent::RolledBack { ordinal: 3 });
    assert_eq!(ordinals(&peer.json("/api/steps").await), [1, 2, 3]);
    assert_eq!(ordinals(&peer.json("/api/evaluations").await), [2]);
}

#[tokio::test]
async fn history_is_bounded() {
    let peer = peer();
    let count = STEPS_MAX as u64 + 3;
    (1..=count).for_each(|n| peer.state.feed.publish(&step_event(n)));
    let all = peer.state.feed.steps(0, usize::MAX);
    assert_eq!(all.len(), STEPS_MAX);
    assert_eq!(all[0].ordinal, 4);
    let page = peer.json("/api/steps?limit=100000").await;
    assert_eq!(page.as_array().unwrap().len(), PAGE_MAX);
}

/// Reads a stream until `wanted` occurs in it.
async fn read_until(body: &mut axum::body::BodyDataStream, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        text += std::str::from_utf8(&body.next().await.unwrap().unwrap()).unwrap();
    }
    text
}

#[tokio::test]
async fn events_reach_a_client_in_order() {
    let peer = peer();
    let response = peer.send(Request::get("/api/events").body(Body::empty()).unwrap()).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.into_body().into_data_stream();
    read_until(&mut body, "event: hello").await;
    peer.state.feed.publish(&StatusEvent::Warning { text: "two\nlines".into() });
    peer.state.feed.publish(&step_event(3));
    let text = read_until(&mut body, "event: step").await;
    let data = text.lines().find_map(|l| l.strip_prefix("data: {\"event\":\"warning\"")).unwrap();
    assert_eq!(data, ",\"text\":\"two\\nlines\"}");
    assert!(text.find("event: warning").unwrap() < text.find("event: step").unwrap());
    assert!(text.contains("\"ordinal\":3"), "{text}");
}

/// A client that does not read costs a bounded queue, and learns that it missed something.
#[tokio::test]
async fn events_of_a_slow_client_are_dropped_and_it_is_told() {
    let peer = peer();
    let response = peer.send(Request::get("/api/events").body(Body::empty()).unwrap()).await;
    let mut body = response.into_body().into_data_stream();
    read_until(&mut body, "event: hello").await;
    let count = FEED_QUEUE_MAX as u64 + 10;
    (1..=count).for_each(|n| peer.state.feed.publish(&StatusEvent::Final { ordinal: n }));
    let text = read_until(&mut body, &format!("\"ordinal\":{count}}}")).await;
    assert!(text.contains("\"event\":\"lagged\",\"missed\":10}"), "{}", &text[..200]);
}

#[tokio::test]
async fn events_clients_over_the_bound_are_refused_until_one_leaves() {
    let peer = peer();
    let open = || peer.send(Request::get("/api/events").body(Body::empty()).unwrap());
    let mut clients = Vec::new();
    for _ in 0..SSE_CLIENTS_MAX {
        let response = open().await;
        assert_eq!(response.status(), StatusCode::OK);
        clients.push(response);
    }
    assert_eq!(open().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    clients.pop();
    assert_eq!(open().await.status(), StatusCode::OK);
}

#[tokio::test]
async fn admin_with_the_token_is_carried_out() {
    let mut peer = peer();
    for (name, action) in [
        ("pause", AdminAction::Pause),
        ("resume", AdminAction::Resume),
        ("stop", AdminAction::Stop),
    ] {
        let request = peer.admin(name, &peer.bearer());
        let answer = tokio::spawn(peer.router().oneshot(request));
        let command = peer.commands.recv().await.unwrap();
        assert_eq!(command.action, action);
        command.reply.send(Ok(())).unwrap();
        let (status, _, body) = split(answer.await.unwrap().unwrap()).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(body, format!("{{\"done\":\"{name}\"}}").as_bytes());
    }
    let request = peer.admin("pause", &peer.bearer());
    let answer = tokio::spawn(peer.router().oneshot(request));
    peer.commands.recv().await.unwrap().reply.send(Err("it is paused already".into())).unwrap();
    let (status, _, body) = split(answer.await.unwrap().unwrap()).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(body, b"{\"error\":\"it is paused already\"}");
    let request = peer.admin("explode", &peer.bearer());
    assert_eq!(peer.error(request).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn admin_without_the_token_does_nothing() {
    let mut peer = peer();
    let token = peer.state.token.text().to_string();
    let almost = format!("Bearer {}0", &token[..63]);
    let short = format!("Bearer {}", &token[..63]);
    for bad in ["", "Bearer ", "Basic abc", &token, &almost, &short] {
        let (status, text) = peer.error(peer.admin("stop", bad)).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{bad}");
        assert!(text.contains("admin-token") && !text.contains(&token), "{text}");
    }
    assert!(peer.commands.try_recv().is_err());
    let request = Request::get("/api/admin/stop").header("authorization", peer.bearer());
    let (status, _) = peer.error(request.body(Body::empty()).unwrap()).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    drop(peer.dir);
}

/// A coordination peer that hangs does not pile commands up, and its end is no hang here.
#[tokio::test]
async fn admin_commands_over_the_queue_are_refused() {
    let mut peer = peer();
    for _ in 0..ADMIN_QUEUE_MAX {
        let (reply, _) = oneshot::channel();
        peer.state.admin.try_send(AdminCommand { action: AdminAction::Pause, reply }).unwrap();
    }
    let (status, text) = peer.error(peer.admin("stop", &peer.bearer())).await;
    assert_eq!((status, text.contains("waiting")), (StatusCode::SERVICE_UNAVAILABLE, true));
    peer.commands.close();
    let (status, text) = peer.error(peer.admin("stop", &peer.bearer())).await;
    assert_eq!((status, text.contains("ending")), (StatusCode::SERVICE_UNAVAILABLE, true));
}

#[tokio::test]
async fn body_over_the_bound_is_refused_with_and_without_a_length() {
    let peer = peer();
    let large = || vec![b'x'; BODY_BYTES_MAX + 1];
    let request = |body| {
        Request::post("/api/admin/pause").header("authorization", peer.bearer()).body(body).unwrap()
    };
    let chunks = futures::stream::iter([Ok::<_, std::io::Error>(large())]);
    let unknown = request(Body::from_stream(chunks));
    assert_eq!(peer.error(unknown).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let mut stated = request(Body::from(large()));
    stated.headers_mut().insert("content-length", large().len().into());
    assert_eq!(peer.error(stated).await.0, StatusCode::PAYLOAD_TOO_LARGE);
}

/// Every line is one that Prometheus reads, whatever a run file or a volunteer calls itself.
#[tokio::test]
async fn metrics_parse() {
    let (_, headers, body) = peer().get("/metrics").await;
    assert!(headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = String::from_utf8(body).unwrap();
    assert!(text.ends_with("# EOF\n"));
    let mut values = BTreeMap::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{line}");
        values.insert(series.to_string(), value.parse::<f64>().unwrap());
    }
    assert_eq!(values["manyhands_steps_done"], 7.0);
    assert_eq!(values["manyhands_reward_mean"], 0.25);
    assert_eq!(values["manyhands_volunteers{standing=\"trusted\"}"], 1.0);
    assert_eq!(values["manyhands_state{state=\"running\"}"], 1.0);
    assert_eq!(values["manyhands_moved_bytes_total{purpose=\"weights\"}"], 12.0);
    assert!(metrics_text(&Status::default()).unwrap().contains("manyhands_steps_done 0"));
}

/// Reads an answer with a Content-Length from a kept-alive connection.
async fn read_answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = stream.read(&mut chunk).await.unwrap();
        text.extend_from_slice(&chunk[..read]);
        let seen = String::from_utf8_lossy(&text).into_owned();
        let Some((header, body)) = seen.split_once("\r\n\r\n") else { continue };
        let length = header.to_ascii_lowercase();
        let length = length.split("content-length: ").nth(1).unwrap();
        if read == 0 || body.len() >= length.lines().next().unwrap().parse().unwrap() {
            return seen;
        }
    }
}

#[tokio::test]
async fn connections_over_the_bound_are_told_so_until_one_closes() {
    let peer = peer();
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(serve(listener, peer.state.clone(), async {
        let _ = stopped.await;
    }));
    let ask = b"GET /api/manifest HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(ask).await.unwrap();
        assert!(read_answer(&mut client).await.starts_with("HTTP/1.1 200"));
        clients.push(client);
    }
    let mut refused = TcpStream::connect(address).await.unwrap();
    let text = read_answer(&mut refused).await;
    assert!(text.starts_with("HTTP/1.1 503") && text.contains("too many"), "{text}");
    // The server notices a closed connection in its own time.
    clients.pop();
    loop {
        let mut client = TcpStream::connect(address).await.unwrap();
        if client.write_all(ask).await.is_ok() && answered(&mut client).await {
            break;
        }
        tokio::task::yield_now().await;
    }
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    let mut end = [0; 1];
    assert!(matches!(clients[0].read(&mut end).await, Ok(0) | Err(_)), "still open after the end");
}

/// Whether a connection gets a manifest: one that is refused may be reset.
async fn answered(client: &mut TcpStream) -> bool {
    let mut chunk = [0; 256];
    let read = client.read(&mut chunk).await.unwrap_or(0);
    chunk[..read].starts_with(b"HTTP/1.1 200")
}

#[tokio::test]
async fn header_over_the_bound_ends_the_connection() {
    let peer = peer();
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, peer.state.clone(), std::future::pending()));
    let mut client = TcpStream::connect(address).await.unwrap();
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
    // The server may hang up before it has all of it.
    let _ = client.write_all(long.as_bytes()).await;
    assert!(!answered(&mut client).await);
}

#[tokio::test]
async fn port_that_is_taken_names_the_flag() {
    let first = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let text = format!("{:#}", bind(first.local_addr().unwrap()).await.unwrap_err());
    assert!(text.contains("taken by another program") && text.contains("--http"), "{text}");
    let text = format!("{:#}", bind("192.0.2.1:0".parse().unwrap()).await.unwrap_err());
    assert!(text.contains("no address of this machine"), "{text}");
}
