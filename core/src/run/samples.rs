//! Sample rollouts for people: a bounded number of the newest groups that a run has learned from.
//!
//! Only shown, never computed with. Field names are a stable interface.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::rollout::{Rollout, Sampled};
use crate::model::tokenizer::Tokenizer;

/// Groups that are kept; the oldest make room.
pub const SAMPLE_GROUPS_MAX: usize = 24;
/// Groups that one step adds.
pub const SAMPLE_GROUPS_A_STEP_MAX: usize = 3;
/// Rollouts of a group that are kept.
pub const SAMPLE_ROLLOUTS_MAX: usize = 6;
/// Tokens of a rollout that are kept, from its beginning.
pub const SAMPLE_TOKENS_MAX: usize = 512;

/// A problem and some of the answers that the model gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleGroup {
    /// Steps of all phases that were done after the one that learned from it.
    pub step: u64,
    /// Position among the groups of that step.
    pub index: u32,
    /// Optimizer updates of the weights that sampled.
    pub policy_version: u64,
    /// Text of the prompt.
    pub problem: String,
    /// Rollouts in the whole group.
    pub rollouts_sampled: u32,
    /// Some of them, in order.
    pub rollouts: Vec<SampleRollout>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRollout {
    /// Strict reward, 0 to 1.
    pub reward: f64,
    /// Its advantage; `None` if the group was of no use to the step.
    pub advantage: Option<f64>,
    /// Whether the end token came in time.
    pub ended: bool,
    /// Tokens in all, with the end token.
    pub length: u32,
    /// Text of its first tokens.
    pub tokens: Vec<String>,
    /// Entropy at each of these tokens, nats.
    pub entropies: Vec<f64>,
}

/// Adds groups of a step that is done. `advantage` knows those of rollouts that entered it, by
/// group and rollout.
pub(super) fn add(
    samples: &mut VecDeque<SampleGroup>,
    step: u64,
    sampled: &Sampled,
    language: &dyn Tokenizer,
    advantage: impl Fn(usize, usize) -> Option<f64>,
) {
    // What the step learned from comes first, in index order.
    let useless = (0..sampled.groups.len()).filter(|g| !sampled.kept.contains(g));
    let groups = sampled.kept.iter().copied().chain(useless).take(SAMPLE_GROUPS_A_STEP_MAX);
    for g in groups {
        let group = &sampled.groups[g];
        let Some(first) = group.first() else { continue };
        let rollouts = chosen(group);
        samples.push_back(SampleGroup {
            step,
            index: g as u32,
            policy_version: sampled.version,
            problem: language.decode(&first.prompt),
            rollouts_sampled: group.len() as u32,
            rollouts: rollouts.map(|r| sample(&group[r], language, advantage(g, r))).collect(),
        });
    }
    while samples.len() > SAMPLE_GROUPS_MAX {
        samples.pop_front();
    }
}

/// Which rollouts of a group are shown: right and wrong ones where there are both.
fn chosen(group: &[Rollout]) -> impl Iterator<Item = usize> {
    let is_right = |r: &usize| group[*r].reward >= 1.0;
    let (right, wrong): (Vec<usize>, Vec<usize>) = (0..group.len()).partition(is_right);
    let half = SAMPLE_ROLLOUTS_MAX / 2;
    let right_count = right.len().min(half.max(SAMPLE_ROLLOUTS_MAX.saturating_sub(wrong.len())));
    let wrong_count = wrong.len().min(SAMPLE_ROLLOUTS_MAX - right_count);
    let mut all = [&right[..right_count], &wrong[..wrong_count]].concat();
    all.sort_unstable();
    all.into_iter()
}

fn sample(rollout: &Rollout, language: &dyn Tokenizer, advantage: Option<f64>) -> SampleRollout {
    let shown = rollout.tokens.len().min(SAMPLE_TOKENS_MAX);
    SampleRollout {
        reward: rollout.reward,
        advantage,
        ended: rollout.ended,
        length: rollout.tokens.len() as u32,
        tokens: language.pieces(&rollout.tokens[..shown]),
        entropies: rollout.entropies[..shown].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use manyhands_shaders::twin::SITE_COUNT;

    use super::*;
    use crate::model::tokenizer::{Bytes, END};

    const BYTES: Bytes = Bytes { vocabulary: 128 };

    fn rollout(reward: f64, length: usize) -> Rollout {
        let mut tokens = vec![u32::from(b'x'); length - 1];
        tokens.push(END);
        Rollout {
            prompt: vec![1, u32::from(b'?')],
            logprobs: vec![-0.5; length],
            entropies: (0..length).map(|i| i as f64).collect(),
            entropy_centers: vec![0; length],
            tokens,
            reward,
            ended: true,
        }
    }

    fn sampled(groups: Vec<Vec<Rollout>>, kept: Vec<usize>) -> Sampled {
        Sampled { step: 0, version: 7, groups, kept, useless: [0; 2], saturations: [0; SITE_COUNT] }
    }

    /// Useful groups come first, and each bound holds.
    #[test]
    fn samples_over_their_bounds_keep_the_newest_useful_ones() {
        let group = |reward| vec![rollout(reward, 3)];
        let of = || sampled(vec![group(0.0), group(1.0), group(0.0), group(1.0)], vec![1, 3]);
        let mut samples = VecDeque::new();
        for step in 1..=20 {
            let advantage = |g: usize, _| (g == 1 || g == 3).then_some(0.5);
            add(&mut samples, step, &of(), &BYTES, advantage);
        }
        assert_eq!(samples.len(), SAMPLE_GROUPS_MAX);
        let last: Vec<_> = samples.iter().rev().take(3).map(|g| (g.step, g.index)).collect();
        assert_eq!(last, [(20, 0), (20, 3), (20, 1)]);
        let newest = samples.back().unwrap();
        assert_eq!((newest.problem.as_str(), newest.policy_version), ("?", 7));
        assert_eq!(newest.rollouts[0].advantage, None);
        assert_eq!(samples[samples.len() - 2].rollouts[0].advantage, Some(0.5));
    }

    /// Right and wrong answers are both shown, and a group of one kind fills the room.
    #[test]
    fn samples_of_a_large_group_are_mixed_and_in_order() {
        let rewards = |right: usize, wrong: usize| {
            let all = vec![rollout(0.0, 2); wrong].into_iter();
            all.chain(vec![rollout(1.0, 2); right]).collect::<Vec<_>>()
        };
        let pick = |right, wrong| {
            let picked: Vec<usize> = chosen(&rewards(right, wrong)).collect();
            let count = picked.iter().filter(|&&r| r >= wrong).count();
            assert!(picked.is_sorted() && picked.len() == SAMPLE_ROLLOUTS_MAX.min(right + wrong));
            count
        };
        assert_eq!(
            [pick(8, 8), pick(0, 16), pick(16, 0), pick(1, 15), pick(15, 1)],
            [3, 0, 6, 1, 5]
        );
    }

    #[test]
    fn sample_of_a_long_rollout_is_cut() {
        let length = SAMPLE_TOKENS_MAX + 9;
        let s = sample(&rollout(1.0, length), &BYTES, None);
        assert_eq!((s.tokens.len(), s.entropies.len()), (SAMPLE_TOKENS_MAX, SAMPLE_TOKENS_MAX));
        assert_eq!(s.length as usize, length);
    }
}
