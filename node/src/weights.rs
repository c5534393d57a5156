//! Weights from blobs: a version is a chain of changes to an earlier one, or to nothing.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::weights::Weights;
use manyhands_core::swarm::delta;
use manyhands_core::swarm::ids::Hash;

/// Applies `blobs` in order, to `base` or to nothing. Every step checks the hashes of what it
/// changes and of what comes out.
pub fn build(
    want: Hash,
    base: Option<Arc<Weights>>,
    blobs: &[Hash],
    model: &ModelConfig,
    get: impl Fn(&Hash) -> Option<Vec<u8>>,
) -> Result<Arc<Weights>> {
    let mut weights = base;
    for hash in blobs {
        let bytes = get(hash).with_context(|| format!("the blob {hash} is missing"))?;
        let next = delta::apply(weights.as_deref(), model, &bytes);
        weights = Some(Arc::new(next.with_context(|| format!("the blob {hash} cannot be used"))?));
    }
    let weights = weights.context("nothing says how these weights are made")?;
    ensure!(Hash::from(weights.hash()) == want, "the weights do not have the hash {want}");
    Ok(weights)
}
