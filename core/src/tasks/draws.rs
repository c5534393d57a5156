//! Random choices as a pure function of a counter: Philox4x32-10 keyed by the seed.

use manyhands_shaders::x1::philox;

/// A stream of random choices, addressed rather than advanced: nothing is shared between streams.
pub(super) struct Draws {
    key: [u32; 2],
    /// `[block and attempt, index low, index high, stream]`.
    counter: [u32; 4],
    block: [u32; 4],
    /// Words of `block` already handed out.
    used: usize,
}

impl Draws {
    /// The stream of `attempt` at problem `index`; `stream` is (family, level, split).
    pub(super) fn new(seed: u64, index: u64, stream: [u8; 3], attempt: u16) -> Self {
        let [family, level, split] = stream;
        Self {
            key: halves(seed),
            counter: [
                u32::from(attempt) << 16,
                halves(index)[0],
                halves(index)[1],
                u32::from_le_bytes([split, level, family, 0]),
            ],
            block: [0; 4],
            used: 4,
        }
    }

    fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter, self.key);
            // No problem needs 2^16 blocks, so the attempt above these bits is never reached.
            self.counter[0] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A number of `0..bound`. The bias of multiply-and-shift is below `bound / 2^32`.
    pub(super) fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "empty range");
        halves(u64::from(self.word()) * u64::from(bound))[1]
    }

    /// A number of `low..=high`.
    pub(super) fn between(&mut self, (low, high): (u32, u32)) -> u32 {
        low + self.below(high - low + 1)
    }

    /// True once in `n` times.
    pub(super) fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    /// One of `items`.
    pub(super) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u32) as usize]
    }

    /// Fisher-Yates.
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u32 + 1) as usize);
        }
    }
}

/// `[low, high]` words.
const fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}
