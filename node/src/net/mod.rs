//! The network: connections, requests, uploads of results, and blobs. It moves opaque bytes.
//!
//! One task owns the swarm (`event_loop`); [`Net`] is a handle to it that clones. Transfers run
//! in tasks of their own (`results`, `serve`) or in their caller's (`fetch`). What messages
//! mean, and whom to trust, is decided elsewhere. Start at [`Net::start`].

mod codec;
mod event_loop;
mod fetch;
mod limits;
mod results;
mod serve;
mod start;
mod streams;
mod traffic;
mod transport;

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol};
use manyhands_core::swarm::ids::{Hash, PeerKey};
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot};

use crate::blobs::BlobStore;
use crate::identity::{Identity, peer_id, peer_key};
use event_loop::Command;

pub use libp2p::multiaddr;
pub use limits::*;
pub use results::ResultFault;
pub use traffic::Traffic;

/// How a node takes part.
#[derive(Debug)]
pub struct NetConfig {
    /// Who it is.
    pub identity: Identity,
    /// Where it listens; port 0 is any free one. Empty for a node that only dials.
    pub listen: Vec<Multiaddr>,
    /// What peers may cost.
    pub limits: Limits,
    /// The blobs that it serves.
    pub blobs: Option<Arc<BlobStore>>,
    /// Certificate authorities that vouch for hosts behind https, beside the usual ones.
    pub trust: Vec<CertificateDer<'static>>,
}

/// What happened.
#[derive(Debug)]
pub enum NetEvent {
    /// A peer is connected: once a peer, however many connections it has.
    Connected {
        /// Who.
        peer: PeerKey,
    },
    /// The last connection of a peer is gone.
    Disconnected {
        /// Who.
        peer: PeerKey,
    },
    /// A peer asks.
    Request {
        /// Who.
        peer: PeerKey,
        /// What, at most [`REQUEST_BYTES_MAX`].
        bytes: Vec<u8>,
        /// Takes the answer.
        reply: ReplyTo,
    },
    /// An upload that was expected has ended.
    Result {
        /// Whose.
        peer: PeerKey,
        /// Of which unit.
        unit: Hash,
        /// The bytes of the receipt, or what went wrong.
        outcome: Result<Vec<u8>, ResultFault>,
    },
    /// A peer asks more often than it may: once a peer and session.
    Flooding {
        /// Who.
        peer: PeerKey,
    },
}

/// Answers one request; dropping it refuses the request.
#[derive(Debug)]
pub struct ReplyTo(oneshot::Sender<Vec<u8>>);

impl ReplyTo {
    /// Answers. An error where the answer is too long, or nobody waits for it any more.
    pub fn answer(self, bytes: Vec<u8>) -> Result<()> {
        let length = bytes.len();
        ensure!(length <= RESPONSE_BYTES_MAX, "{length} bytes are over {RESPONSE_BYTES_MAX}");
        self.0.send(bytes).ok().context("nobody waits for the answer any more")
    }
}

/// A handle to the network. The last one that is dropped ends it.
#[derive(Clone, Debug)]
pub struct Net {
    key: PeerKey,
    commands: mpsc::Sender<Command>,
    addresses: Arc<Mutex<Vec<Multiaddr>>>,
    expected: results::Expected,
    counters: traffic::Counters,
    limits: Arc<Limits>,
}

impl Net {
    /// Starts listening. Must be called within a tokio runtime.
    pub async fn start(config: NetConfig) -> Result<(Self, mpsc::Receiver<NetEvent>)> {
        start::start(config).await
    }

    /// Who this node is.
    pub fn key(&self) -> PeerKey {
        self.key
    }

    /// Where this node listens, each with `/p2p/` and its name, to be dialed as they are.
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes in and out since the start.
    pub fn traffic(&self) -> Traffic {
        self.counters.read()
    }

    /// Connects to a peer at any of its addresses, each of which ends in the same `/p2p/` name.
    pub async fn dial(&self, addresses: Vec<Multiaddr>) -> Result<PeerKey> {
        let peer = common_peer(&addresses)?;
        let key = peer_key(&peer)?;
        let (done, dialed) = oneshot::channel();
        self.command(Command::Dial { peer, addresses, done }).await?;
        dialed.await.context("the network has ended")??;
        Ok(key)
    }

    /// Closes all connections of a peer, which may come back.
    pub async fn disconnect(&self, peer: PeerKey) -> Result<()> {
        self.command(Command::Disconnect { peer: peer_id(&peer)? }).await
    }

    /// Closes all connections of a peer and refuses new ones.
    pub async fn ban(&self, peer: PeerKey) -> Result<()> {
        self.expected.forget_peer(peer);
        self.command(Command::Ban { peer: peer_id(&peer)? }).await
    }

    /// Asks a connected peer, and waits for its answer for at most [`REQUEST_TIMEOUT`].
    pub async fn request(&self, peer: PeerKey, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let length = bytes.len();
        ensure!(length <= REQUEST_BYTES_MAX, "a request of {length} is over {REQUEST_BYTES_MAX}");
        let (done, answer) = oneshot::channel();
        self.command(Command::Request { peer: peer_id(&peer)?, bytes, done }).await?;
        answer.await.context("the network has ended")?
    }

    /// Lets a peer upload the result of a unit: at most `bytes`, with the hash `receipt`.
    pub fn expect(&self, peer: PeerKey, unit: Hash, receipt: Hash, bytes: u64) -> Result<()> {
        let max = self.limits.receiving_bytes_max;
        ensure!(bytes <= max, "a result of {bytes} bytes is over {max}");
        self.expected.expect(peer, unit, receipt, bytes)
    }

    /// No longer waits for a result. What is arriving of it is thrown away.
    pub fn forget(&self, peer: PeerKey, unit: Hash) {
        self.expected.forget(peer, unit);
    }

    /// Uploads the result of a unit to a peer that expects it.
    pub async fn send_result(&self, peer: PeerKey, unit: Hash, bytes: Vec<u8>) -> Result<()> {
        let stream = self.open_stream(peer, streams::RESULT_PROTOCOL).await?;
        results::send(stream, unit, &bytes, &self.limits, &self.counters)
            .await
            .with_context(|| format!("cannot upload the result of {unit} to {}", peer.short()))
    }

    /// Fetches a blob from peers that may have it, each chunk from any of them and checked, into
    /// a store. What has arrived is kept when it fails. `progress` gets bytes done and in all.
    pub async fn fetch(
        &self,
        sources: &[PeerKey],
        hash: Hash,
        store: &BlobStore,
        progress: impl Fn(u64, u64) + Send + Sync,
    ) -> Result<()> {
        fetch::fetch(self, sources, hash, store, &progress).await
    }

    async fn open_stream(&self, peer: PeerKey, protocol: StreamProtocol) -> Result<Stream> {
        let (opened, stream) = oneshot::channel();
        self.command(Command::Open { peer: peer_id(&peer)?, protocol, opened }).await?;
        let stream = stream.await.ok().and_then(|s| s.map_err(|e| tracing::debug!(%e)).ok());
        stream.with_context(|| format!("cannot open a stream to {}", peer.short()))
    }

    async fn command(&self, command: Command) -> Result<()> {
        self.commands.send(command).await.ok().context("the network has ended")
    }
}

/// The peer that all addresses name.
fn common_peer(addresses: &[Multiaddr]) -> Result<PeerId> {
    let count = addresses.len();
    ensure!(count <= DIALS_MAX as usize, "{count} addresses are more than {DIALS_MAX}");
    let named = |a: &Multiaddr| match a.iter().last() {
        Some(multiaddr::Protocol::P2p(peer)) => Some(peer),
        _ => None,
    };
    let first = addresses.first().context("no address to dial")?;
    let peer = named(first).with_context(|| format!("{first} does not end in /p2p/NAME"))?;
    for address in addresses {
        ensure!(named(address) == Some(peer), "{address} does not end in /p2p/{peer}");
    }
    Ok(peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_without_one_common_name_are_refused() {
        let name = |seed| peer_id(&Identity::from_seed([seed; 32]).key()).unwrap();
        let at = |port: u16, rest: &str| -> Multiaddr {
            format!("/ip4/127.0.0.1/tcp/{port}{rest}").parse().unwrap()
        };
        let (a, b) = (format!("/p2p/{}", name(1)), format!("/p2p/{}", name(2)));
        assert_eq!(common_peer(&[at(1, &a), at(2, &format!("/ws{a}"))]).unwrap(), name(1));
        for bad in [vec![], vec![at(1, "")], vec![at(1, &a), at(2, &b)], vec![at(1, &a), at(2, "")]]
        {
            assert!(common_peer(&bad).is_err(), "{bad:?}");
        }
        assert!(common_peer(&vec![at(1, &a); DIALS_MAX as usize + 1]).is_err());
    }
}
