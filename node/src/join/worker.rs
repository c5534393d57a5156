//! The engine of a volunteer, in a thread of its own: loads weights, computes units, rests.

use std::collections::BTreeMap;
use std::sync::{Arc, mpsc as blocking};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use manyhands_core::engine::Engine;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::execute;
use manyhands_core::run::work::{Scored, Work};
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::unit::{Unit, encode_output};
use manyhands_core::swarm::volunteer::Event;
use manyhands_shaders::twin::logits::temperature_scale;
use tokio::sync::mpsc;

use crate::cli::EngineArgs;
use crate::donor::Duty;
use crate::engines;
use crate::{weights, with_engine};

/// What to lie about, in a build that can.
#[cfg(feature = "attacks")]
pub(super) type Lie = Option<crate::attack::Attack>;
/// Nobody lies.
#[cfg(not(feature = "attacks"))]
pub(super) type Lie = ();

/// Reads a blob.
pub(super) type Get = Box<dyn Fn(&Hash) -> Option<Vec<u8>> + Send>;

/// What the worker is told.
pub(super) enum Task {
    /// The model of the run.
    Model(Box<ModelConfig>),
    /// Weights from blobs.
    Load {
        /// Their hash.
        want: Hash,
        /// What the first blob changes.
        base: Option<Hash>,
        /// Blobs in order.
        blobs: Vec<Hash>,
        /// Where the blobs are.
        get: Get,
    },
    /// Weights that are not needed any more.
    Forget(Hash),
    /// A unit.
    Compute {
        /// Its hash.
        hash: Hash,
        /// What to compute.
        unit: Box<Unit>,
    },
    /// How much of the time to work.
    Duty(Duty),
}

/// Starts the worker. Returns where tasks go in, the engine's description, and its measured speed
/// in multiply-adds a second. An engine that fails the conformance suite is not chosen.
pub(super) fn start(
    args: &EngineArgs,
    lie: Lie,
    events: mpsc::Sender<Event>,
) -> Result<(blocking::Sender<Task>, String, f64)> {
    let probe = ModelConfig::preset("micro", 128, 96).context("no such preset")?;
    let engine = engines::choose(args.engine, args.threads, probe.constants())?;
    let description = engine.describe();
    let speed = with_engine!(&engine, |engine| measure(engine.as_ref(), &probe)?);
    eprintln!("engine     {description}, {:.1} G multiply-adds a second", speed / 1e9);
    let (send, receive) = blocking::channel();
    let args = args.clone();
    std::thread::spawn(move || {
        if let Err(error) = work(&args, lie, &receive, &events) {
            eprintln!("error: the engine cannot go on: {error:#}");
            std::process::exit(1);
        }
    });
    Ok((send, description, speed))
}

/// Speed of a forward pass, computed as units are.
fn measure<E: Engine>(engine: &E, model: &ModelConfig) -> Result<f64> {
    let weights = Weights::quantize(model, &master_weights(model, 0));
    let decoder = Decoder::new(engine, &weights);
    let tokens: Vec<u32> = (0..64).map(|i| i % 100 + 3).collect();
    let sequences = vec![Scored { tokens, first: 1 }; 16];
    let work = Work::Score { temperature_scale: temperature_scale(1.0), sequences };
    let run = || pollster::block_on(execute(engine, &decoder, &work, |_| ()));
    run()?;
    let started = Instant::now();
    run()?;
    let multiply_adds = 16.0 * 63.0 * model.multiply_adds(32) as f64;
    Ok(multiply_adds / started.elapsed().as_secs_f64())
}

fn work(
    args: &EngineArgs,
    lie: Lie,
    tasks: &blocking::Receiver<Task>,
    events: &mpsc::Sender<Event>,
) -> Result<()> {
    let mut duty = None;
    loop {
        match tasks.recv() {
            Err(_) => return Ok(()),
            Ok(Task::Duty(new)) => duty = Some(new),
            Ok(Task::Model(model)) => {
                let engine = engines::choose(args.engine, args.threads, model.constants())?;
                return with_engine!(&engine, |engine| {
                    compute(engine.as_ref(), &model, lie, duty, tasks, events)
                });
            }
            Ok(_) => bail!("work came before its model"),
        }
    }
}

fn compute<E: Engine>(
    engine: &E,
    model: &ModelConfig,
    lie: Lie,
    mut duty: Option<Duty>,
    tasks: &blocking::Receiver<Task>,
    events: &mpsc::Sender<Event>,
) -> Result<()> {
    let mut loaded: BTreeMap<Hash, (Arc<Weights>, Decoder<E>)> = BTreeMap::new();
    let mut loader = Loader::default();
    let imported = model.adapter.as_ref().map(|a| a.base);
    #[cfg(feature = "attacks")]
    let mut liar = lie.map(crate::attack::Liar::new);
    #[cfg(not(feature = "attacks"))]
    let () = lie;
    for task in tasks {
        match task {
            Task::Model(new) if *new == *model => {}
            Task::Model(_) => bail!("the host now has another run; join again"),
            Task::Duty(new) => duty = Some(new),
            Task::Forget(hash) => drop(loaded.remove(&hash)),
            Task::Load { want, base, blobs, get } => {
                let base = base.and_then(|b| loaded.get(&b)).map(|(w, _)| w.clone());
                let is_imported = imported == Some(want);
                let shape = if is_imported { model.frozen() } else { model.clone() };
                let event = match weights::build(want, base, &blobs, &shape, get) {
                    Ok(weights) if is_imported => {
                        loader.set_base(engine, Arc::unwrap_or_clone(weights));
                        Event::Weights { hash: want, loaded: true }
                    }
                    Ok(_) if imported.is_some() && !loader.has_base() => {
                        bail!("an adapter came before the model that it adapts")
                    }
                    Ok(weights) => {
                        let decoder = loader.load(engine, &weights, None);
                        loaded.insert(want, (weights, decoder));
                        Event::Weights { hash: want, loaded: true }
                    }
                    Err(error) => {
                        eprintln!("warning: weights cannot be loaded: {error:#}");
                        Event::Weights { hash: want, loaded: false }
                    }
                };
                // Nobody listens when the program ends.
                let _ = events.blocking_send(event);
            }
            Task::Compute { hash, unit } => {
                let started = Instant::now();
                let Some((_, decoder)) = loaded.get(&unit.weights) else {
                    bail!("a unit came before its weights");
                };
                let output = pollster::block_on(execute(engine, decoder, &unit.work, |_| ()))?;
                #[cfg(feature = "attacks")]
                let bytes = match &mut liar {
                    Some(liar) => liar.falsify(&unit.work, output),
                    None => encode_output(&output),
                };
                #[cfg(not(feature = "attacks"))]
                let bytes = encode_output(&output);
                if let Some(duty) = duty {
                    std::thread::sleep(duty.after(started.elapsed()));
                }
                let _ = events.blocking_send(Event::Computed { unit: hash, bytes });
            }
        }
    }
    Ok(())
}
