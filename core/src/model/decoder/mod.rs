//! The decoder, forward and backward, written once over [`Engine`].

mod backward;
mod gradients;
mod loader;

use std::borrow::Borrow;
use std::ops::Range;
use std::sync::Arc;

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::ACTIVATION_FRACTION;

pub use self::backward::{Forward, Head, Keep};
pub use self::gradients::DeviceGradients;
use self::gradients::Slots;
pub use self::loader::Loader;
use super::adapter::{PROJECTIONS, Projection};
use super::config::ModelConfig;
use super::weights::{BIAS_COLS, BIASED, Parameter, Weights};
use crate::engine::{Back, Batch, Engine};

/// A version of the weights on an engine. Decoders that adapt one frozen model share it.
pub struct Decoder<E: Engine> {
    /// Shape of the model.
    pub config: ModelConfig,
    frozen: Arc<Frozen<E>>,
    /// One a layer, or none at all.
    adapters: Vec<Adapters<E>>,
}

struct Frozen<E: Engine> {
    embedding: E::Weight,
    layers: Vec<Layer<E>>,
    final_norm: E::Gain,
    head: Option<E::Weight>,
}

struct Layer<E: Engine> {
    attention_norm: E::Gain,
    ffn_norm: E::Gain,
    /// By [`Projection`].
    projections: [E::Weight; PROJECTIONS],
    /// Of queries, keys and values, if the model has them; see [`BIAS_COLS`].
    biases: Option<[E::Weight; BIASED.len()]>,
}

/// `a` (r, C) and `b` (O, r) of each [`Projection`] that has them.
type Adapters<E> = [Option<[<E as Engine>::Weight; 2]>; PROJECTIONS];

/// A layer with its adapters.
struct Adapted<'a, E: Engine> {
    layer: &'a Layer<E>,
    adapters: Option<&'a Adapters<E>>,
    ones: Option<&'a E::Blocks>,
}

/// What a layer's backward pass reads.
struct Saved<E: Engine> {
    attention_in: E::Blocks,
    attention_norm: E::Norm,
    queries: E::Queries,
    attention_out: E::Blocks,
    ffn_in: E::Blocks,
    ffn_norm: E::Norm,
    gate_up: [E::Tensor; 2],
    ffn_out: E::Blocks,
    /// `x A^T` of each projection that has an adapter.
    inner: [Option<E::Blocks>; PROJECTIONS],
}

/// Uploads of a parameter, by kind; a mismatch is a bug in the order of the parameters.
fn matrix<E: Engine>(engine: &E, p: &Parameter) -> E::Weight {
    match p {
        Parameter::Matrix(tiles) => engine.weight(tiles),
        Parameter::Gain(_) => panic!("expected a matrix"),
    }
}

fn gain<E: Engine>(engine: &E, p: &Parameter) -> E::Gain {
    match p {
        Parameter::Gain(g) => engine.gain(g),
        Parameter::Matrix(_) => panic!("expected a gain"),
    }
}

impl<'a, E: Engine> Adapted<'a, E> {
    fn weight(&self, projection: Projection) -> &'a E::Weight {
        &self.layer.projections[projection as usize]
    }

    fn factors(&self, projection: Projection) -> Option<&'a [E::Weight; 2]> {
        self.adapters.and_then(|a| a[projection as usize].as_ref())
    }

    /// Adds what the adapter of a projection of `x` gives to `y`; keeps its inner product.
    fn add(
        &self,
        engine: &E,
        projection: Projection,
        x: &E::Blocks,
        y: &mut E::Tensor,
        inner: &mut [Option<E::Blocks>; PROJECTIONS],
    ) {
        let Some([a, b]) = self.factors(projection) else { return };
        let [u] = engine.linear(x, [a]);
        let u = engine.blocks(&u);
        engine.linear_add(&u, b, y);
        inner[projection as usize] = Some(u);
    }

    /// `projections` of one `x`.
    fn linear<const K: usize>(
        &self,
        engine: &E,
        projections: [Projection; K],
        x: &E::Blocks,
        inner: &mut [Option<E::Blocks>; PROJECTIONS],
    ) -> [E::Tensor; K] {
        let mut y = engine.linear(x, projections.map(|p| self.weight(p)));
        for (projection, y) in projections.into_iter().zip(&mut y) {
            self.add(engine, projection, x, y, inner);
        }
        y
    }

    /// Queries, keys and values.
    fn queries_keys_values(
        &self,
        engine: &E,
        x: &E::Blocks,
        inner: &mut [Option<E::Blocks>; PROJECTIONS],
    ) -> [E::Tensor; BIASED.len()] {
        let mut out = self.linear(engine, BIASED, x, inner);
        if let (Some(biases), Some(ones)) = (&self.layer.biases, self.ones) {
            let each = biases.iter().zip(&mut out);
            each.for_each(|(bias, y)| engine.linear_add(ones, bias, y));
        }
        out
    }

    /// Adds a projection of `x` to the residual stream.
    fn linear_add(
        &self,
        engine: &E,
        projection: Projection,
        x: &E::Blocks,
        h: &mut E::Tensor,
        inner: &mut [Option<E::Blocks>; PROJECTIONS],
    ) {
        engine.linear_add(x, self.weight(projection), h);
        self.add(engine, projection, x, h, inner);
    }

    /// The gradient of [`Self::linear`]: that of `x`, first of the matrices, then of the adapters.
    fn linear_backward<const K: usize>(
        &self,
        engine: &E,
        dy: [(Projection, &E::Tensor); K],
        x: &E::Blocks,
        batch: &Batch,
        inner: &mut [Option<E::Blocks>; PROJECTIONS],
        slots: &mut Slots<'_, E>,
    ) -> E::Tensor {
        let mut factors = Vec::new();
        let mut products = Vec::with_capacity(2 * K);
        for (projection, dy) in dy {
            let at = projection as usize;
            products.push(Back { dy, w: self.weight(projection), grad: slots.weights[at].take() });
            if let (Some([a, b]), Some(u)) = (self.factors(projection), inner[at].take()) {
                let [grad_a, grad_b] =
                    slots.factors[at].take().map_or([None, None], |g| g.map(Some));
                let du = engine.linear_backward(&u, batch, vec![Back { dy, w: b, grad: grad_b }]);
                factors.push((du, a, grad_a));
            }
        }
        let factors = factors.iter_mut();
        products.extend(factors.map(|(dy, w, grad)| Back { dy, w: *w, grad: grad.take() }));
        engine.linear_backward(x, batch, products)
    }
}

impl<E: Engine> Decoder<E> {
    /// Uploads a version of the weights.
    ///
    /// # Panics
    /// If it is one of an adapter, see [`Self::adapt`].
    pub fn new(engine: &E, weights: &Weights) -> Self {
        Self::upload(engine, &weights.config, weights.parameters.iter())
    }

    /// As [`Self::new`]; each parameter is freed once it is uploaded.
    pub fn take(engine: &E, weights: Weights) -> Self {
        Self::upload(engine, &weights.config, weights.parameters.into_iter())
    }

    fn upload<P: Borrow<Parameter>>(
        engine: &E,
        config: &ModelConfig,
        mut parameters: impl Iterator<Item = P>,
    ) -> Self {
        assert!(config.adapter.is_none(), "an adapter is no whole model");
        let mut next = || parameters.next().expect("a version has all parameters");
        let embedding = matrix(engine, next().borrow());
        let mut layer = || {
            let attention_norm = gain(engine, next().borrow());
            let [query, key, value, output] =
                std::array::from_fn(|_| matrix(engine, next().borrow()));
            let biases =
                config.bias.then(|| std::array::from_fn(|_| matrix(engine, next().borrow())));
            let ffn_norm = gain(engine, next().borrow());
            let [gate, up, down] = std::array::from_fn(|_| matrix(engine, next().borrow()));
            let projections = [query, key, value, output, gate, up, down];
            Layer { attention_norm, ffn_norm, projections, biases }
        };
        let layers = (0..config.layers).map(|_| layer()).collect();
        let final_norm = gain(engine, next().borrow());
        let head = (!config.tied).then(|| matrix(engine, next().borrow()));
        let frozen = Arc::new(Frozen { embedding, layers, final_norm, head });
        Self { config: config.clone(), frozen, adapters: Vec::new() }
    }

    /// This model with an adapter on it.
    ///
    /// # Panics
    /// If `weights` are not those of an adapter.
    pub fn adapt(&self, engine: &E, weights: &Weights) -> Self {
        let adapter = weights.config.adapter.as_ref().expect("the weights are an adapter's");
        let layers = weights.parameters.chunks_exact(2 * adapter.targets.len());
        let layer = |parameters: &[Parameter]| {
            let mut out: Adapters<E> = std::array::from_fn(|_| None);
            for (target, pair) in adapter.targets.iter().zip(parameters.as_chunks().0) {
                let [a, b]: &[Parameter; 2] = pair;
                out[*target as usize] = Some([matrix(engine, a), matrix(engine, b)]);
            }
            out
        };
        Self {
            config: weights.config.clone(),
            frozen: self.frozen.clone(),
            adapters: layers.map(layer).collect(),
        }
    }

    /// All layers; `ones` as [`Self::ones`] gives it.
    fn layers<'a>(
        &'a self,
        ones: Option<&'a E::Blocks>,
    ) -> impl DoubleEndedIterator<Item = Adapted<'a, E>> + ExactSizeIterator {
        let layers = self.frozen.layers.iter().enumerate();
        layers.map(move |(i, layer)| Adapted { layer, adapters: self.adapters.get(i), ones })
    }

    /// What biases are multiplied with: (`rows`, 96) with a one at the beginning of each block.
    fn ones(&self, engine: &E, rows: usize) -> Option<E::Blocks> {
        let one = |i: usize| i32::from(i.is_multiple_of(BLOCK)) << ACTIVATION_FRACTION;
        let ones = || (0..rows * BIAS_COLS).map(one).collect::<Vec<i32>>();
        self.config.bias.then(|| engine.blocks(&engine.tensor(&ones(), BIAS_COLS)))
    }

    /// The output head: (V, C).
    pub fn head(&self) -> &E::Weight {
        self.frozen.head.as_ref().unwrap_or(&self.frozen.embedding)
    }

    /// Empty caches, one a layer.
    pub fn caches(&self, engine: &E, slots: usize, capacity: usize) -> Vec<E::Cache> {
        self.frozen.layers.iter().map(|_| engine.cache(slots, capacity)).collect()
    }

    /// One layer: updates the residual stream `h` (N, C) in place.
    fn layer(
        engine: &E,
        layer: &Adapted<'_, E>,
        batch: &Batch,
        cache: &mut E::Cache,
        h: &mut E::Tensor,
    ) -> Saved<E> {
        use Projection::{Down, Gate, Output, Up};
        let mut inner = std::array::from_fn(|_| None);
        let (attention_in, attention_norm) = engine.rmsnorm(h, &layer.layer.attention_norm);
        let qkv = layer.queries_keys_values(engine, &attention_in, &mut inner);
        let queries = engine.heads(&qkv, batch, cache);
        let attention_out = engine.attention(&queries, cache, batch);
        layer.linear_add(engine, Output, &attention_out, h, &mut inner);
        let (ffn_in, ffn_norm) = engine.rmsnorm(h, &layer.layer.ffn_norm);
        let gate_up = layer.linear(engine, [Gate, Up], &ffn_in, &mut inner);
        let ffn_out = engine.swiglu(&gate_up);
        layer.linear_add(engine, Down, &ffn_out, h, &mut inner);
        Saved {
            attention_in,
            attention_norm,
            queries,
            attention_out,
            ffn_in,
            ffn_norm,
            gate_up,
            ffn_out,
            inner,
        }
    }

    /// The residual stream (N, C) after all layers; the batch continues what the caches hold.
    pub fn states(&self, engine: &E, batch: &Batch, caches: &mut [E::Cache]) -> E::Tensor {
        let mut h = engine.embed(&self.frozen.embedding, batch);
        let ones = self.ones(engine, batch.rows());
        for (layer, cache) in self.layers(ones.as_ref()).zip(caches) {
            Self::layer(engine, &layer, batch, cache, &mut h);
        }
        h
    }

    /// Logits (R, V) in `FX(16)` of rows (R, C) of the residual stream after all layers.
    pub fn logits(&self, engine: &E, h: &E::Tensor) -> E::Tensor {
        let (last, _) = engine.rmsnorm(h, &self.frozen.final_norm);
        let [logits] = engine.linear(&last, [self.head()]);
        logits
    }
}
