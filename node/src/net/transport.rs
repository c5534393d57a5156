//! How bytes travel: QUIC, TCP, and WebSocket with or without TLS, each by name or by address.

use std::error::Error;

use anyhow::{Context, Result};
use libp2p::core::Transport;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::Boxed;
use libp2p::core::upgrade::Version;
use libp2p::identity::{Keypair, PeerId};
use libp2p::websocket::tls;
use libp2p::{dns, noise, quic, tcp, websocket, yamux};
use rustls::pki_types::CertificateDer;

/// All transports in one; `trust` are certificate authorities beside the usual ones.
pub(super) fn build(
    keypair: &Keypair,
    trust: &[CertificateDer<'static>],
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, Box<dyn Error + Send + Sync>> {
    Ok(layered(keypair, trust)?)
}

fn layered(
    keypair: &Keypair,
    trust: &[CertificateDer<'static>],
) -> Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let noise = noise::Config::new(keypair).context("cannot set up encryption")?;
    let tcp = || tcp::tokio::Transport::new(tcp::Config::default());
    let names = "cannot read this system's settings for names (DNS)";
    let plain = tcp()
        .upgrade(Version::V1Lazy)
        .authenticate(noise.clone())
        .multiplex(yamux::Config::default())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let quic = quic::tokio::Transport::new(quic::Config::new(keypair))
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let direct = plain.or_transport(quic).map(|either, _| either.into_inner());
    // WebSocket looks names up itself: TLS must know the name, not only where it leads.
    let mut websocket =
        websocket::Config::new(dns::tokio::Transport::system(tcp()).context(names)?);
    websocket.set_tls_config(tls_config(trust));
    let websocket = websocket
        .upgrade(Version::V1Lazy)
        .authenticate(noise)
        .multiplex(yamux::Config::default())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let direct = dns::tokio::Transport::system(direct).context(names)?;
    Ok(websocket.or_transport(direct).map(|either, _| either.into_inner()).boxed())
}

fn tls_config(trust: &[CertificateDer<'static>]) -> tls::Config {
    let mut builder = tls::Config::builder();
    for certificate in trust {
        // A system's list may hold certificates that nothing can be checked with.
        if let Err(error) = builder.add_trust(&tls::Certificate::new(certificate.to_vec())) {
            tracing::debug!(%error, "a certificate authority is left out");
        }
    }
    builder.finish()
}
