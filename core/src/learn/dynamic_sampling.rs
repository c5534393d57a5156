//! Dynamic sampling (DAPO 2503.14476): groups that teach nothing are left out and replaced.
//!
//! A pure filter. It sees all groups drawn so far *in index order*, keeps the first useful ones,
//! and says how many more to draw. The result depends on indices and rewards only, never on
//! arrival, so a run stays a function of its file. Refills are bounded (`NeMo-RL`: ten generation
//! batches, each refill 1.5 times what is missing); then a smaller batch is used as it is.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, require};
use super::scalar::{all_equal, mean};

/// Which groups are useful.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsefulGroup {
    /// Every group: dynamic sampling is off.
    Any,
    /// Rewards are not all equal: exactly the groups with a non-zero advantage.
    RewardVariance,
    /// `0 < mean reward < 1`, for rewards from 0 to 1: the wording of the papers.
    MeanAccuracy,
}

/// Settings of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DynamicSamplingConfig {
    /// Default `reward_variance`.
    pub useful: UsefulGroup,
    /// A refill draws this many times the missing groups; default 1.5.
    pub refill_multiplier: f64,
    /// Batches of prompts drawn for one step at most, the first included; default 10.
    pub draws_max: u32,
}

impl Default for DynamicSamplingConfig {
    fn default() -> Self {
        Self { useful: UsefulGroup::RewardVariance, refill_multiplier: 1.5, draws_max: 10 }
    }
}

/// What to do after looking at the groups so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enough useful groups.
    Train,
    /// Too few, and refills are left: draw this many more groups (never 0).
    Draw(u32),
    /// Too few, and no refill is left: train on what there is, if anything.
    Exhausted,
}

/// The groups that enter a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Positions of the kept groups, ascending.
    pub kept: Vec<usize>,
    /// Useless groups with the lowest possible mean, 0 or less ("all wrong").
    pub dropped_all_wrong: u32,
    /// Useless groups with a mean of 1 or more ("all right").
    pub dropped_all_right: u32,
    /// Other useless groups: equal rewards in between, or none at all.
    pub dropped_other: u32,
    /// Useful groups beyond the number wanted.
    pub surplus: u32,
    /// What to do next.
    pub next: Next,
}

impl UsefulGroup {
    /// Whether a group with these rewards, `(G)`, can teach something.
    pub fn accepts(self, rewards: &[f64]) -> bool {
        match self {
            Self::Any => true,
            Self::RewardVariance => !all_equal(rewards),
            Self::MeanAccuracy => {
                let accuracy = mean(rewards);
                accuracy > 0.0 && accuracy < 1.0
            }
        }
    }
}

impl DynamicSamplingConfig {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let m = self.refill_multiplier;
        let fits = (1.0..=100.0).contains(&m);
        let fix = "use 1 to 100, such as 1.5";
        require(fits, "dynamic_sampling.refill_multiplier", m, fix)?;
        let fits = (1..=1000).contains(&self.draws_max);
        let fix = "use 1 (no refill) to 1000";
        require(fits, "dynamic_sampling.draws_max", self.draws_max, fix)
    }

    /// Chooses the first `groups_wanted` useful groups. `rewards[g]` is `(G)`, in index order;
    /// `draws_done` counts the batches of prompts that these groups came from.
    pub fn select(&self, rewards: &[Vec<f64>], groups_wanted: u32, draws_done: u32) -> Selection {
        let mut out = Selection {
            kept: vec![],
            dropped_all_wrong: 0,
            dropped_all_right: 0,
            dropped_other: 0,
            surplus: 0,
            next: Next::Train,
        };
        for (index, group) in rewards.iter().enumerate() {
            if !self.useful.accepts(group) {
                out.count_dropped(group);
            } else if out.kept.len() < groups_wanted as usize {
                out.kept.push(index);
            } else {
                out.surplus += 1;
            }
        }
        let missing = groups_wanted - out.kept.len() as u32;
        out.next = match missing {
            0 => Next::Train,
            _ if draws_done >= self.draws_max => Next::Exhausted,
            _ => Next::Draw((f64::from(missing) * self.refill_multiplier).ceil() as u32),
        };
        out
    }
}

impl Selection {
    fn count_dropped(&mut self, rewards: &[f64]) {
        let accuracy = mean(rewards);
        let counter = if rewards.is_empty() || (accuracy > 0.0 && accuracy < 1.0) {
            &mut self.dropped_other
        } else if accuracy >= 1.0 {
            &mut self.dropped_all_right
        } else {
            &mut self.dropped_all_wrong
        };
        *counter += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups() -> Vec<Vec<f64>> {
        vec![
            vec![0.0, 0.0],
            vec![1.0, 0.0],
            vec![1.0, 1.0],
            vec![0.5, 0.5],
            vec![],
            vec![0.0, 0.3],
            vec![1.0, 0.0],
        ]
    }

    #[test]
    fn selection_keeps_the_first_useful_groups_in_index_order() {
        let got = DynamicSamplingConfig::default().select(&groups(), 2, 1);
        assert_eq!(got.kept, [1, 5]);
        assert_eq!((got.dropped_all_wrong, got.dropped_all_right, got.dropped_other), (1, 1, 2));
        assert_eq!((got.surplus, got.next), (1, Next::Train));
    }

    #[test]
    fn selection_asks_for_refills_until_the_bound() {
        let config = DynamicSamplingConfig { draws_max: 3, ..DynamicSamplingConfig::default() };
        assert_eq!(config.select(&groups(), 6, 1).next, Next::Draw(5));
        assert_eq!(config.select(&groups(), 4, 2).next, Next::Draw(2));
        assert_eq!(config.select(&groups(), 4, 3).next, Next::Exhausted);
        assert_eq!(config.select(&[], 4, 0).next, Next::Draw(6));
        assert_eq!(config.select(&[], 0, 0).next, Next::Train);
    }

    /// Appending groups never changes which earlier ones were kept.
    #[test]
    fn selection_is_stable_under_refills() {
        let config = DynamicSamplingConfig::default();
        let full = config.select(&groups(), 3, 1).kept;
        for cut in 0..groups().len() {
            let partial = config.select(&groups()[..cut], 3, 1).kept;
            assert!(full.starts_with(&partial), "{cut}");
        }
    }

    #[test]
    fn useful_group_rules_differ_on_equal_partial_rewards() {
        assert!(UsefulGroup::MeanAccuracy.accepts(&[0.5, 0.5]));
        assert!(!UsefulGroup::RewardVariance.accepts(&[0.5, 0.5]));
        assert!(!UsefulGroup::RewardVariance.accepts(&[0.1; 3]));
        assert!(UsefulGroup::RewardVariance.accepts(&[-1.0, 1.0]));
        assert!(!UsefulGroup::MeanAccuracy.accepts(&[]));
        assert!(UsefulGroup::Any.accepts(&[]));
    }

    #[test]
    fn dynamic_sampling_config_names_key_and_fix() {
        let config = DynamicSamplingConfig { draws_max: 0, ..DynamicSamplingConfig::default() };
        assert!(config.validate().unwrap_err().to_string().contains("draws_max"));
        assert!(serde_json::from_str::<DynamicSamplingConfig>(r#"{"max":3}"#).is_err());
    }
}
