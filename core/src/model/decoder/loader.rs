//! Versions of the weights, one after another, on one engine.

use super::Decoder;
use crate::engine::Engine;
use crate::model::weights::Weights;

/// Puts versions of the weights on an engine, and once the model that they adapt, if they do.
pub struct Loader<E: Engine> {
    base: Option<Decoder<E>>,
}

impl<E: Engine> Default for Loader<E> {
    fn default() -> Self {
        Self { base: None }
    }
}

impl<E: Engine> Loader<E> {
    /// The decoder of a version. `imported` is the model that its adapter adapts.
    ///
    /// # Panics
    /// If there is an adapter and never was such a model.
    pub fn load(
        &mut self,
        engine: &E,
        weights: &Weights,
        imported: Option<&Weights>,
    ) -> Decoder<E> {
        if weights.config.adapter.is_none() {
            return Decoder::new(engine, weights);
        }
        let base = || Decoder::new(engine, imported.expect("an adapter comes with its model"));
        self.base.get_or_insert_with(base).adapt(engine, weights)
    }

    /// Takes the model that the versions to come adapt.
    pub fn set_base(&mut self, engine: &E, imported: Weights) {
        self.base = Some(Decoder::take(engine, imported));
    }

    /// Whether the model that versions adapt is there.
    pub fn has_base(&self) -> bool {
        self.base.is_some()
    }
}
