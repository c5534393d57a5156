//! Honest nodes to test with.

use std::sync::Arc;
use std::time::Duration;

use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_node::blobs::BlobStore;
use manyhands_node::identity::Identity;
use manyhands_node::net::{Limits, Net, NetConfig, NetEvent, ResultFault};
use tempfile::TempDir;
use tokio::sync::mpsc::Receiver;

pub(super) const TRANSPORTS: [&str; 3] =
    ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0/ws"];
/// Far above what anything here takes; a test that hangs fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A node with everything that a test may look at.
pub(super) struct Node {
    pub(super) net: Net,
    pub(super) events: Receiver<NetEvent>,
    pub(super) store: BlobStore,
    _dir: TempDir,
}

impl Node {
    pub(super) async fn start(seed: u8, listen: &str, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path(), 1 << 30).unwrap();
        let config = NetConfig {
            identity: Identity::from_seed([seed; 32]),
            listen: if listen.is_empty() { vec![] } else { vec![listen.parse().unwrap()] },
            limits,
            blobs: Some(Arc::new(store.clone())),
            trust: Vec::new(),
        };
        let (net, events) = Net::start(config).await.unwrap();
        Self { net, events, store, _dir: dir }
    }

    pub(super) async fn next(&mut self) -> NetEvent {
        tokio::time::timeout(PATIENCE, self.events.recv()).await.expect("no event").expect("ended")
    }

    /// The next event that is not about connections.
    pub(super) async fn next_message(&mut self) -> NetEvent {
        loop {
            match self.next().await {
                NetEvent::Connected { .. } | NetEvent::Disconnected { .. } => {}
                event => return event,
            }
        }
    }

    pub(super) async fn next_result(&mut self) -> (PeerKey, Hash, Result<Vec<u8>, ResultFault>) {
        match self.next_message().await {
            NetEvent::Result { peer, unit, outcome } => (peer, unit, outcome),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn dial(&self, other: &Self) -> PeerKey {
        self.net.dial(other.net.addresses()).await.unwrap()
    }
}

/// A server at the first transport, and a client that is connected to it.
pub(super) async fn pair(limits: Limits) -> (Node, Node) {
    let server = Node::start(1, TRANSPORTS[0], limits).await;
    let client = Node::start(2, "", Limits::default()).await;
    client.dial(&server).await;
    (server, client)
}

/// Limits under which a stalled transfer is given up soon.
pub(super) fn quick() -> Limits {
    Limits { grace: Duration::from_millis(300), ..Limits::default() }
}

/// Bytes that differ from chunk to chunk.
pub(super) fn blob(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 % 251) as u8 ^ (i >> 16) as u8).collect()
}
