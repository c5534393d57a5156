//! `manyhands join URL`: a native volunteer.
//!
//! The volunteer of `core` decides; this dials, computes in a `worker` thread, and listens to the
//! machine's owner.

pub mod receipts;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use manyhands_core::swarm::ids::{Hash, PeerKey};
use manyhands_core::swarm::protocol::{PeerAddress, Request, Response};
use manyhands_core::swarm::volunteer::{Effect, Event, Volunteer};
use tokio::sync::mpsc;

use crate::blobs::BlobStore;
use crate::cli::EngineArgs;
use crate::donor::{self, Decision, Donor, DonorPolicy, Signals, WaitReason};
use crate::identity::Identity;
use crate::net::{Limits, Net, NetConfig, NetEvent};
use crate::remote::{Remote, trusted};
use receipts::Receipts;

/// Disk for blobs of weights.
const BLOB_BYTES_MAX: u64 = 4 << 30;
/// Events that wait for the volunteer.
const EVENTS_MAX: usize = 64;
/// Between two looks at the clock and at the owner's wishes.
const TICK: Duration = Duration::from_millis(500);
/// Between two plain lines of progress.
const SHOW: Duration = Duration::from_secs(10);

/// Arguments of `join`.
#[derive(Clone, Debug, Args)]
pub struct JoinArgs {
    /// The address that the host printed.
    pub url: String,
    /// Trust this certificate authority (PEM) for https, instead of those that the system trusts.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Directory of this volunteer: its key and receipts [default: in the user's state directory].
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Lie in this way, to show that it does not pay.
    #[cfg(feature = "attacks")]
    #[arg(long, value_enum)]
    pub attack: Option<crate::attack::Attack>,
    /// When and how hard to work.
    #[command(flatten)]
    pub policy: DonorPolicy,
    /// Where the arithmetic runs.
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// Runs `join`.
pub fn run(args: &JoinArgs) -> Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(join(args));
    runtime.shutdown_background();
    result
}

async fn join(args: &JoinArgs) -> Result<ExitCode> {
    let dir = args.dir.clone().unwrap_or_else(donor::default_dir);
    let mut donor = Donor::open(&dir, args.policy.clone())?;
    let trust = trusted(&args.url, args.ca.as_deref())?;
    let remote = Remote::new(&args.url, &trust)?;
    let manifest = tokio::task::spawn_blocking(move || remote.manifest()).await??;
    for warning in donor.warnings() {
        eprintln!("warning: {warning}");
    }
    let identity = Identity::load_or_create(&dir.join("volunteer.key"))?;
    let secret = identity.secret();
    let blobs = Arc::new(BlobStore::open(&dir.join("blobs"), BLOB_BYTES_MAX)?);
    let (net, net_events) = Net::start(NetConfig {
        identity,
        listen: Vec::new(),
        limits: Limits::default(),
        blobs: None,
        trust,
    })
    .await?;
    eprintln!("joining    {} ({})", manifest.run, manifest.name);
    eprintln!("volunteer  {}", net.key());
    let signals = Signals::register()?;
    tokio::spawn(signals.run(donor.control().clone()));
    let (events, inbox) = mpsc::channel(EVENTS_MAX);
    let engine = args.engine.clone();
    #[cfg(feature = "attacks")]
    let attack = args.attack;
    #[cfg(not(feature = "attacks"))]
    let attack = ();
    let (worker, description, speed) = worker::start(&engine, attack, events.clone())?;
    let agent = format!("manyhands {}", env!("CARGO_PKG_VERSION"));
    let machine = Volunteer::new(secret.clone(), agent, description, speed, manifest.peers);
    let receipts = Receipts::open(&dir, secret)?;
    let runner = Runner {
        machine,
        net,
        blobs,
        worker,
        events,
        receipts,
        donor,
        peer: None,
        started: Instant::now(),
        shown: Instant::now(),
        waiting: None,
        done: None,
    };
    runner.run(net_events, inbox).await
}

/// Who may have blobs: the peer that is asked for work, and those that follow it.
struct Sources {
    first: Option<PeerKey>,
    all: Vec<PeerAddress>,
}

impl Sources {
    /// Fetches a blob from the first that has it.
    async fn fetch(&self, net: &Net, hash: Hash, store: &BlobStore) -> Result<()> {
        let mut outcome = Err(anyhow::anyhow!("nobody to fetch blob {hash} from"));
        if let Some(first) = self.first {
            outcome = net.fetch(&[first], hash, store, |_, _| ()).await;
        }
        for peer in self.all.iter().filter(|p| Some(p.peer) != self.first) {
            if outcome.is_ok() {
                break;
            }
            let addresses = peer.addresses.iter().filter_map(|a| a.parse().ok()).collect();
            if net.dial(addresses).await.is_ok() {
                outcome = net.fetch(&[peer.peer], hash, store, |_, _| ()).await;
            }
        }
        outcome
    }
}

struct Runner {
    machine: Volunteer,
    net: Net,
    blobs: Arc<BlobStore>,
    worker: std::sync::mpsc::Sender<worker::Task>,
    events: mpsc::Sender<Event>,
    receipts: Receipts,
    donor: Donor,
    peer: Option<PeerKey>,
    started: Instant,
    shown: Instant,
    waiting: Option<WaitReason>,
    done: Option<Result<ExitCode>>,
}

impl Runner {
    async fn run(
        mut self,
        mut net_events: mpsc::Receiver<NetEvent>,
        mut inbox: mpsc::Receiver<Event>,
    ) -> Result<ExitCode> {
        let mut look = tokio::time::interval(TICK);
        self.handle(Event::Tick);
        loop {
            if let Some(done) = self.done.take() {
                self.receipts.report(self.started.elapsed());
                return done;
            }
            let wake = self.machine.wake_ms().saturating_sub(self.now_ms()).clamp(1, 500);
            tokio::select! {
                event = net_events.recv() => {
                    if let NetEvent::Disconnected { peer } = event.context("the network has ended")?
                        && self.peer == Some(peer)
                    {
                        self.peer = None;
                        eprintln!("the connection to the host is lost; trying again");
                        self.handle(Event::Lost);
                    }
                }
                event = inbox.recv() => {
                    let event = event.context("the worker has ended")?;
                    self.handle(event);
                }
                () = tokio::time::sleep(Duration::from_millis(wake)) => self.handle(Event::Tick),
                _ = look.tick() => self.look(),
                _ = tokio::signal::ctrl_c() => {
                    self.say_farewell().await;
                    self.done = Some(Ok(ExitCode::SUCCESS));
                }
            }
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Asks the owner's wishes, and shows progress.
    fn look(&mut self) {
        let decision = self.donor.decide();
        let waiting = match decision {
            Decision::Work { duty } => {
                let _ = self.worker.send(worker::Task::Duty(duty));
                None
            }
            Decision::Wait { reason } => Some(reason),
        };
        if waiting != self.waiting {
            match &waiting {
                Some(reason) => eprintln!("resting: {reason}"),
                None => eprintln!("working"),
            }
            self.waiting.clone_from(&waiting);
        }
        self.handle(Event::Pause(waiting.is_some()));
        if self.shown.elapsed() >= SHOW {
            self.shown = Instant::now();
            self.receipts.report(self.started.elapsed());
        }
    }

    async fn say_farewell(&mut self) {
        if let (Some(request), Some(peer)) = (self.machine.farewell(), self.peer) {
            let asked = self.net.request(peer, request.encode());
            // The lease would lapse anyway.
            let _ = tokio::time::timeout(Duration::from_secs(2), asked).await;
        }
    }

    fn handle(&mut self, event: Event) {
        let now_ms = self.now_ms();
        for effect in self.machine.handle(now_ms, event) {
            if let Err(error) = self.carry_out(effect) {
                self.done = Some(Err(error));
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Connect(peer) => self.connect(peer),
            Effect::Ask(request) => self.ask(request),
            Effect::Load { want, base, blobs } => {
                let (net, store, worker) =
                    (self.net.clone(), self.blobs.clone(), self.worker.clone());
                let sources = Sources { first: self.peer, all: self.machine.peers().to_vec() };
                let events = self.events.clone();
                tokio::spawn(async move {
                    for hash in &blobs {
                        if let Err(error) = sources.fetch(&net, *hash, &store).await {
                            tracing::warn!("weights cannot be fetched: {error:#}");
                            let _ = events.send(Event::Weights { hash: want, loaded: false }).await;
                            return;
                        }
                    }
                    let get = move |hash: &_| store.get(hash);
                    let load = worker::Task::Load { want, base, blobs, get: Box::new(get) };
                    // The worker ends with the program.
                    let _ = worker.send(load);
                });
            }
            Effect::Forget(hash) => self.send(worker::Task::Forget(hash))?,
            Effect::Compute { hash, unit } => self.send(worker::Task::Compute { hash, unit })?,
            Effect::Upload { unit, bytes } => self.upload(unit, bytes),
            Effect::Keep { unit, receipt, bytes } => {
                self.receipts.keep(self.machine.run(), unit, receipt, bytes)?;
            }
            Effect::Accepted { unit, sequence } => self.receipts.accepted(unit, sequence)?,
            Effect::Model(config) => {
                let model = config.model()?;
                self.send(worker::Task::Model(Box::new(model)))?;
            }
            Effect::Finished => {
                eprintln!("the run is complete; thank you");
                self.done = Some(Ok(ExitCode::SUCCESS));
            }
            Effect::Refused(refusal) => bail!("the host refuses this volunteer: {refusal}"),
        }
        Ok(())
    }

    fn send(&self, task: worker::Task) -> Result<()> {
        self.worker.send(task).ok().context("the worker has ended")
    }

    fn connect(&mut self, peer: PeerAddress) {
        let (net, events) = (self.net.clone(), self.events.clone());
        self.peer = Some(peer.peer);
        tokio::spawn(async move {
            let addresses = peer.addresses.iter().filter_map(|a| a.parse().ok()).collect();
            let event = match net.dial(addresses).await {
                Ok(_) => Event::Connected,
                Err(error) => {
                    tracing::warn!("cannot connect: {error:#}");
                    Event::Lost
                }
            };
            let _ = events.send(event).await;
        });
    }

    fn ask(&mut self, request: Request) {
        let Some(peer) = self.peer else { return };
        let (net, events) = (self.net.clone(), self.events.clone());
        let bytes = request.encode();
        let _ = self.donor.count_bytes(bytes.len() as u64);
        tokio::spawn(async move {
            let answer = match net.request(peer, bytes).await {
                Ok(bytes) => Response::decode(&bytes).ok(),
                Err(error) => {
                    tracing::debug!("no answer: {error:#}");
                    None
                }
            };
            let _ = events.send(Event::Answer(answer)).await;
        });
    }

    fn upload(&mut self, unit: Hash, bytes: Vec<u8>) {
        let Some(peer) = self.peer else { return };
        let (net, events) = (self.net.clone(), self.events.clone());
        let _ = self.donor.count_bytes(bytes.len() as u64);
        tokio::spawn(async move {
            if let Err(error) = net.send_result(peer, unit, bytes).await {
                tracing::warn!("a result cannot be sent: {error:#}");
            }
            let _ = events.send(Event::Uploaded { unit }).await;
        });
    }
}
