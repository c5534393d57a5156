//! The network of a tab: connections that it dials, requests, results, and chunks of blobs.
//!
//! A tab only ever opens streams; what goes over them is in `core::swarm::transfer`, and is
//! answered by `node`. One task owns the swarm; a [`Link`] is a handle to it that clones.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use futures::channel::{mpsc, oneshot};
use futures::future::{Either, select};
use futures::{AsyncReadExt, AsyncWriteExt, FutureExt, SinkExt, StreamExt};
use libp2p::core::Transport;
use libp2p::core::upgrade::Version;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{self, ConnectionId, NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Stream, StreamProtocol, noise, ping, yamux};
use manyhands_core::swarm::chunks::ChunkList;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::protocol::{REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX};
use manyhands_core::swarm::transfer::{self, Ack, FOUND, PIECE_BYTES};

use crate::browser;
use crate::transport::{Dialer, Traffic};

/// A request without a response fails after this; long polls last up to 30 s.
const REQUEST_MS: u32 = 60_000;
/// Time in which a transfer need not have moved anything.
const GRACE_MS: u32 = 20_000;
/// Transfers slower than this are given up.
const BYTES_PER_SECOND_MIN: u64 = 16 << 10;
/// Dials that wait for the swarm's task.
const COMMANDS_MAX: usize = 16;
/// A dead peer is noticed after two pings in a row without an answer.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// A busy peer may take this long to answer one.
const PING_TIMEOUT: Duration = Duration::from_secs(7);
/// A tab that computes for long keeps its connection; pings find out who is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// Requests go over plain streams, of which each side needs no more than the other's protocols.
#[derive(NetworkBehaviour)]
struct Behaviour {
    streams: libp2p_stream::Behaviour,
    ping: ping::Behaviour,
}

struct Dial {
    peer: PeerId,
    addresses: Vec<Multiaddr>,
    done: oneshot::Sender<Result<()>>,
}

/// A handle to the network.
#[derive(Clone)]
pub struct Link {
    streams: libp2p_stream::Control,
    dials: mpsc::Sender<Dial>,
}

impl Link {
    /// Starts the network of the identity with this seed. `lost` is told of every peer whose last
    /// connection ended.
    pub fn start(seed: [u8; 32], traffic: Traffic, lost: impl Fn() + 'static) -> Result<Self> {
        let keypair = Keypair::ed25519_from_bytes(seed).context("no key")?;
        let noise = noise::Config::new(&keypair).context("no encryption")?;
        let transport = Dialer::new(traffic)
            .upgrade(Version::V1Lazy)
            .authenticate(noise)
            .multiplex(yamux::Config::default())
            .boxed();
        let pings = ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT);
        let streams = libp2p_stream::Behaviour::new();
        let control = streams.new_control();
        let behaviour = Behaviour { streams, ping: ping::Behaviour::new(pings) };
        let config = swarm::Config::with_wasm_executor().with_idle_connection_timeout(IDLE_TIMEOUT);
        let swarm = Swarm::new(transport, behaviour, keypair.public().to_peer_id(), config);
        let (dials, commands) = mpsc::channel(COMMANDS_MAX);
        wasm_bindgen_futures::spawn_local(run(swarm, commands, lost));
        Ok(Self { streams: control, dials })
    }

    /// Connects to a peer at any of the addresses.
    pub async fn dial(&self, peer: PeerKey, addresses: Vec<Multiaddr>) -> Result<()> {
        let (done, dialled) = oneshot::channel();
        let dial = Dial { peer: peer_id(&peer)?, addresses, done };
        self.dials.clone().send(dial).await.context("the network has ended")?;
        dialled.await.context("the network has ended")?
    }

    /// Asks a connected peer.
    pub async fn request(&self, peer: PeerKey, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let length = bytes.len();
        ensure!(length <= REQUEST_BYTES_MAX, "a request of {length} is over {REQUEST_BYTES_MAX}");
        let header = transfer::message_header(length).context("a request is too long")?;
        let ask = async {
            let mut stream = self.open(peer, transfer::REQUEST_PROTOCOL).await?;
            stream.write_all(&header).await?;
            stream.write_all(&bytes).await?;
            stream.close().await?;
            let mut header = [0; transfer::MESSAGE_HEADER_BYTES];
            stream.read_exact(&mut header).await?;
            let length = transfer::message_length(header, RESPONSE_BYTES_MAX)?;
            // Memory grows with the bytes that arrive, not with the length that is claimed.
            let mut answer = Vec::new();
            stream.take(length as u64).read_to_end(&mut answer).await?;
            ensure!(answer.len() == length, "the answer broke off");
            Ok(answer)
        };
        within(REQUEST_MS, ask).await
    }

    /// Uploads the result of a unit, and waits until it was taken or refused.
    pub async fn send_result(&self, peer: PeerKey, unit: Hash, bytes: &[u8]) -> Result<()> {
        let stream = self.open(peer, transfer::RESULT_PROTOCOL).await?;
        let (mut read, mut write) = stream.split();
        let upload = async {
            write.write_all(&transfer::result_header(&unit, bytes.len() as u64)).await?;
            for piece in bytes.chunks(PIECE_BYTES) {
                write.write_all(piece).await?;
            }
            write.close().await
        };
        let mut ack = [0];
        let answer = read.read_exact(&mut ack);
        let both = async {
            // A refusal comes before the end, and makes the rest of the upload pointless.
            match select(std::pin::pin!(answer), std::pin::pin!(upload)).await {
                Either::Left((answered, _)) => answered,
                Either::Right((uploaded, answer)) => match uploaded {
                    Ok(()) => answer.await,
                    Err(error) => answer.await.or(Err(error)),
                },
            }
        };
        within(patience_ms(bytes.len() as u64) + REQUEST_MS, async { Ok(both.await?) }).await?;
        Ok(Ack::read(ack[0])?)
    }

    /// Asks a peer for a blob: its list of chunks, and a stream that gives any of them.
    pub async fn blob(&self, peer: PeerKey, blob: &Hash) -> Result<Chunks> {
        let ask = async {
            let mut stream = self.open(peer, transfer::BLOB_PROTOCOL).await?;
            stream.write_all(&transfer::blob_header(blob, true)).await?;
            stream.flush().await?;
            let mut status = [0];
            stream.read_exact(&mut status).await?;
            ensure!(status == [FOUND], "the host does not have the blob {}", blob.short());
            let mut header = [0; transfer::LIST_HEADER_BYTES];
            stream.read_exact(&mut header).await?;
            let (bytes, length) = transfer::read_list_header(header)?;
            let mut values = Vec::new();
            (&mut stream).take(bytes).read_to_end(&mut values).await?;
            let list = transfer::read_list(blob, length, &values);
            let list = list.context("the host sent a wrong list of chunks")?;
            Ok(Chunks { stream, list })
        };
        within(2 * GRACE_MS, ask).await
    }

    async fn open(&self, peer: PeerKey, protocol: &'static str) -> Result<Stream> {
        let mut streams = self.streams.clone();
        let opened = streams.open_stream(peer_id(&peer)?, StreamProtocol::new(protocol));
        within(GRACE_MS, async { Ok(opened.await?) }).await
    }
}

/// A blob that a peer gives chunk by chunk.
pub struct Chunks {
    stream: Stream,
    /// Its chunks; verified against the blob's hash.
    pub list: ChunkList,
}

impl Chunks {
    /// Asks for chunks, which come in this order.
    pub async fn ask(&mut self, indices: &[usize]) -> Result<()> {
        for &index in indices {
            self.stream.write_all(&u32::try_from(index)?.to_le_bytes()).await?;
        }
        Ok(self.stream.flush().await?)
    }

    /// The chunk that was asked for next.
    pub async fn next(&mut self, index: usize) -> Result<Vec<u8>> {
        let range = self.list.range(index);
        let length = range.end - range.start;
        let mut bytes = vec![0; usize::try_from(length)?];
        let read = async { Ok(self.stream.read_exact(&mut bytes).await?) };
        within(patience_ms(length), read).await?;
        ensure!(self.list.check(index, &bytes), "the host sent a wrong chunk");
        Ok(bytes)
    }
}

/// Time for so many bytes.
fn patience_ms(bytes: u64) -> u32 {
    let moving = bytes.saturating_mul(1000) / BYTES_PER_SECOND_MIN;
    GRACE_MS.saturating_add(u32::try_from(moving).unwrap_or(u32::MAX / 2))
}

async fn within<T>(ms: u32, work: impl Future<Output = Result<T>>) -> Result<T> {
    match select(std::pin::pin!(work), std::pin::pin!(browser::sleep(ms))).await {
        Either::Left((done, _)) => done,
        Either::Right(_) => Err(anyhow!("nothing came for {} s", ms / 1000)),
    }
}

/// The libp2p name of a key.
fn peer_id(key: &PeerKey) -> Result<PeerId> {
    let public = ed25519::PublicKey::try_from_bytes(&key.0)
        .with_context(|| format!("{} is no Ed25519 key", key.short()))?;
    Ok(PublicKey::from(public).to_peer_id())
}

/// The task that owns the swarm, until the last handle is dropped.
async fn run(mut swarm: Swarm<Behaviour>, mut commands: mpsc::Receiver<Dial>, lost: impl Fn()) {
    let mut dials = BTreeMap::<ConnectionId, oneshot::Sender<Result<()>>>::new();
    loop {
        futures::select_biased! {
            command = commands.next() => match command {
                Some(command) => dial(&mut swarm, &mut dials, command),
                None => return,
            },
            event = swarm.select_next_some().fuse() => match event {
                SwarmEvent::ConnectionEstablished { connection_id, .. } => {
                    answer(&mut dials, connection_id, Ok(()));
                }
                SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                    answer(&mut dials, connection_id, Err(anyhow!("cannot connect: {error}")));
                }
                SwarmEvent::ConnectionClosed { num_established: 0, .. } => lost(),
                SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event {
                    connection,
                    result: Err(_),
                    ..
                })) => drop(swarm.close_connection(connection)),
                _ => {}
            },
        }
    }
}

fn dial(
    swarm: &mut Swarm<Behaviour>,
    dials: &mut BTreeMap<ConnectionId, oneshot::Sender<Result<()>>>,
    Dial { peer, addresses, done }: Dial,
) {
    if swarm.is_connected(&peer) {
        // Who asked may be gone.
        drop(done.send(Ok(())));
        return;
    }
    let options =
        DialOpts::peer_id(peer).addresses(addresses).condition(PeerCondition::Always).build();
    let connection = options.connection_id();
    match swarm.dial(options) {
        Ok(()) => drop(dials.insert(connection, done)),
        Err(error) => drop(done.send(Err(anyhow!("cannot dial: {error}")))),
    }
}

fn answer(
    dials: &mut BTreeMap<ConnectionId, oneshot::Sender<Result<()>>>,
    connection: ConnectionId,
    outcome: Result<()>,
) {
    if let Some(done) = dials.remove(&connection) {
        drop(done.send(outcome));
    }
}
