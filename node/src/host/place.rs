//! What every coordination peer needs before it starts: a directory, a key, ports.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use libp2p::multiaddr::{Multiaddr, Protocol};
use manyhands_core::swarm::protocol::PeerAddress;
use rustls::pki_types::CertificateDer;
use tokio::sync::mpsc;

use super::HostArgs;
use super::address::{Site, tunnel};
use crate::blobs::BlobStore;
use crate::cli::program;
use crate::http::{self, AdminToken};
use crate::identity::Identity;
use crate::net::{Limits, Net, NetConfig, NetEvent};
use crate::storage::Storage;
use crate::store::write_atomic;

/// Disk for weights at least, GiB: they are not dropped where --disk is less.
const BLOB_GIB_MIN: u64 = 64;
/// File in a host's directory that says where it can be joined.
pub const URL_FILE: &str = "url";
/// File in a host's directory with the addresses it listened on.
const LISTEN_FILE: &str = "listen";

/// A directory that is open, and ports that are.
pub(super) struct Place {
    pub(super) storage: Arc<Storage>,
    pub(super) blobs: Arc<BlobStore>,
    pub(super) identity: Identity,
    pub(super) token: Arc<AdminToken>,
    pub(super) net: Net,
    pub(super) events: mpsc::Receiver<NetEvent>,
    pub(super) site: Site,
    /// Where volunteers reach it.
    pub(super) own: PeerAddress,
}

impl Place {
    /// `trust` are certificate authorities of peers that are dialled by https.
    pub(super) async fn open(
        args: &HostArgs,
        dir: &Path,
        trust: Vec<CertificateDer<'static>>,
    ) -> Result<Self> {
        let storage = Arc::new(Storage::open(dir)?);
        let blob_bytes_max = args.disk.max(BLOB_GIB_MIN) << 30;
        let blobs = Arc::new(BlobStore::open(&dir.join("blobs"), blob_bytes_max)?);
        let identity = Identity::load_or_create(&dir.join("host.key"))?;
        let token = Arc::new(AdminToken::open(dir)?);
        let listen = |addresses: Vec<Multiaddr>| NetConfig {
            identity: identity.clone(),
            listen: addresses,
            limits: Limits::default(),
            blobs: Some(blobs.clone()),
            trust: trust.clone(),
        };
        // The same ports as before, so that volunteers find their way back by themselves.
        let before = listened(dir, args.listen);
        let started = match before.is_empty() {
            true => None,
            false => Net::start(listen(before)).await.ok(),
        };
        let (net, events) = match started {
            Some(started) => started,
            None => Net::start(listen(any_port(args.listen)?)).await?,
        };
        remember(dir, &net)?;
        let site = Site::open(&args.address, args.listen, dir).await?;
        let tunnel = tunnel(&site.url, identity.keypair().public().to_peer_id());
        let addresses = net.addresses().into_iter().chain(tunnel);
        let addresses = addresses.map(|a| a.to_string()).collect();
        let own = PeerAddress { peer: net.key(), addresses };
        Ok(Self { storage, blobs, identity, token, net, events, site, own })
    }
}

/// Lets programs and people know where it is.
pub(super) fn announce(dir: &Path, url: &str) -> Result<()> {
    write_atomic(&dir.join(URL_FILE), url.as_bytes())?;
    eprintln!("page       {url}");
    eprintln!("join       {} join {url}", program());
    eprintln!(
        "operator   the token for pausing and stopping is in {}",
        dir.join(http::TOKEN_FILE).display()
    );
    Ok(())
}

/// Addresses with ports to be chosen.
fn any_port(ip: IpAddr) -> Result<Vec<Multiaddr>> {
    let of = |rest| format!("/{}/{ip}/{rest}", family(ip)).parse().context("--listen");
    ["tcp/0", "udp/0/quic-v1", "tcp/0/ws"].into_iter().map(of).collect()
}

/// The addresses of the last time, if they are of this interface.
fn listened(dir: &Path, ip: IpAddr) -> Vec<Multiaddr> {
    let text = std::fs::read_to_string(dir.join(LISTEN_FILE)).unwrap_or_default();
    let prefix = format!("/{}/{ip}/", family(ip));
    text.lines().filter(|l| l.starts_with(&prefix)).filter_map(|l| l.parse().ok()).collect()
}

/// Keeps the ports that were chosen.
fn remember(dir: &Path, net: &Net) -> Result<()> {
    let bare = |a: &Multiaddr| {
        let parts = a.iter().filter(|p| !matches!(p, Protocol::P2p(_)));
        parts.collect::<Multiaddr>().to_string()
    };
    let lines: Vec<String> = net.addresses().iter().map(bare).collect();
    write_atomic(&dir.join(LISTEN_FILE), lines.join("\n").as_bytes())
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "ip4" } else { "ip6" }
}
