//! Crashes of the coordination peer: it goes on from ledger and blobs, wherever it was interrupted.

use manyhands_tests::swarm::lab::{Lab, Shape};
use manyhands_tests::swarm::machine::Profile;
use manyhands_tests::swarm::outcome::Outcome;
use manyhands_tests::swarm::random::Random;
use manyhands_tests::swarm::world::World;

/// Virtual time that a run may take.
const LIMIT_MS: u64 = 300_000;

/// Runs a swarm whose coordinator crashes after the given effects; returns how many there were.
fn crash(lab: &mut Lab, seed: u64, crashes: &[u64]) -> u64 {
    let mut random = Random::new(seed);
    let profiles = (0..4).map(|_| Profile::random(&mut random, 0.1)).collect();
    let solo = lab.solo;
    let mut world = World::new(lab, seed, profiles);
    world.crashes.extend(crashes);
    let name = format!("seed {seed}, crashes {crashes:?}");
    let print_on_panic = Named(&name);
    assert_eq!(world.run(LIMIT_MS), solo, "{name}");
    let outcome = Outcome::of(&world);
    assert_eq!(outcome.closed(), Some(solo), "{name}");
    assert!(outcome.expelled.is_empty(), "{name}: {:?}", outcome.expelled);
    assert_eq!(outcome.rolled_back, 0, "{name}");
    assert_eq!(world.computed_again, 0, "{name}: an accepted unit was given out again");
    outcome.assert_no_item_twice();
    outcome.assert_credits(&world);
    assert_eq!(world.crashed_at.len(), crashes.len() - world.crashes.len(), "{name}");
    drop(print_on_panic);
    world.effects
}

/// Says which case it was that panicked.
struct Named<'a>(&'a str);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed: {}", self.0);
        }
    }
}

fn lab(policy_lag: u64) -> Lab {
    Lab::new(Shape { sft_steps: 2, rl_steps: 2, policy_lag })
}

/// What was promised before a crash must stand after it, and nothing may count twice.
#[test]
fn crash_after_any_effect_loses_nothing() {
    let mut lab = lab(1);
    let count = crash(&mut lab, 1, &[]);
    let stride = 1 + count / 250;
    let cases: Vec<u64> = (1..count).step_by(stride as usize).collect();
    for at in &cases {
        crash(&mut lab, 1, &[*at]);
    }
    eprintln!("{} crashes, one after every {stride} of {count} effects", cases.len());
}

/// A crash while the coordination peer comes back, and others later.
#[test]
fn crash_soon_after_a_crash_loses_nothing() {
    for policy_lag in 0..3 {
        let mut lab = lab(policy_lag);
        let mut random = Random::new(policy_lag);
        for seed in 0..20 {
            let first = 1 + random.below(600);
            let second = first + 1 + random.below(30);
            crash(&mut lab, seed, &[first, second, second + random.below(400)]);
        }
    }
}
