//! The network layer on loopback: honest nodes, and peers that misbehave on raw streams.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bounds;
mod node;
mod raw;

use std::sync::Mutex;

use futures::{AsyncReadExt, AsyncWriteExt};
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_node::identity::Identity;
use manyhands_node::net::multiaddr::Multiaddr;
use manyhands_node::net::{
    Limits, Net, NetConfig, NetEvent, REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, ResultFault,
    UPLOADS_A_PEER_MAX,
};
use node::{Node, PATIENCE, TRANSPORTS, blob, pair, quick};
use raw::Raw;

/// Answers every request with its bytes reversed.
fn echo(mut node: Node) {
    tokio::spawn(async move {
        while let Some(event) = node.events.recv().await {
            if let NetEvent::Request { mut bytes, reply, .. } = event {
                bytes.reverse();
                reply.answer(bytes).unwrap();
            }
        }
    });
}

#[tokio::test]
async fn requests_are_answered_both_ways_on_every_transport() {
    for transport in TRANSPORTS {
        let mut server = Node::start(1, transport, Limits::default()).await;
        let client = Node::start(2, "", Limits::default()).await;
        assert_eq!(client.dial(&server).await, server.net.key());
        assert!(
            matches!(server.next().await, NetEvent::Connected { peer } if peer == client.net.key())
        );
        let (client_net, client_key) = (client.net.clone(), client.net.key());
        let (server_net, server_key) = (server.net.clone(), server.net.key());
        echo(server);
        echo(client);
        let answer = client_net.request(server_key, b"abc".to_vec()).await.unwrap();
        assert_eq!(answer, b"cba", "{transport}");
        let long = blob(REQUEST_BYTES_MAX);
        let answer = server_net.request(client_key, long.clone()).await.unwrap();
        assert!(answer.iter().eq(long.iter().rev()), "{transport}");
        let traffic = server_net.traffic();
        assert_eq!(traffic.requests_in_bytes, 3 + long.len() as u64, "{transport}");
        assert_eq!(traffic.requests_out_bytes, 3 + long.len() as u64, "{transport}");
    }
}

#[tokio::test]
async fn request_too_long_or_refused_or_to_a_stranger_fails() {
    let (mut server, client) = pair(Limits::default()).await;
    let (key, net) = (server.net.key(), client.net.clone());
    assert!(net.request(key, vec![0; REQUEST_BYTES_MAX + 1]).await.is_err());
    let stranger = Identity::from_seed([77; 32]).key();
    assert!(net.request(stranger, vec![0]).await.unwrap_err().to_string().contains("connected"));
    let asked = tokio::spawn(async move { net.request(key, vec![1]).await });
    let NetEvent::Request { reply, .. } = server.next_message().await else { panic!() };
    assert!(reply.answer(vec![0; RESPONSE_BYTES_MAX + 1]).is_err());
    assert!(asked.await.unwrap().is_err());
}

#[tokio::test]
async fn result_that_is_expected_arrives_and_any_other_is_refused() {
    let (mut server, client) = pair(Limits::default()).await;
    let (key, peer) = (server.net.key(), client.net.key());
    let bytes = blob(3_000_000);
    let (unit, receipt) = (Hash::of(b"unit"), Hash::of(&bytes));
    let refused = client.net.send_result(key, unit, bytes.clone()).await.unwrap_err();
    assert!(format!("{refused:#}").contains("not expect"), "{refused:#}");

    server.net.expect(peer, unit, receipt, bytes.len() as u64 - 1).unwrap();
    assert!(client.net.send_result(key, unit, bytes.clone()).await.is_err(), "too long");

    server.net.expect(peer, unit, receipt, bytes.len() as u64).unwrap();
    let mut wrong = bytes.clone();
    wrong[1_000_000] ^= 1;
    let sent = client.net.send_result(key, unit, wrong).await.unwrap_err();
    assert!(format!("{sent:#}").contains("differ"), "{sent:#}");
    let differs = (peer, unit, Err(ResultFault::DiffersFromReceipt));
    assert_eq!(server.next_result().await, differs);

    server.net.expect(peer, unit, receipt, bytes.len() as u64).unwrap();
    client.net.send_result(key, unit, bytes.clone()).await.unwrap();
    assert_eq!(server.next_result().await, (peer, unit, Ok(bytes.clone())));
    assert!(client.net.send_result(key, unit, bytes.clone()).await.is_err(), "a second time");

    server.net.expect(peer, unit, receipt, bytes.len() as u64).unwrap();
    server.net.forget(peer, unit);
    assert!(client.net.send_result(key, unit, bytes).await.is_err(), "forgotten");
    assert!(server.net.expect(peer, unit, receipt, u64::MAX).is_err());
}

#[tokio::test]
async fn empty_result_arrives() {
    let (mut server, client) = pair(Limits::default()).await;
    let (unit, peer) = (Hash::of(b"unit"), client.net.key());
    server.net.expect(peer, unit, Hash::of(b""), 0).unwrap();
    client.net.send_result(server.net.key(), unit, vec![]).await.unwrap();
    assert_eq!(server.next_result().await, (peer, unit, Ok(vec![])));
}

#[tokio::test]
async fn upload_that_stalls_is_closed_and_its_memory_goes_to_the_next() {
    let limits = Limits { receiving_bytes_max: 100 << 10, ..quick() };
    let mut server = Node::start(1, TRANSPORTS[0], limits).await;
    let client = Node::start(2, "", Limits::default()).await;
    client.dial(&server).await;
    let mut liar = Raw::connect(9, &server.net.addresses()).await;
    let (slow, good) = (Hash::of(b"slow"), blob(80 << 10));
    server.net.expect(liar.key, slow, slow, 80 << 10).unwrap();
    server.net.expect(client.net.key(), slow, Hash::of(&good), 80 << 10).unwrap();
    let mut stream = liar.open("/manyhands/result/1").await;
    let header = [&slow.0[..], &(80_u64 << 10).to_le_bytes(), &[1]].concat();
    stream.write_all(&header).await.unwrap();
    stream.flush().await.unwrap();
    let arrived = async {
        while server.net.traffic().results_in_bytes == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, arrived).await.expect("the first byte never came");
    client.net.send_result(server.net.key(), slow, good.clone()).await.unwrap();
    assert_eq!(server.next_result().await, (liar.key, slow, Err(ResultFault::TooSlow)));
    assert_eq!(server.next_result().await, (client.net.key(), slow, Ok(good)));
}

#[tokio::test]
async fn uploads_over_a_peers_slots_are_closed_at_once() {
    // Nothing else closes them before this test's patience ends.
    let limits = Limits { grace: 2 * PATIENCE, ..Limits::default() };
    let server = Node::start(1, TRANSPORTS[0], limits).await;
    let mut liar = Raw::connect(9, &server.net.addresses()).await;
    let mut held = Vec::new();
    for _ in 0..UPLOADS_A_PEER_MAX {
        let mut stream = liar.open("/manyhands/result/1").await;
        // Past the negotiation, which is lazy, and into the header.
        stream.write_all(&[1]).await.unwrap();
        stream.flush().await.unwrap();
        held.push(stream);
    }
    let mut stream = liar.open("/manyhands/result/1").await;
    let mut byte = [0];
    let read = tokio::time::timeout(PATIENCE, stream.read(&mut byte)).await.expect("held open");
    assert!(!matches!(read, Ok(1)), "answered");
}

#[tokio::test]
async fn blob_arrives_over_every_transport() {
    for transport in TRANSPORTS {
        let server = Node::start(1, transport, Limits::default()).await;
        let client = Node::start(2, "", Limits::default()).await;
        client.dial(&server).await;
        for length in [0, 10, 1 << 20, (5 << 20) + 77] {
            let bytes = blob(length);
            let hash = server.store.put(&bytes).unwrap();
            let told = Mutex::new((0, 0));
            let progress = |done, all| *told.lock().unwrap() = (done, all);
            client.net.fetch(&[server.net.key()], hash, &client.store, progress).await.unwrap();
            assert_eq!(client.store.get(&hash).unwrap(), bytes, "{transport} {length}");
            assert_eq!(told.into_inner().unwrap(), (length as u64, length as u64));
        }
        let missing = Hash::of(b"missing");
        let fetched =
            client.net.fetch(&[server.net.key()], missing, &client.store, |_, _| ()).await;
        assert!(fetched.unwrap_err().to_string().contains("does not have"), "{transport}");
    }
}

#[tokio::test]
async fn fetch_goes_on_from_another_source_when_the_first_dies() {
    let bytes = blob(40 << 20);
    let first = Node::start(1, TRANSPORTS[0], Limits::default()).await;
    let second = Node::start(2, TRANSPORTS[0], Limits::default()).await;
    let client = Node::start(3, "", quick()).await;
    let hash = first.store.put(&bytes).unwrap();
    second.store.put(&bytes).unwrap();
    let key = client.dial(&first).await;
    client.dial(&second).await;
    let alive = Mutex::new(Some(first));
    let kill = |done: u64, _| {
        if done >= 3 << 20 {
            alive.lock().unwrap().take();
        }
    };
    client.net.fetch(&[key], hash, &client.store, kill).await.unwrap_err();
    assert!(!client.store.contains(&hash));
    let sources = [key, second.net.key()];
    client.net.fetch(&sources, hash, &client.store, |_, _| ()).await.unwrap();
    assert_eq!(client.store.get(&hash).unwrap(), bytes);
    let served = second.net.traffic().blobs_out_bytes;
    assert!(served <= 37 << 20, "{served} bytes: what had arrived was fetched again");
}

#[tokio::test]
async fn chunks_come_from_all_sources() {
    let bytes = blob(32 << 20);
    let client = Node::start(3, "", Limits::default()).await;
    let mut sources = Vec::new();
    for seed in [1, 2] {
        let node = Node::start(seed, TRANSPORTS[0], Limits::default()).await;
        node.store.put(&bytes).unwrap();
        client.dial(&node).await;
        sources.push(node);
    }
    let keys: Vec<PeerKey> = sources.iter().map(|s| s.net.key()).collect();
    let hash = Hash::of(&bytes);
    client.net.fetch(&keys, hash, &client.store, |_, _| ()).await.unwrap();
    assert!(client.store.contains(&hash));
    let served: Vec<u64> = sources.iter().map(|s| s.net.traffic().blobs_out_bytes).collect();
    assert!(served.iter().all(|s| *s > 0), "{served:?}");
    assert_eq!(client.net.traffic().blobs_in_bytes, bytes.len() as u64);
}

#[tokio::test]
async fn bad_chunk_of_a_lying_source_is_not_kept() {
    let bytes = blob((6 << 20) + 5);
    let mut client = Node::start(3, TRANSPORTS[0], quick()).await;
    let mut liar = Raw::connect(9, &client.net.addresses()).await;
    assert!(matches!(client.next().await, NetEvent::Connected { peer } if peer == liar.key));
    let mut wrong = bytes.clone();
    wrong[2 << 20] ^= 1;
    liar.serve(&bytes, wrong);
    let hash = Hash::of(&bytes);
    let error = client.net.fetch(&[liar.key], hash, &client.store, |_, _| ()).await.unwrap_err();
    let error = error.to_string();
    assert!(error.contains(&liar.key.short()) && error.contains("wrong chunk"), "{error}");
    assert!(!client.store.contains(&hash));

    let honest = Node::start(1, TRANSPORTS[0], Limits::default()).await;
    honest.store.put(&bytes).unwrap();
    client.dial(&honest).await;
    let sources = [liar.key, honest.net.key()];
    client.net.fetch(&sources, hash, &client.store, |_, _| ()).await.unwrap();
    assert_eq!(client.store.get(&hash).unwrap(), bytes);
}

#[tokio::test]
async fn flooding_peer_is_named_once_and_its_requests_dropped() {
    let limits = Limits { requests_burst_max: 4, requests_per_second_max: 0, ..Limits::default() };
    let (mut server, client) = pair(limits).await;
    let key = server.net.key();
    let asks = (0..10).map(|i| client.net.request(key, vec![i]));
    let serve = async {
        let (mut requests, mut floods) = (Vec::new(), 0);
        while requests.len() < 4 || floods == 0 {
            match server.next_message().await {
                NetEvent::Request { reply, .. } => requests.push(reply),
                NetEvent::Flooding { peer } => {
                    assert_eq!(peer, client.net.key());
                    floods += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        requests.into_iter().for_each(|reply| reply.answer(vec![]).unwrap());
    };
    let (answers, ()) = tokio::join!(futures::future::join_all(asks), serve);
    assert_eq!(answers.iter().filter(|a| a.is_ok()).count(), 4);
    client.net.disconnect(key).await.unwrap();
    assert!(matches!(server.next().await, NetEvent::Disconnected { .. }), "told twice");
}

#[tokio::test]
async fn banned_peer_is_disconnected_and_cannot_come_back() {
    let (mut server, mut client) = pair(Limits::default()).await;
    let peer = client.net.key();
    assert!(matches!(server.next().await, NetEvent::Connected { .. }));
    assert!(matches!(client.next().await, NetEvent::Connected { .. }));
    server.net.ban(peer).await.unwrap();
    assert!(matches!(server.next().await, NetEvent::Disconnected { peer: p } if p == peer));
    assert!(matches!(client.next().await, NetEvent::Disconnected { .. }));
    // The dialer may see the connection before the other side refuses it.
    if client.net.dial(server.net.addresses()).await.is_ok() {
        assert!(matches!(client.next().await, NetEvent::Connected { .. }));
        assert!(matches!(client.next().await, NetEvent::Disconnected { .. }));
    }
    assert!(server.net.request(peer, vec![]).await.is_err());
    assert!(server.events.try_recv().is_err(), "the banned peer was let in");
}

#[tokio::test]
async fn connections_over_the_limit_are_refused() {
    let limits = Limits { connections_max: 2, ..Limits::default() };
    let mut server = Node::start(1, TRANSPORTS[0], limits).await;
    let mut clients = Vec::new();
    for seed in 2..4 {
        let client = Node::start(seed, "", Limits::default()).await;
        client.dial(&server).await;
        assert!(matches!(server.next().await, NetEvent::Connected { .. }));
        clients.push(client);
    }
    let mut third = Node::start(4, "", Limits::default()).await;
    if third.net.dial(server.net.addresses()).await.is_ok() {
        assert!(matches!(third.next().await, NetEvent::Connected { .. }));
        assert!(matches!(third.next().await, NetEvent::Disconnected { .. }));
    }
    assert!(server.events.try_recv().is_err(), "a third peer was let in");
    drop(clients.pop());
    assert!(matches!(server.next().await, NetEvent::Disconnected { .. }));
    third.dial(&server).await;
    assert!(matches!(server.next().await, NetEvent::Connected { .. }));
}

#[tokio::test]
async fn garbage_on_every_protocol_leaves_the_node_working() {
    let mut server = Node::start(1, TRANSPORTS[0], quick()).await;
    let mut liar = Raw::connect(9, &server.net.addresses()).await;
    let unit = Hash([7; 32]);
    server.net.expect(liar.key, unit, unit, 1 << 20).unwrap();
    let mut state = 1_u64;
    for round in 0..30 {
        for protocol in ["/manyhands/request/1", "/manyhands/result/1", "/manyhands/blob/1"] {
            let mut garbage = vec![0; 1 << (round % 14)];
            for byte in &mut garbage {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            if round % 3 == 0 {
                // A plausible beginning, with a length of nearly everything.
                garbage.splice(0..0, [&[7; 32][..], &[255; 8]].concat());
            }
            let mut stream = liar.open(protocol).await;
            // The node may have closed the stream already.
            let _ = stream.write_all(&garbage).await;
            let _ = stream.close().await;
        }
    }
    let client = Node::start(2, "", Limits::default()).await;
    client.dial(&server).await;
    let (net, key) = (client.net.clone(), server.net.key());
    let asked = tokio::spawn(async move { net.request(key, b"alive".to_vec()).await });
    loop {
        match server.next_message().await {
            NetEvent::Request { peer, reply, .. } if peer == client.net.key() => {
                reply.answer(b"yes".to_vec()).unwrap();
                break;
            }
            // Garbage that begins with a small length is a request like any other.
            NetEvent::Request { .. } | NetEvent::Flooding { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(asked.await.unwrap().unwrap(), b"yes");
}

#[tokio::test]
async fn port_that_is_taken_is_a_clear_error() {
    for transport in TRANSPORTS {
        let first = Node::start(1, transport, Limits::default()).await;
        let mut taken: Multiaddr = first.net.addresses().remove(0);
        taken.pop();
        let identity = Identity::from_seed([2; 32]);
        let limits = Limits::default();
        let config =
            NetConfig { identity, listen: vec![taken], limits, blobs: None, trust: Vec::new() };
        let error = format!("{:#}", Net::start(config).await.unwrap_err());
        assert!(error.contains("another program"), "{transport}: {error}");
    }
}
