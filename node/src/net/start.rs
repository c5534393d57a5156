//! Builds the swarm and opens its listeners.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use libp2p::connection_limits::ConnectionLimits;
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, Swarm, SwarmEvent};
use libp2p::{Multiaddr, SwarmBuilder, allow_block_list, connection_limits, identify, ping};
use rustls::pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::codec::{BytesCodec, REQUEST_PROTOCOL};
use super::event_loop::EventLoop;
use super::limits::{
    COMMANDS_MAX, DIALS_MAX, EVENTS_MAX, Limits, REQUEST_TIMEOUT, REQUESTS_A_CONNECTION_MAX,
    STREAMS_WAITING_MAX,
};
use super::results::{Expected, Receiver};
use super::serve::Server;
use super::traffic::Counters;
use super::{Net, NetConfig, NetEvent, streams, transport};

/// A dead peer is noticed after two pings in a row without an answer: within half a minute.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// A busy volunteer may take this long to answer one.
const PING_TIMEOUT: Duration = Duration::from_secs(7);
/// A volunteer that computes for long keeps its connection; pings find out who is gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Opening a port does not take longer.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);

/// What the swarm does, limits first: whom they deny costs nothing more.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) limits: connection_limits::Behaviour,
    pub(super) banned: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    pub(super) requests: request_response::Behaviour<BytesCodec>,
    pub(super) streams: streams::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) identify: identify::Behaviour,
}

/// Starts the network: see [`Net::start`].
pub(super) async fn start(config: NetConfig) -> Result<(Net, mpsc::Receiver<NetEvent>)> {
    let NetConfig { identity, listen, limits, blobs, trust } = config;
    let counters = Counters::default();
    let mut swarm = build(&identity.keypair(), &limits, &counters, &trust)?;
    let addresses = listen_on(&mut swarm, &listen).await?;
    let (commands, commands_in) = mpsc::channel(COMMANDS_MAX);
    let (events, events_out) = mpsc::channel(EVENTS_MAX);
    let limits = Arc::new(limits);
    let expected = Expected::default();
    let net = Net {
        key: identity.key(),
        commands,
        addresses: Arc::new(Mutex::new(addresses)),
        expected: expected.clone(),
        counters: counters.clone(),
        limits: Arc::clone(&limits),
    };
    let receiver = Receiver::new(expected, Arc::clone(&limits), counters.clone(), events.clone());
    let server = blobs.map(|blobs| Server::new(blobs, Arc::clone(&limits), counters));
    let addresses = Arc::clone(&net.addresses);
    let event_loop =
        EventLoop::new(swarm, commands_in, events, limits, receiver, server, addresses);
    tokio::spawn(event_loop.run());
    Ok((net, events_out))
}

fn build(
    keypair: &libp2p::identity::Keypair,
    limits: &Limits,
    counters: &Counters,
    trust: &[CertificateDer<'static>],
) -> Result<Swarm<Behaviour>> {
    let requests = request_response::Behaviour::with_codec(
        BytesCodec::new(counters.clone()),
        [(REQUEST_PROTOCOL, ProtocolSupport::Full)],
        request_response::Config::default()
            .with_request_timeout(REQUEST_TIMEOUT)
            .with_max_concurrent_streams(REQUESTS_A_CONNECTION_MAX),
    );
    let connections = ConnectionLimits::default()
        .with_max_established(Some(limits.connections_max))
        .with_max_established_per_peer(Some(limits.connections_a_peer_max))
        .with_max_pending_incoming(Some(limits.pending_inbound_max))
        .with_max_pending_outgoing(Some(DIALS_MAX));
    let pings = ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT);
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(connections),
        banned: allow_block_list::Behaviour::default(),
        requests,
        streams: streams::Behaviour::default(),
        ping: ping::Behaviour::new(pings),
        identify: identify::Behaviour::new(
            identify::Config::new("/manyhands/1".into(), keypair.public())
                .with_agent_version(concat!("manyhands/", env!("CARGO_PKG_VERSION")).into())
                .with_cache_size(0),
        ),
    };
    let swarm = SwarmBuilder::with_existing_identity(keypair.clone())
        .with_tokio()
        .with_other_transport(|keypair| transport::build(keypair, trust))
        .context("cannot set up the transports")?
        .with_behaviour(|_| behaviour)
        .context("cannot set up the swarm")?
        .with_swarm_config(|c| {
            c.with_idle_connection_timeout(IDLE_TIMEOUT)
                .with_max_negotiating_inbound_streams(STREAMS_WAITING_MAX)
        })
        .build();
    Ok(swarm)
}

/// Opens every listener, and waits until each has told its address.
async fn listen_on(swarm: &mut Swarm<Behaviour>, listen: &[Multiaddr]) -> Result<Vec<Multiaddr>> {
    let mut waiting = BTreeSet::new();
    for address in listen {
        refuse_taken(address)?;
        let id = swarm
            .listen_on(address.clone())
            .with_context(|| format!("cannot listen on {address}"))?;
        waiting.insert(id.to_string());
    }
    let name = Protocol::P2p(*swarm.local_peer_id());
    let mut addresses = Vec::new();
    let opened = async {
        while !waiting.is_empty() {
            match swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { listener_id, address } => {
                    waiting.remove(&listener_id.to_string());
                    addresses.push(address.with(name.clone()));
                }
                SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                    bail!("the listener of {addresses:?} closed: {reason:?}")
                }
                SwarmEvent::ListenerError { error, .. } => bail!("cannot listen: {error}"),
                _ => {}
            }
        }
        Ok(())
    };
    tokio::time::timeout(LISTEN_TIMEOUT, opened).await.context("no address to listen on")??;
    Ok(addresses)
}

/// Says so when another program has the port. libp2p shares its TCP ports with whoever shares
/// theirs, and two nodes on one port would each get some of the connections.
fn refuse_taken(address: &Multiaddr) -> Result<()> {
    let mut parts = address.iter();
    let ip = match parts.next() {
        Some(Protocol::Ip4(ip)) => IpAddr::V4(ip),
        Some(Protocol::Ip6(ip)) => IpAddr::V6(ip),
        _ => return Ok(()),
    };
    let probed = match parts.next() {
        Some(Protocol::Tcp(port)) => TcpListener::bind(SocketAddr::new(ip, port)).map(drop),
        Some(Protocol::Udp(port)) => UdpSocket::bind(SocketAddr::new(ip, port)).map(drop),
        _ => return Ok(()),
    };
    probed.with_context(|| {
        format!(
            "cannot listen on {address}: another program may have the port; choose another one, \
             or 0 for any that is free"
        )
    })
}
