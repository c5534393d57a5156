//! How far sampling may run ahead of training: AReaL's staleness gate (arXiv 2505.24298, eq. 3).
//!
//! With batches of B rollouts, a trainer at version i and a bound eta on the policy lag, the N-th
//! rollout may be submitted iff `floor((N - 1) / B) <= i + eta`: it will enter batch
//! `floor((N - 1) / B)`, which is trained at that version.

/// Number of rollouts that may have been submitted in all: `B (i + eta + 1)`.
pub const fn rollouts_admitted(batch: u64, policy_version: u64, policy_lag_max: u64) -> u64 {
    batch.saturating_mul(policy_version.saturating_add(policy_lag_max).saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::super::golden::golden;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn staleness_gate_equals_golden() {
        let golden = golden();
        let cases = golden["areal_gate B=4"].as_object().unwrap();
        assert_eq!(cases.len(), 9);
        for (key, expected) in cases {
            let numbers: Vec<u64> = key
                .split(',')
                .map(|part| part.split('=').nth(1).unwrap().parse().unwrap())
                .collect();
            assert_eq!(rollouts_admitted(4, numbers[0], numbers[1]), expected.as_u64().unwrap());
        }
    }

    proptest! {
        /// A rollout admitted at version i is consumed at most eta versions later.
        #[test]
        fn staleness_no_admitted_rollout_is_too_old(batch in 1..64u64, i in 0..99u64, eta in 0..9u64) {
            let last = rollouts_admitted(batch, i, eta);
            prop_assert!((last - 1) / batch <= i + eta);
            prop_assert!(last / batch > i + eta);
        }
    }
}
