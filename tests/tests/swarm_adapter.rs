//! Swarms that train an adapter on an imported model: everybody needs that model too, and the
//! weights are still those of one machine on its own.

use std::sync::Arc;

use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::decoder::Loader;
use manyhands_core::run::execute::execute;
use manyhands_core::swarm::delta;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::replay::{Recompute, Sources, replay};
use manyhands_tests::swarm::attacks::Attack;
use manyhands_tests::swarm::lab::{Lab, Shape};
use manyhands_tests::swarm::machine::Profile;
use manyhands_tests::swarm::mirror::Mirror;
use manyhands_tests::swarm::outcome::Outcome;
use manyhands_tests::swarm::random::Random;
use manyhands_tests::swarm::world::World;
use pollster::block_on;

const LIMIT_MS: u64 = 600_000;

fn lab(policy_lag: u64) -> Lab {
    Lab::adapter(Shape { sft_steps: 8, rl_steps: 4, policy_lag })
}

/// Only the factors are trained, and they are: the run learns something.
#[test]
fn solo_run_trains_the_factors_alone() {
    let lab = lab(1);
    assert_eq!(lab.model.parameter_count(), 4 * (32 + 32) + 4 * (32 + 48));
    let loss: Vec<f64> = lab.reports.iter().take(8).map(|r| r.loss).collect();
    assert!(loss[7] < 0.9 * loss[0], "{loss:?}");
    assert!(lab.reports.iter().all(|r| r.saturations.is_empty()), "{:?}", lab.reports);
}

#[test]
fn swarm_with_liars_churn_and_crashes_comes_to_the_weights_of_one_machine() {
    let mut lab = lab(1);
    let solo = lab.solo;
    for seed in 0..4 {
        let mut random = Random::new(seed);
        let mut profiles: Vec<_> = (0..3).map(|_| Profile::random(&mut random, 0.7)).collect();
        profiles.push(Profile { speed: 2e6, ..Profile::default() });
        if seed > 1 {
            let attack = Some(Attack::EarlyEnd);
            profiles.push(Profile { speed: 8e6, attack, ..Profile::default() });
        }
        let mut world = World::new(&mut lab, seed, profiles);
        world.crashes.extend([40 + 30 * seed, 200]);
        assert_eq!(world.run(LIMIT_MS), solo, "seed {seed}");
        assert_eq!(Outcome::of(&world).closed(), Some(solo), "seed {seed}");
    }
}

/// A follower has nothing but ledger and blobs.
#[test]
fn follower_derives_an_adapter() {
    let mut lab = lab(0);
    let solo = lab.solo;
    let mut world = World::new(&mut lab, 3, vec![Profile::default(), Profile::default()]);
    world.follow(Mirror::new(0));
    assert_eq!(world.run(LIMIT_MS), solo);
    let follower = world.mirror.as_ref().unwrap().follower.as_ref().unwrap();
    assert_eq!(Hash::from(follower.pipeline().version().hash()), solo);
}

/// Nor has whoever replays: the imported weights come from the blob that the first record names,
/// and other weights under that name are refused.
#[test]
fn replay_computes_every_unit_again_on_the_imported_model() {
    let mut lab = lab(1);
    let solo = lab.solo;
    let mut world = World::new(&mut lab, 5, vec![Profile::default(), Profile::default()]);
    assert_eq!(world.run(LIMIT_MS), solo);
    let (ledger, mut blobs) = (world.store.records.clone(), world.store.blobs.clone());
    let (config, model) = (lab.config.clone(), lab.model.clone());
    let engine = Cpu::new(model.constants(), 1, None);
    let check = |blobs: &std::collections::BTreeMap<Hash, Vec<u8>>| {
        let mut loader = Loader::default();
        let sources = Sources {
            files: &mut |_| unreachable!("every file is a blob"),
            import: &mut |_, find| {
                let blob = find("imported/weights").ok_or("the imported weights are lost")?;
                let base = config.model.base.unwrap();
                let weights = delta::build(base, None, [blob], &model.frozen());
                let weights = Arc::unwrap_or_clone(weights.map_err(|e| e.to_string())?);
                Ok(Lab::imported(weights))
            },
            blobs,
            recompute: Recompute::All,
            execute: &mut |problems, version, work| {
                let imported = problems.imported().map(AsRef::as_ref);
                let decoder = loader.load(&engine, &version.weights, imported);
                block_on(execute(&engine, &decoder, work, |_| ()))
            },
            progress: &mut |_, _| {},
        };
        replay(&mut ledger.iter().cloned(), sources).unwrap()
    };
    let found = check(&blobs);
    assert!(found.ok && found.recomputed > 20, "{found:?}");
    assert_eq!(found.weights, Some(solo));
    let (_, blob) = &lab.files[1];
    blobs.get_mut(&Hash::of(blob)).unwrap()[100] ^= 1;
    let found = check(&blobs);
    assert_eq!(found.first_wrong, Some((0, "the imported weights are lost".into())));
}
