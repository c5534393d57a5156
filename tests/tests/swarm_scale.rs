//! The goals of scheduling and verification, on a swarm of a few hundred in simulated time.

use manyhands_tests::scale::Scale;

/// A change of the scheduler or of trust that leaves volunteers idle, audits too much, or expels
/// the honest shows here. `--example swarm_scale` prints the figures of larger swarms.
#[test]
fn swarm_of_hundreds_is_busy_and_cheap_to_verify() {
    for policy_lag in [1, 2] {
        let scale = Scale::new(300, 16, policy_lag);
        let figures = scale.simulate();
        let text = format!("{scale:?}\n{figures}");
        let (utilisation, overhead) = (figures.utilisation().1, figures.overhead().1);
        assert!(utilisation >= 0.9, "{utilisation}\n{text}");
        assert!(overhead <= 0.1, "{overhead}\n{text}");
        assert!(figures.wasted <= 0.05 * figures.useful, "{text}");
        assert_eq!(figures.honest_expelled, 0, "{text}");
        assert!(figures.expelled >= 15, "{text}");
        assert_eq!(scale.simulate(), figures, "another course from the same seed");
    }
}
