//! Questions for work that have no answer yet: which must have one by when, and whose are served
//! first when there is work: of units the fastest, of audits whoever has waited longest. Audits
//! must not be for the fast alone, who may be in league.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use crate::swarm::ids::PeerKey;

/// How many may find nothing that suits them before the others are not asked.
pub const IN_VAIN_MAX: usize = 4;

/// A place in an order.
type Rank = (u64, PeerKey);

/// Who has been asked whether what there is suits it.
#[derive(Debug)]
pub struct Turn {
    by_speed: bool,
    last: Option<Rank>,
    /// How many of them found nothing.
    pub in_vain: usize,
}

impl Turn {
    /// Begins with the fastest.
    pub fn of_the_fastest() -> Self {
        Self { by_speed: true, last: None, in_vain: 0 }
    }

    /// Begins with who has waited longest.
    pub fn of_the_oldest() -> Self {
        Self { by_speed: false, ..Self::of_the_fastest() }
    }
}

#[derive(Debug)]
struct Question<T> {
    until_ms: u64,
    speed: u64,
    token: T,
}

/// One question a volunteer at most; `T` is what is needed to answer it. Units that suit nobody
/// of the fastest suit nobody else, so that looking for who should have one costs little however
/// many wait.
#[derive(Debug)]
pub struct Waiting<T> {
    questions: BTreeMap<PeerKey, Question<T>>,
    by_time: BTreeSet<Rank>,
    /// The fastest comes first.
    by_speed: BTreeSet<Rank>,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self { questions: BTreeMap::new(), by_time: BTreeSet::new(), by_speed: BTreeSet::new() }
    }
}

impl<T> Waiting<T> {
    /// Keeps the question of `peer`, which does `speed` multiply-adds a second, until `until_ms`.
    /// An older question of it must be released before.
    pub fn hold(&mut self, peer: PeerKey, speed: f64, until_ms: u64, token: T) {
        let speed = speed as u64;
        self.questions.insert(peer, Question { until_ms, speed, token });
        self.by_time.insert((until_ms, peer));
        self.by_speed.insert((u64::MAX - speed, peer));
    }

    /// Takes the question of `peer` out, if there is one.
    pub fn release(&mut self, peer: &PeerKey) -> Option<T> {
        let Question { until_ms, speed, token } = self.questions.remove(peer)?;
        self.by_time.remove(&(until_ms, *peer));
        self.by_speed.remove(&(u64::MAX - speed, *peer));
        Some(token)
    }

    /// Somebody who must not wait beyond `now_ms`.
    pub fn due(&self, now_ms: u64) -> Option<PeerKey> {
        self.by_time.first().filter(|(until_ms, _)| *until_ms <= now_ms).map(|(_, peer)| *peer)
    }

    /// Whose turn it is, if that can still help.
    pub fn next(&self, turn: &mut Turn) -> Option<PeerKey> {
        if turn.in_vain >= IN_VAIN_MAX {
            return None;
        }
        let after = turn.last.map_or(Bound::Unbounded, Bound::Excluded);
        let order = if turn.by_speed { &self.by_speed } else { &self.by_time };
        turn.last = order.range((after, Bound::Unbounded)).next().copied();
        turn.last.map(|(_, peer)| peer)
    }

    /// Everybody's, in no order of interest; none is left.
    pub fn drain(&mut self) -> impl Iterator<Item = T> + use<T> {
        let Self { questions, .. } = std::mem::take(self);
        questions.into_values().map(|q| q.token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_for_the_fastest_audits_for_the_oldest_and_nobody_waits_too_long() {
        let mut waiting = Waiting::default();
        let peer = |i| PeerKey([i; 32]);
        for (i, (speed, until)) in
            [(5.0, 30), (50.0, 20), (20.0, 10), (50.0, 40)].iter().enumerate()
        {
            waiting.hold(peer(i as u8), *speed, *until, i);
        }
        let order = |mut turn| std::iter::from_fn(|| waiting.next(&mut turn)).collect::<Vec<_>>();
        assert_eq!(order(Turn::of_the_fastest()), [1, 3, 2, 0].map(peer));
        assert_eq!(order(Turn::of_the_oldest()), [2, 1, 0, 3].map(peer));
        assert_eq!(waiting.due(9), None);
        assert_eq!(waiting.due(10), Some(peer(2)));
        assert_eq!(waiting.release(&peer(2)), Some(2));
        assert_eq!(waiting.release(&peer(2)), None);
        assert_eq!(waiting.due(29), Some(peer(1)));
        assert!(waiting.drain().eq([0, 1, 3]));
        assert_eq!((waiting.next(&mut Turn::of_the_fastest()), waiting.due(99)), (None, None));
    }

    #[test]
    fn few_are_asked_in_vain() {
        let mut waiting = Waiting::default();
        (0..100).for_each(|i| waiting.hold(PeerKey([i; 32]), f64::from(i), 0, ()));
        let mut turn = Turn::of_the_fastest();
        let mut asked = 0;
        while waiting.next(&mut turn).is_some() {
            asked += 1;
            turn.in_vain += 1;
        }
        assert_eq!(asked, IN_VAIN_MAX);
    }
}
