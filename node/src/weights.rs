//! Weights from blobs: a version is a chain of changes to an earlier one, or to nothing.

use std::sync::Arc;

use anyhow::{Context, Result};
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
    let mut missing = None;
    let found = blobs.iter().map_while(|hash| {
        let bytes = get(hash);
        missing = bytes.is_none().then_some(*hash);
        bytes
    });
    let built = delta::build(want, base, found, model);
    match missing {
        Some(hash) => anyhow::bail!("the blob {hash} is missing"),
        None => built.with_context(|| format!("the weights {want} cannot be made")),
    }
}
