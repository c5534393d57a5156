//! Every bound of the network, driven over it.

use futures::future::{join_all, select_all};
use futures::stream::FuturesUnordered;
use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt};
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::transfer;
use manyhands_node::identity::Identity;
use manyhands_node::net::{
    BANNED_MAX, EVENTS_MAX, EVENTS_WAITING_MAX, Limits, NetEvent, REQUESTS_A_CONNECTION_MAX,
    REQUESTS_OUT_MAX, SERVES_A_PEER_MAX, SERVING_CHUNKS_MAX,
};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::node::{Node, PATIENCE, TRANSPORTS, blob, pair};
use crate::raw::Raw;

/// Nothing else closes a stream before a test's patience ends.
fn patient() -> Limits {
    Limits { grace: 2 * PATIENCE, ..Limits::default() }
}

fn stranger(seed: u32) -> PeerKey {
    let mut bytes = [200; 32];
    bytes[..4].copy_from_slice(&seed.to_le_bytes());
    Identity::from_seed(bytes).key()
}

/// Asks for a blob on a raw stream; its length, once the list is there.
async fn ask(peer: &mut Raw, hash: Hash) -> std::io::Result<libp2p::Stream> {
    let mut stream = peer.open("/manyhands/blob/1").await;
    stream.write_all(&transfer::blob_header(&hash, false)).await?;
    stream.flush().await?;
    let mut found = [0];
    stream.read_exact(&mut found).await?;
    assert_eq!(found, [1]);
    Ok(stream)
}

#[tokio::test]
async fn serves_over_a_peers_slots_are_closed_at_once() {
    let server = Node::start(1, TRANSPORTS[0], patient()).await;
    let hash = server.store.put(b"small").unwrap();
    let mut greedy = Raw::connect(9, &server.net.addresses()).await;
    let mut held = Vec::new();
    for _ in 0..SERVES_A_PEER_MAX {
        held.push(ask(&mut greedy, hash).await.unwrap());
    }
    let more = timeout(PATIENCE, ask(&mut greedy, hash)).await.expect("held open");
    assert!(more.is_err(), "served");
    // Another peer is served all the same.
    let mut modest = Raw::connect(10, &server.net.addresses()).await;
    ask(&mut modest, hash).await.unwrap();
}

/// Chunks in memory are bounded: streams beyond them wait for their turn, and get it.
#[tokio::test]
async fn chunks_that_nobody_reads_hold_others_up_only_until_they_go() {
    let server = Node::start(1, TRANSPORTS[0], patient()).await;
    let bytes = blob(1 << 20);
    let hash = server.store.put(&bytes).unwrap();
    let (mut peers, mut streams) = (Vec::new(), Vec::new());
    while streams.len() <= SERVING_CHUNKS_MAX {
        let mut peer = Raw::connect(20 + peers.len() as u8, &server.net.addresses()).await;
        for _ in 0..SERVES_A_PEER_MAX {
            let mut stream = ask(&mut peer, hash).await.unwrap();
            stream.write_all(&0_u32.to_le_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            streams.push(stream);
        }
        peers.push(peer);
    }
    let read = streams.into_iter().map(|mut stream| async move {
        let mut chunk = vec![0; 1 << 20];
        stream.read_exact(&mut chunk).await.unwrap();
        Hash::of(&chunk)
    });
    let all = timeout(PATIENCE, join_all(read)).await.expect("a stream never had its turn");
    assert!(all.len() > SERVING_CHUNKS_MAX && all.iter().all(|h| *h == hash));
}

/// A burst of streams, far above what may wait, is dropped in part and harms nobody.
#[tokio::test]
async fn streams_in_a_burst_leave_the_node_working() {
    let server = Node::start(1, TRANSPORTS[0], Limits::default()).await;
    let hash = server.store.put(b"small").unwrap();
    let mut greedy = Raw::connect(9, &server.net.addresses()).await;
    let mut held = Vec::new();
    for _ in 0..200 {
        let mut stream = greedy.open("/manyhands/blob/1").await;
        // The node may have closed it already.
        let _ = stream.write_all(&[7; 10]).await;
        held.push(stream);
    }
    let mut modest = Raw::connect(10, &server.net.addresses()).await;
    timeout(PATIENCE, ask(&mut modest, hash)).await.expect("not served").unwrap();
}

/// Of the requests that one connection has open, those over the bound fail at once.
#[tokio::test]
async fn requests_over_a_connections_bound_fail_at_once() {
    let (mut server, client) = pair(Limits::default()).await;
    let key = server.net.key();
    let many = 2 * REQUESTS_A_CONNECTION_MAX;
    let mut asks: FuturesUnordered<_> =
        (0..many).map(|_| client.net.request(key, vec![1])).collect();
    let first = timeout(PATIENCE, asks.next()).await.expect("nothing was refused").unwrap();
    assert!(first.is_err(), "answered by nobody");
    let mut held = Vec::new();
    let mut failed = 1;
    while held.len() + failed < many {
        tokio::select! {
            event = server.next_message() => match event {
                NetEvent::Request { reply, .. } => held.push(reply),
                other => panic!("{other:?}"),
            },
            answer = asks.next() => failed += usize::from(answer.unwrap().is_err()),
        }
    }
    assert!(held.len() <= REQUESTS_A_CONNECTION_MAX, "{} requests came through", held.len());
    held.into_iter().for_each(|reply| reply.answer(vec![2]).unwrap());
    while let Some(answer) = timeout(PATIENCE, asks.next()).await.expect("not answered") {
        assert_eq!(answer.unwrap(), [2]);
    }
}

/// A program that does not take its events is not buried in them: requests over the bound are
/// dropped, which their senders see, and the others are answered when it wakes.
#[tokio::test]
async fn requests_that_nobody_takes_are_dropped_over_the_bound() {
    let mut server = Node::start(1, TRANSPORTS[0], Limits::default()).await;
    let key = server.net.key();
    let waiting = EVENTS_MAX + EVENTS_WAITING_MAX;
    let mut clients = Vec::new();
    while clients.len() * REQUESTS_A_CONNECTION_MAX <= waiting {
        let client = Node::start(20 + clients.len() as u8, "", Limits::default()).await;
        client.dial(&server).await;
        clients.push(client);
    }
    let all = clients.len() * REQUESTS_A_CONNECTION_MAX;
    let mut asks: FuturesUnordered<_> = clients
        .iter()
        .flat_map(|c| (0..REQUESTS_A_CONNECTION_MAX).map(|_| c.net.request(key, vec![1])))
        .collect();
    let mut failed = 0;
    // The newest ones find no place.
    let over = all - waiting;
    while failed < over {
        let answer = timeout(PATIENCE, asks.next()).await.expect("nothing was dropped").unwrap();
        assert!(answer.is_err(), "answered by nobody");
        failed += 1;
    }
    let mut answered = 0;
    while answered + failed < all {
        tokio::select! {
            event = server.next_message() => match event {
                NetEvent::Request { reply, .. } => {
                    answered += 1;
                    reply.answer(vec![2]).unwrap();
                }
                other => panic!("{other:?}"),
            },
            answer = asks.next() => failed += usize::from(answer.unwrap().is_err()),
        }
    }
    assert!(answered <= waiting && answered > waiting / 2, "{answered} of {all} were kept");
}

#[tokio::test]
async fn requests_of_this_node_over_their_bound_are_refused() {
    let client = Node::start(1, "", Limits::default()).await;
    let mut servers = Vec::new();
    while servers.len() * REQUESTS_A_CONNECTION_MAX <= REQUESTS_OUT_MAX {
        let server = Node::start(20 + servers.len() as u8, TRANSPORTS[0], Limits::default()).await;
        client.dial(&server).await;
        servers.push(server);
    }
    let mut asks: FuturesUnordered<_> = servers
        .iter()
        .flat_map(|s| {
            (0..REQUESTS_A_CONNECTION_MAX).map(|_| client.net.request(s.net.key(), vec![1]))
        })
        .collect();
    let first = timeout(PATIENCE, asks.next()).await.expect("nothing was refused").unwrap();
    let text = format!("{:#}", first.unwrap_err());
    assert!(text.contains("waiting already"), "{text}");
}

#[tokio::test]
async fn connections_of_one_peer_over_its_bound_are_refused() {
    let limits = Limits { connections_a_peer_max: 1, ..Limits::default() };
    let mut server = Node::start(1, TRANSPORTS[0], limits).await;
    let first = Node::start(2, "", Limits::default()).await;
    first.dial(&server).await;
    assert!(matches!(server.next().await, NetEvent::Connected { .. }));
    let mut twin = Node::start(2, "", Limits::default()).await;
    // The dialer may see the connection before the other side refuses it.
    if twin.net.dial(server.net.addresses()).await.is_ok() {
        assert!(matches!(twin.next().await, NetEvent::Connected { .. }));
        assert!(matches!(twin.next().await, NetEvent::Disconnected { .. }));
    }
    assert!(server.net.request(first.net.key(), vec![]).now_or_never().is_none(), "hung up");
}

/// Whoever connects and says nothing takes a place that others cannot have, and no more of them
/// than there are.
#[tokio::test]
async fn connections_that_prove_no_key_are_bounded() {
    let limits = Limits { pending_inbound_max: 2, ..Limits::default() };
    let server = Node::start(1, TRANSPORTS[0], limits).await;
    let port = server.net.addresses()[0].iter().find_map(|p| match p {
        libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
        _ => None,
    });
    let address = ("127.0.0.1", port.unwrap());
    // What is over the bound is closed without a word; nobody greets the others.
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut bytes = [[0; 1]; 3];
    let reads = silent.iter_mut().zip(&mut bytes).map(|(s, byte)| Box::pin(s.read(byte)));
    let (read, _, others) = timeout(PATIENCE, select_all(reads)).await.expect("all let in");
    assert!(!matches!(read, Ok(1)), "greeted");
    assert!(others.into_iter().all(|read| read.now_or_never().is_none()), "more than one closed");
    drop(silent);
    let honest = Node::start(2, "", Limits::default()).await;
    let arrives = async { while honest.net.dial(server.net.addresses()).await.is_err() {} };
    timeout(PATIENCE, arrives).await.expect("never let in");
}

#[tokio::test]
async fn oldest_of_the_banned_gives_way() {
    let (server, client) = pair(Limits::default()).await;
    server.net.ban(client.net.key()).await.unwrap();
    for i in 0..BANNED_MAX as u32 {
        server.net.ban(stranger(i)).await.unwrap();
    }
    let arrives = async { while client.net.dial(server.net.addresses()).await.is_err() {} };
    timeout(PATIENCE, arrives).await.expect("never let in");
    let asked = client.net.request(server.net.key(), vec![1]);
    let mut server = server;
    let answered = async {
        match server.next_message().await {
            NetEvent::Request { reply, .. } => reply.answer(vec![2]).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let (answer, ()) = tokio::join!(asked, answered);
    assert_eq!(answer.unwrap(), [2]);
}

/// Sources over the bound are not asked, even if they are the only ones that could help.
#[tokio::test]
async fn fetch_asks_no_more_sources_than_its_bound() {
    const SOURCES_MAX: u32 = 16;
    let (server, client) = pair(Limits::default()).await;
    let hash = server.store.put(b"small").unwrap();
    let after = |n: u32| (0..n).map(stranger).chain([server.net.key()]).collect::<Vec<_>>();
    let error = client.net.fetch(&after(SOURCES_MAX), hash, &client.store, |_, _| ()).await;
    assert!(error.unwrap_err().to_string().contains("no source"));
    client.net.fetch(&after(SOURCES_MAX - 1), hash, &client.store, |_, _| ()).await.unwrap();
    assert!(client.store.contains(&hash));
}

/// A source is asked for a few chunks, and for the next one only when one has come.
#[tokio::test]
async fn chunks_are_asked_for_no_further_ahead_than_the_bound() {
    const AHEAD_MAX: usize = 4;
    let bytes = blob(9 << 20);
    let hash = Hash::of(&bytes);
    let mut client = Node::start(3, TRANSPORTS[0], patient()).await;
    let mut source = Raw::connect(9, &client.net.addresses()).await;
    assert!(matches!(client.next().await, NetEvent::Connected { peer } if peer == source.key));
    let mut streams = source.accept();
    let sources = [source.key];
    let fetch = client.net.fetch(&sources, hash, &client.store, |_, _| ());
    let serve = async {
        let list = manyhands_core::swarm::chunks::ChunkList::of(&bytes);
        let (_, mut stream) = streams.next().await.unwrap();
        stream.read_exact(&mut [0; 33]).await.unwrap();
        let mut answer = vec![1];
        answer.extend_from_slice(&transfer::list(&list));
        stream.write_all(&answer).await.unwrap();
        stream.flush().await.unwrap();
        let mut asked = Vec::new();
        for served in 0..list.count() {
            let least = if served == 0 { AHEAD_MAX } else { served + 1 };
            let mut indices = [0; 64];
            while asked.len() < 4 * least {
                let read = stream.read(&mut indices).await.unwrap();
                asked.extend_from_slice(&indices[..read]);
            }
            while let Some(Ok(read @ 1..)) = stream.read(&mut indices).now_or_never() {
                asked.extend_from_slice(&indices[..read]);
            }
            assert!(asked.len() <= 4 * (served + AHEAD_MAX), "too far ahead");
            let index = asked[4 * served..].first_chunk().unwrap();
            let range = list.range(u32::from_le_bytes(*index) as usize);
            stream.write_all(&bytes[range.start as usize..range.end as usize]).await.unwrap();
            stream.flush().await.unwrap();
        }
        // Until the other side has all.
        let _ = stream.read(&mut [0]).await;
    };
    let (fetched, ()) = tokio::join!(fetch, serve);
    fetched.unwrap();
    assert!(client.store.contains(&hash));
}
