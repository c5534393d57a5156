//! `manyhands host`: a coordination peer.
//!
//! The coordinator of `core` decides everything; this moves bytes between it, the network, the
//! disk, the own engine that audits, and whoever watches. Start at [`run`], then `actor`.

mod actor;
mod auditor;
mod keep;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use libp2p::multiaddr::{Multiaddr, Protocol};
use manyhands_core::run::config::RunConfig;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::protocol::PeerAddress;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::blobs::BlobStore;
use crate::cli::{program, runs_dir};
use crate::http::{self, AdminToken, Feed, HttpState, Tunnel};
use crate::identity::Identity;
use crate::net::{Limits, Net, NetConfig};
use crate::storage::Storage;
use crate::store::{read_bounded, write_atomic};
use crate::train::{open_problems, parse_run};

/// Port of dashboard and API, unless it is taken.
const HTTP_PORT: u16 = 8420;
/// Disk for blobs that are served.
const BLOB_BYTES_MAX: u64 = 64 << 30;
/// Largest run file.
const RUN_BYTES_MAX: u64 = 1 << 20;
/// File in a host's directory that says where it can be joined.
pub const URL_FILE: &str = "url";
/// File in a host's directory with the addresses it listened on.
const LISTEN_FILE: &str = "listen";
/// Events that wait for the coordinator.
const EVENTS_MAX: usize = 1024;

/// Arguments of `host`.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// The run file (TOML).
    pub run: PathBuf,
    /// Directory of the run [default: runs/NAME].
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Where the dashboard and the API are served [default: 0.0.0.0:8420, or a free port].
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub http: Option<SocketAddr>,
    /// Address that volunteers dial; ports are chosen freely.
    #[arg(long, default_value = "0.0.0.0")]
    pub listen: IpAddr,
    /// Threads that audit; 0 takes all cores.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// End when the run is complete, instead of going on to serve it.
    #[arg(long)]
    pub once: bool,
    /// Write a summary of the complete run to this file, as JSON. Implies --once.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What `/api/manifest` says: all that it takes to join.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The run.
    pub run: Hash,
    /// Its name.
    pub name: String,
    /// Protocol of the swarm.
    pub protocol: u32,
    /// Who coordinates, first, and who follows.
    pub peers: Vec<PeerAddress>,
}

/// Runs `host`.
pub fn run(args: &HostArgs) -> Result<ExitCode> {
    let text = String::from_utf8(read_bounded(&args.run, RUN_BYTES_MAX)?)
        .context("the run file is not UTF-8")?;
    let config = parse_run(&text).with_context(|| format!("in {}", args.run.display()))?;
    let base = args.run.parent().map(PathBuf::from).unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(host(args, &config, &base));
    // The auditor may be in the middle of a unit; nothing depends on it.
    runtime.shutdown_background();
    result
}

async fn host(args: &HostArgs, config: &RunConfig, base: &Path) -> Result<ExitCode> {
    let problems = open_problems(config, base)?;
    let dir = args.dir.clone().unwrap_or_else(|| runs_dir().join(&config.name));
    let storage = Arc::new(Storage::open(&dir)?);
    let blobs = Arc::new(BlobStore::open(&dir.join("blobs"), BLOB_BYTES_MAX)?);
    let identity = Identity::load_or_create(&dir.join("host.key"))?;
    let token = Arc::new(AdminToken::open(&dir)?);
    let files = problem_files(config, base)?;
    let secret = identity.secret();
    let listen = |addresses: Vec<Multiaddr>| NetConfig {
        identity: identity.clone(),
        listen: addresses,
        limits: Limits::default(),
        blobs: Some(blobs.clone()),
    };
    // The same ports as before, so that volunteers find their way back by themselves.
    let before = listened(&dir, args.listen);
    let started = match before.is_empty() {
        true => None,
        false => Net::start(listen(before)).await.ok(),
    };
    let (net, net_events) = match started {
        Some(started) => started,
        None => Net::start(listen(any_port(args.listen)?)).await?,
    };
    remember(&dir, &net)?;
    let listener = bind(args).await?;
    let http_address = listener.local_addr()?;
    let own = PeerAddress {
        peer: net.key(),
        addresses: net.addresses().iter().map(ToString::to_string).collect(),
    };
    let keep = keep::Keep::open(&dir, storage.clone(), blobs)?;
    let url = format!("http://{}:{}", reachable(http_address.ip()), http_address.port());
    let (admin, commands) = mpsc::channel(http::ADMIN_QUEUE_MAX);
    let (status, shown) = watch::channel(Arc::default());
    let feed = Arc::new(Feed::default());
    let setup = actor::Setup {
        config: config.clone(),
        problems,
        files,
        secret,
        token: token.text().to_string(),
        own,
        url: url.clone(),
        threads: args.threads,
        once: args.once || args.json.is_some(),
        json: args.json.clone(),
    };
    let p2p = tab_listener(&net).map(|address| Arc::new(Tunnel::to(address)));
    let actor = actor::Actor::start(setup, keep, net, status, feed.clone())?;
    let manifest = serde_json::to_vec(&actor.manifest())?;
    write_atomic(&dir.join(URL_FILE), url.as_bytes())?;
    eprintln!("run        {} ({})", actor.run(), config.name);
    eprintln!("dashboard  {url}");
    eprintln!("join       {} join {url}", program());
    eprintln!(
        "operator   the token for pausing and stopping is in {}",
        dir.join(http::TOKEN_FILE).display()
    );
    let reader = storage.clone();
    let ledger = move |from, limit| {
        let records = reader.records(from, limit)?;
        records.iter().map(|b| Ok(manyhands_core::swarm::chain::decode(b)?)).collect()
    };
    let source = storage;
    let blob = move |hash: &Hash| {
        source.blob(hash).ok().flatten().map(|bytes| http::Blob::Bytes(bytes.into()))
    };
    let state = HttpState {
        status: shown,
        feed,
        manifest: manifest.into(),
        ledger: Arc::new(ledger),
        blob: Arc::new(blob),
        admin,
        token,
        p2p,
    };
    let (_running, ended) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(http::serve(listener, state, async move {
        let _ = ended.await;
    }));
    let code = actor.run_until_done(net_events, commands).await;
    served.abort();
    code
}

/// Addresses with ports to be chosen.
fn any_port(ip: IpAddr) -> Result<Vec<Multiaddr>> {
    let of = |rest| format!("/{}/{ip}/{rest}", family(ip)).parse().context("--listen");
    ["tcp/0", "udp/0/quic-v1", "tcp/0/ws"].into_iter().map(of).collect()
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

/// The address under which others reach an unspecified one.
fn reachable(ip: IpAddr) -> IpAddr {
    if !ip.is_unspecified() {
        return ip;
    }
    // Nothing is sent: connecting a datagram socket only asks which interface would be used.
    let local = UdpSocket::bind("0.0.0.0:0").and_then(|s| {
        s.connect("192.0.2.1:9")?;
        s.local_addr()
    });
    local.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |a| a.ip())
}

async fn bind(args: &HostArgs) -> Result<tokio::net::TcpListener> {
    let Some(address) = args.http else {
        let any = SocketAddr::from((args.listen, HTTP_PORT));
        return match http::bind(any).await {
            Ok(listener) => Ok(listener),
            Err(_) => http::bind(SocketAddr::from((args.listen, 0))).await,
        };
    };
    http::bind(address).await
}

/// Path and content hash of the problem files of a run.
fn problem_files(config: &RunConfig, base: &Path) -> Result<Vec<(String, Hash)>> {
    let paths = config.tasks.iter().filter_map(|t| t.jsonl.clone());
    let hash = |path: String| {
        let bytes = read_bounded(&base.join(&path), 256 << 20)?;
        Ok((path, Hash::of(&bytes)))
    };
    paths.map(hash).collect()
}
