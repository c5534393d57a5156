//! `/api/records`: the ledger backwards.

use std::sync::Arc;

use axum::http::StatusCode;
use manyhands_core::swarm::chain::encode;
use manyhands_core::swarm::ids::{Hash, PeerKey, Signature};
use manyhands_core::swarm::ledger::{Entry, Record};
use manyhands_core::swarm::status::Status;
use manyhands_node::http::{RECORDS_MAX, RECORDS_SCANNED_MAX};
use serde_json::Value;

use crate::support::{Peer, RECORDS, peer};

/// A ledger of versions, in which every 1,000th record voids a unit of volunteer 7 or 8 in turn.
fn ledger(count: u64) -> Peer {
    let mut peer = peer();
    let record = move |sequence: u64| Record {
        sequence,
        previous: Hash([1; 32]),
        time_ms: 0,
        entry: match sequence % 1000 {
            0 => Entry::Voided {
                unit: Hash([2; 32]),
                volunteer: PeerKey([7 + (sequence / 1000 % 2) as u8; 32]),
            },
            _ => Entry::Final { ordinal: sequence },
        },
        signature: Signature([2; 64]),
    };
    peer.state.ledger = Arc::new(move |from, limit| {
        Ok((from..count).take(limit).map(|n| encode(&record(n))).collect())
    });
    let status = Status { ledger_records: count, ..Status::default() };
    peer.status.send_replace(Arc::new(status));
    peer
}

fn sequences(page: &Value) -> Vec<u64> {
    page["records"].as_array().unwrap().iter().map(|r| r["sequence"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn records_come_newest_first_and_go_on_to_the_beginning() {
    let peer = ledger(60);
    let page = peer.json("/api/records?limit=3").await;
    assert_eq!(sequences(&page), [59, 58, 57]);
    assert_eq!(page["next"], 57);
    let page = peer.json("/api/records?before=57&limit=1000").await;
    assert_eq!(sequences(&page), (0..57).rev().collect::<Vec<_>>());
    assert_eq!(page["next"], Value::Null);
    assert_eq!(sequences(&peer.json("/api/records?before=0").await), [0; 0]);
    let beyond = peer.json("/api/records?before=18446744073709551615&limit=1").await;
    assert_eq!(sequences(&beyond), [59]);
    let many = ledger(RECORDS).json("/api/records?limit=9999").await;
    assert_eq!(sequences(&many).len(), RECORDS_MAX);
}

#[tokio::test]
async fn records_of_a_kind_or_a_volunteer_are_found_among_many() {
    let peer = ledger(3500);
    let page = peer.json("/api/records?kind=voided").await;
    assert_eq!(sequences(&page), [3000, 2000, 1000, 0]);
    assert_eq!(page["next"], Value::Null);
    let by = format!("/api/records?kind=voided&by={}", PeerKey([7; 32]));
    assert_eq!(sequences(&peer.json(&by).await), [2000, 0]);
    assert_eq!(sequences(&peer.json("/api/records?kind=unit").await), [0; 0]);
}

/// A request costs a bounded number of records, and says where to go on.
#[tokio::test]
async fn records_scan_is_bounded() {
    let count = 2 * RECORDS_SCANNED_MAX + 10;
    let peer = ledger(count);
    let page = peer.json("/api/records?kind=closed").await;
    assert_eq!(sequences(&page), [0; 0]);
    assert_eq!(page["next"], count - RECORDS_SCANNED_MAX);
}

#[tokio::test]
async fn records_asked_for_badly_are_refused() {
    let peer = ledger(5);
    for bad in ["kind=secret", "by=me", "by=", "before=-1", "limit=x", "from=1"] {
        let (status, text) = peer.get_error(&format!("/api/records?{bad}")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{bad}: {text}");
    }
}
