//! Where the gradient of every parameter is summed.

use crate::engine::{Engine, EngineError};
use crate::model::adapter::PROJECTIONS;
use crate::model::config::ModelConfig;
use crate::model::weights::{BIASED, Gradients, shapes};

/// Gradient accumulators on an engine, in the order of [`shapes`].
pub struct DeviceGradients<E: Engine> {
    config: ModelConfig,
    all: Vec<E::Gradient>,
}

/// Where the gradients of a layer go; `None` for what is not trained.
pub(super) struct Slots<'a, E: Engine> {
    pub(super) norms: [Option<&'a mut E::Gradient>; 2],
    pub(super) weights: [Option<&'a mut E::Gradient>; PROJECTIONS],
    pub(super) factors: [Option<[&'a mut E::Gradient; 2]>; PROJECTIONS],
}

/// Where all gradients go.
pub(super) struct AllSlots<'a, E: Engine> {
    pub(super) embedding: Option<&'a mut E::Gradient>,
    pub(super) layers: Vec<Slots<'a, E>>,
    pub(super) final_norm: Option<&'a mut E::Gradient>,
    pub(super) head: Option<&'a mut E::Gradient>,
}

impl<E: Engine> DeviceGradients<E> {
    /// Zeros for every parameter.
    pub fn zeros(engine: &E, config: &ModelConfig) -> Self {
        let all = shapes(config).into_iter().map(|s| engine.gradient(s.rows, s.cols));
        Self { config: config.clone(), all: all.collect() }
    }

    pub(super) fn slots(&mut self) -> AllSlots<'_, E> {
        let mut next = self.all.iter_mut();
        let is_whole = self.config.adapter.is_none();
        let targets = self.config.adapter.as_ref().map_or(&[][..], |a| &a.targets);
        let embedding = if is_whole { next.next() } else { None };
        let mut layer = || {
            let mut slots = Slots {
                norms: [None, None],
                weights: std::array::from_fn(|_| None),
                factors: std::array::from_fn(|_| None),
            };
            if is_whole {
                slots.norms[0] = next.next();
                slots.weights[..4].iter_mut().for_each(|w| *w = next.next());
                if self.config.bias {
                    // Biases stay as they are, and their gradients zero.
                    next.by_ref().take(BIASED.len()).for_each(drop);
                }
                slots.norms[1] = next.next();
                slots.weights[4..].iter_mut().for_each(|w| *w = next.next());
            }
            for target in targets {
                slots.factors[*target as usize] = next.next().zip(next.next()).map(|(a, b)| [a, b]);
            }
            slots
        };
        let layers = (0..self.config.layers).map(|_| layer()).collect();
        AllSlots { embedding, layers, final_norm: next.next(), head: next.next() }
    }

    /// The sums in the canonical order.
    pub async fn read(self, engine: &E) -> Result<Gradients, EngineError> {
        Self::read_sum(vec![self], engine).await
    }

    /// The sums of all of these, in the canonical order.
    pub async fn read_sum(all: Vec<Self>, engine: &E) -> Result<Gradients, EngineError> {
        let mut lists: Vec<Vec<E::Gradient>> = Vec::new();
        for gradients in all {
            lists.resize_with(gradients.all.len(), Vec::new);
            lists.iter_mut().zip(gradients.all).for_each(|(list, g)| list.push(g));
        }
        Ok(Gradients(engine.take_gradients(lists).await?))
    }
}
