//! A second coordination peer: it mirrors, derives, refuses lies, and goes on when the first dies.

use manyhands_core::swarm::chain::{Verifier, Writer};
use manyhands_core::swarm::follower::{Answer, FollowError};
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::ledger::Entry;
use manyhands_core::swarm::protocol::{PROTOCOL, Refusal, Request, Response};
use manyhands_tests::swarm::attacks::Attack;
use manyhands_tests::swarm::lab::{Lab, Shape};
use manyhands_tests::swarm::machine::Profile;
use manyhands_tests::swarm::mirror::Mirror;
use manyhands_tests::swarm::outcome::Outcome;
use manyhands_tests::swarm::random::Random;
use manyhands_tests::swarm::world::World;

/// Virtual time that a run may take.
const LIMIT_MS: u64 = 300_000;

fn lab() -> Lab {
    Lab::new(Shape { sft_steps: 2, rl_steps: 3, policy_lag: 1 })
}

fn honest(seed: u64) -> Vec<Profile> {
    let mut random = Random::new(seed);
    (0..4).map(|_| Profile::random(&mut random, 0.1)).collect()
}

/// The coordinator is lost for good after each of many effects, with the follower some records
/// behind: the promoted follower ends with the weights of the undisturbed run.
#[test]
fn follower_promoted_anywhere_ends_with_the_same_weights() {
    let mut lab = lab();
    let solo = lab.solo;
    let mut undisturbed = World::new(&mut lab, 1, honest(1));
    undisturbed.run(LIMIT_MS);
    let (count, mut promoted) = (undisturbed.effects, 0);
    for (case, at) in (1..count).step_by(1 + count as usize / 60).enumerate() {
        let mut world = World::new(&mut lab, 1, honest(1));
        world.follow(Mirror::new(case % 7));
        world.crashes.push_back(at);
        assert_eq!(world.run(LIMIT_MS), solo, "lost after effect {at}");
        let outcome = Outcome::of(&world);
        assert!(outcome.expelled.is_empty(), "lost after effect {at}: {:?}", outcome.expelled);
        outcome.assert_no_item_twice();
        let is_promotion = |e: &Entry| matches!(e, Entry::Promoted { .. });
        promoted += outcome.records.iter().filter(|r| is_promotion(&r.entry)).count();
    }
    eprintln!("{promoted} promotions");
    assert!(promoted > 40, "only {promoted} promotions: the test shows little");
}

/// A follower comes to the same weights, through roll-backs too, and keeps states to go on from.
#[test]
fn follower_derives_what_the_coordinator_publishes_through_roll_backs() {
    let mut lab = Lab::new(Shape { sft_steps: 4, rl_steps: 3, policy_lag: 1 });
    let (solo, mut restarts) = (lab.solo, 0);
    for seed in 0..6 {
        let honest = Profile { speed: 2e6, ..Profile::default() };
        let liar = Profile { speed: 8e6, attack: Some(Attack::EarlyEnd), ..Profile::default() };
        let mut world = World::new(&mut lab, seed, vec![honest.clone(), honest, liar]);
        world.follow(Mirror::new(0));
        assert_eq!(world.run(LIMIT_MS), solo, "seed {seed}");
        let mirror = world.mirror.as_ref().unwrap();
        let follower = mirror.follower.as_ref().unwrap();
        assert!(follower.is_closed(), "seed {seed}");
        assert_eq!(Hash::from(follower.pipeline().version().hash()), solo, "seed {seed}");
        assert_eq!(follower.status().ordinal, 7);
        assert!(!mirror.store.snapshots.is_empty(), "seed {seed}: no state was kept");
        assert_eq!(mirror.restarts, Outcome::of(&world).rolled_back, "seed {seed}");
        restarts += mirror.restarts;
    }
    assert!(restarts > 0, "nothing was rolled back: the test shows little");
}

/// A coordination peer that publishes weights of its own invention is not followed.
#[test]
fn follower_refuses_weights_that_the_units_do_not_lead_to() {
    let mut lab = lab();
    let mut world = World::new(&mut lab, 1, honest(1));
    world.run(LIMIT_MS);
    let records = std::mem::take(&mut world.store.records);
    let blobs = std::mem::take(&mut world.store.blobs);
    let (mut mirror, mut verifier) = (Mirror::new(0), Verifier::default());
    for bytes in &records {
        let before = verifier.clone();
        let record = verifier.push(bytes).unwrap();
        if let Entry::Version { ordinal, update: 0, delta, delta_bytes, base, .. } = record.entry {
            let weights = Hash([1; 32]);
            let entry = Entry::Version {
                ordinal,
                update: 0,
                weights,
                delta,
                delta_bytes,
                base,
                full: None,
            };
            let (_, lie) = Writer::after(&before, World::secret()).append(0, entry);
            let refused = mirror.take(&lab, &lie, &blobs).unwrap_err();
            assert!(matches!(refused, FollowError::OtherWeights { .. }), "{refused}");
            return;
        }
        mirror.take(&lab, bytes, &blobs).unwrap();
    }
    panic!("no version was published");
}

/// Whoever was never named as a follower cannot take the run over.
#[test]
fn follower_refuses_a_stranger_who_goes_on() {
    let mut lab = lab();
    let mut world = World::new(&mut lab, 1, honest(1));
    world.run(LIMIT_MS);
    let blobs = std::mem::take(&mut world.store.blobs);
    let first = world.store.records[0].clone();
    let (mut mirror, mut verifier) = (Mirror::new(0), Verifier::default());
    mirror.take(&lab, &first, &blobs).unwrap();
    verifier.push(&first).unwrap();
    let stranger = Mirror::new(0).secret;
    let entry = Entry::Promoted { coordinator: stranger.key() };
    let (_, bytes) = Writer::after(&verifier, stranger).append(0, entry);
    let refused = mirror.take(&lab, &bytes, &blobs).unwrap_err();
    assert!(matches!(refused, FollowError::Stranger { .. }), "{refused}");
}

/// A follower gives out the ledger and ways to weights, and no work.
#[test]
fn follower_answers_readers_and_sends_workers_on() {
    let mut lab = lab();
    let mut world = World::new(&mut lab, 1, honest(1));
    world.follow(Mirror::new(0));
    let weights = world.run(LIMIT_MS);
    let follower = world.mirror.as_ref().and_then(|m| m.follower.as_ref()).unwrap();
    let hello = |protocol| Request::Hello {
        protocol,
        digest: "x".into(),
        agent: String::new(),
        engine: String::new(),
        speed: 1.0,
    };
    let refused = |refusal| Answer::Response(Response::Refused(refusal));
    assert_eq!(follower.answer(hello(PROTOCOL)), refused(Refusal::Follower));
    assert_eq!(follower.answer(hello(PROTOCOL + 1)), refused(Refusal::Protocol(PROTOCOL)));
    assert_eq!(follower.answer(Request::Take), refused(Refusal::Follower));
    let asked = Request::Ledger { from: 3, limit: 5 };
    assert_eq!(follower.answer(asked), Answer::Records { from: 3, limit: 5 });
    let asked = Request::Weights { want: weights, have: Vec::new() };
    let Answer::Response(Response::Weights { base: None, blobs }) = follower.answer(asked) else {
        panic!("no way to the final weights");
    };
    assert!(!blobs.is_empty());
    let asked = Request::Weights { want: Hash([1; 32]), have: Vec::new() };
    assert_eq!(follower.answer(asked), refused(Refusal::UnknownWeights));
}
