//! Golden batches, rounding, masks and statistics of the integer weights.

use std::f64::consts::LN_2;

use super::super::golden::{GOLDEN_TOLERANCE, assert_close, golden, numbers};
use super::super::kl::KlEstimator;
use super::*;

/// Half a unit of `FX(16)`, plus the printed precision of the golden numbers.
const ROUNDING: f64 = 0.5 / 65536.0 + GOLDEN_TOLERANCE;
const LONE: LossConfig = LossConfig {
    objective: Objective::prorl_v1(),
    kl: KlConfig::plain(KlEstimator::K2, 0.0),
    aggregation: Aggregation::TokenMean,
    covariance: CovarianceControl::None,
    loss_scale_log2: 0,
};

struct Golden {
    new: Vec<f64>,
    old: Vec<f64>,
    behav: Vec<f64>,
    advantages: Vec<f64>,
}

impl Golden {
    fn read() -> Self {
        let inputs = &golden()["token_losses"]["inputs"];
        let [new, old, behav, advantages] =
            ["new", "old", "behav", "A"].map(|key| numbers(&inputs[key]));
        Self { new, old, behav, advantages }
    }

    /// Eight rollouts of one token each.
    fn rollouts(&self) -> Vec<RolloutTokens<'_>> {
        (0..8)
            .map(|t| RolloutTokens {
                policy_logprobs: &self.new[t..=t],
                proximal_logprobs: &self.old[t..=t],
                sampler_logprobs: &self.behav[t..=t],
                reference_logprobs: Some(&self.behav[t..=t]),
                entropies: None,
                loss_mask: &[true],
                advantage: self.advantages[t],
            })
            .collect()
    }
}

fn units(weights: &[Vec<i32>], scale: GradientScale) -> Vec<f64> {
    let unit = f64::from(1_u32 << (16 + scale.loss_scale_log2));
    weights.concat().iter().map(|&w| f64::from(w) / unit).collect()
}

/// Gradient weight = aggregation weight x token gradient, with the sign that the engine expects.
#[test]
fn weights_are_minus_the_golden_gradient() {
    let data = Golden::read();
    let config = LossConfig { objective: Objective::prorl_v2(), ..LONE };
    let out = batch_weights(&config, &data.rollouts(), StepContext::default()).unwrap();
    let golden = &golden()["token_losses"]["icepop_0.5_5_prorlv2_0.2_0.27"];
    let expected: Vec<f64> = numbers(&golden["dloss_dnew"]).iter().map(|g| -g).collect();
    assert_close("w", &units(&out.token_weights, out.scale), &expected, ROUNDING);
    assert_eq!(out.scale, GradientScale { loss_scale_log2: 0, divisor: 8.0 });
    let loss = numbers(&golden["loss"]).iter().sum::<f64>() / 8.0;
    assert_close("loss", &[out.stats.loss], &[loss], GOLDEN_TOLERANCE);
    let stats = out.stats;
    assert_eq!((stats.dropped_token_count, stats.dropped_sequence_count), (2, 2));
    assert_eq!((stats.clip_low_fraction, stats.clip_high_fraction), (0.125, 0.125));
    assert!(stats.mismatch_kl > 0.1 && stats.ratio_mean > 1.0 && stats.weight_abs_mean > 0.5);
}

/// KL, loss scale and a sequence-weighted aggregation on top, against the formula in f64.
#[test]
fn weights_combine_kl_scale_and_aggregation() {
    let data = Golden::read();
    let rollout = |range: std::ops::Range<usize>, advantage| RolloutTokens {
        policy_logprobs: &data.new[range.clone()],
        proximal_logprobs: &data.old[range.clone()],
        sampler_logprobs: &data.behav[range.clone()],
        reference_logprobs: Some(&data.behav[range.clone()]),
        entropies: None,
        loss_mask: &[true, true, false, true, true, true][..range.len()],
        advantage,
    };
    let rollouts = [rollout(0..2, 1.0), rollout(2..8, -1.0)];
    let config = LossConfig {
        kl: KlConfig::plain(KlEstimator::K2, 0.1),
        aggregation: Aggregation::SeqMeanTokenMean,
        loss_scale_log2: 4,
        ..LONE
    };
    let step = StepContext { entropy_coefficient: 0.25, seed: 0 };
    let out = batch_weights(&config, &rollouts, step).unwrap();
    // 2 and 5 unmasked tokens: N/B = 3.5.
    let c = |t: usize| if t < 2 { 1.75 } else { 0.7 };
    let mut expected = vec![];
    for t in 0..8 {
        let logprobs =
            TokenLogprobs { policy: data.new[t], proximal: data.old[t], sampler: data.behav[t] };
        let advantage = if t < 2 { 1.0 } else { -1.0 };
        let loss = token_loss(&config.objective, logprobs, SequenceRatios::default(), advantage);
        let slope = loss.dloss_dlogprob + 0.1 * (data.new[t] - data.behav[t]);
        expected.push(if t == 4 { 0.0 } else { -c(t) * slope });
    }
    let half_unit = 0.5 / f64::from(1 << 20) + 1e-12;
    assert_close("w", &units(&out.token_weights, out.scale), &expected, half_unit);
    let entropy: Vec<f64> = (0..8).map(|t| if t == 4 { 0.0 } else { 0.25 * c(t) * LN_2 }).collect();
    assert_close("u", &units(&out.entropy_weights, out.scale), &entropy, half_unit);
    assert_eq!(out.scale.divisor, 7.0);
}

/// Summing `kl_cov` losses as verl does: algorithms §5.4.
#[test]
fn kl_cov_adds_its_penalty_to_the_chosen_token() {
    let data = Golden::read();
    let objective = Objective::ppo(1.0, 1e9);
    let covariance = CovarianceControl::KlCov { share: 0.2, coefficient: 1.0 };
    let with = LossConfig { objective, covariance, ..LONE };
    let without = LossConfig { objective, ..LONE };
    let run = |c: &LossConfig| batch_weights(c, &data.rollouts(), StepContext::default()).unwrap();
    let (with, without) = (run(&with), run(&without));
    // The page prints six decimals.
    assert_close("sum", &[with.stats.loss * 8.0], &[7.858168], 5e-7);
    assert_eq!(with.stats.covariance_token_count, 1);
    let differing: Vec<usize> =
        (0..8).filter(|&t| with.token_weights[t] != without.token_weights[t]).collect();
    assert_eq!(differing, [4]);
    // policy < proximal: the penalty pulls the log-probability up, by exactly one unit.
    assert_eq!(with.token_weights[4][0] - without.token_weights[4][0], 65536);
}

#[test]
fn clip_cov_removes_the_policy_loss_only() {
    let data = Golden::read();
    let covariance = CovarianceControl::ClipCov { low: 0.9, high: 1.0, share: 0.1 };
    let kl = KlConfig::plain(KlEstimator::K2, 0.5);
    let config = LossConfig { covariance, kl, ..LONE };
    let out = batch_weights(&config, &data.rollouts(), StepContext::default()).unwrap();
    let w = units(&out.token_weights, out.scale)[1];
    assert_close("only kl is left", &[w], &[-0.5 * (data.new[1] - data.behav[1])], ROUNDING);
}

#[test]
fn weights_round_half_to_even_and_count_losses() {
    let mut rounding = Rounding::new(0);
    let unit = 1.0 / 65536.0;
    let got = [0.5, 1.5, 2.5, -0.5, -1.5, 0.0].map(|x| rounding.round(x * unit, LIM));
    assert_eq!(got, [0, 2, 2, 0, -2, 0]);
    assert_eq!((rounding.vanished, rounding.clamped), (2, 0));
    let top = f64::from(LIM) * unit;
    assert_eq!([top, 1e9, -1e9].map(|x| rounding.round(x, LIM)), [LIM, LIM, -LIM]);
    assert_eq!(rounding.clamped, 2);
}

#[test]
fn weights_masked_tokens_are_never_read() {
    let nan = [f64::NAN, -1.0];
    let mask = [false, true];
    let rollout = RolloutTokens {
        policy_logprobs: &nan,
        proximal_logprobs: &nan,
        sampler_logprobs: &nan,
        reference_logprobs: Some(&nan),
        entropies: Some(&nan),
        loss_mask: &mask,
        advantage: 1.0,
    };
    let step = StepContext { entropy_coefficient: 0.5, seed: 0 };
    let out = batch_weights(&LossConfig::default(), &[rollout], step).unwrap();
    assert_eq!(
        (out.token_weights, out.entropy_weights),
        // 0.5 ln 2 in Q16.
        (vec![vec![0, 65536]], vec![vec![0, 22713]])
    );
    let unmasked = RolloutTokens { loss_mask: &[true, true], ..rollout };
    assert_eq!(
        batch_weights(&LossConfig::default(), &[rollout, unmasked], step),
        Err(WeightsError::NotFinite { rollout: 1, token: 0 })
    );
    let short = RolloutTokens { loss_mask: &[true], ..rollout };
    let error = batch_weights(&LossConfig::default(), &[short], step).unwrap_err();
    assert!(error.to_string().contains("policy_logprobs has 2"), "{error}");
    let unscored = RolloutTokens { reference_logprobs: None, ..rollout };
    let error = batch_weights(&LossConfig::default(), &[unscored], step);
    assert_eq!(error, Err(WeightsError::NoReference { rollout: 0 }));
}

#[test]
fn weights_all_masked_or_empty_batch_is_zero() {
    let lp = [-1.0; 3];
    let rollout = RolloutTokens {
        policy_logprobs: &lp,
        proximal_logprobs: &lp,
        sampler_logprobs: &lp,
        reference_logprobs: Some(&lp),
        entropies: None,
        loss_mask: &[false; 3],
        advantage: 1.0,
    };
    for batch in [&[][..], &[rollout][..]] {
        let out = batch_weights(&LossConfig::default(), batch, StepContext::default()).unwrap();
        assert_eq!((out.scale.divisor, out.stats), (0.0, BatchStats::default()));
        assert!(out.token_weights.iter().flatten().all(|&w| w == 0));
    }
}

/// Rejected tokens still count in the divisor, so the survivors keep their weight.
#[test]
fn weights_rejection_does_not_raise_the_survivors() {
    let lp = [-1.0; 2];
    let batch = |sampler: &[f64]| {
        let rollout = RolloutTokens {
            policy_logprobs: &lp,
            proximal_logprobs: &lp,
            sampler_logprobs: sampler,
            reference_logprobs: Some(&lp),
            entropies: None,
            loss_mask: &[true; 2],
            advantage: 1.0,
        };
        batch_weights(&LossConfig::default(), &[rollout], StepContext::default()).unwrap()
    };
    let (honest, rejected) = (batch(&[-1.0, -1.0]), batch(&[-1.0, -9.0]));
    assert_eq!(rejected.token_weights, [[honest.token_weights[0][0], 0]]);
    assert_eq!(rejected.scale, honest.scale);
    assert_eq!(honest.stats.mismatch_kl, 0.0);
}

#[test]
fn published_logprobs_convert_exactly() {
    assert_eq!(logprob_from_fixed(-(3 << 23)), -1.5);
    assert_eq!(logprob_from_fixed(1), libm::pow(2.0, -24.0));
}
