//! Tells people what happens in a run: the terminal, the log, and whoever watches over HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::pipeline::Pipeline;
use manyhands_core::run::report::{Phase, StepReport};
use manyhands_core::run::state::State;
use manyhands_core::swarm::status::StatusEvent;

use crate::http::Feed;
use crate::store::RunDir;
use crate::train::{LOG, LogLine, read_log};
use crate::view::{View, eval_line, phase_name};

pub(super) struct Teller {
    config: RunConfig,
    run_dir: RunDir,
    feed: Arc<Feed>,
    view: View,
    phase: Option<Phase>,
    last_step: Instant,
}

impl Teller {
    pub(super) fn new(config: RunConfig, run_dir: RunDir, feed: Arc<Feed>) -> Self {
        let last_step = Instant::now();
        Self { config, run_dir, feed, view: View::new(), phase: None, last_step }
    }

    /// A line that stays.
    pub(super) fn say(&self, text: &str) {
        self.view.say(text);
    }

    /// Takes the live line away.
    pub(super) fn finish(&self) {
        self.view.finish();
    }

    pub(super) fn announce(&mut self, event: &StatusEvent, pipeline: &Pipeline) -> Result<()> {
        match event {
            StatusEvent::Step { ordinal, report } => {
                let tokens_per_second = self.step(report)?;
                self.feed.show_samples(pipeline.samples().iter());
                self.feed.publish_step(*ordinal, report.clone(), tokens_per_second);
                return Ok(());
            }
            StatusEvent::Evaluation { evaluation, .. } => {
                self.view.say(&eval_line(&evaluation.report));
                let line = LogLine::Eval { evaluation: evaluation.clone(), seconds: 0.0 };
                self.run_dir.append(LOG, &line)?;
            }
            StatusEvent::Joined { peer, agent } => {
                self.say(&format!("volunteer {} joined ({agent})", short(peer)));
            }
            StatusEvent::Left { peer } => self.say(&format!("volunteer {} left", short(peer))),
            StatusEvent::Expelled { peer, offence } => {
                self.say(&format!("volunteer {} expelled: {offence:?}", short(peer)));
            }
            StatusEvent::RolledBack { ordinal } => {
                self.say(&format!("false work had entered: back to the version of step {ordinal}"));
            }
            StatusEvent::Warning { text } => self.say(&format!("warning: {text}")),
            StatusEvent::Version { .. } | StatusEvent::Final { .. } | StatusEvent::State { .. } => {
            }
        }
        self.feed.publish(event);
        Ok(())
    }

    /// Shows and logs a step; its tokens a second.
    fn step(&mut self, report: &StepReport) -> Result<f64> {
        let steps = match report.phase {
            Phase::Sft => self.config.sft.as_ref().map_or(0, |s| s.steps),
            _ => self.config.rl.as_ref().map_or(0, |s| s.steps),
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
        self.run_dir.append(LOG, &LogLine::Step { report, seconds, tokens_per_second })?;
        Ok(tokens_per_second)
    }

    /// Cuts the log to what the state has behind it.
    pub(super) fn adopt_log(&mut self, state: &State) -> Result<()> {
        self.run_dir.truncate_log(LOG, |line| {
            let line: Option<LogLine> = serde_json::from_value(line.clone()).ok();
            line.is_some_and(|line| line.precedes(state))
        })?;
        if state.ordinal(&self.config) > 0 {
            let phase = phase_name(state.phase);
            self.view.say(&format!("going on at {phase} step {}", state.step));
        }
        Ok(())
    }

    /// Shows what the log knows to whoever comes.
    pub(super) fn show_log(&self) -> Result<()> {
        if !self.run_dir.path(LOG).exists() {
            return Ok(());
        }
        let sft = self.config.sft.as_ref().map_or(0, |s| s.steps);
        let ordinal = |phase, step| match phase {
            Phase::Sft => step,
            Phase::Rl => sft + step,
            Phase::Done => self.config.steps(),
        };
        for line in read_log(&self.run_dir)? {
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
}

fn short(peer: &str) -> &str {
    peer.get(..8).unwrap_or(peer)
}
