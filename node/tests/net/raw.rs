//! A peer that says whatever a test wants, on streams that are not ours.

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::multiaddr::Multiaddr;
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{PeerId, Stream, StreamProtocol, SwarmBuilder, noise, ping, tcp, yamux};
use manyhands_core::swarm::chunks::ChunkList;
use manyhands_core::swarm::ids::PeerKey;
use manyhands_node::identity::Identity;

/// A node closes connections of peers that do not answer pings.
#[derive(NetworkBehaviour)]
struct Behaviour {
    streams: libp2p_stream::Behaviour,
    ping: ping::Behaviour,
}

/// The peer, connected to one node.
pub(super) struct Raw {
    pub(super) key: PeerKey,
    node: PeerId,
    control: libp2p_stream::Control,
}

impl Raw {
    /// Connects to a node by TCP.
    pub(super) async fn connect(seed: u8, addresses: &[Multiaddr]) -> Self {
        let identity = Identity::from_seed([seed; 32]);
        let mut swarm = SwarmBuilder::with_existing_identity(identity.keypair())
            .with_tokio()
            .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
            .unwrap()
            .with_behaviour(|_| Behaviour {
                streams: libp2p_stream::Behaviour::new(),
                ping: ping::Behaviour::default(),
            })
            .unwrap()
            .with_swarm_config(|c| {
                c.with_idle_connection_timeout(std::time::Duration::from_secs(60))
            })
            .build();
        let control = swarm.behaviour().streams.new_control();
        swarm.dial(addresses[0].clone()).unwrap();
        let node = loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionEstablished { peer_id, .. } => break peer_id,
                SwarmEvent::OutgoingConnectionError { error, .. } => panic!("{error}"),
                _ => {}
            }
        };
        tokio::spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
        Self { key: identity.key(), node, control }
    }

    /// Opens a stream to the node.
    pub(super) async fn open(&mut self, protocol: &'static str) -> Stream {
        self.control.open_stream(self.node, StreamProtocol::new(protocol)).await.unwrap()
    }

    /// Streams of blobs that the node opens.
    pub(super) fn accept(&mut self) -> libp2p_stream::IncomingStreams {
        self.control.accept(StreamProtocol::new("/manyhands/blob/1")).unwrap()
    }

    /// Serves the chunk list of one blob, and the chunks of another.
    pub(super) fn serve(&mut self, list_of: &[u8], chunks: Vec<u8>) {
        let list = ChunkList::of(list_of);
        let mut streams = self.accept();
        tokio::spawn(async move {
            while let Some((_, mut stream)) = streams.next().await {
                let (list, chunks) = (list.clone(), chunks.clone());
                tokio::spawn(async move {
                    let mut header = [0; 33];
                    stream.read_exact(&mut header).await?;
                    stream.write_all(&[1]).await?;
                    if header[32] == 1 {
                        stream.write_all(&list.length.to_le_bytes()).await?;
                        stream.write_all(list.values.as_flattened()).await?;
                    }
                    stream.flush().await?;
                    let mut index = [0; 4];
                    while stream.read_exact(&mut index).await.is_ok() {
                        let range = list.range(u32::from_le_bytes(index) as usize);
                        let chunk = &chunks[range.start as usize..range.end as usize];
                        stream.write_all(chunk).await?;
                        stream.flush().await?;
                    }
                    std::io::Result::Ok(())
                });
            }
        });
    }
}
