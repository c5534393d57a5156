//! A toy task learns, and a run is a pure function of its file: not of threads, engines,
//! interruptions. Whole steps of the trainer on the CPU engine.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;

use manyhands_core::engine::Engine;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::twin::Twin;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::pipeline::Advanced;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::report::{RlReport, StepReport};
use manyhands_core::run::state::State;
use manyhands_core::run::trainer::Trainer;
use pollster::block_on;

/// Every part of the state: two phases, lag, mini-batches, a KL term, resets that clear the
/// optimizer, the entropy controller, length penalty.
const EVERYTHING: &str = r#"
name = "everything"
seed = 5
[model]
preset = "nano"
context = 24
[[task]]
jsonl = "problems"
[sft]
steps = 30
batch = 16
[sft.optimizer]
learning_rate = 3e-3
[rl]
steps = 6
prompts = 4
group_size = 4
max_new_tokens = 6
updates = 2
policy_lag = 1
[rl.learn.optimizer]
learning_rate = 1e-3
[rl.learn.loss.kl]
estimator = "k2"
beta = 1e-2
[rl.learn.entropy]
low = 0.5
high = 1.0
[rl.learn.reset]
every_steps = 3
reset_optimizer = true
[rl.learn.length]
overlong = { length_max = 6, buffer = 3 }
[eval]
problems = 4
samples = 4
k = [1, 4]
every = 3
"#;

/// Reinforcement learning without lag: one version samples, scores and trains.
const ON_POLICY: &str = r#"
name = "on-policy"
seed = 9
[model]
preset = "nano"
context = 24
[[task]]
jsonl = "problems"
[rl]
steps = 20
prompts = 8
group_size = 8
max_new_tokens = 6
[rl.learn.optimizer]
learning_rate = 3e-4
[rl.learn.loss.kl]
estimator = "k2"
beta = 1e-3
[eval]
problems = 4
samples = 2
k = [1]
"#;

/// A model so small that the twin trains it.
const SMALL: (&str, &str) = (
    "preset = \"nano\"\ncontext = 24",
    "[model.shape]\nvocabulary = 128\nlayers = 1\nwidth = 32\nheads = 2\nkv_heads = 1\n\
     head_dim = 16\nffn = 48\ncontext = 24",
);

fn config(text: &str) -> RunConfig {
    toml::from_str(text).unwrap()
}

/// Sixty-four problems; `answer` says what is right.
fn problems(config: &RunConfig, answer: fn(usize) -> usize) -> Problems {
    let line = |i: usize| format!("{{\"prompt\":\"p{i}=\",\"answer\":\"{}\"}}\n", answer(i));
    let text: String = (0..64).map(line).collect();
    Problems::open(config, |_| Ok(text.clone())).unwrap()
}

fn cpu(config: &RunConfig, threads: usize) -> Cpu {
    Cpu::new(config.model().unwrap().constants(), threads, None)
}

fn start<'e, E: Engine>(
    engine: &'e E,
    config: &RunConfig,
    problems: Problems,
    state: State,
) -> Trainer<'e, E> {
    Trainer::new(engine, config.clone(), problems, state).unwrap()
}

fn fresh(config: &RunConfig) -> State {
    State::new(config, &config.model().unwrap(), None)
}

/// Goes on to the next step's report; `None` when the run is done.
fn step<E: Engine>(trainer: &mut Trainer<'_, E>) -> Option<StepReport> {
    loop {
        match block_on(trainer.advance(&mut |_| {})).unwrap()? {
            Advanced::Step(report) => return Some(*report),
            Advanced::Evaluation(_) | Advanced::Phase(_) => {}
        }
    }
}

/// Steps until the run is done.
fn finish<E: Engine>(trainer: &mut Trainer<'_, E>) -> Vec<StepReport> {
    std::iter::from_fn(|| step(trainer)).collect()
}

fn files(trainer: &Trainer<'_, impl Engine>) -> BTreeMap<String, Vec<u8>> {
    trainer.state().save(&trainer.pipeline.config, trainer.pipeline.model()).1
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let differ = a.iter().zip(b).position(|(a, b)| a != b);
    differ.or((a.len() != b.len()).then_some(a.len().min(b.len())))
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len() as f64;
    x.sum::<f64>() / n
}

fn rl(report: &StepReport) -> &RlReport {
    report.rl.as_ref().unwrap()
}

/// A policy that has learnt the form of an answer, `#` and a digit from 0 to 3, but not which.
fn policy_that_guesses(config: &RunConfig) -> State {
    let sft = ON_POLICY.split_once("[rl]").unwrap().0.to_string()
        + "[sft]\nsteps = 40\nbatch = 32\n[sft.optimizer]\nlearning_rate = 3e-3\n";
    let sft = self::config(&sft);
    let engine = cpu(&sft, 2);
    // Mixed so that the digit cannot be told from the prompt.
    let guess = problems(&sft, |i| (i * 37 + i / 3 + i / 7) % 4);
    let mut trainer = start(&engine, &sft, guess, fresh(&sft));
    finish(&mut trainer);
    let mut state = fresh(config);
    for (to, from) in state.optimizer.tensors.iter_mut().zip(&trainer.state().optimizer.tensors) {
        to.master.clone_from(&from.master);
    }
    if state.reference.is_some() {
        state.reference = Some(state.master());
    }
    state
}

/// If no gradient flows, or its sign is wrong, the loss stays near `ln 128`.
#[test]
fn sft_reduces_the_loss_to_what_the_data_allow() {
    // Six tokens a trace, one of them a digit that is hard to guess: ln 2 / 3 and some.
    const LOSS_MAX: f64 = 0.5;
    let config = config(EVERYTHING.split_once("[rl]").unwrap().0);
    let engine = cpu(&config, 2);
    let mut trainer = start(&engine, &config, problems(&config, |i| i % 2), fresh(&config));
    let reports = finish(&mut trainer);
    assert_eq!(reports.len(), 30);
    let first = reports[0].loss;
    let last = mean(reports[25..].iter().map(|r| r.loss));
    eprintln!("loss {first:.3} to {last:.3}");
    assert!(first > 4.0, "an untrained model is near ln 128 = 4.85, not {first}");
    assert!(last < LOSS_MAX, "the loss is still {last}");
    for r in &reports {
        assert!(r.saturations.is_empty() && r.grad_norm > 0.0, "step {}: {r:?}", r.step);
    }
}

/// One of four answers is right, always the same: the reward must rise from chance to certainty.
#[test]
fn rl_raises_the_reward_and_samples_from_what_it_trains() {
    const MARGIN: f64 = 0.4;
    let config = config(ON_POLICY);
    let engine = cpu(&config, 2);
    let state = policy_that_guesses(&config);
    let mut trainer = start(&engine, &config, problems(&config, |_| 3), state);
    let reports = finish(&mut trainer);
    let rewards: Vec<f64> = reports.iter().map(|r| rl(r).reward).collect();
    let (first, last) = (mean(rewards[..3].iter().copied()), mean(rewards[17..].iter().copied()));
    eprintln!("reward {first:.3} to {last:.3}");
    assert!(first > 0.05, "nothing to learn from: {rewards:?}");
    assert!(last > first + MARGIN, "{first} to {last}: {rewards:?}");
    for r in &reports {
        let (step, rl) = (r.step, rl(r));
        assert_eq!(rl.policy_lag, 0, "step {step}");
        assert_eq!(rl.sampler_mismatch, 0.0, "step {step}: sampler and trainer differ");
        assert_eq!(rl.batch.mismatch_kl, 0.0, "step {step}");
        if rl.groups_kept > 0 {
            assert_eq!(rl.batch.ratio_mean, 1.0, "step {step}");
        }
    }
}

/// A piece of state that is missing from a checkpoint shows at the first step that needs it.
#[test]
fn state_reloaded_at_every_boundary_continues_with_the_same_bits() {
    let config = config(EVERYTHING);
    let engine = cpu(&config, 1);
    let problems = problems(&config, |i| i % 2);
    let mut whole = start(&engine, &config, problems.clone(), fresh(&config));
    let mut broken = start(&engine, &config, problems.clone(), fresh(&config));
    let mut reports = Vec::new();
    let mut boundary = 0;
    loop {
        assert!(whole.pipeline.is_at_boundary());
        let saved = files(&broken);
        for (name, bytes) in files(&whole) {
            if let Some(i) = first_difference(&saved[&name], &bytes) {
                let line = |x: &[u8]| {
                    String::from_utf8_lossy(&x[i.saturating_sub(60)..x.len().min(i + 40)])
                        .into_owned()
                };
                let (got, want) = (line(&saved[&name]), line(&bytes));
                panic!("boundary {boundary}: {name} differs at byte {i}: {got}\ninstead of {want}");
            }
        }
        let (read, state) = State::load(&saved).unwrap();
        assert_eq!(read, config);
        broken = start(&engine, &read, problems.clone(), state);
        let report = step(&mut whole);
        assert_eq!(step(&mut broken), report, "boundary {boundary}");
        if report.is_none() {
            break;
        }
        reports.extend(report);
        boundary += 1;
    }
    assert_eq!(broken.state().evaluations, whole.state().evaluations);
    assert_eq!(whole.state().evaluations.len(), 9 + 2 + 1, "every third step, and the end");
    assert_eq!(broken.weights_hash(), whole.weights_hash());
    assert_eq!(boundary, 30 + 6);
    let learnt: Vec<&RlReport> = reports.iter().filter_map(|r| r.rl.as_ref()).collect();
    assert!(learnt.iter().any(|r| r.reward > 0.0), "nothing was learnt from");
    assert!(learnt.iter().any(|r| r.policy_lag > 0), "no lag");
    assert!(learnt.iter().any(|r| r.batch.kl > 0.0), "no KL");
    assert!(learnt.iter().any(|r| r.reset.is_some()), "no reset");
    let alphas: Vec<f64> = learnt.iter().map(|r| r.entropy_coefficient).collect();
    assert!(alphas.iter().any(|a| *a != alphas[0]), "the entropy controller rested: {alphas:?}");
}

/// Work is split over threads by shape only, and integer sums have no order.
#[test]
fn final_weights_do_not_depend_on_threads() {
    let config = config(EVERYTHING);
    let run = |threads| {
        let engine = cpu(&config, threads);
        let mut trainer = start(&engine, &config, problems(&config, |i| i % 2), fresh(&config));
        let reports = finish(&mut trainer);
        (trainer.weights_hash(), reports)
    };
    let (one, two) = (run(1), run(2));
    assert_eq!(one.1, two.1);
    assert_eq!(one.0, two.0);
    let start = State::new(&config, &config.model().unwrap(), None);
    let engine = cpu(&config, 1);
    let untrained = self::start(&engine, &config, problems(&config, |i| i % 2), start);
    assert_ne!(untrained.weights_hash(), one.0, "the run changed nothing");
}

/// The loops that define the arithmetic, and the tuned ones, train the same model.
#[test]
fn final_weights_do_not_depend_on_the_engine() {
    let text = EVERYTHING.replace(&format!("[model]\n{}", SMALL.0), SMALL.1);
    let text = text.replace("batch = 16", "batch = 8").replace("steps = 6", "steps = 3");
    let config = config(&text);
    assert_eq!(config.model().unwrap().width, 32);
    fn run<E: Engine>(engine: &E, config: &RunConfig) -> (String, Vec<StepReport>) {
        let mut trainer = start(engine, config, problems(config, |i| i % 2), fresh(config));
        let reports = finish(&mut trainer);
        (trainer.weights_hash().to_hex().to_string(), reports)
    }
    let twin = run(&Twin::new(config.model().unwrap().constants()), &config);
    let cpu = run(&cpu(&config, 2), &config);
    assert_eq!(twin.1, cpu.1);
    assert_eq!(twin.0, cpu.0);
}

/// Steps an on-policy run whose reference is reset as `reset` says, to just after the first reset.
fn to_the_first_reset<'e>(
    engine: &'e Cpu,
    config: &RunConfig,
    state: State,
) -> (Trainer<'e, Cpu>, Vec<StepReport>) {
    let mut trainer = start(engine, config, problems(config, |_| 3), state);
    let mut reports = Vec::new();
    loop {
        let report = step(&mut trainer).expect("a reset comes before the run ends");
        let is_reset = rl(&report).reset.is_some();
        reports.push(report);
        if is_reset {
            return (trainer, reports);
        }
    }
}

/// ProRL v1 clears the optimizer with the reference, v2 keeps it; both start at KL 0.
#[test]
fn reset_moves_the_reference_and_clears_or_keeps_the_optimizer() {
    for (version, reset, reason) in [
        (1, "every_steps = 3\nreset_optimizer = true", "schedule"),
        (2, "every_steps = 3", "schedule"),
        (1, "stalled = { patience = 2, min_delta = 1.0 }\nreset_optimizer = true", "stalled"),
        (2, "every_steps = 19\nkl_above = 1e-9", "kl"),
    ] {
        let name = format!("v{version} by {reason}");
        let reset = format!("[rl.learn.reset]\n{reset}\n[eval]\nevery = 1");
        let text = ON_POLICY.replace("[eval]", &reset);
        let config = config(&text);
        let engine = cpu(&config, 2);
        let state = policy_that_guesses(&config);
        let begin = state.master();
        let (mut trainer, reports) = to_the_first_reset(&engine, &config, state);
        assert_eq!(rl(&reports[0]).batch.kl, 0.0, "{name}: the reference is the start");
        assert_eq!(rl(reports.last().unwrap()).reset.as_deref(), Some(reason), "{name}");
        assert!(rl(reports.last().unwrap()).batch.kl > 0.0, "{name}: the policy has moved");

        let state = trainer.state();
        assert_ne!(state.master(), begin, "{name}");
        assert_eq!(state.reference, Some(state.master()), "{name}");
        let optimizer = &state.optimizer;
        let moments = || {
            let both = optimizer.tensors.iter().map(|t| [&t.first_moment, &t.second_moment]);
            both.flatten().flatten().copied()
        };
        assert_eq!(optimizer.update_count, reports.len() as u64, "{name}: the schedule goes on");
        if version == 1 {
            assert_eq!(optimizer.moment_step, 0, "{name}");
            assert_eq!(moments().position(|m| m != 0.0), None, "{name}");
        } else {
            assert_eq!(optimizer.moment_step, optimizer.update_count, "{name}");
            assert!(moments().any(|m| m != 0.0), "{name}");
        }
        let after = step(&mut trainer).unwrap();
        assert_eq!(rl(&after).batch.kl, 0.0, "{name}: KL just after a reset");
    }
}
