//! Per-token policy losses, their exact gradients and what was clipped: one composable function.
//!
//! Notation, all natural logs: `policy` = log `pi_theta`, the weights being trained; `proximal` = log
//! `pi_old`, the trainer's weights before this update; `sampler` = log mu, what the sampler reported.
//! `r = exp(policy - proximal)`, `w = exp(proximal - sampler)`, `A` the advantage. To minimise:
//!
//! | surrogate | loss of a token | source |
//! | --- | --- | --- |
//! | `ppo` | `-min(r A, clip(r, 1-low, 1+high) A)` | PPO; decoupled clip: DAPO 2503.14476, ProRL 2505.24864 |
//! | + `dual_clip` c | for A < 0: `min(that, -c A)` | dual-clip PPO, as in verl |
//! | + `delta` d | `-min(min(r, d) A, clip(r) A)` | two-sided clip, INTELLECT-2 2505.07291 |
//! | `cispo` | `-sg(clip(r)) A policy` | MiniMax-M1 2506.13585, clip bounds as in verl |
//! | `gspo` | `ppo` with `r = exp(mean over the sequence of policy - proximal)` | GSPO 2507.18071 |
//! | `dppo` | `-1[keep] A exp(policy - sampler) + kl_coef (policy - sampler)^2` | 2602.04879, as in prime-rl |
//!
//! The first three surrogates are multiplied by `sg(f(w))`, see [`Importance`]. `Importance::Raw`
//! with `ppo` is AReaL's decoupled PPO (2505.24298). Combine freely; [`Objective::validate`] names
//! what makes no sense.
//!
//! Gradients are those of automatic differentiation: zero where a clip is active, passing at its
//! boundary. Departures: log-ratios are clamped to +-20 (verl), and the gradient of a GSPO token
//! is `-s A`, which is the exact gradient under `seq_mean_token_mean` aggregation (verl's
//! formulation) when all tokens of a sequence share one advantage.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};
use super::scalar::{ratio, ratio_is_free};

/// Shape of the policy loss.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Surrogate {
    /// Clipped importance ratio of each token.
    Ppo,
    /// Clipped ratio as a constant factor of the log-probability: no token loses its gradient.
    Cispo,
    /// Clipped importance ratio of the whole sequence.
    Gspo,
    /// Trust region on the difference of probabilities, straight against the sampler.
    Dppo {
        /// Largest change of a token's probability in the direction of the advantage: 0.2.
        probability_gap_max: f64,
        /// Coefficient of the squared log-ratio: 1e-3.
        kl_coef: f64,
    },
}

/// Correction for tokens sampled by other weights or kernels: `f(w)`, never differentiated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Importance {
    /// `f(w) = 1`.
    None,
    /// `f(w) = w`: unbiased, unbounded variance (decoupled PPO).
    Raw,
    /// `f(w) = min(w, cap)`: truncated importance sampling of tokens.
    Tis {
        /// Upper bound of w: 2, or 8 for 8-bit samplers of large models.
        cap: f64,
    },
    /// `f(w) = w` inside `[low, high]`, else 0: IcePop.
    Icepop {
        /// 0.5 in ProRL v2.
        low: f64,
        /// 5 in ProRL v2.
        high: f64,
    },
    /// `f(w) = w` if the sequence's geometric mean of w lies in `[low, high]`, else 0 for all of it
    /// (`seq-mask-tis` of ProRL v2.1).
    SeqMask {
        /// 0.999 in ProRL v2.1.
        low: f64,
        /// 1.002 in ProRL v2.1.
        high: f64,
    },
}

/// A policy loss. Defaults are those of ProRL v2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Objective {
    /// Shape of the loss; default `ppo`.
    pub surrogate: Surrogate,
    /// Ratios below `1 - clip_low` are clipped; default 0.2.
    pub clip_low: f64,
    /// Ratios above `1 + clip_high` are clipped; default 0.27.
    pub clip_high: f64,
    /// Cap c of the loss at `-c A` for negative advantages; default off, verl uses 3.
    pub dual_clip: Option<f64>,
    /// Cap of the unclipped ratio for either sign; default off, INTELLECT-2 uses 4.
    pub delta: Option<f64>,
    /// Correction for the sampler's distribution; default `icepop` on 0.5 to 5.
    pub importance: Importance,
}

impl Default for Objective {
    fn default() -> Self {
        Self::prorl_v2()
    }
}

impl Objective {
    /// PPO with the given clip and nothing else.
    pub const fn ppo(clip_low: f64, clip_high: f64) -> Self {
        Self {
            surrogate: Surrogate::Ppo,
            clip_low,
            clip_high,
            dual_clip: None,
            delta: None,
            importance: Importance::None,
        }
    }

    /// ProRL v1: clip 0.2 / 0.4. The paper does not mention dual clip, so it is off.
    pub const fn prorl_v1() -> Self {
        Self::ppo(0.2, 0.4)
    }

    /// ProRL v2: clip 0.2 / 0.27, IcePop on 0.5 to 5.
    pub const fn prorl_v2() -> Self {
        let importance = Importance::Icepop { low: 0.5, high: 5.0 };
        Self { importance, ..Self::ppo(0.2, 0.27) }
    }

    /// Checks ranges and combinations.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let finite_positive = |x: f64| x.is_finite() && x > 0.0;
        require(
            (0.0..=1.0).contains(&self.clip_low),
            "objective.clip_low",
            self.clip_low,
            "use a number from 0 to 1, such as 0.2",
        )?;
        require(
            self.clip_high.is_finite() && self.clip_high >= 0.0,
            "objective.clip_high",
            self.clip_high,
            "use a number from 0 up, such as 0.27",
        )?;
        if let Some(c) = self.dual_clip {
            let fits = c.is_finite() && c > 1.0 + self.clip_high;
            require(fits, "objective.dual_clip", c, "use more than 1 + clip_high, such as 3")?;
        }
        if let Some(delta) = self.delta {
            let fits = delta.is_finite() && delta > 1.0 + self.clip_high;
            require(fits, "objective.delta", delta, "use more than 1 + clip_high, such as 4")?;
        }
        let one_cap = self.dual_clip.is_none() || self.delta.is_none();
        require(one_cap, "objective.delta", "set", "set either delta or dual_clip, not both")?;
        match self.importance {
            Importance::None | Importance::Raw => {}
            Importance::Tis { cap } => {
                require(finite_positive(cap), "objective.importance.tis.cap", cap, "use 2")?;
            }
            Importance::Icepop { low, high } | Importance::SeqMask { low, high } => {
                let fits = low >= 0.0 && finite_positive(high) && low <= high;
                let got = format!("[{low}, {high}]");
                require(fits, "objective.importance", got, "use 0 <= low <= high")?;
            }
        }
        if let Surrogate::Dppo { probability_gap_max, kl_coef } = self.surrogate {
            let key = "objective.surrogate.dppo.probability_gap_max";
            require(finite_positive(probability_gap_max), key, probability_gap_max, "use 0.2")?;
            let fits = kl_coef.is_finite() && kl_coef >= 0.0;
            require(fits, "objective.surrogate.dppo.kl_coef", kl_coef, "use 1e-3")?;
            let fix = "use \"none\": dppo compares with the sampler itself";
            require(self.importance == Importance::None, "objective.importance", "set", fix)?;
        }
        let capped = self.dual_clip.is_some() || self.delta.is_some();
        let caps_apply = matches!(self.surrogate, Surrogate::Ppo | Surrogate::Gspo);
        let fix = "remove dual_clip and delta: only ppo and gspo use them";
        require(caps_apply || !capped, "objective.surrogate", "cispo or dppo", fix)
    }
}

/// One token's log-probabilities, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Under the weights being trained.
    pub policy: f64,
    /// Under the trainer's weights before this update.
    pub proximal: f64,
    /// As reported by the sampler.
    pub sampler: f64,
}

/// Mean log-ratios of the unmasked tokens of one sequence, for the sequence-level methods.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SequenceRatios {
    /// Mean of `policy - proximal`, nats a token.
    pub log_ratio: f64,
    /// Mean of `proximal - sampler`, nats a token.
    pub log_mismatch: f64,
}

impl SequenceRatios {
    /// Means over the given tokens, first to last; zeros when there are none.
    pub fn of(tokens: impl IntoIterator<Item = TokenLogprobs>) -> Self {
        let mut sums = Self::default();
        let mut count = 0.0;
        for token in tokens {
            sums.log_ratio += token.policy - token.proximal;
            sums.log_mismatch += token.proximal - token.sampler;
            count += 1.0;
        }
        if count > 0.0 {
            sums.log_ratio /= count;
            sums.log_mismatch /= count;
        }
        sums
    }
}

/// Loss and gradient of one token, before aggregation, and what happened to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenLoss {
    /// To be minimised.
    pub loss: f64,
    /// Derivative of the loss with respect to `policy`.
    pub dloss_dlogprob: f64,
    /// `r`, of the token, of the sequence (gspo), or against the sampler (dppo).
    pub importance_ratio: f64,
    /// `f(w)`: see [`Importance`].
    pub importance_weight: f64,
    /// The lower clip decided the loss.
    pub clipped_low: bool,
    /// The upper clip decided the loss.
    pub clipped_high: bool,
    /// `dual_clip` or `delta` decided the loss.
    pub clipped_dual: bool,
}

impl TokenLoss {
    /// Whether the importance mask removed this token.
    pub fn is_dropped(&self) -> bool {
        self.importance_weight == 0.0
    }
}

/// The loss of one token of a sequence with the given ratios.
pub fn token_loss(
    objective: &Objective,
    token: TokenLogprobs,
    sequence: SequenceRatios,
    advantage: f64,
) -> TokenLoss {
    let log_ratio = token.policy - token.proximal;
    let mut out = match objective.surrogate {
        Surrogate::Ppo => clipped(objective, log_ratio, advantage),
        Surrogate::Gspo => clipped(objective, sequence.log_ratio, advantage),
        Surrogate::Cispo => cispo(objective, log_ratio, token.policy, advantage),
        Surrogate::Dppo { probability_gap_max, kl_coef } => {
            dppo(probability_gap_max, kl_coef, token, advantage)
        }
    };
    let weight = importance_weight(objective.importance, token, sequence);
    out.importance_weight = weight;
    out.loss *= weight;
    out.dloss_dlogprob *= weight;
    out
}

/// `f(w)` of [`Importance`].
pub fn importance_weight(
    importance: Importance,
    token: TokenLogprobs,
    sequence: SequenceRatios,
) -> f64 {
    let w = ratio(token.proximal - token.sampler);
    let keep_if = |keep: bool| if keep { w } else { 0.0 };
    match importance {
        Importance::None => 1.0,
        Importance::Raw => w,
        Importance::Tis { cap } => w.min(cap),
        Importance::Icepop { low, high } => keep_if((low..=high).contains(&w)),
        Importance::SeqMask { low, high } => {
            keep_if((low..=high).contains(&ratio(sequence.log_mismatch)))
        }
    }
}

/// PPO's clipped surrogate with both optional caps, on any log-ratio.
fn clipped(objective: &Objective, log_ratio: f64, advantage: f64) -> TokenLoss {
    let r = ratio(log_ratio);
    let bounded = r.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high);
    let capped = objective.delta.map_or(r, |delta| r.min(delta));
    let mut out = TokenLoss { importance_ratio: r, ..TokenLoss::default() };

    let (free, clip) = (-capped * advantage, -bounded * advantage);
    out.loss = free.max(clip);
    out.clipped_low = clip > free && bounded > r;
    out.clipped_high = clip > free && bounded < r;
    let mut passes = ratio_is_free(log_ratio) && free >= clip;
    if passes && capped < r {
        out.clipped_dual = true;
        passes = false;
    }
    if let Some(c) = objective.dual_clip
        && advantage < 0.0
        && out.loss > -c * advantage
    {
        out.loss = -c * advantage;
        out.clipped_dual = true;
        passes = false;
    }
    out.dloss_dlogprob = if passes { -r * advantage } else { 0.0 };
    out
}

fn cispo(objective: &Objective, log_ratio: f64, logprob: f64, advantage: f64) -> TokenLoss {
    let r = ratio(log_ratio);
    let bounded = r.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high);
    TokenLoss {
        loss: -bounded * advantage * logprob,
        dloss_dlogprob: -bounded * advantage,
        importance_ratio: r,
        clipped_low: bounded > r,
        clipped_high: bounded < r,
        ..TokenLoss::default()
    }
}

fn dppo(gap_max: f64, kl_coef: f64, token: TokenLogprobs, advantage: f64) -> TokenLoss {
    let log_ratio = token.policy - token.sampler;
    let r = ratio(log_ratio);
    let gap = libm::exp(token.policy) - libm::exp(token.sampler);
    let clipped_high = advantage > 0.0 && gap > gap_max;
    let clipped_low = advantage < 0.0 && gap < -gap_max;
    let kept = if clipped_high || clipped_low { 0.0 } else { -r * advantage };
    let passes = if ratio_is_free(log_ratio) { kept } else { 0.0 };
    TokenLoss {
        loss: kept + kl_coef * (log_ratio * log_ratio),
        dloss_dlogprob: passes + 2.0 * kl_coef * log_ratio,
        importance_ratio: r,
        clipped_low,
        clipped_high,
        ..TokenLoss::default()
    }
}

#[cfg(test)]
mod tests;
