//! `manyhands host`: a coordination peer.
//!
//! The coordinator of `core` decides everything; this moves bytes between it, the network, the
//! disk, the own engine that audits, and whoever watches. Start at [`run`], then `actor`; `follow`
//! is a peer that mirrors another one and could go on in its place.

mod actor;
mod address;
mod auditor;
mod follow;
mod keep;
mod place;
mod serve;
mod teller;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use jiff::Timestamp;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::problems::Problems;
use manyhands_core::swarm::chain;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::ledger::Entry;
use manyhands_core::swarm::protocol::{PeerAddress, Request, Response};
use manyhands_core::swarm::recovery::opening;
use serde::{Deserialize, Serialize};

use crate::blobs::BlobStore;
use crate::cli::runs_dir;
use crate::net::Net;
use crate::storage::Storage;
use crate::store::read_bounded;
use crate::train::{open_problems, parse_run};
use crate::{clock, imported};
use keep::find;
use place::Place;

pub use address::AddressArgs;
pub use place::URL_FILE;

/// Largest run file.
const RUN_BYTES_MAX: u64 = 1 << 20;
/// Largest problem file.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Exit code after Ctrl-C, as shells expect it.
pub const INTERRUPTED: u8 = 130;
/// Events that wait for the coordinator.
const EVENTS_MAX: usize = 1024;

/// Arguments of `host`.
#[derive(Clone, Debug, Args)]
pub struct HostArgs {
    /// The run file (TOML). Not needed where --dir holds a run already, nor with --follow.
    #[arg(required_unless_present_any = ["dir", "follow"])]
    pub run: Option<PathBuf>,
    /// Directory of the run [default: runs/NAME, or runs/NAME-follower with --follow].
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Mirror the run of the host at this address, and be ready to go on with it.
    #[arg(long, value_name = "URL", conflicts_with_all = ["run", "promote", "once", "json"])]
    pub follow: Option<String>,
    /// File with the operator's token of the host that is followed: its `admin-token`
    /// [default: the text of `MANYHANDS_TOKEN` in the environment].
    #[arg(long, value_name = "FILE", requires = "follow")]
    pub token: Option<PathBuf>,
    /// Trust this certificate authority (PEM) when following a host by https, instead of those
    /// that the system trusts.
    #[arg(long, value_name = "FILE", requires = "follow")]
    pub ca: Option<PathBuf>,
    /// Go on with the run that --dir followed, because its host is lost for good.
    #[arg(long, requires = "dir")]
    pub promote: bool,
    /// Address that volunteers dial; ports are chosen freely.
    #[arg(long, default_value = "0.0.0.0")]
    pub listen: IpAddr,
    /// Threads that audit; 0 takes all cores.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Disk for results and weights, GiB. Beyond it the results of old, final steps are dropped;
    /// a replay computes them again.
    #[arg(long, value_name = "GIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(..=1 << 20))]
    pub disk: u64,
    /// End when the run is complete, instead of going on to serve it.
    #[arg(long)]
    pub once: bool,
    /// Write a summary of the complete run to this file, as JSON. Implies --once.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// How others reach it.
    #[command(flatten)]
    pub address: AddressArgs,
}

/// What `/api/manifest` says: all that it takes to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = match &args.follow {
        Some(url) => runtime.block_on(follow::follow(args, url)),
        None => runtime.block_on(host(args)),
    };
    // The auditor may be in the middle of a unit; nothing depends on it.
    runtime.shutdown_background();
    result
}

/// A run, and where it comes from.
struct Run {
    config: RunConfig,
    problems: Problems,
    /// Problem files by path: content hash.
    files: Vec<(String, Hash)>,
}

impl Run {
    /// From a run file and the problem files that it names, which are kept for followers.
    fn from_file(path: &Path, config: RunConfig, blobs: &BlobStore) -> Result<Self> {
        let base = path.parent().map(PathBuf::from).unwrap_or_default();
        let problems = open_problems(&config, &base)?;
        let mut files = Vec::new();
        for path in config.tasks.iter().filter_map(|t| t.jsonl.clone()) {
            let bytes = read_bounded(&base.join(&path), FILE_BYTES_MAX)?;
            files.push((path, blobs.put(&bytes)?));
        }
        if let Some(imported) = problems.model() {
            for (name, bytes) in imported::files(&config, &base, &imported)? {
                files.push((name, blobs.put(&bytes)?));
            }
        }
        Ok(Self { config, problems, files })
    }

    /// From a ledger and its blobs.
    fn from_ledger(storage: &Storage, blobs: &BlobStore) -> Result<Self> {
        let first = storage.records(0, 1)?.pop().context(
            "the directory holds no run; name a run file to begin one, or follow one first",
        )?;
        let (config, files) = opening(&first).map_err(anyhow::Error::msg)?;
        let read = |path: &str| {
            let named = files.iter().find(|(name, _)| name == path);
            let bytes = named.and_then(|(_, hash)| find(storage, blobs, hash));
            let bytes = bytes.ok_or("this directory has no copy of it; name the run file")?;
            String::from_utf8(bytes).map_err(|e| e.to_string())
        };
        let mut problems = Problems::open(&config, read)?;
        if config.model.import.is_some() {
            let of = |path: &str| {
                let (_, hash) = files.iter().find(|(name, _)| name == path)?;
                find(storage, blobs, hash)
            };
            problems = problems.with_model(imported::from_blobs(&config, &of)?);
        }
        Ok(Self { config, problems, files })
    }
}

/// Reads a run file.
pub(crate) fn read_run(path: &Path) -> Result<RunConfig> {
    let text = String::from_utf8(read_bounded(path, RUN_BYTES_MAX)?)
        .context("the run file is not UTF-8")?;
    parse_run(&text, path.parent().unwrap_or(Path::new(".")))
        .with_context(|| format!("in {}", path.display()))
}

async fn host(args: &HostArgs) -> Result<ExitCode> {
    let config = args.run.as_deref().map(read_run).transpose()?;
    let name = config.as_ref().map(|c| c.name.clone());
    let dir = args.dir.clone().or_else(|| Some(runs_dir().join(name?)));
    let dir = dir.context("name a run file, or the directory of a run with --dir")?;
    let place = Place::open(args, &dir, Vec::new()).await?;
    let run = match (&args.run, config) {
        (Some(path), Some(config)) => Run::from_file(path, config, &place.blobs)?,
        _ => Run::from_ledger(&place.storage, &place.blobs)?,
    };
    let keep = keep::Keep::open(&dir, place.storage.clone(), place.blobs.clone())?;
    if let Some(newest_ms) = keep.newest_ms()? {
        clock::check_ledger(Timestamp::now(), newest_ms)?;
    }
    refuse_if_promoted(&place, &keep.peers()?).await?;
    let (token, url) = (place.token.clone(), place.site.url.clone());
    let served = serve::start(place.site, &place.storage, &place.blobs, token.clone(), &place.net);
    let setup = actor::Setup {
        config: run.config,
        problems: run.problems,
        files: run.files,
        secret: place.identity.secret(),
        token: token.text().to_string(),
        own: place.own.clone(),
        url: url.clone(),
        threads: args.threads,
        once: args.once || args.json.is_some(),
        json: args.json.clone(),
        promote: args.promote,
        disk_bytes: args.disk << 30,
    };
    let name = setup.config.name.clone();
    let tell = teller::Teller::new(setup.config.clone(), keep.run_dir.clone(), served.feed);
    let mut actor = actor::Actor::start(setup, keep, place.net, served.shown, tell)?;
    actor.show()?;
    eprintln!("run        {} ({name})", actor.run());
    place::announce(&dir, &url)?;
    let code = actor.run_until_done(place.events, served.commands).await;
    drop(served.running);
    code
}

/// Two peers that write one ledger would be two runs: a host that comes back after another one
/// went on in its place must not.
async fn refuse_if_promoted(place: &Place, peers: &[PeerAddress]) -> Result<()> {
    let next = place.storage.len()?;
    for peer in peers.iter().filter(|p| p.peer != place.own.peer) {
        if let Some(who) = promoted_after(&place.net, peer, next).await {
            bail!(
                "another coordination peer ({}) went on with this run while this one was away; mirror it with `host --follow URL --dir ANOTHER`, this directory's last records were left behind",
                who.short()
            );
        }
    }
    Ok(())
}

/// Who went on with the run at this record, as this peer knows. A peer that is away knows nothing.
async fn promoted_after(net: &Net, peer: &PeerAddress, next: u64) -> Option<PeerKey> {
    let addresses = peer.addresses.iter().filter_map(|a| a.parse().ok()).collect();
    net.dial(addresses).await.ok()?;
    // It may have lost the last records before it went on.
    let from = next.saturating_sub(u64::from(RECORDS_ASKED));
    let request = Request::Ledger { from, limit: 2 * RECORDS_ASKED };
    let answer = net.request(peer.peer, request.encode()).await.ok()?;
    let Ok(Response::Records(records)) = Response::decode(&answer) else { return None };
    records.iter().find_map(|bytes| match chain::decode(bytes).ok()?.entry {
        Entry::Promoted { coordinator } if coordinator == peer.peer => Some(coordinator),
        _ => None,
    })
}

/// Records before the own ledger's end, and after it, in which a promotion is looked for.
const RECORDS_ASKED: u32 = 1024;
