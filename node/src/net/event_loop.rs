//! The task that owns the swarm: commands and network events in, [`NetEvent`]s out.
//!
//! It never waits for anything but its inputs, so that nothing that a peer or the program is slow
//! to do can stop it. What the program has not taken yet is queued, with a bound on requests;
//! other events are at most a few for each connection.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow};
use futures::StreamExt;
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, Message, OutboundRequestId};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, Swarm, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, ping};
use manyhands_core::swarm::ids::PeerKey;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::codec::{Answer, BytesCodec};
use super::limits::{BANNED_MAX, Bucket, EVENTS_WAITING_MAX, Limits, REQUESTS_OUT_MAX};
use super::results::Receiver;
use super::serve::Server;
use super::start::{Behaviour, BehaviourEvent};
use super::streams::{BLOB_PROTOCOL, Inbound, Opened, RESULT_PROTOCOL};
use super::{NetEvent, ReplyTo};
use crate::identity::peer_key;

/// What handles ask for.
#[derive(Debug)]
pub(super) enum Command {
    Dial { peer: PeerId, addresses: Vec<Multiaddr>, done: oneshot::Sender<Result<()>> },
    Disconnect { peer: PeerId },
    Ban { peer: PeerId },
    Request { peer: PeerId, bytes: Vec<u8>, done: oneshot::Sender<Result<Vec<u8>>> },
    Open { peer: PeerId, protocol: StreamProtocol, opened: Opened },
}

/// What is known of a connected peer.
struct Session {
    bucket: Bucket,
    flooding_told: bool,
}

/// The state of the task.
pub(super) struct EventLoop {
    swarm: Swarm<Behaviour>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<NetEvent>,
    waiting: VecDeque<NetEvent>,
    limits: Arc<Limits>,
    receiver: Receiver,
    server: Option<Server>,
    addresses: Arc<Mutex<Vec<Multiaddr>>>,
    sessions: BTreeMap<PeerKey, Session>,
    dials: BTreeMap<ConnectionId, oneshot::Sender<Result<()>>>,
    requests: BTreeMap<OutboundRequestId, oneshot::Sender<Result<Vec<u8>>>>,
    banned: VecDeque<PeerId>,
}

impl EventLoop {
    pub(super) fn new(
        swarm: Swarm<Behaviour>,
        commands: mpsc::Receiver<Command>,
        events: mpsc::Sender<NetEvent>,
        limits: Arc<Limits>,
        receiver: Receiver,
        server: Option<Server>,
        addresses: Arc<Mutex<Vec<Multiaddr>>>,
    ) -> Self {
        Self {
            swarm,
            commands,
            events,
            waiting: VecDeque::new(),
            limits,
            receiver,
            server,
            addresses,
            sessions: BTreeMap::new(),
            dials: BTreeMap::new(),
            requests: BTreeMap::new(),
            banned: VecDeque::new(),
        }
    }

    /// Runs until the last handle is dropped.
    pub(super) async fn run(mut self) {
        let events = self.events.clone();
        loop {
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                },
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                permit = events.reserve(), if !self.waiting.is_empty() => {
                    match (permit, self.waiting.pop_front()) {
                        (Ok(permit), Some(event)) => permit.send(event),
                        // The program no longer listens, and may still use its handles.
                        _ => self.waiting.clear(),
                    }
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Dial { peer, addresses, done } => self.dial(peer, addresses, done),
            Command::Disconnect { peer } => self.disconnect(peer),
            Command::Ban { peer } => self.ban(peer),
            Command::Request { peer, bytes, done } => self.request(peer, bytes, done),
            Command::Open { peer, protocol, opened } => {
                if self.swarm.is_connected(&peer) {
                    self.swarm.behaviour_mut().streams.open(peer, protocol, opened);
                } else {
                    drop(opened.send(Err(io::ErrorKind::NotConnected.into())));
                }
            }
        }
    }

    fn dial(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, done: oneshot::Sender<Result<()>>) {
        if self.swarm.is_connected(&peer) {
            drop(done.send(Ok(())));
            return;
        }
        let options = DialOpts::peer_id(peer)
            .addresses(addresses)
            .condition(PeerCondition::Always)
            .allocate_new_port()
            .build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => drop(self.dials.insert(connection, done)),
            Err(error) => drop(done.send(Err(anyhow!("cannot dial {peer}: {error}")))),
        }
    }

    fn disconnect(&mut self, peer: PeerId) {
        // An error says that the peer is not connected, which is what was asked for.
        let _ = self.swarm.disconnect_peer_id(peer);
    }

    fn ban(&mut self, peer: PeerId) {
        if !self.swarm.behaviour_mut().banned.block_peer(peer) {
            return;
        }
        self.banned.push_back(peer);
        if self.banned.len() > BANNED_MAX
            && let Some(oldest) = self.banned.pop_front()
        {
            self.swarm.behaviour_mut().banned.unblock_peer(oldest);
        }
    }

    fn request(&mut self, peer: PeerId, bytes: Vec<u8>, done: oneshot::Sender<Result<Vec<u8>>>) {
        if !self.swarm.is_connected(&peer) {
            drop(done.send(Err(anyhow!("{peer} is not connected"))));
        } else if self.requests.len() >= REQUESTS_OUT_MAX {
            drop(done.send(Err(anyhow!("{REQUESTS_OUT_MAX} requests are waiting already"))));
        } else {
            let id = self.swarm.behaviour_mut().requests.send_request(&peer, bytes);
            self.requests.insert(id, done);
        }
    }

    fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id, connection_id, num_established, ..
            } => {
                self.on_connected(peer_id, connection_id, num_established.get());
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, .. } => {
                self.on_disconnected(peer_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                if let Some(done) = self.dials.remove(&connection_id) {
                    drop(done.send(Err(anyhow!("cannot connect: {error}"))));
                }
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                let address = address.with(Protocol::P2p(*self.swarm.local_peer_id()));
                self.addresses.lock().unwrap_or_else(PoisonError::into_inner).push(address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                let address = address.with(Protocol::P2p(*self.swarm.local_peer_id()));
                let mut all = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
                all.retain(|a| *a != address);
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "listener"),
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "a listener has closed");
            }
            SwarmEvent::Behaviour(BehaviourEvent::Requests(event)) => self.on_request_event(event),
            SwarmEvent::Behaviour(BehaviourEvent::Streams(inbound)) => self.on_stream(inbound),
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event {
                connection,
                result: Err(error),
                peer,
            })) => {
                // Also one that knows no pings: nobody would notice that it is dead.
                tracing::debug!(%peer, %error, "closing a connection that does not answer pings");
                self.swarm.close_connection(connection);
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, peer: PeerId, connection: ConnectionId, count: u32) {
        if let Some(done) = self.dials.remove(&connection) {
            drop(done.send(Ok(())));
        }
        let Ok(key) = peer_key(&peer) else {
            // No ledger could name it.
            self.disconnect(peer);
            return;
        };
        if count == 1 {
            let bucket = Bucket::full(&self.limits, Instant::now());
            self.sessions.insert(key, Session { bucket, flooding_told: false });
            self.tell(NetEvent::Connected { peer: key });
        }
    }

    fn on_disconnected(&mut self, peer: PeerId) {
        let Ok(key) = peer_key(&peer) else { return };
        self.sessions.remove(&key);
        // A session that the program has not heard of need not be told: so the queue stays
        // short however often a peer comes and goes.
        let before = self.waiting.len();
        let began = self
            .waiting
            .iter()
            .rposition(|e| matches!(e, NetEvent::Connected { peer } if *peer == key));
        if let Some(began) = began {
            let mut index = 0;
            self.waiting.retain(|event| {
                index += 1;
                index <= began || event.session() != Some(key)
            });
        }
        if self.waiting.len() == before {
            self.tell(NetEvent::Disconnected { peer: key });
        }
    }

    fn on_request_event(&mut self, event: request_response::Event<Vec<u8>, Answer>) {
        match event {
            request_response::Event::Message { peer, message, .. } => match message {
                Message::Request { request, channel, .. } => {
                    let Some(peer) = self.admit(&peer) else { return };
                    let (reply, answer) = oneshot::channel();
                    let answered = Answer::Later(answer);
                    let requests: &mut request_response::Behaviour<BytesCodec> =
                        &mut self.swarm.behaviour_mut().requests;
                    if requests.send_response(channel, answered).is_ok()
                        && self.waiting.len() < EVENTS_WAITING_MAX
                    {
                        let reply = ReplyTo(reply);
                        self.tell(NetEvent::Request { peer, bytes: request, reply });
                    }
                }
                Message::Response { request_id, response } => {
                    // `read_response` gives nothing else.
                    if let (Some(done), Answer::Ready(bytes)) =
                        (self.requests.remove(&request_id), response)
                    {
                        drop(done.send(Ok(bytes)));
                    }
                }
            },
            request_response::Event::OutboundFailure { request_id, error, .. } => {
                if let Some(done) = self.requests.remove(&request_id) {
                    drop(done.send(Err(anyhow!("the request failed: {error}"))));
                }
            }
            request_response::Event::InboundFailure { peer, error, .. } => {
                tracing::debug!(%peer, %error, "a request was not answered");
            }
            request_response::Event::ResponseSent { .. } => {}
        }
    }

    fn on_stream(&mut self, Inbound { peer, protocol, stream }: Inbound) {
        let Some(peer) = self.admit(&peer) else { return };
        if protocol == RESULT_PROTOCOL {
            self.receiver.spawn(peer, stream);
        } else if protocol == BLOB_PROTOCOL
            && let Some(server) = &self.server
        {
            server.spawn(peer, stream);
        }
    }

    /// Whether a peer may ask for something now; says once who asks too often.
    fn admit(&mut self, peer: &PeerId) -> Option<PeerKey> {
        let key = peer_key(peer).ok()?;
        let session = self.sessions.get_mut(&key)?;
        if session.bucket.take(&self.limits, Instant::now()) {
            return Some(key);
        }
        if !std::mem::replace(&mut session.flooding_told, true) {
            self.tell(NetEvent::Flooding { peer: key });
        }
        None
    }

    /// Tells the program, after what it has not been told yet.
    fn tell(&mut self, event: NetEvent) {
        if !self.waiting.is_empty() {
            self.waiting.push_back(event);
        } else if let Err(TrySendError::Full(event)) = self.events.try_send(event) {
            self.waiting.push_back(event);
        }
    }
}

impl NetEvent {
    /// Whose session the event belongs to: such events mean nothing after its end.
    fn session(&self) -> Option<PeerKey> {
        match self {
            Self::Connected { peer } | Self::Request { peer, .. } | Self::Flooding { peer } => {
                Some(*peer)
            }
            Self::Disconnected { .. } | Self::Result { .. } => None,
        }
    }
}
