//! The page as the host serves it: embedded, packed, tagged, and with nothing from elsewhere.

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use manyhands_core::run::samples::{SampleGroup, SampleRollout};
use manyhands_core::swarm::status::StatusEvent;
use manyhands_node::http::{FileSize, file_sizes};

use crate::support::{Peer, peer, split};

/// All files of the page, and of the tab if it was built, as they are sent.
const PAGE_BYTES_MAX: usize = 2 << 20;
/// Largest size of the words of imported models, sent.
const WORDS_BYTES_MAX: usize = 1_300_000;

async fn ask(peer: &Peer, path: &str, header: (&str, &str)) -> (StatusCode, HeaderMap, Vec<u8>) {
    let request = Request::get(path).header(header.0, header.1).body(Body::empty()).unwrap();
    split(peer.send(request).await).await
}

#[tokio::test]
async fn page_and_its_files_have_types_tags_and_a_strict_policy() {
    let peer = peer();
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/index.html", "text/html; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/views/run.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
        ("/vendor/uplot/uPlot.esm.js", "text/javascript; charset=utf-8"),
        ("/vendor/uplot/LICENSE", "text/plain; charset=utf-8"),
        ("/vendor/fonts/hanken-grotesk.woff2", "font/woff2"),
    ] {
        let (status, headers, body) = peer.get(path).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert_eq!(headers["content-type"], kind, "{path}");
        assert!(!headers.contains_key("content-encoding") && !body.is_empty(), "{path}");
        let policy = headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self' 'wasm-unsafe-eval';"));
        assert!(!policy.contains("unsafe-inline") && !policy.contains("http"), "{policy}");
        let tag = headers["etag"].to_str().unwrap();
        for known in [tag.to_string(), format!("\"other\", W/{tag}")] {
            let (status, _, body) = ask(&peer, path, ("if-none-match", &known)).await;
            assert_eq!((status, body.len()), (StatusCode::NOT_MODIFIED, 0), "{path}");
        }
        assert_eq!(ask(&peer, path, ("if-none-match", "\"other\"")).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn page_is_packed_for_browsers_that_take_it() {
    let peer = peer();
    let (_, _, whole) = peer.get("/vendor/uplot/uPlot.esm.js").await;
    let accept = ("accept-encoding", "br, gzip");
    let (_, headers, packed) = ask(&peer, "/vendor/uplot/uPlot.esm.js", accept).await;
    assert_eq!(headers["content-encoding"], "gzip");
    assert_eq!(headers["vary"], "accept-encoding");
    assert!(packed.starts_with(&[0x1f, 0x8b]) && packed.len() < whole.len() / 2);
    // Fonts are packed already.
    let (_, headers, _) = ask(&peer, "/vendor/fonts/hanken-grotesk.woff2", accept).await;
    assert!(!headers.contains_key("content-encoding"));
}

/// The figures are for `--nocapture`; the bound is for everybody who waits on a slow line.
#[tokio::test]
async fn page_and_tab_together_stay_under_two_megabytes() {
    let sizes = file_sizes();
    for size in &sizes {
        println!("{:>9} {:>9} {}", size.bytes, size.sent_bytes, size.path);
    }
    // Loaded by those only who talk to an imported model.
    let are_words = |s: &&FileSize| s.path.starts_with("/pkg/manyhands_words");
    let (words, others): (Vec<&FileSize>, Vec<_>) = sizes.iter().partition(are_words);
    for (what, files, most) in [("words", words, WORDS_BYTES_MAX), ("else", others, PAGE_BYTES_MAX)]
    {
        let sent: usize = files.iter().map(|s| s.sent_bytes).sum();
        println!("{sent:>19} {what}, as sent");
        assert!(sent < most, "{what}: {sent}");
        assert!(what == "words" || sent > 100_000, "{what}: {sent}");
    }
}

/// Nothing that a browser would fetch is anywhere but here, and peers' words stay text.
#[tokio::test]
async fn page_needs_nothing_from_elsewhere() {
    let peer = peer();
    for size in file_sizes() {
        let own = !size.path.starts_with("/vendor/") && !size.path.starts_with("/pkg/");
        let is_code = [".js", ".html", ".css"].iter().any(|end| size.path.ends_with(end));
        if !own || !is_code {
            continue;
        }
        let (_, _, body) = peer.get(size.path).await;
        let text = String::from_utf8(body).unwrap();
        // The one address is the name of SVG's namespace, which is never fetched.
        let text = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http://") && !text.contains("https://"), "{}", size.path);
        assert!(!text.contains("innerHTML") && !text.contains("eval("), "{}", size.path);
    }
}

#[tokio::test]
async fn page_paths_do_not_lead_elsewhere() {
    let peer = peer();
    for path in
        ["/nowhere", "/../Cargo.toml", "/app.js/", "//app.js", "/views/", "/%2e%2e/run.toml"]
    {
        assert_eq!(peer.get_error(path).await.0, StatusCode::NOT_FOUND, "{path}");
    }
    let request = Request::post("/app.js").body(Body::empty()).unwrap();
    assert_eq!(peer.error(request).await.0, StatusCode::NOT_FOUND);
}

/// Samples of steps that were rolled back are gone with them.
#[tokio::test]
async fn samples_are_shown_until_their_step_is_taken_back() {
    let peer = peer();
    assert_eq!(peer.json("/api/samples").await["groups"], serde_json::json!([]));
    let group = |step| SampleGroup {
        step,
        index: 1,
        policy_version: 3,
        problem: "2+2=".into(),
        rollouts_sampled: 8,
        rollouts: vec![SampleRollout {
            reward: 1.0,
            advantage: Some(0.5),
            ended: true,
            length: 3,
            tokens: vec!["#".into(), "4".into(), String::new()],
            entropies: vec![0.1, 0.2, 0.0],
        }],
    };
    peer.state.feed.show_samples([group(4), group(5)].iter());
    let shown = peer.json("/api/samples").await;
    assert_eq!(shown["groups"][1]["step"], 5);
    assert_eq!(shown["groups"][0]["rollouts"][0]["tokens"][1], "4");
    peer.state.feed.publish(&StatusEvent::RolledBack { ordinal: 4 });
    assert_eq!(peer.json("/api/samples").await["groups"].as_array().unwrap().len(), 1);
}
