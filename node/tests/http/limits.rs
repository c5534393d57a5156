//! Who watches, who connects, and how many of them.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use futures::StreamExt;
use manyhands_core::swarm::status::StatusEvent;
use manyhands_node::http::{CONNECTIONS_MAX, FEED_QUEUE_MAX, SSE_CLIENTS_MAX, bind, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::support::{peer, step_event};

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
    let server = tokio::spawn(serve(listener, peer.state.clone(), None, async {
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
    tokio::spawn(serve(listener, peer.state.clone(), None, std::future::pending()));
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
