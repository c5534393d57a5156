//! Dishonest volunteers are caught, and leave no trace in the weights.
//!
//! `cargo test -p manyhands-tests --test swarm_attacks -- --nocapture` prints how soon.

use manyhands_core::swarm::ledger::Offence;
use manyhands_tests::swarm::attacks::Attack;
use manyhands_tests::swarm::lab::{Lab, Shape};
use manyhands_tests::swarm::machine::Profile;
use manyhands_tests::swarm::outcome::Outcome;
use manyhands_tests::swarm::world::World;

/// Virtual time that a run may take.
const LIMIT_MS: u64 = 3_600_000;
/// Runs of each attack.
const SEEDS: u64 = 8;

/// What came of an attack.
struct Trial {
    offences: Vec<Option<Offence>>,
    lies: Vec<u64>,
    rolled_back: u64,
    voided: u64,
    right: bool,
    innocent: bool,
    virtual_ms: u64,
}

fn attack(lab: &mut Lab, attack: Attack, seed: u64) -> Trial {
    let colluders = if attack == Attack::Colluding { 10 } else { 1 };
    let honest = Profile { speed: 2e6, ..Profile::default() };
    let liar = Profile { speed: 8e6, attack: Some(attack), ..Profile::default() };
    let mut profiles = vec![honest; 3];
    profiles.extend(vec![liar; colluders]);
    let solo = lab.solo;
    let mut world = World::new(lab, seed, profiles);
    if attack == Attack::Colluding {
        // So slow that most audits are done by volunteers.
        world.own_speed = 5e5;
    }
    let weights = world.run(LIMIT_MS);
    let outcome = Outcome::of(&world);
    let offence = |i: usize| outcome.expelled.get(&world.machines[i].key()).copied();
    let liars = 3..3 + colluders;
    Trial {
        offences: liars.clone().map(offence).collect(),
        lies: liars.map(|i| world.machines[i].lies).collect(),
        rolled_back: outcome.rolled_back,
        voided: outcome.voided,
        right: weights == solo,
        innocent: (0..3).all(|i| offence(i).is_none()),
        virtual_ms: world.now_ms,
    }
}

/// Every attack, until it is caught; and then the weights must be those of the honest run.
#[test]
fn attackers_are_caught_and_leave_the_weights_alone() {
    let mut lab = Lab::new(Shape { sft_steps: 8, rl_steps: 6, policy_lag: 1 });
    eprintln!("newcomer_audits 3, audit_probability_min 0.2, {SEEDS} seeds; 3 honest volunteers");
    eprintln!("attack            caught  offences  false units: mean  p99  rolled back  right  ms");
    for kind in Attack::ALL {
        let trials: Vec<Trial> = (0..SEEDS).map(|seed| attack(&mut lab, kind, seed)).collect();
        let all = || trials.iter().flat_map(|t| t.offences.iter().zip(&t.lies));
        let caught = all().filter(|(o, _)| o.is_some()).count();
        let mut offences: Vec<Offence> = all().filter_map(|(o, _)| *o).collect();
        offences.sort();
        offences.dedup();
        let mut lies: Vec<u64> = all().map(|(_, l)| *l).collect();
        lies.sort();
        let mean = lies.iter().sum::<u64>() as f64 / lies.len() as f64;
        let p99 = lies[(lies.len() * 99).div_ceil(100) - 1];
        let rolled: u64 = trials.iter().map(|t| t.rolled_back).sum();
        let voided: u64 = trials.iter().map(|t| t.voided).sum();
        let right = trials.iter().filter(|t| t.right).count();
        let ms = trials.iter().map(|t| t.virtual_ms).sum::<u64>() / SEEDS;
        eprintln!(
            "{:<17} {caught:>3}/{:<3} {offences:?} {mean:>6.1} {p99:>4} {rolled:>6} ({voided}) {right}/{SEEDS} {ms} innocent {}",
            format!("{kind:?}"),
            lies.len(),
            trials.iter().all(|t| t.innocent),
        );
    }
}
