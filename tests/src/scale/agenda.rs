//! What will happen in simulated time: hundreds of millions of events, in order of time and then
//! of entry, at a constant cost each.

use std::collections::{BTreeMap, VecDeque};

/// Milliseconds of a span: events of the present one have a list each millisecond.
const SPAN_BITS: u32 = 16;

/// Events by when they are due.
pub(super) struct Agenda<T> {
    now_ms: u64,
    /// Of the present span, by millisecond.
    near: Vec<VecDeque<T>>,
    /// Of later spans.
    far: BTreeMap<u64, Vec<(u64, T)>>,
}

impl<T> Agenda<T> {
    pub(super) fn new() -> Self {
        let near = std::iter::repeat_with(VecDeque::new).take(1 << SPAN_BITS).collect();
        Self { now_ms: 0, near, far: BTreeMap::new() }
    }

    /// `event` will happen at `at_ms`, or now if that has passed.
    pub(super) fn push(&mut self, at_ms: u64, event: T) {
        let at_ms = at_ms.max(self.now_ms);
        if at_ms >> SPAN_BITS == self.now_ms >> SPAN_BITS {
            self.list(at_ms).push_back(event);
        } else {
            self.far.entry(at_ms >> SPAN_BITS).or_default().push((at_ms, event));
        }
    }

    /// When the next event happens, and the event.
    pub(super) fn pop(&mut self) -> Option<(u64, T)> {
        loop {
            if let Some(event) = self.list(self.now_ms).pop_front() {
                return Some((self.now_ms, event));
            }
            *self.list(self.now_ms) = VecDeque::new();
            self.now_ms += 1;
            if self.now_ms.trailing_zeros() >= SPAN_BITS {
                let (span, events) = self.far.pop_first()?;
                self.now_ms = span << SPAN_BITS;
                for (at_ms, event) in events {
                    self.push(at_ms, event);
                }
            }
        }
    }

    fn list(&mut self, at_ms: u64) -> &mut VecDeque<T> {
        &mut self.near[(at_ms & ((1 << SPAN_BITS) - 1)) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::Agenda;

    #[test]
    fn events_come_in_order_of_time_and_then_of_entry() {
        let mut agenda = Agenda::new();
        let times = [70_000, 5, 9_000_000, 5, 0, 70_000, 65_535, 65_536, 200_000];
        for (i, at) in times.into_iter().enumerate() {
            agenda.push(at, i);
        }
        let mut seen = Vec::new();
        while let Some((at, i)) = agenda.pop() {
            if i == 8 {
                // What is late happens now.
                agenda.push(3, 9);
            }
            seen.push((at, i));
        }
        let mut expected: Vec<_> = times.into_iter().zip(0..).chain([(200_000, 9)]).collect();
        expected.sort_unstable();
        assert_eq!(seen, expected);
    }
}
