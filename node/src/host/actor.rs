//! The loop of a coordination peer: events in, effects carried out in order.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc as blocking};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::problems::Problems;
use manyhands_core::swarm::coordinator::{
    Arrival, Blobs, Coordinator, Effect, Event, Execution, Start,
};
use manyhands_core::swarm::ids::{Hash, Secret};
use manyhands_core::swarm::protocol::{PeerAddress, Request, Response};
use manyhands_core::swarm::scheduler::TaskId;
use manyhands_core::swarm::status::Status;
use tokio::sync::mpsc;

use super::keep::Keep;
use super::serve::Shown;
use super::teller::Teller;
use super::{EVENTS_MAX, INTERRUPTED, auditor};
use crate::http::{AdminAction, AdminCommand};
use crate::net::{Net, NetEvent, ReplyTo, ResultFault};
use crate::plot;
use crate::store::write_atomic;
use crate::train::{PLOT, Summary, read_log, summary};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(200);
/// Between two states for whoever watches.
const SHOW: Duration = Duration::from_millis(500);
/// How long a complete run waits for its volunteers to hear of it.
const FAREWELL: Duration = Duration::from_secs(4);

/// What a host is made of.
pub(super) struct Setup {
    pub(super) config: RunConfig,
    pub(super) problems: Problems,
    pub(super) files: Vec<(String, Hash)>,
    pub(super) secret: Secret,
    pub(super) token: String,
    pub(super) own: PeerAddress,
    pub(super) url: String,
    pub(super) threads: usize,
    pub(super) once: bool,
    pub(super) json: Option<PathBuf>,
    pub(super) promote: bool,
    /// Bytes of blobs from which on old results are dropped.
    pub(super) disk_bytes: u64,
}

/// The complete run, for scripts. Field names are a stable interface.
#[derive(serde::Serialize)]
struct HostSummary {
    #[serde(flatten)]
    summary: Summary,
    /// Identity of the run.
    run: String,
    /// Wall seconds from the start of this process.
    seconds: f64,
    /// The last state: volunteers, audits, expulsions, bytes.
    status: Status,
}

pub(super) struct Actor {
    setup: Setup,
    coordinator: Coordinator,
    keep: Keep,
    net: Net,
    auditor: blocking::Sender<Execution>,
    executed: mpsc::Receiver<(TaskId, Result<Hash>)>,
    replies: BTreeMap<u64, ReplyTo>,
    next_token: u64,
    shown: Shown,
    shown_peers: Vec<PeerAddress>,
    tell: Teller,
    started: Instant,
    closed: Option<Instant>,
}

impl Actor {
    pub(super) fn start(
        setup: Setup,
        keep: Keep,
        net: Net,
        shown: Shown,
        tell: Teller,
    ) -> Result<Self> {
        let started = Instant::now();
        let coordinator = recover(&setup, &keep, started)?;
        let (done, executed) = mpsc::channel(EVENTS_MAX);
        let auditor = auditor::start(
            setup.config.model()?,
            setup.problems.imported().cloned(),
            setup.threads,
            keep.storage.clone(),
            keep.served.clone(),
            move |id, receipt| {
                // The actor is gone when the program ends.
                let _ = done.blocking_send((id, receipt));
            },
        );
        Ok(Self {
            setup,
            coordinator,
            keep,
            net,
            auditor,
            executed,
            replies: BTreeMap::new(),
            next_token: 0,
            shown,
            shown_peers: Vec::new(),
            tell,
            started,
            closed: None,
        })
    }

    pub(super) fn run(&self) -> Hash {
        self.coordinator.run()
    }

    /// Drops old results where the disk that they may take is used up.
    fn prune(&mut self) -> Result<()> {
        if self.keep.is_full(self.setup.disk_bytes)?
            && let Some(ordinal) = self.keep.prune(self.coordinator.final_ordinal())?
        {
            self.coordinator.forget(ordinal);
        }
        Ok(())
    }

    /// Tells who coordinates and who follows, where that has changed, and remembers it.
    fn show_peers(&mut self) -> Result<()> {
        let peers = self.coordinator.peers();
        if self.shown_peers == peers {
            return Ok(());
        }
        self.keep.set_peers(peers)?;
        self.shown_peers = peers.to_vec();
        self.shown.join(self.coordinator.run(), &self.setup.config.name, peers)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Works until the run is complete (if asked to end then), the operator stops it, or Ctrl-C.
    pub(super) async fn run_until_done(
        mut self,
        mut events: mpsc::Receiver<NetEvent>,
        mut commands: mpsc::Receiver<AdminCommand>,
    ) -> Result<ExitCode> {
        let mut tick = tokio::time::interval(TICK);
        let mut show = tokio::time::interval(SHOW);
        self.tell.adopt_log(self.coordinator.pipeline().state())?;
        self.tell.show_log()?;
        self.handle(Event::Tick).await?;
        loop {
            tokio::select! {
                event = events.recv() => {
                    let event = event.context("the network has ended")?;
                    self.hear(event).await?;
                }
                done = self.executed.recv() => {
                    let (audit, receipt) = done.context("the auditor has ended")?;
                    let receipt = receipt.context("an audit cannot be computed")?;
                    self.handle(Event::Executed { audit, receipt }).await?;
                }
                Some(command) = commands.recv() => {
                    let _ = command.reply.send(Ok(()));
                    match command.action {
                        AdminAction::Pause => self.handle(Event::Pause(true)).await?,
                        AdminAction::Resume => self.handle(Event::Pause(false)).await?,
                        AdminAction::Stop => return self.stop("stopped by the operator"),
                    }
                }
                _ = tick.tick() => {
                    self.handle(Event::Tick).await?;
                    if self.is_over() {
                        return self.finish();
                    }
                }
                _ = show.tick() => {
                    self.show()?;
                    self.prune()?;
                }
                _ = tokio::signal::ctrl_c() => return self.stop("interrupted"),
            }
        }
    }

    fn stop(&mut self, why: &str) -> Result<ExitCode> {
        self.tell.finish();
        eprintln!("{why}; everything accepted is saved, start again to go on");
        Ok(ExitCode::from(INTERRUPTED))
    }

    fn is_over(&self) -> bool {
        let Some(closed) = self.closed.filter(|_| self.setup.once) else { return false };
        let volunteers = self.coordinator.scheduler().volunteers().values();
        closed.elapsed() > FAREWELL || volunteers.clone().all(|v| !v.is_present)
    }

    async fn hear(&mut self, event: NetEvent) -> Result<()> {
        let event = match event {
            NetEvent::Connected { .. } => return Ok(()),
            NetEvent::Disconnected { peer } => Event::Left { peer },
            NetEvent::Flooding { peer } => Event::Flooding { peer },
            NetEvent::Request { peer, bytes, reply } => match Request::decode(&bytes) {
                Ok(request) => {
                    self.next_token += 1;
                    self.replies.insert(self.next_token, reply);
                    Event::Request { peer, token: self.next_token, request }
                }
                Err(_) => Event::Malformed { peer },
            },
            NetEvent::Result { peer, unit, outcome } => {
                let arrival = match outcome {
                    Ok(bytes) => Arrival::Whole(bytes),
                    Err(ResultFault::DiffersFromReceipt) => Arrival::Differs,
                    Err(ResultFault::TooSlow | ResultFault::Broken) => {
                        self.net.forget(peer, unit);
                        Arrival::Failed
                    }
                };
                Event::Result { peer, unit, arrival }
            }
        };
        self.handle(event).await
    }

    async fn handle(&mut self, event: Event) -> Result<()> {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (now_ms, wall_ms) = (self.now_ms(), wall.as_millis() as u64);
        let effects = self.coordinator.handle(now_ms, wall_ms, event, &self.keep);
        for effect in effects {
            self.carry_out(effect).await?;
        }
        Ok(())
    }

    async fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Persist { blobs, records } => self.keep.persist(blobs, records).context(
                "the ledger cannot be written; nothing accepted before is lost, free some disk space and start again",
            )?,
            Effect::Snapshot { ordinal, files } => {
                let keep = self.setup.config.checkpoint.keep;
                self.keep.snapshot(ordinal, &files.0, &files.1, keep)?;
            }
            Effect::DropSnapshots { after } => self.keep.run_dir.remove_after(after)?,
            Effect::Reply { token, response } => self.reply(token, &response),
            Effect::ReplyRecords { token, from, limit } => {
                let page = self.keep.page(from, limit)?;
                self.reply(token, &Response::Records(page));
            }
            Effect::Expect { peer, unit, receipt, bytes } => {
                if let Err(error) = self.net.expect(peer, unit, receipt, bytes) {
                    tracing::warn!(peer = %peer.short(), "an upload cannot be taken: {error:#}");
                }
            }
            Effect::Ban(peer) => self.net.ban(peer).await?,
            Effect::Execute(execution) => {
                self.auditor.send(execution).ok().context("the auditor has ended")?;
            }
            Effect::Announce(event) => {
                self.tell.announce(&event, self.coordinator.pipeline())?;
            }
            Effect::Restart => {
                self.coordinator = recover(&self.setup, &self.keep, self.started)?;
                self.tell.adopt_log(self.coordinator.pipeline().state())?;
            }
            Effect::Closed(weights) => {
                self.closed = Some(Instant::now());
                self.tell.say(&format!("the run is complete: weights {weights}"));
                if !self.setup.once {
                    self.tell.say("serving it until Ctrl-C");
                }
            }
            Effect::Failed(error) => {
                self.tell.finish();
                bail!("the run cannot go on: {error}");
            }
        }
        Ok(())
    }

    fn reply(&mut self, token: u64, response: &Response) {
        // Whoever asked may be gone.
        let answered = self.replies.remove(&token).map(|reply| reply.answer(response.encode()));
        if let Some(Err(error)) = answered {
            tracing::debug!("an answer was not taken: {error:#}");
        }
    }

    pub(super) fn show(&mut self) -> Result<()> {
        let mut status = self.coordinator.status(self.now_ms());
        let traffic = self.net.traffic();
        status.join = self.setup.url.clone();
        status.version = env!("CARGO_PKG_VERSION").into();
        status.addresses.clone_from(&self.setup.own.addresses);
        for (name, bytes) in [
            ("requests_in", traffic.requests_in_bytes),
            ("requests_out", traffic.requests_out_bytes),
            ("results_in", traffic.results_in_bytes),
            ("blobs_out", traffic.blobs_out_bytes),
        ] {
            status.bytes.insert(name.into(), bytes);
        }
        self.shown.status.send_replace(Arc::new(status));
        self.show_peers()?;
        Ok(())
    }

    fn finish(&mut self) -> Result<ExitCode> {
        self.tell.finish();
        let weights = self.coordinator.pipeline().version().hash();
        let lines = read_log(&self.keep.run_dir)?;
        plot::write(&self.keep.run_dir.path(PLOT), &lines)?;
        println!("weights {}", weights.to_hex());
        self.show()?;
        if let Some(path) = &self.setup.json {
            let summary = HostSummary {
                summary: summary(&lines, weights),
                run: self.coordinator.run().to_string(),
                seconds: self.started.elapsed().as_secs_f64(),
                status: self.shown.status.borrow().as_ref().clone(),
            };
            write_atomic(path, &serde_json::to_vec_pretty(&summary)?)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn recover(setup: &Setup, keep: &Keep, started: Instant) -> Result<Coordinator> {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let start = Start {
        config: setup.config.clone(),
        problems: setup.problems.clone(),
        files: setup.files.clone(),
        secret: setup.secret.clone(),
        audit_seed: keep.audit_seed()?,
        token: setup.token.clone(),
        ledger: &mut keep.ledger(),
        snapshots: keep.snapshots()?,
        promote: setup.promote,
        forgotten: keep.forgotten()?,
        now_ms: started.elapsed().as_millis() as u64,
        wall_ms: wall.as_millis() as u64,
    };
    let mut coordinator = Coordinator::recover(start, keep as &dyn Blobs)?;
    coordinator.set_peers(vec![setup.own.clone()]);
    Ok(coordinator)
}
