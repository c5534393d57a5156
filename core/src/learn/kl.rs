//! KL to the reference policy, estimated from one sampled token: value and gradient.
//!
//! With `x = policy - reference` (nats; Schulman, "Approximating KL divergence", 2020):
//!
//! | estimator | value | gradient w.r.t. `policy` | expected gradient under the policy |
//! | --- | --- | --- | --- |
//! | `k1` | `x` | 1 | 0: useless as a loss |
//! | `k2` | `x^2 / 2` | `x` | that of KL(policy, reference) |
//! | `k3` | `exp(-x) - 1 + x` | `1 - exp(-x)` | that of KL(reference, policy) |
//! | `k3_plus` | that of `k3` | that of `k2` (straight-through: `k2 - sg(k2) + sg(k3)`) | as `k2` |
//!
//! Clamps act as in PyTorch: a clamped quantity has no gradient, and for `k3_plus` each part is
//! clamped by itself. `NeMo-RL` multiplies by `exp(lp - sg lp)`, a score-function term; we do not.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};

/// Which estimate of KL(policy, reference) enters the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// Log-ratio.
    K1,
    /// Half its square.
    K2,
    /// Always positive, low variance.
    K3,
    /// Value of k3, gradient of k2.
    K3Plus,
}

/// The KL term of the loss. Defaults are those of ProRL v2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KlConfig {
    /// Default `k2`.
    pub estimator: KlEstimator,
    /// Coefficient; 0 turns the term off. Default 1e-4.
    pub beta: f64,
    /// The log-ratio is clamped to plus or minus this; default 20 nats.
    pub input_clamp: Option<f64>,
    /// The value is clamped to plus or minus this; default 10 nats.
    pub output_clamp: Option<f64>,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            estimator: KlEstimator::K2,
            beta: 1e-4,
            input_clamp: Some(20.0),
            output_clamp: Some(10.0),
        }
    }
}

/// Value and gradient of one token, without beta.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KlTerm {
    /// Nats.
    pub value: f64,
    /// Derivative of what is differentiated (see `k3_plus`) with respect to `policy`.
    pub dvalue_dlogprob: f64,
}

impl KlConfig {
    /// An estimator without clamps.
    pub const fn plain(estimator: KlEstimator, beta: f64) -> Self {
        Self { estimator, beta, input_clamp: None, output_clamp: None }
    }

    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fits = self.beta.is_finite() && self.beta >= 0.0;
        require(fits, "kl.beta", self.beta, "use a number from 0 up, such as 1e-4")?;
        let k1 = self.estimator == KlEstimator::K1 && self.beta > 0.0;
        let fix = "use k2: the expected gradient of k1 is zero";
        require(!k1, "kl.estimator", "k1", fix)?;
        for (key, clamp) in
            [("kl.input_clamp", self.input_clamp), ("kl.output_clamp", self.output_clamp)]
        {
            let clamp = clamp.unwrap_or(1.0);
            require(clamp > 0.0, key, clamp, "use a positive number of nats, or leave it out")?;
        }
        Ok(())
    }

    /// The term of one token, from log-probabilities in nats.
    pub fn term(&self, policy_logprob: f64, reference_logprob: f64) -> KlTerm {
        let x = policy_logprob - reference_logprob;
        match self.estimator {
            KlEstimator::K3Plus => KlTerm {
                value: self.clamped(x, k3).value,
                dvalue_dlogprob: self.clamped(x, k2).dvalue_dlogprob,
            },
            KlEstimator::K1 => self.clamped(x, |x| (x, 1.0)),
            KlEstimator::K2 => self.clamped(x, k2),
            KlEstimator::K3 => self.clamped(x, k3),
        }
    }

    fn clamped(&self, log_ratio: f64, estimate: fn(f64) -> (f64, f64)) -> KlTerm {
        let clamp = |v: f64, limit: Option<f64>| limit.map_or(v, |limit| v.clamp(-limit, limit));
        let x = clamp(log_ratio, self.input_clamp);
        let (raw, slope) = estimate(x);
        let value = clamp(raw, self.output_clamp);
        let free = x == log_ratio && value == raw;
        KlTerm { value, dvalue_dlogprob: if free { slope } else { 0.0 } }
    }
}

fn k2(x: f64) -> (f64, f64) {
    (0.5 * (x * x), x)
}

/// Also the mismatch estimate of [`mismatch_kl`].
fn k3(x: f64) -> (f64, f64) {
    let inverse = libm::exp(-x);
    (inverse - 1.0 + x, 1.0 - inverse)
}

/// Estimate of KL(sampler, proximal) from one token drawn by the sampler: `exp(y) - 1 - y` with
/// `y = proximal - sampler`, clamped to +-20. Zero in exact arithmetic at policy lag 0.
pub fn mismatch_kl(proximal_logprob: f64, sampler_logprob: f64) -> f64 {
    let limit = super::scalar::LOG_RATIO_LIMIT;
    k3((sampler_logprob - proximal_logprob).clamp(-limit, limit)).0
}

#[cfg(test)]
mod tests {
    use super::super::golden::{assert_close, assert_golden, golden, numbers};
    use super::*;
    use proptest::prelude::*;

    const ALL: [KlEstimator; 4] =
        [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3, KlEstimator::K3Plus];

    fn log_softmax(logits: &[f64]) -> Vec<f64> {
        let z: f64 = logits.iter().map(|&l| libm::exp(l)).sum();
        logits.iter().map(|&l| l - libm::log(z)).collect()
    }

    /// Expected value, and expected gradient with respect to the logits, over all tokens.
    fn enumerate(estimator: KlEstimator, lp: &[f64], reference: &[f64]) -> (f64, Vec<f64>) {
        let config = KlConfig::plain(estimator, 1.0);
        let mut value = 0.0;
        let mut gradient = vec![0.0; lp.len()];
        for token in 0..lp.len() {
            let term = config.term(lp[token], reference[token]);
            let p = libm::exp(lp[token]);
            value += p * term.value;
            for i in 0..lp.len() {
                let onehot = f64::from(u8::from(i == token));
                gradient[i] += p * term.dvalue_dlogprob * (onehot - libm::exp(lp[i]));
            }
        }
        (value, gradient)
    }

    /// Only k2 (and the gradient of k3+) follows the reverse KL: algorithms §1.5.3.
    #[test]
    fn kl_estimators_equal_golden_in_expectation() {
        let golden = &golden()["kl"];
        let lp = log_softmax(&numbers(&golden["logits"]));
        let reference: Vec<f64> = numbers(&golden["ref"]).into_iter().map(libm::log).collect();
        let [k1, k2, k3, k3_plus] = ALL.map(|e| enumerate(e, &lp, &reference));
        for (got, keys) in [
            (&k1, ["E[k1]", "E[grad k1]"]),
            (&k2, ["E[k2]", "E[grad k2]"]),
            (&k3, ["E[k3]", "E[grad k3]"]),
            (&k3_plus, ["E[k3]", "E[grad k2]"]),
            (&k1, ["KL(pi||ref)", "E[grad k1]"]),
            (&(k3.0, k2.1.clone()), ["KL(pi||ref)", "gradKL(pi||ref)"]),
        ] {
            assert_golden(keys[0], &[got.0], &golden[keys[0]]);
            assert_golden(keys[1], &got.1, &golden[keys[1]]);
        }
        assert_golden("grad k3", &k3.1, &golden["gradKL(ref||pi)"]);
        let forward: f64 = (0..4).map(|i| libm::exp(reference[i]) * (reference[i] - lp[i])).sum();
        assert_golden("KL(ref||pi)", &[forward], &golden["KL(ref||pi)"]);
    }

    #[test]
    fn kl_at_the_reference_is_exactly_zero() {
        for estimator in [KlEstimator::K2, KlEstimator::K3, KlEstimator::K3Plus] {
            let term = KlConfig { estimator, ..KlConfig::default() }.term(-1.7, -1.7);
            assert_eq!(term, KlTerm { value: 0.0, dvalue_dlogprob: 0.0 }, "{estimator:?}");
        }
        assert_eq!(mismatch_kl(-0.3, -0.3), 0.0);
    }

    #[test]
    fn kl_clamps_stop_value_and_gradient() {
        let config = KlConfig::default();
        assert_eq!(config.term(-1.0, -5.0), KlTerm { value: 8.0, dvalue_dlogprob: 4.0 });
        assert_eq!(config.term(0.0, -5.0), KlTerm { value: 10.0, dvalue_dlogprob: 0.0 });
        assert_eq!(config.term(0.0, -50.0), KlTerm { value: 10.0, dvalue_dlogprob: 0.0 });
        let input_only = KlConfig { output_clamp: None, ..config };
        assert_eq!(input_only.term(0.0, -50.0), KlTerm { value: 200.0, dvalue_dlogprob: 0.0 });
    }

    #[test]
    fn kl_config_refuses_k1_as_a_loss() {
        let error = KlConfig::plain(KlEstimator::K1, 0.1).validate().unwrap_err();
        assert!(error.to_string().contains("use k2"), "{error}");
        assert!(KlConfig { beta: f64::NAN, ..KlConfig::default() }.validate().is_err());
        assert!(serde_json::from_str::<KlConfig>(r#"{"clamp":1}"#).is_err());
    }

    proptest! {
        #[test]
        fn kl_values_are_nonnegative_and_gradients_match_differences(
            policy in -8.0..0.0f64, reference in -8.0..0.0f64,
        ) {
            prop_assert!(mismatch_kl(policy, reference) >= -1e-15);
            for estimator in ALL {
                let config = KlConfig::plain(estimator, 1.0);
                let term = config.term(policy, reference);
                let differentiated =
                    if estimator == KlEstimator::K3Plus { KlEstimator::K2 } else { estimator };
                let at = |p| KlConfig::plain(differentiated, 1.0).term(p, reference).value;
                let h = 1e-5;
                let slope = (at(policy + h) - at(policy - h)) / (2.0 * h);
                assert_close("slope", &[term.dvalue_dlogprob], &[slope], 1e-6 * (1.0 + slope.abs()));
                prop_assert!(estimator == KlEstimator::K1 || term.value >= -1e-15);
            }
        }
    }
}
