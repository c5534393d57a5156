//! The decoder, forward and backward, written once over [`Engine`].

use std::borrow::Cow;

use super::config::ModelConfig;
use super::weights::{Gradients, LAYER_TENSORS, Parameter, Weights, shapes};
use crate::engine::{Batch, Engine, EngineError, SeedRow};

/// A version of the weights on an engine.
pub struct Decoder<E: Engine> {
    /// Shape of the model.
    pub config: ModelConfig,
    embedding: E::Weight,
    layers: Vec<Layer<E>>,
    final_norm: E::Gain,
    head: Option<E::Weight>,
}

struct Layer<E: Engine> {
    attention_norm: E::Gain,
    query: E::Weight,
    key: E::Weight,
    value: E::Weight,
    output: E::Weight,
    ffn_norm: E::Gain,
    gate: E::Weight,
    up: E::Weight,
    down: E::Weight,
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
}

/// The forward pass of a batch, kept for its backward pass.
pub struct Forward<E: Engine> {
    /// (N, V) logits in `FX(16)`.
    pub logits: E::Tensor,
    caches: Vec<E::Cache>,
    saved: Vec<Saved<E>>,
    last: E::Blocks,
    last_norm: E::Norm,
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

impl<E: Engine> Decoder<E> {
    /// Uploads a version of the weights.
    pub fn new(engine: &E, weights: &Weights) -> Self {
        let p = &weights.parameters;
        let layers = p[1..].chunks_exact(LAYER_TENSORS).take(weights.config.layers);
        let layer = |l: &[Parameter]| Layer {
            attention_norm: gain(engine, &l[0]),
            query: matrix(engine, &l[1]),
            key: matrix(engine, &l[2]),
            value: matrix(engine, &l[3]),
            output: matrix(engine, &l[4]),
            ffn_norm: gain(engine, &l[5]),
            gate: matrix(engine, &l[6]),
            up: matrix(engine, &l[7]),
            down: matrix(engine, &l[8]),
        };
        let after = 1 + weights.config.layers * LAYER_TENSORS;
        Self {
            config: weights.config.clone(),
            embedding: matrix(engine, &p[0]),
            layers: layers.map(layer).collect(),
            final_norm: gain(engine, &p[after]),
            head: p.get(after + 1).map(|p| matrix(engine, p)),
        }
    }

    /// The output head: (V, C).
    pub fn head(&self) -> &E::Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Empty caches, one a layer.
    pub fn caches(&self, engine: &E, slots: usize, capacity: usize) -> Vec<E::Cache> {
        self.layers.iter().map(|_| engine.cache(slots, capacity)).collect()
    }

    /// One layer: updates the residual stream `h` (N, C) in place.
    fn layer(
        &self,
        engine: &E,
        layer: &Layer<E>,
        batch: &Batch,
        cache: &mut E::Cache,
        h: &mut E::Tensor,
    ) -> Saved<E> {
        let (attention_in, attention_norm) = engine.rmsnorm(h, &layer.attention_norm);
        let qkv = engine.linear(&attention_in, [&layer.query, &layer.key, &layer.value]);
        let queries = engine.heads(&qkv, batch, cache);
        let attention_out = engine.attention(&queries, cache, batch);
        engine.linear_add(&attention_out, &layer.output, h);
        let (ffn_in, ffn_norm) = engine.rmsnorm(h, &layer.ffn_norm);
        let gate_up = engine.linear(&ffn_in, [&layer.gate, &layer.up]);
        let ffn_out = engine.swiglu(&gate_up);
        engine.linear_add(&ffn_out, &layer.down, h);
        Saved {
            attention_in,
            attention_norm,
            queries,
            attention_out,
            ffn_in,
            ffn_norm,
            gate_up,
            ffn_out,
        }
    }

    /// Logits of the given rows only, through the caches: prefill, decoding and scoring.
    /// The batch continues what the caches hold.
    pub fn logits(
        &self,
        engine: &E,
        batch: &Batch,
        caches: &mut [E::Cache],
        rows: &[u32],
    ) -> E::Tensor {
        let mut h = engine.embed(&self.embedding, batch);
        for (layer, cache) in self.layers.iter().zip(caches) {
            self.layer(engine, layer, batch, cache, &mut h);
        }
        if rows.len() != batch.rows() {
            h = engine.rows(&h, rows);
        }
        let (last, _) = engine.rmsnorm(&h, &self.final_norm);
        let [logits] = engine.linear(&last, [self.head()]);
        logits
    }

    /// Forward pass over whole sequences, kept for [`Self::backward`].
    pub fn forward(&self, engine: &E, batch: &Batch) -> Forward<E> {
        let capacity = batch.segments.iter().map(|s| s.rows).max().unwrap_or(0);
        let mut caches = self.caches(engine, batch.segments.len(), capacity);
        let mut h = engine.embed(&self.embedding, batch);
        let layers = self.layers.iter().zip(&mut caches);
        let saved = layers.map(|(l, c)| self.layer(engine, l, batch, c, &mut h)).collect();
        let (last, last_norm) = engine.rmsnorm(&h, &self.final_norm);
        let [logits] = engine.linear(&last, [self.head()]);
        Forward { logits, caches, saved, last, last_norm }
    }

    /// Backward pass: the gradient of `sum over rows of the seeded loss` is added to `grads`.
    pub fn backward(
        &self,
        engine: &E,
        batch: &Batch,
        mut forward: Forward<E>,
        seeds: &[SeedRow],
        temperature_scale: i32,
        grads: &mut DeviceGradients<E>,
    ) {
        let d_logits = engine.seed(&forward.logits, seeds, temperature_scale);
        drop(forward.logits);
        let head_grad = grads.head.as_mut().unwrap_or(&mut grads.embedding);
        let dn =
            engine.linear_backward([&d_logits], &forward.last, [self.head()], batch, [head_grad]);
        drop(d_logits);
        let mut dh = engine.rmsnorm_backward(
            &dn,
            &forward.last_norm,
            &self.final_norm,
            &mut grads.final_norm,
            None,
        );
        for ((layer, cache), g) in
            self.layers.iter().zip(&forward.caches).zip(&mut grads.layers).rev()
        {
            let saved = forward.saved.pop().expect("one saved state a layer");
            dh = self.layer_backward(engine, layer, batch, cache, saved, dh, g);
        }
        engine.embed_backward(&dh, batch, &mut grads.embedding);
    }

    fn layer_backward(
        &self,
        engine: &E,
        layer: &Layer<E>,
        batch: &Batch,
        cache: &E::Cache,
        saved: Saved<E>,
        dh: E::Tensor,
        grads: &mut [E::Gradient; LAYER_TENSORS],
    ) -> E::Tensor {
        let [n1, q, k, v, o, n2, gate, up, down] = grads;
        let da = engine.linear_backward([&dh], &saved.ffn_out, [&layer.down], batch, [down]);
        let [dg, du] = engine.swiglu_backward(&da, &saved.gate_up);
        let w = [&layer.gate, &layer.up];
        let dn = engine.linear_backward([&dg, &du], &saved.ffn_in, w, batch, [gate, up]);
        let dh = engine.rmsnorm_backward(&dn, &saved.ffn_norm, &layer.ffn_norm, n2, Some(dh));
        let d_out =
            engine.linear_backward([&dh], &saved.attention_out, [&layer.output], batch, [o]);
        let [dq, dk, dv] = engine.attention_backward(&d_out, &saved.queries, cache, batch);
        let w = [&layer.query, &layer.key, &layer.value];
        let dn = engine.linear_backward([&dq, &dk, &dv], &saved.attention_in, w, batch, [q, k, v]);
        engine.rmsnorm_backward(&dn, &saved.attention_norm, &layer.attention_norm, n1, Some(dh))
    }
}

/// Gradient accumulators on an engine.
pub struct DeviceGradients<E: Engine> {
    embedding: E::Gradient,
    layers: Vec<[E::Gradient; LAYER_TENSORS]>,
    final_norm: E::Gradient,
    head: Option<E::Gradient>,
}

impl<E: Engine> DeviceGradients<E> {
    /// Zeros for every parameter.
    pub fn zeros(engine: &E, config: &ModelConfig) -> Self {
        let mut all = shapes(config).into_iter().map(|s| engine.gradient(s.rows, s.cols));
        let mut next = || all.next().expect("shapes lists every tensor");
        Self {
            embedding: next(),
            layers: (0..config.layers).map(|_| std::array::from_fn(|_| next())).collect(),
            final_norm: next(),
            head: (!config.tied).then(next),
        }
    }

    /// Reads the sums in the canonical order.
    pub async fn read(&self, engine: &E) -> Result<Gradients, EngineError> {
        let sums = self.view(engine).await?;
        Ok(Gradients(sums.into_iter().map(Cow::into_owned).collect()))
    }

    /// As [`Self::read`], without a copy where the engine's memory is this one.
    pub async fn view(&self, engine: &E) -> Result<Vec<Cow<'_, [i64]>>, EngineError> {
        let all = std::iter::once(&self.embedding)
            .chain(self.layers.iter().flatten())
            .chain(std::iter::once(&self.final_norm))
            .chain(&self.head);
        let mut out = Vec::new();
        for gradient in all {
            out.push(engine.read_gradient(gradient).await?);
        }
        Ok(out)
    }
}
