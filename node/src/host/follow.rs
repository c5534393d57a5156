//! A coordination peer that follows another one: mirrors its ledger and blobs, serves them, shows
//! the run, and could go on with it (`--promote`).
//!
//! A thread reads the ledger over HTTP, in order and with the blobs that each record names; the
//! follower of `core` checks and derives. Over libp2p it makes itself known to the coordination
//! peer and answers those who read.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::swarm::chain::{self, record_hash};
use manyhands_core::swarm::coordinator::Blobs;
use manyhands_core::swarm::follower::{Answer, Effect, Follower};
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::protocol::{PeerAddress, Refusal, Request, Response};
use tokio::sync::mpsc;

use super::keep::{Keep, find};
use super::place::{self, Place};
use super::serve::{self, Shown};
use super::teller::Teller;
use super::{HostArgs, INTERRUPTED, Manifest, Run};
use crate::blobs::BlobStore;
use crate::cli::{program, runs_dir};
use crate::http::{AdminAction, TOKEN_FILE, TOKEN_FILE_BYTES_MAX};
use crate::net::{Net, NetEvent, ReplyTo};
use crate::remote::{Remote, trusted};
use crate::storage::Storage;
use crate::store::read_bounded;

/// Records that wait to be taken; each may hold a result.
const MIRRORED_MAX: usize = 32;
/// Between two questions for new records.
const POLL: Duration = Duration::from_millis(300);
/// Between two attempts to reach a host that is away.
const RETRY: Duration = Duration::from_secs(2);
/// Between two looks at the connection.
const LINK: Duration = Duration::from_secs(3);
/// Between two states for whoever watches.
const SHOW: Duration = Duration::from_millis(500);
/// Where the token may be instead of a file.
const TOKEN_VARIABLE: &str = "MANYHANDS_TOKEN";

/// What comes from the host.
enum Mirrored {
    Record { bytes: Vec<u8>, blobs: Vec<(Hash, Vec<u8>)> },
    Unreachable(anyhow::Error),
    Impossible(anyhow::Error),
}

/// Follows until it is told to end.
pub(super) async fn follow(args: &HostArgs, url: &str) -> Result<ExitCode> {
    let token = read_token(args.token.as_deref())?;
    let trust = trusted(url, args.ca.as_deref())?;
    let remote = Remote::new(url, &trust)?;
    let asked = remote.clone();
    let manifest = tokio::task::spawn_blocking(move || asked.manifest()).await??;
    let default = || runs_dir().join(format!("{}-follower", manifest.name));
    let dir: PathBuf = args.dir.clone().unwrap_or_else(default);
    let place = Place::open(args, &dir, trust).await?;
    let mut keep = Keep::open(&dir, place.storage.clone(), place.blobs.clone())?;
    begin(&mut keep, &remote, &manifest).await?;
    let run = Run::from_ledger(&place.storage, &place.blobs)?;
    let site_url = place.site.url.clone();
    let served =
        serve::start(place.site, &place.storage, &place.blobs, place.token.clone(), &place.net);
    let name = run.config.name.clone();
    eprintln!("following  {} ({name}) at {}", manifest.run, remote.url());
    place::announce(&dir, &site_url)?;
    let mut tell = Teller::new(run.config.clone(), keep.run_dir.clone(), served.feed);
    let follower = start(&run, &keep)?;
    tell.adopt_log(follower.pipeline().state())?;
    tell.show_log()?;
    let (send, mirrored) = mpsc::channel(MIRRORED_MAX);
    let (storage, blobs) = (place.storage.clone(), place.blobs.clone());
    let next = follower.sequence();
    std::thread::spawn(move || mirror(&remote, next, &storage, &blobs, &send));
    let peer = Peer {
        run,
        follower,
        keep,
        tell,
        shown: served.shown,
        net: place.net,
        token,
        coordinator: manifest.peers,
        own: place.own,
        url: site_url,
        dir,
        lost: None,
    };
    let code = peer.run(place.events, mirrored, served.commands).await;
    drop(served.running);
    code
}

fn read_token(file: Option<&Path>) -> Result<String> {
    let text = match file {
        Some(path) => String::from_utf8(read_bounded(path, TOKEN_FILE_BYTES_MAX)?)
            .with_context(|| format!("{} is no token", path.display()))?,
        None => std::env::var(TOKEN_VARIABLE).ok().with_context(|| {
            format!(
                "a follower needs the operator's token: give the other host's file {TOKEN_FILE} with --token, or its text in {TOKEN_VARIABLE}"
            )
        })?,
    };
    Ok(text.trim().to_string())
}

/// Makes sure that the mirror has the run's first record, and holds no other run.
async fn begin(keep: &mut Keep, remote: &Remote, manifest: &Manifest) -> Result<()> {
    let first = match keep.storage.records(0, 1)?.pop() {
        Some(first) => first,
        None => {
            let asked = remote.clone();
            let fetch = move || {
                let first = asked.records(0)?.into_iter().next().context("the ledger is empty")?;
                let blobs = blobs_of(&asked, &first, |_| false)?;
                anyhow::Ok((first, blobs))
            };
            let (first, blobs) = tokio::task::spawn_blocking(fetch).await??;
            keep.persist(blobs, vec![first.clone()])?;
            first
        }
    };
    ensure!(
        record_hash(&first) == manifest.run,
        "the directory mirrors another run; choose another one with --dir"
    );
    Ok(())
}

/// The blobs that a record names and that are not here.
fn blobs_of(
    remote: &Remote,
    record: &[u8],
    is_here: impl Fn(&Hash) -> bool,
) -> Result<Vec<(Hash, Vec<u8>)>> {
    let record = chain::decode(record)?;
    let mut out = Vec::new();
    for hash in record.entry.blobs().into_iter().filter(|h| !is_here(h)) {
        let bytes = remote.blob(&hash)?.with_context(|| {
            format!(
                "the host has no copy of blob {hash} of record {} any more: a follower must begin before results are dropped",
                record.sequence
            )
        })?;
        out.push((hash, bytes));
    }
    Ok(out)
}

/// Reads the ledger, from its next record on, until nobody listens.
fn mirror(
    remote: &Remote,
    mut next: u64,
    storage: &Storage,
    served: &BlobStore,
    out: &mpsc::Sender<Mirrored>,
) {
    let is_here = |hash: &Hash| find(storage, served, hash).is_some();
    while !out.is_closed() {
        let page = match remote.records(next) {
            Ok(page) => page,
            Err(error) => {
                let _ = out.blocking_send(Mirrored::Unreachable(error));
                std::thread::sleep(RETRY);
                continue;
            }
        };
        if page.is_empty() {
            std::thread::sleep(POLL);
        }
        for bytes in page {
            let item = match blobs_of(remote, &bytes, is_here) {
                Ok(blobs) => Mirrored::Record { bytes, blobs },
                // The host may have gone in between; only if it is there has it no copy.
                Err(error) => match remote.manifest() {
                    Ok(_) => Mirrored::Impossible(error),
                    Err(_) => Mirrored::Unreachable(error),
                },
            };
            let is_record = matches!(item, Mirrored::Record { .. });
            // Nobody listens when the program ends.
            if out.blocking_send(item).is_err() || !is_record {
                break;
            }
            next += 1;
        }
    }
}

fn start(run: &Run, keep: &Keep) -> Result<Follower> {
    let (config, problems) = (run.config.clone(), run.problems.clone());
    let follower = Follower::start(config, problems, &mut keep.ledger(), &keep.snapshots()?, keep)?;
    Ok(follower)
}

struct Peer {
    run: Run,
    follower: Follower,
    keep: Keep,
    tell: Teller,
    shown: Shown,
    net: Net,
    token: String,
    /// Who coordinates, first, and who follows, as last heard.
    coordinator: Vec<PeerAddress>,
    own: PeerAddress,
    url: String,
    dir: PathBuf,
    lost: Option<Instant>,
}

impl Peer {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<NetEvent>,
        mut mirrored: mpsc::Receiver<Mirrored>,
        mut commands: mpsc::Receiver<crate::http::AdminCommand>,
    ) -> Result<ExitCode> {
        let (mut show, mut link) = (tokio::time::interval(SHOW), tokio::time::interval(LINK));
        let (linked, mut links) = mpsc::channel(1);
        let (mut is_linking, mut is_linked) = (false, false);
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                count = mirrored.recv_many(&mut batch, MIRRORED_MAX) => {
                    ensure!(count > 0, "the mirror has ended");
                    self.take(std::mem::take(&mut batch))?;
                }
                event = events.recv() => match event.context("the network has ended")? {
                    NetEvent::Request { bytes, reply, .. } => self.answer(&bytes, reply)?,
                    NetEvent::Disconnected { peer } if self.is_coordinator(peer) => {
                        is_linked = false;
                    }
                    _ => {}
                },
                Some(command) = commands.recv() => match command.action {
                    AdminAction::Stop => {
                        let _ = command.reply.send(Ok(()));
                        return Ok(self.stop("stopped by the operator"));
                    }
                    AdminAction::Pause | AdminAction::Resume => {
                        let why = "this peer only follows; ask the one that coordinates";
                        let _ = command.reply.send(Err(why.into()));
                    }
                },
                Some(outcome) = links.recv() => {
                    is_linking = false;
                    is_linked = self.linked(outcome)?;
                }
                _ = link.tick(), if !is_linking && !is_linked => {
                    is_linking = true;
                    let introduction = introduce(
                        self.net.clone(),
                        self.coordinator.clone(),
                        self.token.clone(),
                        self.own.addresses.clone(),
                    );
                    let linked = linked.clone();
                    tokio::spawn(async move { linked.send(introduction.await).await });
                }
                _ = show.tick() => self.show(),
                _ = tokio::signal::ctrl_c() => return Ok(self.stop("interrupted")),
            }
        }
    }

    fn is_coordinator(&self, peer: PeerKey) -> bool {
        self.coordinator.first().is_some_and(|c| c.peer == peer)
    }

    fn stop(&self, why: &str) -> ExitCode {
        self.tell.finish();
        eprintln!("{why}; the mirror is saved, start again to go on following");
        ExitCode::from(INTERRUPTED)
    }

    /// Takes records in order: their blobs are kept first, they are kept once they are checked.
    fn take(&mut self, batch: Vec<Mirrored>) -> Result<()> {
        let mut checked = Vec::new();
        let mut outcome = Ok(());
        for item in batch {
            match item {
                Mirrored::Record { bytes, blobs } => {
                    self.found();
                    outcome = self.check(bytes, blobs, &mut checked);
                }
                Mirrored::Unreachable(error) => self.unreachable(&error),
                Mirrored::Impossible(error) => outcome = Err(error),
            }
            if outcome.is_err() {
                break;
            }
        }
        // What was checked before something went wrong is as good as ever.
        self.keep.persist(Vec::new(), checked)?;
        outcome
    }

    fn check(
        &mut self,
        bytes: Vec<u8>,
        blobs: Vec<(Hash, Vec<u8>)>,
        checked: &mut Vec<Vec<u8>>,
    ) -> Result<()> {
        self.keep.keep_blobs(blobs, &chain::decode(&bytes)?.entry.weight_blobs())?;
        let effects = self.follower.push(&bytes, &self.keep as &dyn Blobs)?;
        checked.push(bytes);
        for effect in effects {
            match effect {
                Effect::Announce(event) => {
                    self.tell.announce(&event, self.follower.pipeline())?;
                }
                Effect::Snapshot { ordinal, files } => {
                    // A state rests on records: they are kept before it.
                    self.keep.persist(Vec::new(), std::mem::take(checked))?;
                    let keep = self.run.config.checkpoint.keep;
                    self.keep.snapshot(ordinal, &files.0, &files.1, keep)?;
                }
                Effect::Restart { ordinal } => {
                    self.keep.persist(Vec::new(), std::mem::take(checked))?;
                    self.keep.run_dir.remove_after(ordinal)?;
                    self.follower = start(&self.run, &self.keep)?;
                    self.follower.set_peers(self.coordinator.clone());
                    self.tell.adopt_log(self.follower.pipeline().state())?;
                }
            }
        }
        Ok(())
    }

    fn found(&mut self) {
        if self.lost.take().is_some() {
            self.tell.say("the host is back");
        }
    }

    fn unreachable(&mut self, error: &anyhow::Error) {
        if self.lost.is_none() {
            self.lost = Some(Instant::now());
            self.tell.say(&format!(
                "the host is away ({error:#}); trying again. If it is lost for good, end this and go on with the run by\n  {} host --promote --dir {}",
                program(),
                self.dir.display()
            ));
        }
    }

    /// What came of an introduction: whether the connection stands.
    fn linked(&mut self, outcome: Result<Response>) -> Result<bool> {
        match outcome {
            Ok(Response::Peers(peers)) => {
                self.keep.set_peers(&peers)?;
                self.follower.set_peers(peers.clone());
                self.coordinator = peers;
                Ok(true)
            }
            Ok(Response::Refused(refusal @ (Refusal::Token | Refusal::Full))) => {
                bail!("the host does not take this follower: {refusal}")
            }
            Ok(other) => {
                tracing::warn!("the host answers an introduction with {other:?}");
                Ok(false)
            }
            Err(error) => {
                tracing::debug!("cannot reach the host: {error:#}");
                Ok(false)
            }
        }
    }

    fn answer(&self, bytes: &[u8], reply: ReplyTo) -> Result<()> {
        // What is no request gets no answer, and whoever asked is told by the stream's end.
        let Ok(request) = Request::decode(bytes) else { return Ok(()) };
        let response = match self.follower.answer(request) {
            Answer::Response(response) => response,
            Answer::Records { from, limit } => Response::Records(self.keep.page(from, limit)?),
        };
        if let Err(error) = reply.answer(response.encode()) {
            tracing::debug!("an answer was not taken: {error:#}");
        }
        Ok(())
    }

    fn show(&mut self) {
        let mut status = self.follower.status();
        status.join.clone_from(&self.url);
        status.version = env!("CARGO_PKG_VERSION").into();
        status.addresses.clone_from(&self.own.addresses);
        status.warnings.push(match self.lost {
            None => "this peer mirrors the run of another one".into(),
            Some(since) => format!(
                "the peer that coordinates has been away for {} s",
                since.elapsed().as_secs()
            ),
        });
        self.shown.status.send_replace(Arc::new(status));
        let run = self.follower.run().unwrap_or(Hash([0; 32]));
        let shown = self.shown.join(run, &self.run.config.name, &self.coordinator);
        if let Err(error) = shown {
            tracing::error!("the manifest cannot be written: {error:#}");
        }
    }
}

/// Makes this peer known to the one that coordinates.
async fn introduce(
    net: Net,
    peers: Vec<PeerAddress>,
    token: String,
    addresses: Vec<String>,
) -> Result<Response> {
    let coordinator = peers.first().context("the host names no coordination peer")?;
    let dialled = coordinator.addresses.iter().filter_map(|a| a.parse().ok()).collect();
    net.dial(dialled).await?;
    let request = Request::Follow { token, addresses };
    let answer = net.request(coordinator.peer, request.encode()).await?;
    Response::decode(&answer).context("the answer is no message")
}
