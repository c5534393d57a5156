//! The tunnel of tabs: the swarm behind the page's own address.

use std::net::SocketAddr;
use std::sync::Arc;

use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_node::blobs::BlobStore;
use manyhands_node::http::{TUNNELS_MAX, Tunnel, bind, serve};
use manyhands_node::identity::{Identity, peer_id};
use manyhands_node::net::multiaddr::{Multiaddr, Protocol};
use manyhands_node::net::{Limits, Net, NetConfig, NetEvent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc::Receiver;

use crate::support::peer;

async fn node(seed: u8, listen: &str, store: &BlobStore) -> (Net, Receiver<NetEvent>) {
    let listen = if listen.is_empty() { vec![] } else { vec![listen.parse().unwrap()] };
    let (identity, blobs) = (Identity::from_seed([seed; 32]), Some(Arc::new(store.clone())));
    let config = NetConfig { identity, listen, limits: Limits::default(), blobs };
    Net::start(config).await.unwrap()
}

/// Serves a page whose tunnel leads to `listener`.
async fn page(listener: SocketAddr) -> SocketAddr {
    let mut state = peer().state;
    state.p2p = Some(Arc::new(Tunnel::to(listener)));
    let socket = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(serve(socket, state, std::future::pending()));
    address
}

fn port(address: &Multiaddr) -> SocketAddr {
    let tcp = address.iter().find_map(|p| if let Protocol::Tcp(p) = p { Some(p) } else { None });
    SocketAddr::from(([127, 0, 0, 1], tcp.unwrap()))
}

/// A request, a result and a blob of several chunks through the page's port.
#[tokio::test]
async fn tunnel_carries_all_that_a_volunteer_says() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [served, kept] = dirs.each_ref().map(|d| BlobStore::open(d.path(), 1 << 26).unwrap());
    let blob: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(31) >> 5) as u8).collect();
    let hash = served.put(&blob).unwrap();
    let (host, mut events) = node(1, "/ip4/127.0.0.1/tcp/0/ws", &served).await;
    let http = page(port(&host.addresses()[0])).await;

    let (tab, _tab_events) = node(2, "", &kept).await;
    let through: Multiaddr = [
        Protocol::from(http.ip()),
        Protocol::Tcp(http.port()),
        Protocol::Ws("/p2p".into()),
        Protocol::P2p(peer_id(&host.key()).unwrap()),
    ]
    .into_iter()
    .collect();
    let key: PeerKey = tab.dial(vec![through]).await.unwrap();
    assert_eq!(key, host.key());
    let asked = tokio::spawn({
        let tab = tab.clone();
        async move { tab.request(key, b"question".to_vec()).await }
    });
    let mut result = vec![7; 2_000_000];
    result[77] = 1;
    let unit = Hash::of(b"unit");
    loop {
        match events.recv().await.unwrap() {
            NetEvent::Request { bytes, reply, .. } => {
                assert_eq!(bytes, b"question");
                reply.answer(b"answer".to_vec()).unwrap();
                break;
            }
            NetEvent::Connected { peer } => assert_eq!(peer, tab.key()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(asked.await.unwrap().unwrap(), b"answer");
    host.expect(tab.key(), unit, Hash::of(&result), result.len() as u64).unwrap();
    tab.send_result(key, unit, result.clone()).await.unwrap();
    let Some(NetEvent::Result { outcome, .. }) = events.recv().await else { panic!("no result") };
    assert_eq!(outcome.unwrap(), result);
    tab.fetch(&[key], hash, &kept, |_, _| ()).await.unwrap();
    assert_eq!(kept.get(&hash).unwrap(), blob);
}

const HANDSHAKE: &str = "GET /p2p HTTP/1.1\r\nHost: here\r\nConnection: keep-alive, Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\
    \r\n\r\n";

/// Sends a handshake, and returns the connection and the first line of the answer.
async fn shake(http: SocketAddr) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(http).await.unwrap();
    stream.write_all(HANDSHAKE.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.windows(4).any(|w| w == b"\r\n\r\n") {
        assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
    }
    let text = String::from_utf8_lossy(&answer);
    (stream, text.lines().next().unwrap().to_string())
}

/// A listener that agrees to every handshake, and then only listens.
async fn agreeable() -> SocketAddr {
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let answer = "HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
                while stream.read(&mut [0; 1024]).await.is_ok_and(|n| n > 0) {}
            });
        }
    });
    address
}

#[tokio::test]
async fn tunnels_are_bounded_and_given_back() {
    let http = page(agreeable().await).await;
    let mut open = Vec::new();
    for _ in 0..TUNNELS_MAX {
        let (stream, line) = shake(http).await;
        assert!(line.starts_with("HTTP/1.1 101"), "{line}");
        open.push(stream);
    }
    assert!(shake(http).await.1.starts_with("HTTP/1.1 503"));
    drop(open.pop());
    // It comes back, though not in the instant in which it ends.
    while !shake(http).await.1.starts_with("HTTP/1.1 101") {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn tunnel_to_nobody_says_so() {
    let free = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let nobody = free.local_addr().unwrap();
    drop(free);
    let http = page(nobody).await;
    assert!(shake(http).await.1.starts_with("HTTP/1.1 503"));
}
