//! Golden numbers, clip arithmetic and finite differences of the per-token losses.

use super::super::golden::{assert_close, assert_golden, golden, numbers};
use super::*;
use proptest::prelude::*;

fn single(objective: &Objective, token: TokenLogprobs, advantage: f64) -> TokenLoss {
    token_loss(objective, token, SequenceRatios::of([token]), advantage)
}

fn golden_tokens() -> (Vec<TokenLogprobs>, Vec<f64>) {
    let inputs = &golden()["token_losses"]["inputs"];
    let [new, old, behav] = ["new", "old", "behav"].map(|key| numbers(&inputs[key]));
    let tokens = (0..new.len())
        .map(|t| TokenLogprobs { policy: new[t], proximal: old[t], sampler: behav[t] })
        .collect();
    (tokens, numbers(&inputs["A"]))
}

/// All nine variants, loss and gradient.
#[test]
fn token_loss_variants_equal_golden() {
    let with = |clip_low, clip_high, importance| Objective {
        importance,
        ..Objective::ppo(clip_low, clip_high)
    };
    let none = Importance::None;
    let dppo = Surrogate::Dppo { probability_gap_max: 0.2, kl_coef: 1e-3 };
    let variants = [
        ("ppo_0.2_0.2", Objective::ppo(0.2, 0.2)),
        ("prorl_0.2_0.4", Objective::prorl_v1()),
        (
            "intellect2_two_sided_eps0.2_delta4",
            Objective { delta: Some(4.0), ..Objective::ppo(0.2, 0.2) },
        ),
        (
            "verl_dualclip_c3_0.2_0.28",
            Objective { dual_clip: Some(3.0), ..Objective::ppo(0.2, 0.28) },
        ),
        ("decoupled_ppo_areal_eps0.2(uncapped)", with(0.2, 0.2, Importance::Raw)),
        ("tis_C2_prorl", with(0.2, 0.4, Importance::Tis { cap: 2.0 })),
        ("icepop_0.5_5_prorlv2_0.2_0.27", Objective::prorl_v2()),
        ("cispo_0.2_0.28", Objective { surrogate: Surrogate::Cispo, ..with(0.2, 0.28, none) }),
        ("dppo_tv0.2_kl1e-3(prime-rl)", Objective { surrogate: dppo, ..with(0.2, 0.2, none) }),
    ];
    let golden = &golden()["token_losses"];
    assert_eq!(golden.as_object().unwrap().len(), variants.len() + 1, "a variant is missing");
    let (tokens, advantages) = golden_tokens();
    for (key, objective) in variants {
        objective.validate().unwrap();
        let out: Vec<TokenLoss> =
            tokens.iter().zip(&advantages).map(|(t, &a)| single(&objective, *t, a)).collect();
        let losses: Vec<f64> = out.iter().map(|t| t.loss).collect();
        let gradients: Vec<f64> = out.iter().map(|t| t.dloss_dlogprob).collect();
        assert_golden(key, &losses, &golden[key]["loss"]);
        assert_golden(key, &gradients, &golden[key]["dloss_dnew"]);
    }
}

#[test]
fn token_loss_flags_name_what_was_clipped() {
    let (tokens, advantages) = golden_tokens();
    let out: Vec<TokenLoss> = tokens
        .iter()
        .zip(&advantages)
        .map(|(t, &a)| single(&Objective { dual_clip: Some(3.0), ..Objective::prorl_v2() }, *t, a))
        .collect();
    let indices = |f: fn(&TokenLoss) -> bool| -> Vec<usize> {
        (0..out.len()).filter(|&t| f(&out[t])).collect()
    };
    assert_eq!(indices(|t| t.clipped_high), [0]);
    assert_eq!(indices(|t| t.clipped_low), [4]);
    assert_eq!(indices(|t| t.clipped_dual), [6]);
    assert_eq!(indices(TokenLoss::is_dropped), [4, 5]);
}

#[test]
fn gspo_equals_golden() {
    let golden = &golden()["gspo"];
    let advantages = numbers(&golden["A"]);
    let (tokens, _) = golden_tokens();
    let sequences = [&tokens[..4], &tokens[4..]];
    let ratios = sequences.map(|s| SequenceRatios::of(s.iter().copied()));
    assert_golden("ratios", &ratios.map(|s| ratio(s.log_ratio)), &golden["ratios"]);
    for (key, low, high) in [("eps3e-4_4e-4", 3e-4, 4e-4), ("eps0.5_0.5", 0.5, 0.5)] {
        let objective = Objective { surrogate: Surrogate::Gspo, ..Objective::ppo(low, high) };
        let out: Vec<TokenLoss> = (0..8)
            .map(|t| token_loss(&objective, tokens[t], ratios[t / 4], advantages[t]))
            .collect();
        // seq_mean_token_mean of two sequences of four tokens is the mean of the eight.
        let loss = out.iter().map(|t| t.loss).sum::<f64>() / 8.0;
        let gradients: Vec<f64> = out.iter().map(|t| t.dloss_dlogprob / 8.0).collect();
        assert_golden(key, &[loss], &golden[key]["loss"]);
        assert_golden(key, &gradients, &golden[key]["grad"]);
    }
}

/// A rare token must be allowed to grow further than a symmetric clip lets it: algorithms §1.5.4.
#[test]
fn clip_higher_stops_exactly_at_its_bound() {
    let at = |p: f64, p_old: f64, high: f64| {
        let token =
            TokenLogprobs { policy: libm::log(p), proximal: libm::log(p_old), sampler: 0.0 };
        single(&Objective::ppo(0.2, high), token, 1.0).dloss_dlogprob
    };
    for (high, bound) in [(0.2, 0.012), (0.28, 0.0128), (0.4, 0.014)] {
        assert!(at(bound * (1.0 - 1e-9), 0.01, high) < 0.0, "{high}: pushed below the bound");
        assert_eq!(at(bound * (1.0 + 1e-9), 0.01, high), 0.0, "{high}: free above the bound");
        for p in [0.9, 0.95, 1.0] {
            assert!(at(p, 0.9, high) < 0.0, "a likely token is never clipped");
        }
    }
}

#[test]
fn seq_mask_keeps_or_drops_whole_sequences() {
    let objective = Objective {
        importance: Importance::SeqMask { low: 0.999, high: 1.002 },
        ..Objective::ppo(0.2, 0.2)
    };
    let token = |sampler| TokenLogprobs { policy: -1.0, proximal: -1.0, sampler };
    // Mismatches that cancel in the geometric mean: kept, and each token keeps its raw ratio.
    let kept = [token(-1.5), token(-0.5)];
    let ratios = SequenceRatios::of(kept);
    let weights = kept.map(|t| token_loss(&objective, t, ratios, 1.0).importance_weight);
    assert_close("raw", &weights, &[libm::exp(0.5), libm::exp(-0.5)], 1e-15);
    let dropped = [token(-1.01), token(-1.0)];
    let ratios = SequenceRatios::of(dropped);
    for t in dropped {
        let out = token_loss(&objective, t, ratios, 1.0);
        assert!(out.is_dropped() && out.loss == 0.0 && out.dloss_dlogprob == 0.0);
    }
}

#[test]
fn token_loss_extreme_log_ratios_stay_finite() {
    for policy in [-1e4, -30.0, 0.0] {
        for proximal in [-1e4, -30.0, 0.0] {
            let out = single(
                &Objective::prorl_v2(),
                TokenLogprobs { policy, proximal, sampler: -30.0 },
                -1.0,
            );
            assert!(out.loss.is_finite() && out.dloss_dlogprob.is_finite());
            if (policy - proximal).abs() > 20.0 {
                assert_eq!(out.dloss_dlogprob, 0.0);
            }
        }
    }
}

#[test]
fn objective_config_names_key_and_fix() {
    let parse = |s: &str| serde_json::from_str::<Objective>(s);
    let partial = parse(r#"{"clip_high":0.4,"importance":{"tis":{"cap":2.0}}}"#).unwrap();
    assert_eq!(
        partial,
        Objective { importance: Importance::Tis { cap: 2.0 }, ..Objective::ppo(0.2, 0.4) }
    );
    assert!(parse(r#"{"clip_hi":0.4}"#).is_err());
    assert!(parse(r#"{"importance":{"tis":{"cap":2.0,"floor":0}}}"#).is_err());
    let message = |o: Objective| o.validate().unwrap_err().to_string();
    assert!(message(Objective::ppo(-0.1, 0.2)).contains("objective.clip_low"));
    assert!(message(Objective { dual_clip: Some(1.1), ..Objective::ppo(0.2, 0.2) }).contains("3"));
    let both = Objective { dual_clip: Some(3.0), delta: Some(4.0), ..Objective::ppo(0.2, 0.2) };
    assert!(message(both).contains("delta"));
    let surrogate = Surrogate::Dppo { probability_gap_max: 0.2, kl_coef: 1e-3 };
    assert!(message(Objective { surrogate, ..Objective::prorl_v2() }).contains("importance"));
}

proptest! {
    /// The gradient is the derivative of the loss wherever the loss is differentiable.
    /// (cispo is left out: its loss is deliberately not the integral of its gradient.)
    #[test]
    fn token_loss_gradient_is_the_finite_difference(
        policy in -4.0..-0.01f64, proximal in -4.0..-0.01f64, sampler in -4.0..-0.01f64,
        advantage in -2.0..2.0f64, which in 0..4usize,
    ) {
        let objective = [
            Objective { dual_clip: Some(3.0), ..Objective::prorl_v2() },
            Objective { delta: Some(4.0), importance: Importance::Raw, ..Objective::prorl_v1() },
            Objective { importance: Importance::Tis { cap: 2.0 }, ..Objective::prorl_v1() },
            Objective {
                surrogate: Surrogate::Dppo { probability_gap_max: 0.2, kl_coef: 0.1 },
                ..Objective::ppo(0.2, 0.2)
            },
        ][which];
        let at = |policy| single(&objective, TokenLogprobs { policy, proximal, sampler }, advantage);
        // Small enough that central differences err by 1e-9 of a third derivative below 200.
        let h = 1e-6;
        let (below, here, above) = (at(policy - h), at(policy), at(policy + h));
        let flags = |t: TokenLoss| (t.clipped_low, t.clipped_high, t.clipped_dual);
        prop_assume!(flags(below) == flags(above));
        let difference = (above.loss - below.loss) / (2.0 * h);
        prop_assert!((difference - here.dloss_dlogprob).abs() <= 1e-6 * (1.0 + difference.abs()));
    }
}
