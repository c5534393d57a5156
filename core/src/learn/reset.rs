//! When the reference policy is replaced by the current one.
//!
//! ProRL v1 (arXiv 2505.24864) resets when validation stagnates and re-initialises the optimizer;
//! v2 resets every 200 to 500 steps, on a KL spike, or on stalled validation, and keeps the
//! optimizer. v1's trigger was a human decision: patience and minimum gain are ours.
//!
//! This module only decides. The caller points the reference at the current policy version (so
//! that KL is exactly zero) and calls [`AdamW::reset`](super::optimizer::AdamW::reset) if told to.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};

/// Triggers, any of which suffices. Defaults are those of ProRL v2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResetConfig {
    /// Reset when this many steps have passed since the last one; default 400.
    pub every_steps: Option<u64>,
    /// Reset when the batch's mean KL to the reference exceeds this many nats; default off.
    pub kl_above: Option<f64>,
    /// Reset when validation stalls; default off.
    pub stalled: Option<Stall>,
    /// Whether a reset also clears the optimizer (v1 does, v2 does not); default false.
    pub reset_optimizer: bool,
}

/// What counts as stalled validation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stall {
    /// Evaluations in a row without a new best.
    pub patience: u32,
    /// A new best is better than the old one by more than this.
    pub min_delta: f64,
}

/// Why the reference was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResetReason {
    /// `every_steps` passed.
    Schedule,
    /// KL above `kl_above`.
    Kl,
    /// Validation stalled.
    Stalled,
}

/// A decision to reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// The first trigger in the order of [`ResetReason`].
    pub reason: ResetReason,
    /// Whether the optimizer's moments and step count start again too.
    pub reset_optimizer: bool,
}

/// What is known after a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observation {
    /// Number of finished steps.
    pub step: u64,
    /// Mean KL to the reference, nats a token, if measured.
    pub kl: Option<f64>,
    /// Validation score, higher is better, if this step was evaluated.
    pub validation: Option<f64>,
}

/// Memory of the policy: part of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResetState {
    /// Step of the last reset; 0 before the first.
    pub last_reset_step: u64,
    /// Best validation score of the whole run.
    pub best_validation: Option<f64>,
    /// Evaluations since the best score or the last reset.
    pub stalled_evaluations: u32,
    /// Resets so far.
    pub reset_count: u32,
}

impl Default for ResetConfig {
    fn default() -> Self {
        Self::prorl_v2()
    }
}

impl ResetConfig {
    /// Resets on stalled validation and clears the optimizer.
    pub const fn prorl_v1() -> Self {
        Self {
            every_steps: None,
            kl_above: None,
            stalled: Some(Stall { patience: 5, min_delta: 0.0 }),
            reset_optimizer: true,
        }
    }

    /// Resets every 400 steps (published: 200 to 500) and keeps the optimizer. The thresholds of its
    /// other two triggers are not published, so those are off.
    pub const fn prorl_v2() -> Self {
        Self { every_steps: Some(400), kl_above: None, stalled: None, reset_optimizer: false }
    }

    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fix = "use 1 or more steps, or leave it out";
        require(self.every_steps != Some(0), "reset.every_steps", 0, fix)?;
        let kl = self.kl_above.unwrap_or(1.0);
        require(kl > 0.0, "reset.kl_above", kl, "use a positive number of nats, or leave it out")?;
        let Some(stall) = self.stalled else { return Ok(()) };
        require(stall.patience > 0, "reset.stalled.patience", 0, "use 1 or more evaluations")?;
        let fits = stall.min_delta.is_finite() && stall.min_delta >= 0.0;
        require(fits, "reset.stalled.min_delta", stall.min_delta, "use 0 or a small gain")
    }
}

impl ResetState {
    /// Takes in what is known after a step and decides. The caller carries the decision out.
    pub fn observe(&mut self, config: &ResetConfig, seen: Observation) -> Option<Reset> {
        if let Some(score) = seen.validation {
            let min_delta = config.stalled.map_or(0.0, |stall| stall.min_delta);
            // A score that is not a number never is a new best.
            if self.best_validation.map_or(!score.is_nan(), |best| score > best + min_delta) {
                self.best_validation = Some(score);
                self.stalled_evaluations = 0;
            } else {
                self.stalled_evaluations += 1;
            }
        }
        let elapsed = seen.step.saturating_sub(self.last_reset_step);
        let reason = if config.every_steps.is_some_and(|every| elapsed >= every) {
            ResetReason::Schedule
        } else if config.kl_above.zip(seen.kl).is_some_and(|(limit, kl)| kl > limit) {
            ResetReason::Kl
        } else if config.stalled.is_some_and(|s| self.stalled_evaluations >= s.patience) {
            ResetReason::Stalled
        } else {
            return None;
        };
        self.last_reset_step = seen.step;
        self.stalled_evaluations = 0;
        self.reset_count += 1;
        Some(Reset { reason, reset_optimizer: config.reset_optimizer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFF: ResetConfig =
        ResetConfig { every_steps: None, kl_above: None, stalled: None, reset_optimizer: false };

    fn reasons(config: ResetConfig, seen: &[Observation]) -> Vec<Option<ResetReason>> {
        let mut state = ResetState::default();
        seen.iter().map(|&o| state.observe(&config, o).map(|r| r.reason)).collect()
    }

    #[test]
    fn reset_schedule_counts_from_the_last_reset() {
        let config = ResetConfig { every_steps: Some(3), kl_above: Some(1.0), ..OFF };
        let at = |step, kl| Observation { step, kl: Some(kl), validation: None };
        let seen = [at(1, 0.0), at(2, 1.5), at(3, 0.0), at(4, 1.0), at(5, 0.0), at(6, 0.0)];
        let (kl, schedule) = (Some(ResetReason::Kl), Some(ResetReason::Schedule));
        assert_eq!(reasons(config, &seen), [None, kl, None, None, schedule, None]);
    }

    #[test]
    fn reset_stall_waits_for_patience_and_min_delta() {
        let config = ResetConfig { stalled: Some(Stall { patience: 2, min_delta: 0.05 }), ..OFF };
        let scores = [0.5, 0.6, 0.62, f64::NAN, 0.64, 0.7, 0.7];
        let seen = scores.map(|v| Observation { validation: Some(v), ..Observation::default() });
        let stalled = Some(ResetReason::Stalled);
        assert_eq!(reasons(config, &seen), [None, None, None, stalled, None, None, None]);
        let between = Observation { step: 9, kl: Some(9.0), validation: None };
        assert_eq!(reasons(config, &[between; 9]), [None; 9], "no evaluation, no stall");
    }

    #[test]
    fn reset_state_survives_a_round_trip() {
        let mut state = ResetState::default();
        let seen = Observation { step: 400, kl: Some(0.1), validation: Some(0.25) };
        let reset = state.observe(&ResetConfig::prorl_v2(), seen).unwrap();
        assert!(!reset.reset_optimizer && state.reset_count == 1 && state.last_reset_step == 400);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<ResetState>(&text).unwrap(), state);
    }

    #[test]
    fn reset_config_names_key_and_fix() {
        let error = ResetConfig { every_steps: Some(0), ..OFF }.validate().unwrap_err();
        assert!(error.to_string().contains("reset.every_steps"), "{error}");
        assert!(ResetConfig { kl_above: Some(f64::NAN), ..OFF }.validate().is_err());
        assert!(OFF.validate().is_ok());
    }
}
