//! How much is known of a volunteer, and how often its work is done again.
//!
//! Adaptive replication as in BOINC (Anderson 2020, section 5.2): a newcomer is audited on every
//! unit; after `newcomer_audits` valid ones in a row with probability `max(p_min, 1 / n)`, `n` being
//! its valid audits in a row. One invalid unit expels.

use serde::{Deserialize, Serialize};

use super::ledger::Offence;
use crate::run::config::SwarmSection;

/// What a volunteer has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Audits in a row that were valid.
    pub valid_in_a_row: u32,
    /// Units whose results entered the run.
    pub accepted: u64,
    /// Units that were audited.
    pub audited: u64,
    /// Multiply-adds of accepted units that were audited, or came before an audited one.
    pub credit: u64,
    /// Multiply-adds of accepted units that no audit stands behind yet.
    pub provisional_credit: u64,
    /// Why it is no longer served.
    pub expelled: Option<Offence>,
}

impl Standing {
    /// Whether results go in at once.
    pub fn is_trusted(&self, policy: &SwarmSection) -> bool {
        self.expelled.is_none() && self.valid_in_a_row >= policy.newcomer_audits
    }

    /// Probability that the next unit is audited.
    pub fn audit_probability(&self, policy: &SwarmSection) -> f64 {
        if self.is_trusted(policy) {
            policy.audit_probability_min.max(1.0 / f64::from(self.valid_in_a_row))
        } else {
            1.0
        }
    }
}

/// Probability that a volunteer that falsifies a share `false_share` of its units, and starts when
/// it is trusted, is not caught within `units` units.
pub fn survival(policy: &SwarmSection, false_share: f64, units: u64) -> f64 {
    let mut standing = Standing { valid_in_a_row: policy.newcomer_audits, ..Standing::default() };
    let mut survives = 1.0;
    // The mean course: a valid audit raises `n` every `1 / p` units.
    let mut audits = 0.0;
    for _ in 0..units {
        let p = standing.audit_probability(policy);
        survives *= 1.0 - p * false_share;
        audits += p;
        standing.valid_in_a_row = policy.newcomer_audits + audits as u32;
    }
    survives
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audit_probability_falls_with_valid_units_to_its_floor() {
        let policy = SwarmSection::default();
        let p = |valid_in_a_row| {
            Standing { valid_in_a_row, ..Standing::default() }.audit_probability(&policy)
        };
        assert_eq!([p(0), p(9), p(10), p(20), p(50), p(1000)], [1.0, 1.0, 0.1, 0.05, 0.02, 0.02]);
    }

    #[test]
    fn survival_falls_with_units_and_with_the_share_of_lies() {
        let policy = SwarmSection::default();
        assert_eq!(survival(&policy, 0.0, 1000), 1.0);
        assert!((survival(&policy, 1.0, 1) - 0.9).abs() < 1e-12);
        let (few, many) = (survival(&policy, 0.05, 100), survival(&policy, 0.05, 10_000));
        assert!(few < 1.0 && many < few && many < 1e-4, "{few} {many}");
    }
}
