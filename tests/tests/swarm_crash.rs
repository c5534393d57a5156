//! Crashes of the coordination peer: it goes on from ledger and blobs, wherever it was interrupted.

use manyhands_tests::swarm::attacks::Attack;
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
    world.is_torn = seed % 2 == 1;
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

/// Where the coordinator was interrupted in a run with a liar: the weights must not show it.
fn crash_with_liar(lab: &mut Lab, seed: u64, attack: Attack, crashes: &[u64]) -> (u64, u64) {
    let honest = Profile { speed: 2e6, ..Profile::default() };
    let liar = Profile { speed: 8e6, attack: Some(attack), ..Profile::default() };
    let solo = lab.solo;
    let mut world = World::new(lab, seed, vec![honest.clone(), honest, liar]);
    world.crashes.extend(crashes);
    world.is_torn = seed % 2 == 1;
    let name = format!("{attack:?}, seed {seed}, crashes {crashes:?}");
    let print_on_panic = Named(&name);
    assert_eq!(world.run(LIMIT_MS), solo, "{name}");
    let outcome = Outcome::of(&world);
    let liar = world.machines[2].key();
    assert!(outcome.expelled.keys().all(|who| *who == liar), "{name}: {:?}", outcome.expelled);
    drop(print_on_panic);
    (world.effects, outcome.rolled_back)
}

/// A roll-back that is interrupted is taken up again: no lie may hide behind a crash.
#[test]
fn crash_during_a_roll_back_hides_no_lie() {
    let mut lab = Lab::new(Shape { sft_steps: 4, rl_steps: 3, policy_lag: 1 });
    let mut random = Random::new(3);
    let mut rolled_back = 0;
    for attack in [Attack::EarlyEnd, Attack::SignFlipped, Attack::OneBit, Attack::Saturated] {
        for seed in 0..4 {
            let (count, _) = crash_with_liar(&mut lab, seed, attack, &[]);
            for _ in 0..15 {
                let first = 1 + random.below(count);
                let second = first + 1 + random.below(20);
                rolled_back += crash_with_liar(&mut lab, seed, attack, &[first, second]).1;
            }
        }
    }
    eprintln!("{rolled_back} roll-backs");
    assert!(rolled_back > 50, "only {rolled_back} roll-backs: the tests show little");
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
