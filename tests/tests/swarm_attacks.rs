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
const SEEDS: u64 = 6;
/// Volunteers that do no harm.
const HONEST: usize = 3;

/// What came of an attack.
struct Trial {
    seed: u64,
    /// Of each liar.
    offences: Vec<Option<Offence>>,
    /// False results of each liar that it announced as its own work.
    lies: Vec<u64>,
    /// Units of each liar in the run.
    accepted: Vec<u64>,
    rolled_back: u64,
    voided: u64,
    is_right: bool,
    innocent_expelled: usize,
    virtual_ms: u64,
}

fn trial(lab: &mut Lab, attack: Option<Attack>, seed: u64) -> Trial {
    eprintln!("{attack:?}, seed {seed}");
    let liars = if attack == Some(Attack::Colluding) { 10 } else { 1 };
    let honest = Profile { speed: 2e6, ..Profile::default() };
    let liar = Profile { speed: 8e6, attack, ..Profile::default() };
    let mut profiles = vec![honest; HONEST];
    profiles.extend(vec![liar; liars]);
    let solo = lab.solo;
    let mut world = World::new(lab, seed, profiles);
    if liars > 1 {
        // So slow that volunteers do most audits.
        world.own_speed = 5e5;
    }
    let is_right = world.run(LIMIT_MS) == solo;
    let outcome = Outcome::of(&world);
    let offence = |i: usize| outcome.expelled.get(&world.machines[i].key()).copied();
    let accepted = |i: usize| {
        let own = |(_, u): &&(u64, _)| {
            let unit: &manyhands_core::swarm::ledger::UnitEntry = u;
            unit.volunteer == world.machines[i].key()
        };
        outcome.units.iter().filter(own).count() as u64
    };
    Trial {
        seed,
        offences: (HONEST..HONEST + liars).map(offence).collect(),
        lies: (HONEST..HONEST + liars).map(|i| world.machines[i].lies).collect(),
        accepted: (HONEST..HONEST + liars).map(accepted).collect(),
        rolled_back: outcome.rolled_back,
        voided: outcome.voided,
        is_right,
        innocent_expelled: (0..HONEST).filter(|i| offence(*i).is_some()).count(),
        virtual_ms: world.now_ms,
    }
}

fn header() {
    eprintln!(
        "newcomer_audits 3, audit_probability_min 0.2, {SEEDS} seeds, {HONEST} honest volunteers"
    );
    eprintln!(
        "{:<17}{:>7}{:>11}{:>6}{:>12}{:>8}{:>7}{:>10}  offences",
        "attack", "caught", "lies: mean", "p99", "roll-backs", "voided", "right", "mean ms"
    );
}

/// Runs an attack with every seed and prints a line. Nobody innocent may suffer, and whoever was
/// caught may have left no trace.
fn attack(lab: &mut Lab, attack: Attack) -> Vec<Trial> {
    let trials: Vec<Trial> = (0..SEEDS).map(|seed| trial(lab, Some(attack), seed)).collect();
    let mut lies: Vec<u64> = trials.iter().flat_map(|t| t.lies.clone()).collect();
    lies.sort_unstable();
    let mut offences: Vec<Offence> =
        trials.iter().flat_map(|t| t.offences.iter().flatten().copied()).collect();
    let caught = format!("{}/{}", offences.len(), lies.len());
    offences.sort_unstable();
    offences.dedup();
    let sum = |of: fn(&Trial) -> u64| trials.iter().map(of).sum::<u64>();
    eprintln!(
        "{:<17}{caught:>7}{:>11.1}{:>6}{:>12}{:>8}{:>7}{:>10}  {offences:?}",
        format!("{attack:?}"),
        lies.iter().sum::<u64>() as f64 / lies.len() as f64,
        lies[(lies.len() * 99).div_ceil(100) - 1],
        sum(|t| t.rolled_back),
        sum(|t| t.voided),
        format!("{}/{SEEDS}", sum(|t| u64::from(t.is_right))),
        sum(|t| t.virtual_ms) / SEEDS,
    );
    for t in &trials {
        let name = format!("{attack:?}, seed {}", t.seed);
        assert_eq!(t.innocent_expelled, 0, "{name}: an honest volunteer was expelled");
        let all_caught = t.offences.iter().all(Option::is_some);
        let told_lies = t.lies.iter().any(|l| *l > 0);
        assert!(t.is_right || told_lies && !all_caught, "{name}: false weights");
    }
    trials
}

fn lab() -> Lab {
    Lab::new(Shape { sft_steps: 8, rl_steps: 6, policy_lag: 1 })
}

/// False results of trusted volunteers: if one stayed in the run, the weights would differ.
#[test]
fn falsified_results_are_found_and_rolled_back() {
    use Attack::*;
    let mut lab = lab();
    header();
    let mut rolled_back = 0;
    for kind in [
        RandomBytes,
        Zeros,
        OtherWeights,
        OldWeights,
        Truncated,
        EarlyEnd,
        OtherTemperature,
        Copied,
        ForgedReward,
        SignFlipped,
        Scaled,
        OneBit,
        Saturated,
        OtherBytes,
    ] {
        for t in attack(&mut lab, kind) {
            let name = format!("{kind:?}, seed {}", t.seed);
            assert!(t.offences[0].is_some(), "{name}: not caught");
            assert!(t.is_right, "{name}: false weights");
            let malformed = matches!(kind, RandomBytes | Truncated | OtherBytes);
            assert!(!malformed || t.voided == 0, "{name}: entered though it has no meaning");
            rolled_back += t.rolled_back;
        }
    }
    assert!(rolled_back > 0, "no lie ever entered: the tests show nothing");
}

/// Few lies may escape, as the survival probability says; none that was told by a convict stands.
#[test]
fn rare_lies_of_a_convict_are_rolled_back() {
    let mut lab = lab();
    header();
    let trials = attack(&mut lab, Attack::Rarely);
    assert!(trials.iter().any(|t| t.offences[0].is_some() && t.rolled_back > 0), "never caught");
}

/// Ten identities that confirm each other's lies: one that is caught drags down the others.
#[test]
fn colluders_that_confirm_each_other_are_all_found() {
    let mut lab = lab();
    header();
    for t in attack(&mut lab, Attack::Colluding) {
        assert!(t.is_right, "seed {}: false weights", t.seed);
        assert!(t.rolled_back > 0 && t.offences.iter().any(Option::is_some), "seed {}", t.seed);
    }
}

/// What breaks the protocol expels at once; what merely annoys gains nothing and delays little.
#[test]
fn abuse_of_the_protocol_gains_nothing() {
    use Attack::*;
    /// Slowdown against three honest volunteers alone that an idle fourth may cause.
    const SLOWDOWN_MAX: f64 = 1.5;
    let mut lab = lab();
    header();
    let alone = attack(&mut lab, Malformed).iter().map(|t| t.virtual_ms).max().unwrap_or(0);
    for (kind, offence) in [
        (Malformed, Some(Offence::Malformed)),
        (Oversized, Some(Offence::Malformed)),
        (Stolen, Some(Offence::BadSignature)),
        (Hoarding, None),
        (SlowLoris, None),
        (Replayed, None),
    ] {
        for t in attack(&mut lab, kind) {
            let name = format!("{kind:?}, seed {}", t.seed);
            assert!(t.is_right, "{name}: false weights");
            assert_eq!(t.rolled_back, 0, "{name}");
            let idle = matches!(kind, Hoarding | SlowLoris);
            if offence.is_some() {
                assert_eq!(t.offences[0], offence, "{name}");
            }
            // Those it had when it gained trust, and what was on its way then.
            assert!(!idle || t.accepted[0] <= 6, "{name}: {} units accepted", t.accepted[0]);
            let slowdown = t.virtual_ms as f64 / alone as f64;
            assert!(!idle || slowdown < SLOWDOWN_MAX, "{name}: {slowdown:.2} times as long");
        }
    }
}

/// The control: without an attack nobody is expelled and nothing is rolled back.
#[test]
fn fast_honest_volunteer_in_the_attackers_place_is_not_accused() {
    let mut lab = lab();
    for seed in 0..SEEDS {
        let t = trial(&mut lab, None, seed);
        assert!(t.is_right && t.offences == [None] && t.rolled_back == 0, "seed {seed}");
        assert!(t.accepted[0] > 20, "seed {seed}: an attacker would have had no chance");
    }
}
