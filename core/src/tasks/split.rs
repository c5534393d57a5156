//! Training and held-out problems, told apart by their content.

/// One problem in this many is held out.
pub const HELD_OUT_ONE_IN: u8 = 8;

/// Which of the two disjoint sets a problem belongs to. The numbers are part of random streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Split {
    /// May be trained on.
    Train = 0,
    /// Only ever evaluated on.
    HeldOut = 1,
}

impl Split {
    /// The split of a problem with this canonical content.
    ///
    /// Held out iff the first byte of the content's BLAKE3 hash is divisible by
    /// [`HELD_OUT_ONE_IN`], so neither seeds nor indices nor the order of a file can move a problem
    /// from one set to the other.
    pub fn of(content: &str) -> Self {
        let hash = blake3::hash(content.as_bytes());
        if hash.as_bytes()[0].is_multiple_of(HELD_OUT_ONE_IN) { Self::HeldOut } else { Self::Train }
    }
}
