//! What a coordination peer shows over HTTP, whether it coordinates or follows.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::Result;
use axum::body::Bytes;
use libp2p::multiaddr::Protocol;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::protocol::{PROTOCOL, PeerAddress};
use manyhands_core::swarm::status::Status;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::Manifest;
use super::address::Site;
use crate::blobs::BlobStore;
use crate::http::{self, AdminCommand, AdminToken, Feed, HttpState, Tunnel};
use crate::net::Net;
use crate::storage::Storage;

/// What changes of what is shown.
pub(super) struct Shown {
    pub(super) status: watch::Sender<Arc<Status>>,
    manifest: watch::Sender<Bytes>,
}

impl Shown {
    /// Says what it takes to join.
    pub(super) fn join(&self, run: Hash, name: &str, peers: &[PeerAddress]) -> Result<()> {
        let (name, peers) = (name.to_string(), peers.to_vec());
        let manifest = Manifest { run, name, protocol: PROTOCOL, peers };
        self.manifest.send_replace(serde_json::to_vec(&manifest)?.into());
        Ok(())
    }
}

/// A server that runs, and what leads to it and from it.
pub(super) struct Served {
    pub(super) shown: Shown,
    pub(super) feed: Arc<Feed>,
    /// What the operator wants.
    pub(super) commands: mpsc::Receiver<AdminCommand>,
    /// Ends the server when it is dropped.
    pub(super) running: Running,
}

/// See [`Served::running`].
pub(super) struct Running {
    task: JoinHandle<Result<()>>,
    _ended: oneshot::Sender<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts the server. What is shown is empty at first.
pub(super) fn start(
    site: Site,
    storage: &Arc<Storage>,
    blobs: &Arc<BlobStore>,
    token: Arc<AdminToken>,
    net: &Net,
) -> Served {
    let (admin, commands) = mpsc::channel(http::ADMIN_QUEUE_MAX);
    let (status, status_shown) = watch::channel(Arc::default());
    let (manifest, manifest_shown) = watch::channel(Bytes::new());
    let feed = Arc::new(Feed::default());
    let reader = storage.clone();
    let (small, large) = (storage.clone(), blobs.clone());
    let blob = move |hash: &Hash| match small.blob(hash).ok().flatten() {
        Some(bytes) => Some(http::Blob::Bytes(bytes.into())),
        None => large.file(hash).map(http::Blob::File),
    };
    let state = HttpState {
        status: status_shown,
        feed: feed.clone(),
        manifest: manifest_shown,
        ledger: Arc::new(move |from, limit| reader.records(from, limit)),
        blob: Arc::new(blob),
        admin,
        token,
        p2p: tab_listener(net).map(|address| Arc::new(Tunnel::to(address))),
    };
    let (ended, end) = oneshot::channel::<()>();
    let (listener, tls) = site.start();
    let task = tokio::spawn(http::serve(listener, state, tls, async move {
        let _ = end.await;
    }));
    let running = Running { task, _ended: ended };
    Served { shown: Shown { status, manifest }, feed, commands, running }
}

/// Where the own listener for WebSocket is reached from this machine, best by loopback.
fn tab_listener(net: &Net) -> Option<SocketAddr> {
    let addresses = net.addresses();
    let sockets = addresses.iter().filter_map(|address| {
        let mut parts = address.iter();
        let ip = match parts.next()? {
            Protocol::Ip4(ip) => IpAddr::V4(ip),
            Protocol::Ip6(ip) => IpAddr::V6(ip),
            _ => return None,
        };
        let Protocol::Tcp(port) = parts.next()? else { return None };
        matches!(parts.next()?, Protocol::Ws(_)).then_some(SocketAddr::new(ip, port))
    });
    sockets.max_by_key(|address| address.ip().is_loopback())
}
