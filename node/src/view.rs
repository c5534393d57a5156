//! The terminal: a live line while a run works, a plain line now and then when nobody watches.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use manyhands_core::run::report::{EvalReport, Part, Phase, Progress, StepReport};

/// Between plain lines when the output is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Shows the progress of a run and measures where its time goes.
pub struct View {
    bar: ProgressBar,
    plain: bool,
    last_plain: Option<Instant>,
    clock: Clock,
}

/// Seconds by part of a step.
#[derive(Default)]
struct Clock {
    part: Option<(Part, Instant)>,
    seconds: BTreeMap<Part, f64>,
}

impl Clock {
    fn switch(&mut self, next: Option<Part>) {
        let now = Instant::now();
        if let Some((part, since)) = self.part.take() {
            *self.seconds.entry(part).or_default() += (now - since).as_secs_f64();
        }
        self.part = next.map(|part| (part, now));
    }
}

impl View {
    /// A view on standard error.
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        let style =
            ProgressStyle::with_template("{prefix:4} {wide_bar:.green} {pos}/{len} {eta:>4} {msg}");
        bar.set_style(style.expect("the template is well formed"));
        Self {
            bar,
            plain: !std::io::stderr().is_terminal(),
            last_plain: None,
            clock: Clock::default(),
        }
    }

    /// A phase of `steps` steps goes on at `step`.
    pub fn phase(&self, phase: Phase, step: u64, steps: u64) {
        self.bar.set_prefix(phase_name(phase));
        self.bar.set_length(steps);
        self.bar.set_position(step);
        self.bar.reset_eta();
    }

    /// Takes what a step reports while it runs.
    pub fn observe(&mut self, progress: Progress) {
        match progress {
            Progress::Begins(part) => self.clock.switch(Some(part)),
            Progress::Tokens(_) => self.bar.tick(),
        }
    }

    /// Seconds by part since the last call.
    pub fn take_seconds(&mut self) -> BTreeMap<Part, f64> {
        self.clock.switch(None);
        std::mem::take(&mut self.clock.seconds)
    }

    /// A step is done.
    pub fn step(&mut self, report: &StepReport, steps: u64, tokens_per_second: f64) {
        let text = step_line(report, tokens_per_second);
        self.bar.set_position(report.step);
        self.bar.set_message(text.clone());
        let due = self.last_plain.is_none_or(|t| t.elapsed() >= PLAIN_INTERVAL);
        if self.plain && (due || report.step == steps) {
            self.last_plain = Some(Instant::now());
            eprintln!("{:4} {}/{steps} {text}", phase_name(report.phase), report.step);
        }
    }

    /// A line that stays.
    pub fn say(&self, text: &str) {
        if self.plain {
            eprintln!("{text}");
        } else {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    /// Takes the live line away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
}

/// Short name of a phase.
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Sft => "sft",
        Phase::Rl => "rl",
        Phase::Done => "done",
    }
}

fn step_line(report: &StepReport, tokens_per_second: f64) -> String {
    let mut text = match &report.rl {
        None => format!("loss {:.3}", report.loss),
        Some(rl) => {
            let clip = rl.batch.clip_low_fraction + rl.batch.clip_high_fraction;
            format!(
                "reward {:.3} entropy {:.3} kl {:.4} clip {:.3} len {:.1} groups {}/{}",
                rl.reward,
                rl.entropy,
                rl.batch.kl,
                clip,
                rl.length,
                rl.groups_kept,
                rl.groups_sampled
            )
        }
    };
    text += &format!(" |g| {:.3} {:.0} tok/s", report.grad_norm, tokens_per_second);
    // Terms so large that a sum might overflow are no clamps: imported models have some.
    let clamps = report.saturations.iter().filter(|(site, _)| *site != "matmul");
    let clamped: u64 = clamps.map(|(_, count)| count).sum();
    if clamped > 0 {
        text += &format!(" CLAMPED {clamped}");
    }
    text
}

/// An evaluation in one line.
pub fn eval_line(report: &EvalReport) -> String {
    let passes = report.overall.pass_at_k.iter().map(|(k, i)| {
        format!("pass@{k} {:.1}% [{:.1}, {:.1}]", 100.0 * i.mean, 100.0 * i.low, 100.0 * i.high)
    });
    let passes: Vec<String> = passes.collect();
    format!(
        "held out: {}, greedy {:.1}%, token entropy {:.3}, {:.1} distinct answers of {}",
        passes.join(", "),
        100.0 * report.greedy,
        report.token_entropy,
        report.overall.distinct_answers,
        report.overall.samples,
    )
}
