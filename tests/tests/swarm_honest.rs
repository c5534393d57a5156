//! Honest swarms: whoever takes part, the run's weights are those of one machine on its own.

use manyhands_tests::swarm::lab::{Lab, Shape};
use manyhands_tests::swarm::machine::Profile;
use manyhands_tests::swarm::outcome::Outcome;
use manyhands_tests::swarm::random::Random;
use manyhands_tests::swarm::world::World;

/// Virtual time that a run may take; steady swarms need seconds.
const LIMIT_MS: u64 = 600_000;

fn lab(policy_lag: u64) -> Lab {
    Lab::new(Shape { sft_steps: 8, rl_steps: 4, policy_lag })
}

/// The run of the tests must train, or equal weights would show nothing.
#[test]
fn solo_run_learns_from_rewards_and_reference() {
    let lab = lab(1);
    let rl: Vec<_> = lab.reports.iter().filter_map(|r| r.rl.as_ref()).collect();
    for r in &rl {
        eprintln!(
            "reward {:.3}, kept {}, kl {:.4}, lag {}",
            r.reward, r.groups_kept, r.batch.kl, r.policy_lag
        );
    }
    assert!(rl.iter().any(|r| r.reward > 0.0 && r.reward < 1.0), "rewards are all alike");
    assert!(rl.iter().any(|r| r.batch.kl > 0.0), "no distance to the reference");
    assert!(rl.iter().any(|r| r.policy_lag > 0), "no lag");
}

fn honest(lab: &mut Lab, seed: u64, count: usize, trouble: f64) {
    let mut random = Random::new(seed);
    let mut profiles: Vec<Profile> =
        (0..count).map(|_| Profile::random(&mut random, trouble)).collect();
    profiles[0].churn_ms = profiles[0].churn_ms.min(if count == 1 { 0 } else { u64::MAX });
    let solo = lab.solo;
    let mut world = World::new(lab, seed, profiles);
    let name = format!("seed {seed}, {count} volunteers, trouble {trouble}");
    eprintln!("{name}");
    let weights = world.run(LIMIT_MS);
    assert_eq!(weights, solo, "{name}");
    let outcome = Outcome::of(&world);
    assert_eq!(outcome.closed(), Some(solo), "{name}");
    assert!(outcome.expelled.is_empty(), "{name}: {:?}", outcome.expelled);
    outcome.assert_no_item_twice();
    outcome.assert_credits(&world);
    eprintln!(
        "{name}: {} units, {} records, {} ms",
        outcome.units.len(),
        outcome.records.len(),
        world.now_ms
    );
}

/// Steady volunteers of any number: a result that depends on who took part would show here.
#[test]
fn weights_of_steady_swarms_are_those_of_one_machine() {
    for policy_lag in 0..3 {
        let mut lab = lab(policy_lag);
        for count in [1, 3, 17] {
            honest(&mut lab, 100 + count as u64, count, 0.0);
        }
    }
}

/// Volunteers that come, go, lose messages and overtake each other.
#[test]
fn weights_of_troubled_swarms_are_those_of_one_machine() {
    for policy_lag in 0..3 {
        let mut lab = lab(policy_lag);
        for seed in 0..6 {
            let count = [1, 3, 17][(seed % 3) as usize];
            honest(&mut lab, 10 * policy_lag + seed, count, [0.4, 1.0][(seed / 3) as usize]);
        }
    }
}
