//! The HTTP side of a coordination peer: every route, every bound, every refusal.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod limits;
mod p2p;
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::Record;
use manyhands_core::swarm::status::{Status, StatusEvent};
use manyhands_node::http::{
    ADMIN_QUEUE_MAX, AdminAction, AdminCommand, BLOB_CHUNK_BYTES, BODY_BYTES_MAX, PAGE_MAX, ROUTES,
    STEPS_MAX, metrics_text,
};
use serde_json::Value;
use tokio::sync::oneshot;
use tower::ServiceExt;

use support::{evaluation_event, example_status, file_blob, peer, record, split, step_event};

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
        let expected = match path.as_str() {
            "/p2p" => StatusCode::UPGRADE_REQUIRED,
            p if p.starts_with("/api/admin") => StatusCode::UNAUTHORIZED,
            _ => StatusCode::OK,
        };
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
