//! The own engine of a coordination peer: computes audits, one after the other, in a thread.

use std::sync::{Arc, mpsc};

use anyhow::{Context, Result};
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, Loader};
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::execute;
use manyhands_core::swarm::coordinator::Execution;
use manyhands_core::swarm::ids::Hash;
use manyhands_core::swarm::scheduler::TaskId;
use manyhands_core::swarm::unit::{Unit, decode_output, encode_output};

use super::keep::find;
use crate::blobs::BlobStore;
use crate::engines::thread_count;
use crate::storage::Storage;
use crate::weights;

/// Versions that are kept on the engine.
const DECODERS_MAX: usize = 3;

/// Where audits go in. What comes out goes to `done`.
pub(super) fn start(
    model: ModelConfig,
    imported: Option<Arc<Weights>>,
    threads: usize,
    storage: Arc<Storage>,
    served: Arc<BlobStore>,
    done: impl Fn(TaskId, Result<Hash>) + Send + 'static,
) -> mpsc::Sender<Execution> {
    let (send, receive) = mpsc::channel::<Execution>();
    std::thread::spawn(move || {
        let engine = Cpu::new(model.constants(), thread_count(threads), None);
        let mut shelf = Shelf { imported, loader: Loader::default(), decoders: Vec::new() };
        for execution in receive {
            let get = |hash: &Hash| find(&storage, &served, hash);
            let id = execution.audit;
            done(id, audit(&engine, &model, &mut shelf, &execution, get));
        }
    });
    send
}

/// The versions that are on the engine.
struct Shelf {
    /// What they adapt, if they do.
    imported: Option<Arc<Weights>>,
    loader: Loader<Cpu>,
    decoders: Vec<(Hash, Decoder<Cpu>)>,
}

fn audit(
    engine: &Cpu,
    model: &ModelConfig,
    Shelf { imported, loader, decoders }: &mut Shelf,
    execution: &Execution,
    get: impl Fn(&Hash) -> Option<Vec<u8>>,
) -> Result<Hash> {
    let unit = get(&execution.unit).context("the unit is not stored")?;
    let unit = Unit::decode(&unit, model)?;
    let claimed = get(&execution.result).context("the result is not stored")?;
    let claimed = decode_output(&claimed, &unit.work, model)?;
    if !decoders.iter().any(|(hash, _)| *hash == unit.weights) {
        let imported = imported.as_deref();
        let decoder = match &execution.version {
            Some(version) => loader.load(engine, &version.weights, imported),
            None => {
                let built = weights::build(unit.weights, None, &execution.plan, model, &get)?;
                loader.load(engine, &built, imported)
            }
        };
        decoders.push((unit.weights, decoder));
        let surplus = decoders.len().saturating_sub(DECODERS_MAX);
        decoders.drain(..surplus);
    }
    let found = decoders.iter().find(|(hash, _)| *hash == unit.weights);
    let (_, decoder) = found.context("the decoder was just loaded")?;
    let work = unit.work.audit(&claimed);
    let output = pollster::block_on(execute(engine, decoder, &work, |_| ()))?;
    Ok(Hash::of(&encode_output(&output)))
}
