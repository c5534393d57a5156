//! Reading a ledger from a host's pages, and hosts that send what nobody asked for.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use manyhands_core::swarm::chain;
use manyhands_node::http::{PAGE_MAX, bind, serve};
use manyhands_node::ledger_pages::LedgerPages;
use tokio::task::spawn_blocking;

use crate::support::{RECORDS, peer, record};

#[tokio::test]
async fn ledger_comes_back_byte_for_byte_over_many_pages() {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(serve(listener, peer().state, std::future::pending()));
    let read = spawn_blocking(move || {
        let mut pages = LedgerPages::of(&format!("http://{address}/"));
        let records: Vec<Vec<u8>> = pages.by_ref().collect();
        pages.finish().unwrap();
        records
    });
    let expected: Vec<Vec<u8>> = (0..RECORDS).map(|i| chain::encode(&record(i))).collect();
    assert_eq!(read.await.unwrap(), expected);
    server.abort();
}

/// Answers one request with this text.
fn answering(body: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
        let length = body.len();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        // Whoever has read enough may hang up.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    });
    format!("http://{address}")
}

fn error_of(body: String) -> String {
    let mut pages = LedgerPages::of(&answering(body));
    assert_eq!(pages.next(), None);
    format!("{:#}", pages.finish().unwrap_err())
}

#[test]
fn page_over_its_bounds_or_of_something_else_is_refused() {
    let records: Vec<_> = (0..=PAGE_MAX as u64).map(record).collect();
    let text = error_of(serde_json::to_string(&records).unwrap());
    assert!(text.contains("more records"), "{text}");
    let text =
        error_of(" ".repeat(manyhands_node::ledger_pages::LEDGER_PAGE_BYTES_MAX as usize + 1));
    assert!(text.contains("cannot read a page"), "{text}");
    let text = error_of("<html>".into());
    assert!(text.contains("no ledger"), "{text}");
}
