//! The loop of a coordination peer: events in, effects carried out in order.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc as blocking};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::report::{Phase, StepReport};
use manyhands_core::swarm::coordinator::{
    Arrival, Blobs, Coordinator, Effect, Event, Execution, Start,
};
use manyhands_core::swarm::ids::{Hash, Secret};
use manyhands_core::swarm::protocol::{PROTOCOL, PeerAddress, Request, Response};
use manyhands_core::swarm::scheduler::TaskId;
use manyhands_core::swarm::status::{Status, StatusEvent};
use tokio::sync::{mpsc, watch};

use super::keep::Keep;
use super::{EVENTS_MAX, Manifest, auditor};
use crate::http::{AdminAction, AdminCommand, Feed};
use crate::net::{Net, NetEvent, ReplyTo, ResultFault};
use crate::plot;
use crate::store::write_atomic;
use crate::train::{LOG, LogLine, PLOT, Summary, read_log, summary};
use crate::view::{View, eval_line, phase_name};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(200);
/// Between two states for whoever watches.
const SHOW: Duration = Duration::from_millis(500);
/// How long a complete run waits for its volunteers to hear of it.
const FAREWELL: Duration = Duration::from_secs(4);
/// Exit code after Ctrl-C, as shells expect it.
const INTERRUPTED: u8 = 130;
/// Bytes of ledger in one answer.
const PAGE_BYTES_MAX: usize = 4 << 20;

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
    status: watch::Sender<Arc<Status>>,
    feed: Arc<Feed>,
    view: View,
    phase: Option<Phase>,
    started: Instant,
    last_step: Instant,
    closed: Option<Instant>,
}

impl Actor {
    pub(super) fn start(
        setup: Setup,
        keep: Keep,
        net: Net,
        status: watch::Sender<Arc<Status>>,
        feed: Arc<Feed>,
    ) -> Result<Self> {
        let started = Instant::now();
        let coordinator = recover(&setup, &keep, started)?;
        let (done, executed) = mpsc::channel(EVENTS_MAX);
        let auditor = auditor::start(
            setup.config.model()?,
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
            status,
            feed,
            view: View::new(),
            phase: None,
            started,
            last_step: started,
            closed: None,
        })
    }

    pub(super) fn run(&self) -> Hash {
        self.coordinator.run()
    }

    pub(super) fn manifest(&self) -> Manifest {
        Manifest {
            run: self.coordinator.run(),
            name: self.setup.config.name.clone(),
            protocol: PROTOCOL,
            peers: vec![self.setup.own.clone()],
        }
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
        self.adopt_log()?;
        self.show_log()?;
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
                _ = show.tick() => self.show(),
                _ = tokio::signal::ctrl_c() => return self.stop("interrupted"),
            }
        }
    }

    fn stop(&mut self, why: &str) -> Result<ExitCode> {
        self.view.finish();
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
                let mut page = self.keep.storage.records(from, limit as usize)?;
                let mut bytes = 0;
                let fits = page.iter().take_while(|r| {
                    bytes += r.len();
                    bytes <= PAGE_BYTES_MAX
                });
                let count = fits.count().max(1);
                page.truncate(count);
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
            Effect::Announce(event) => self.announce(*event)?,
            Effect::Restart => {
                self.coordinator = recover(&self.setup, &self.keep, self.started)?;
                self.adopt_log()?;
            }
            Effect::Closed(weights) => {
                self.closed = Some(Instant::now());
                self.view.say(&format!("the run is complete: weights {weights}"));
                if !self.setup.once {
                    self.view.say("serving it until Ctrl-C");
                }
            }
            Effect::Failed(error) => {
                self.view.finish();
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

    fn announce(&mut self, event: StatusEvent) -> Result<()> {
        match &event {
            StatusEvent::Step { ordinal, report } => {
                let tokens_per_second = self.step(report)?;
                self.feed.show_samples(self.coordinator.pipeline().samples().iter());
                self.feed.publish_step(*ordinal, report.clone(), tokens_per_second);
                return Ok(());
            }
            StatusEvent::Evaluation { evaluation, .. } => {
                self.view.say(&eval_line(&evaluation.report));
                let line = LogLine::Eval { evaluation: evaluation.clone(), seconds: 0.0 };
                self.keep.run_dir.append(LOG, &line)?;
            }
            StatusEvent::Joined { peer, agent } => {
                self.view.say(&format!("volunteer {} joined ({agent})", short(peer)));
            }
            StatusEvent::Left { peer } => {
                self.view.say(&format!("volunteer {} left", short(peer)));
            }
            StatusEvent::Expelled { peer, offence } => {
                self.view.say(&format!("volunteer {} expelled: {offence:?}", short(peer)));
            }
            StatusEvent::RolledBack { ordinal } => {
                self.view
                    .say(&format!("false work had entered: back to the version of step {ordinal}"));
            }
            StatusEvent::Warning { text } => self.view.say(&format!("warning: {text}")),
            StatusEvent::Version { .. } | StatusEvent::Final { .. } | StatusEvent::State { .. } => {
            }
        }
        self.feed.publish(&event);
        Ok(())
    }

    /// Shows and logs a step; its tokens a second.
    fn step(&mut self, report: &StepReport) -> Result<f64> {
        let steps = match report.phase {
            Phase::Sft => self.setup.config.sft.as_ref().map_or(0, |s| s.steps),
            _ => self.setup.config.rl.as_ref().map_or(0, |s| s.steps),
        };
        if self.phase != Some(report.phase) {
            self.view.phase(report.phase, report.step - 1, steps);
            self.phase = Some(report.phase);
        }
        let tokens = (report.trained_tokens + report.sampled_tokens) as f64;
        let tokens_per_second = tokens / self.last_step.elapsed().as_secs_f64().max(1e-3);
        self.last_step = Instant::now();
        self.view.step(report, steps, tokens_per_second);
        let (report, seconds) = (Box::new(report.clone()), BTreeMap::new());
        self.keep.run_dir.append(LOG, &LogLine::Step { report, seconds, tokens_per_second })?;
        Ok(tokens_per_second)
    }

    /// Cuts the log to what the state has behind it.
    fn adopt_log(&mut self) -> Result<()> {
        let state = self.coordinator.pipeline().state();
        self.keep.run_dir.truncate_log(LOG, |line| {
            let line: Option<LogLine> = serde_json::from_value(line.clone()).ok();
            line.is_some_and(|line| line.precedes(state))
        })?;
        let ordinal = self.coordinator.pipeline().ordinal();
        if ordinal > 0 {
            let phase = phase_name(state.phase);
            self.view.say(&format!("going on at {phase} step {}", state.step));
        }
        Ok(())
    }

    /// Shows what the log knows to whoever comes.
    fn show_log(&self) -> Result<()> {
        if !self.keep.run_dir.path(LOG).exists() {
            return Ok(());
        }
        let sft = self.setup.config.sft.as_ref().map_or(0, |s| s.steps);
        let ordinal = |phase, step| match phase {
            Phase::Sft => step,
            Phase::Rl => sft + step,
            Phase::Done => self.setup.config.steps(),
        };
        for line in read_log(&self.keep.run_dir)? {
            match line {
                LogLine::Step { report, tokens_per_second, .. } => {
                    let ordinal = ordinal(report.phase, report.step);
                    self.feed.publish_step(ordinal, report, tokens_per_second);
                }
                LogLine::Eval { evaluation, .. } => {
                    let ordinal = ordinal(evaluation.phase, evaluation.step);
                    self.feed.publish(&StatusEvent::Evaluation { ordinal, evaluation });
                }
            }
        }
        Ok(())
    }

    fn show(&mut self) {
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
        self.status.send_replace(Arc::new(status));
    }

    fn finish(&mut self) -> Result<ExitCode> {
        self.view.finish();
        let weights = self.coordinator.pipeline().version().hash();
        let lines = read_log(&self.keep.run_dir)?;
        plot::write(&self.keep.run_dir.path(PLOT), &lines)?;
        println!("weights {}", weights.to_hex());
        self.show();
        if let Some(path) = &self.setup.json {
            let summary = HostSummary {
                summary: summary(&lines, weights),
                run: self.coordinator.run().to_string(),
                seconds: self.started.elapsed().as_secs_f64(),
                status: self.status.borrow().as_ref().clone(),
            };
            write_atomic(path, &serde_json::to_vec_pretty(&summary)?)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn short(peer: &str) -> &str {
    peer.get(..8).unwrap_or(peer)
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
        promote: false,
        now_ms: started.elapsed().as_millis() as u64,
        wall_ms: wall.as_millis() as u64,
    };
    let mut coordinator = Coordinator::recover(start, keep as &dyn Blobs)?;
    coordinator.set_peers(vec![setup.own.clone()]);
    Ok(coordinator)
}
