//! Identities that tie the modules together: each holds exactly in theory, by enumeration here.
//!
//! The trainer at the bottom is the smallest whole of this directory: log-probabilities go
//! through [`batch_weights`] to `i32`, and nothing but those integers moves the policy.

use super::config::LearnConfig;
use super::golden::{GOLDEN_TOLERANCE, assert_close, assert_golden, golden, numbers};
use super::kl::{KlConfig, KlEstimator};
use super::objective::{
    Importance, Objective, SequenceRatios, TokenLogprobs, importance_weight, token_loss,
};
use super::optimizer::{AdamW, AdamWConfig, TensorState};
use super::reset::{Observation, ResetConfig, ResetState};
use super::weights::{BatchWeights, LossConfig, RolloutTokens, StepContext, batch_weights};

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
    let z: f64 = logits.iter().map(|&l| libm::exp(l - top)).sum();
    logits.iter().map(|&l| l - top - libm::log(z)).collect()
}

fn exp(logprobs: &[f64]) -> Vec<f64> {
    logprobs.iter().map(|&lp| libm::exp(lp)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn entropy(logprobs: &[f64]) -> f64 {
    -dot(&exp(logprobs), logprobs)
}

/// `sum_a mass_a slope_a d log pi(a) / d logits`.
fn logit_gradient(mass: &[f64], slope: &[f64], logprobs: &[f64]) -> Vec<f64> {
    let total = dot(mass, slope);
    let p = exp(logprobs);
    (0..p.len()).map(|i| mass[i] * slope[i] - total * p[i]).collect()
}

/// `E_mu[w A grad log pi] = E_pi[A grad log pi]`, and with a cap the bias is
/// `sum_a (1 - min(w, C) / w) pi A grad log pi`: algorithms §8, test 2.
#[test]
fn importance_sampling_is_unbiased_and_its_truncation_bias_is_the_closed_form() {
    let policy = log_softmax(&[0.3, -0.7, 1.1, 0.0, 2.0, -1.5, 0.4, 0.9]);
    let sampler = log_softmax(&[1.0, 0.6, -0.9, 0.2, 0.1, 0.8, -1.0, 0.3]);
    let advantages = [1.0, -0.5, 0.3, -1.0, 0.8, -0.2, 0.0, 0.6];
    let (pi, mu) = (exp(&policy), exp(&sampler));
    let estimate = |importance| {
        let objective = Objective { importance, ..Objective::ppo(0.2, 0.2) };
        let slopes: Vec<f64> = (0..8)
            .map(|a| {
                let (policy, sampler) = (policy[a], sampler[a]);
                let token = TokenLogprobs { policy, proximal: policy, sampler };
                let sequence = SequenceRatios::of([token]);
                -token_loss(&objective, token, sequence, advantages[a]).dloss_dlogprob
            })
            .collect();
        logit_gradient(&mu, &slopes, &policy)
    };
    let exact = logit_gradient(&pi, &advantages, &policy);
    assert_close("unbiased", &estimate(Importance::Raw), &exact, 1e-14);

    let cap = 1.5;
    let missing: Vec<f64> = (0..8)
        .map(|a| {
            let token =
                TokenLogprobs { policy: policy[a], proximal: policy[a], sampler: sampler[a] };
            let weight =
                |importance| importance_weight(importance, token, SequenceRatios::default());
            1.0 - weight(Importance::Tis { cap }) / weight(Importance::Raw)
        })
        .collect();
    assert!(missing.iter().filter(|&&m| m > 0.1).count() >= 2, "the cap must act");
    let lost: Vec<f64> = (0..8).map(|a| missing[a] * advantages[a]).collect();
    let bias = logit_gradient(&pi, &lost, &policy);
    let truncated = estimate(Importance::Tis { cap });
    let expected: Vec<f64> = (0..8).map(|i| exact[i] - bias[i]).collect();
    assert_close("truncated", &truncated, &expected, 1e-14);
}

/// Entropy falls by the covariance of log-probability and advantage: algorithms §5.4.
#[test]
fn entropy_change_is_minus_the_covariance() {
    let golden = golden();
    let logits = numbers(&golden["kl"]["logits"]);
    let golden = &golden["entropy"];
    // Not printed in the file; the only vector of one-decimal entries that gives its covariances.
    let rewards = [1.0, -0.5, 0.2, -1.0];
    let eta = 1e-4;
    let lp = log_softmax(&logits);
    let p = exp(&lp);
    let baseline = dot(&p, &rewards);
    let advantages = rewards.map(|r| r - baseline);
    let covariance = |values: &[f64]| {
        let centred: Vec<f64> = lp.iter().map(|l| l - dot(&p, &lp)).collect();
        (0..4).map(|i| p[i] * centred[i] * (values[i] - dot(&p, values))).sum::<f64>()
    };
    let weighted: Vec<f64> = (0..4).map(|i| p[i] * advantages[i]).collect();
    assert_golden("npg", &[-covariance(&advantages)], &golden["-Cov(logp,A)"]);
    assert_golden("pg", &[-covariance(&weighted)], &golden["-Cov(logp,p*A)"]);
    for (key, step) in [("npg_dH/eta", &advantages[..]), ("pg_dH/eta", &weighted)] {
        let change = |eta: f64| {
            let moved: Vec<f64> = (0..4).map(|i| logits[i] + eta * step[i]).collect();
            (entropy(&log_softmax(&moved)) - entropy(&lp)) / eta
        };
        // Differences of entropies near 1 carry 1e-16 / eta = 1e-12 of noise.
        assert_golden(key, &[change(eta)], &golden[key]);
        // The error is of order eta: ten times the step, ten times the error.
        let error = |eta| change(eta) + covariance(step);
        let growth = error(10.0 * eta) / error(eta);
        assert!((growth - 10.0).abs() < 0.1, "{key}: {growth}");
    }
}

/// Arms of the bandit of algorithms §1.5.5: three correct ones, then 61 wrong ones.
const CORRECT: [f64; 3] = [0.3, 0.01, 0.001];
const ARMS: usize = 64;
const BETA: f64 = 0.5;

fn reward(arm: usize) -> f64 {
    f64::from(u8::from(arm < CORRECT.len()))
}

fn initial_logprobs() -> Vec<f64> {
    let wrong = (1.0 - CORRECT.iter().sum::<f64>()) / (ARMS - CORRECT.len()) as f64;
    (0..ARMS).map(|a| libm::log(CORRECT.get(a).copied().unwrap_or(wrong))).collect()
}

/// Every arm once, on policy, with the exact baseline: the integers, and w in units of one.
fn bandit_weights(
    config: &LossConfig,
    policy: &[f64],
    reference: &[f64],
) -> (BatchWeights, Vec<f64>) {
    let baseline: f64 = (0..ARMS).map(|a| libm::exp(policy[a]) * reward(a)).sum();
    let rollouts: Vec<RolloutTokens<'_>> = (0..ARMS)
        .map(|a| RolloutTokens {
            policy_logprobs: &policy[a..=a],
            proximal_logprobs: &policy[a..=a],
            sampler_logprobs: &policy[a..=a],
            reference_logprobs: Some(&reference[a..=a]),
            entropies: None,
            loss_mask: &[true],
            advantage: reward(a) - baseline,
        })
        .collect();
    let out = batch_weights(config, &rollouts, StepContext::default()).unwrap();
    let unit = f64::from(1_u32 << (16 + config.loss_scale_log2));
    let w = out.token_weights.iter().map(|w| f64::from(w[0]) / unit).collect();
    (out, w)
}

fn bandit_config() -> LossConfig {
    LossConfig {
        objective: Objective::prorl_v1(),
        kl: KlConfig::plain(KlEstimator::K2, BETA),
        loss_scale_log2: 10,
        ..LossConfig::default()
    }
}

/// KL keeps diversity, resets let it improve: k converged resets give `ref exp(k R / beta)`.
///
/// The trainer takes natural-gradient steps on the logits, `theta += eta w`, which contract the
/// distance to the optimum by `1 - eta beta` a step; w arrives rounded to 2^-26.
#[test]
fn bandit_trained_by_integer_weights_reaches_the_closed_form_of_resets() {
    // A weight is off by 2^-27 at most, the fixed point by that over beta: 1.5e-8 in log space.
    const TRAINER_TOLERANCE: f64 = 1e-7;
    let golden = golden();
    let expected =
        golden["kl_resets(beta=.5, p_correct=(.3,.01,.001), 64 arms)"].as_array().unwrap();
    let start = initial_logprobs();
    let mut logits = start.clone();
    for (k, expected) in expected.iter().enumerate() {
        let reference = log_softmax(&logits);
        for _ in 0..60 {
            let (_, w) = bandit_weights(&bandit_config(), &log_softmax(&logits), &reference);
            (0..ARMS).for_each(|a| logits[a] += w[a]);
        }
        let policy = log_softmax(&logits);
        let tilted: Vec<f64> =
            (0..ARMS).map(|a| start[a] + (k + 1) as f64 * reward(a) / BETA).collect();
        let closed = log_softmax(&tilted);
        let pass = |lp: &[f64]| exp(&lp[..3]).iter().sum::<f64>();
        let conditional =
            |lp: &[f64]| exp(&lp[..3]).iter().map(|p| p / pass(lp)).collect::<Vec<_>>();

        assert_golden("closed form pass@1", &[pass(&closed)], &expected["closed_form"]);
        assert_golden("closed form entropy", &[entropy(&closed)], &expected["H"]);
        assert_golden("conditional", &conditional(&closed), &expected["cond_correct"]);
        assert_close("policy", &policy, &closed, TRAINER_TOLERANCE);
        assert_close("pass@1", &[pass(&policy)], &numbers(&expected["pass@1"]), TRAINER_TOLERANCE);
        assert_close("entropy", &[entropy(&policy)], &[entropy(&closed)], 10.0 * TRAINER_TOLERANCE);
        assert_close("diversity", &conditional(&policy), &conditional(&start), TRAINER_TOLERANCE);
        // The plain policy gradient vanishes there too.
        let (_, w) = bandit_weights(&bandit_config(), &closed, &reference);
        let gradient = logit_gradient(&exp(&closed), &w, &closed);
        assert_close("gradient", &gradient, &[0.0; ARMS], TRAINER_TOLERANCE);
    }
}

/// The whole chain, down to AdamW on integer gradients, climbs to the same optimum.
#[test]
fn bandit_trained_by_adamw_on_integer_gradients_reaches_the_optimum() {
    let reference = initial_logprobs();
    let master: Vec<f32> = reference.iter().map(|&l| l as f32).collect();
    let mut optimizer = AdamW::new(vec![TensorState::new(master, false)]);
    let config = AdamWConfig { learning_rate: 0.02, grad_norm_max: None, ..AdamWConfig::default() };
    for step in 0..3000 {
        let logits: Vec<f64> = optimizer.tensors[0].master.iter().map(|&l| f64::from(l)).collect();
        let policy = log_softmax(&logits);
        let (out, w) = bandit_weights(&bandit_config(), &policy, &reference);
        // The engine's d logits = (p - onehot) w, summed over arms weighted by their probability.
        let unit = f64::from(1_u32 << 26);
        let gradient: Vec<i64> = logit_gradient(&exp(&policy), &w, &policy)
            .iter()
            .map(|g| (-g * unit * out.scale.divisor).round_ties_even() as i64)
            .collect();
        let rate = if step < 2000 { 0.02 } else { 0.002 };
        let config = AdamWConfig { learning_rate: rate, ..config };
        optimizer.step(&config, out.scale, &[&gradient]).unwrap();
    }
    let logits: Vec<f64> = optimizer.tensors[0].master.iter().map(|&l| f64::from(l)).collect();
    let pass: f64 = exp(&log_softmax(&logits)[..3]).iter().sum();
    // Adam jitters by about the final rate times the slope of pass@1.
    assert_close("pass@1", &[pass], &[0.7693335053], 1e-3);
}

/// Right after a reset the KL and its gradient are exactly zero; v1 clears Adam, v2 keeps every bit:
/// algorithms §1.5.2.
#[test]
fn reset_zeroes_kl_exactly_and_treats_the_optimizer_as_its_version_says() {
    let seen = Observation { step: 400, kl: None, validation: Some(0.0) };
    let v1 = LearnConfig::prorl_v1(BETA).reset;
    let mut trained = AdamW::new(vec![TensorState::new(vec![0.5; 4], true)]);
    let scale = super::weights::GradientScale { loss_scale_log2: 0, divisor: 1.0 };
    trained.step(&AdamWConfig::default(), scale, &[&[65536, -9, 3, 0]]).unwrap();
    for (config, clears) in [(v1, true), (ResetConfig::prorl_v2(), false)] {
        let mut state = ResetState::default();
        let config = ResetConfig { every_steps: Some(400), ..config };
        let reset = state.observe(&config, seen).unwrap();
        let mut optimizer = trained.clone();
        if reset.reset_optimizer {
            optimizer.reset();
        }
        let fresh = AdamW::new(vec![TensorState::new(trained.tensors[0].master.clone(), true)]);
        assert_eq!(reset.reset_optimizer, clears);
        assert_eq!(optimizer.tensors == fresh.tensors && optimizer.moment_step == 0, clears);
        assert_eq!(optimizer == trained, !clears);
    }

    let policy = log_softmax(&[0.3, -2.0, 1.5]);
    for p in &policy {
        let term = KlConfig::default().term(*p, *p);
        assert_eq!((term.value.to_bits(), term.dvalue_dlogprob), (0, 0.0));
    }
    let arms = initial_logprobs();
    let (with, _) = bandit_weights(&bandit_config(), &arms, &arms);
    let without = LossConfig { kl: KlConfig::plain(KlEstimator::K2, 0.0), ..bandit_config() };
    let (without, _) = bandit_weights(&without, &arms, &arms);
    assert_eq!(with.token_weights, without.token_weights);
    assert_eq!(with.stats.kl.to_bits(), 0);
    assert!(with.stats.weight_abs_mean > GOLDEN_TOLERANCE);
}
