//! A weighted blend of families and levels.

use serde::{Deserialize, Serialize};

use super::{Family, LEVEL_MAX, Problem, Split, draws::Draws};

/// Most entries of a mixture.
pub const MIXTURE_ENTRIES_MAX: usize = 256;

/// The stream that picks entries, apart from every family's.
const PICK_STREAM: u8 = u8::MAX;

/// One ingredient of a [`Mixture`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixtureEntry {
    /// What kind of problem.
    pub family: Family,
    /// How hard, 1 to [`LEVEL_MAX`].
    pub level: u32,
    /// Share of the problems, in proportion to the other entries; at least 1.
    pub weight: u32,
}

/// Families and levels with weights: in a configuration file, a list of [`MixtureEntry`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<MixtureEntry>", into = "Vec<MixtureEntry>")]
pub struct Mixture {
    entries: Vec<MixtureEntry>,
    weight_sum: u32,
}

/// Why a list of entries is no mixture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MixtureError {
    /// There is nothing, or far too much, to draw from.
    #[error("a mixture needs 1 to {MIXTURE_ENTRIES_MAX} entries, got {0}")]
    EntryCount(usize),
    /// The level does not exist.
    #[error("[{index}].level: {level} is outside 1..={LEVEL_MAX}")]
    Level {
        /// Which entry, from 0.
        index: usize,
        /// What it asked for.
        level: u32,
    },
    /// The entry could never be drawn.
    #[error("[{index}].weight: must be at least 1; remove the entry to switch it off")]
    ZeroWeight {
        /// Which entry, from 0.
        index: usize,
    },
    /// The weights up to this entry do not fit 32 bits.
    #[error("[{index}].weight: the weights add up to more than {}, scale them down", u32::MAX)]
    WeightSum {
        /// Which entry, from 0.
        index: usize,
    },
}

impl TryFrom<Vec<MixtureEntry>> for Mixture {
    type Error = MixtureError;

    fn try_from(entries: Vec<MixtureEntry>) -> Result<Self, MixtureError> {
        if entries.is_empty() || entries.len() > MIXTURE_ENTRIES_MAX {
            return Err(MixtureError::EntryCount(entries.len()));
        }
        let mut weight_sum = 0_u32;
        for (index, &MixtureEntry { level, weight, .. }) in entries.iter().enumerate() {
            if !(1..=LEVEL_MAX).contains(&level) {
                return Err(MixtureError::Level { index, level });
            }
            if weight == 0 {
                return Err(MixtureError::ZeroWeight { index });
            }
            weight_sum = weight_sum.checked_add(weight).ok_or(MixtureError::WeightSum { index })?;
        }
        Ok(Self { entries, weight_sum })
    }
}

impl From<Mixture> for Vec<MixtureEntry> {
    fn from(mixture: Mixture) -> Self {
        mixture.entries
    }
}

impl Mixture {
    /// The entries, in the order given.
    pub fn entries(&self) -> &[MixtureEntry] {
        &self.entries
    }

    /// Problem number `index` of a stream, and the family that scores it.
    pub fn problem(&self, seed: u64, index: u64, split: Split) -> (Family, Problem) {
        let mut draws = Draws::new(seed, index, [PICK_STREAM, 0, split as u8], 0);
        let mut ticket = draws.below(self.weight_sum);
        for &MixtureEntry { family, level, weight } in &self.entries {
            if ticket < weight {
                return (family, family.generate(seed, index, level, split));
            }
            ticket -= weight;
        }
        unreachable!("a ticket is below the sum of the weights");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Mixture, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    /// A wrong entry must be refused with its place and key, before a run starts.
    #[test]
    fn mixture_bad_entry_names_the_key() {
        for (json, part) in [
            ("[]", "1 to 256 entries, got 0"),
            (r#"[{"family":"gcd","level":6,"weight":1}]"#, "[0].level: 6"),
            (
                r#"[{"family":"gcd","level":1,"weight":1},{"family":"lcm","level":1,"weight":0}]"#,
                "[1].weight",
            ),
            (
                r#"[{"family":"gcd","level":1,"weight":4294967295},{"family":"lcm","level":1,"weight":1}]"#,
                "[1].weight: the weights add up",
            ),
            (r#"[{"family":"gcd","level":1,"weight":1,"size":3}]"#, "unknown field `size`"),
            (r#"[{"family":"gdc","level":1,"weight":1}]"#, "unknown variant `gdc`"),
            (r#"[{"family":"gcd","level":1}]"#, "missing field `weight`"),
        ] {
            let message = read(json).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    /// Entries are drawn in proportion, the same way each time, and survive a round trip.
    #[test]
    fn mixture_draws_follow_the_weights() {
        let json = r#"[{"family":"gcd","level":1,"weight":1},{"family":"chain_sum","level":2,"weight":3}]"#;
        let mixture = read(json).unwrap();
        assert_eq!(serde_json::to_string(&mixture).unwrap(), json);
        let mut gcds = 0;
        for index in 0..4000 {
            let (family, problem) = mixture.problem(7, index, Split::Train);
            assert_eq!(mixture.problem(7, index, Split::Train), (family, problem.clone()));
            assert_eq!(family.score(&problem, &problem.trace), 1.0);
            gcds += u32::from(family == Family::Gcd);
        }
        assert!((900..1100).contains(&gcds), "{gcds}");
    }
}
