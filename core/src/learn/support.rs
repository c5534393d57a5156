//! Which correct answers a trained model gained and lost ("The Invisible Leash", 2507.14843).
//!
//! An answer is in the support of a policy when its probability exceeds epsilon. Over all pairs of
//! problem and correct answer: preserved (before and after), expanded (after only), shrunk (before
//! only), out (neither).

use serde::{Deserialize, Serialize};

/// Counts of (problem, correct answer) pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SupportCounts {
    /// In both supports.
    pub preserved: u64,
    /// In the trained model's only.
    pub expanded: u64,
    /// In the base model's only.
    pub shrunk: u64,
    /// In neither.
    pub out: u64,
}

impl SupportCounts {
    /// Counts one correct answer by its probabilities (or frequencies) before and after training.
    pub fn add(&mut self, base: f64, trained: f64, epsilon: f64) {
        let counter = match (base > epsilon, trained > epsilon) {
            (true, true) => &mut self.preserved,
            (false, true) => &mut self.expanded,
            (true, false) => &mut self.shrunk,
            (false, false) => &mut self.out,
        };
        *counter += 1;
    }

    /// SRR, support retention rate `P / (P + S)`. `None` if the base had no support.
    pub fn retention_rate(&self) -> Option<f64> {
        share(self.preserved, self.preserved + self.shrunk)
    }

    /// NDR, net discovery rate `E / (P + E)`. `None` if the trained model has no support.
    pub fn discovery_rate(&self) -> Option<f64> {
        share(self.expanded, self.preserved + self.expanded)
    }

    /// SDS, harmonic mean of the two; 0 if both are 0.
    pub fn dynamic_score(&self) -> Option<f64> {
        let (retention, discovery) = (self.retention_rate()?, self.discovery_rate()?);
        let sum = retention + discovery;
        Some(if sum == 0.0 { 0.0 } else { 2.0 * retention * discovery / sum })
    }

    /// NSCR, net support change rate `(E - S) / (P + E + S)`. `None` if neither has support.
    pub fn net_change_rate(&self) -> Option<f64> {
        let total = self.preserved + self.expanded + self.shrunk;
        Some(share(self.expanded, total)? - share(self.shrunk, total)?)
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::super::golden::{assert_golden, golden};
    use super::*;

    #[test]
    fn support_metrics_equal_golden() {
        let golden = &golden()["support(ProRL-v1 overall)"];
        let counts = SupportCounts { preserved: 2400, expanded: 36, shrunk: 163, out: 805 };
        for (key, got) in [
            ("SRR", counts.retention_rate()),
            ("NDR", counts.discovery_rate()),
            ("SDS", counts.dynamic_score()),
            ("NSCR", counts.net_change_rate()),
        ] {
            assert_golden(key, &[got.unwrap()], &golden[key]);
        }
    }

    #[test]
    fn support_empty_has_no_rates() {
        let mut counts = SupportCounts::default();
        counts.add(0.0, 0.1, 0.1);
        assert_eq!(
            (counts.out, counts.retention_rate(), counts.net_change_rate()),
            (1, None, None)
        );
        counts.add(0.2, 0.0, 0.1);
        assert_eq!((counts.retention_rate(), counts.dynamic_score()), (Some(0.0), None));
        counts.add(0.0, 0.2, 0.1);
        assert_eq!((counts.dynamic_score(), counts.net_change_rate()), (Some(0.0), Some(0.0)));
    }
}
