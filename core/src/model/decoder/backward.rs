//! The backward pass, and what a forward pass keeps for it.

use super::{Adapted, Decoder, DeviceGradients, Projection, Range, Saved, Slots};
use crate::engine::{Back, Batch, Engine, SeedRow};

/// What the forward pass of a layer keeps for its backward pass. Either gives the same bits and
/// the same counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All that is needed.
    All,
    /// Its input only, from which it is computed once more: gradient checkpointing (Chen et al.
    /// 2016, arXiv:1604.06174), one checkpoint a layer.
    Input,
}

enum Kept<E: Engine> {
    All(E::Cache, Saved<E>),
    Input(E::Tensor),
}

/// The forward pass of a batch, kept for its backward pass.
pub struct Forward<E: Engine> {
    /// (N, C) the residual stream after all layers.
    pub states: E::Tensor,
    kept: Vec<Kept<E>>,
}

/// The output head on some rows, kept for its backward pass.
pub struct Head<E: Engine> {
    /// (R, V) logits in `FX(16)`.
    pub logits: E::Tensor,
    last: E::Blocks,
    norm: E::Norm,
    rows: Batch,
}

impl<E: Engine> Decoder<E> {
    /// Forward pass over whole sequences.
    pub fn forward(&self, engine: &E, batch: &Batch, keep: Keep) -> Forward<E> {
        let mut states = engine.embed(&self.frozen.embedding, batch);
        let ones = self.ones(engine, batch.rows());
        let mut keep_one = |layer: &Adapted<'_, E>| {
            let input = (keep == Keep::Input).then(|| engine.concat(&[&states]));
            let (cache, saved) = Self::whole_layer(engine, layer, batch, &mut states);
            input.map_or_else(|| Kept::All(cache, saved), Kept::Input)
        };
        let kept = self.layers(ones.as_ref()).map(|layer| keep_one(&layer)).collect();
        Forward { states, kept }
    }

    /// A layer of whole sequences, with a cache of its own.
    fn whole_layer(
        engine: &E,
        layer: &Adapted<'_, E>,
        batch: &Batch,
        h: &mut E::Tensor,
    ) -> (E::Cache, Saved<E>) {
        let capacity = batch.segments.iter().map(|s| s.rows).max().unwrap_or(0);
        let mut cache = engine.cache(batch.segments.len(), capacity);
        let saved = Self::layer(engine, layer, batch, &mut cache, h);
        (cache, saved)
    }

    /// The head on a piece of the rows of `states`, see [`Batch::pieces`].
    pub fn head_forward(
        &self,
        engine: &E,
        states: &E::Tensor,
        (range, rows): (Range<usize>, Batch),
    ) -> Head<E> {
        let rows_of_states: Vec<u32> = range.map(|row| row as u32).collect();
        let h = engine.rows(states, &rows_of_states);
        let (last, norm) = engine.rmsnorm(&h, &self.frozen.final_norm);
        let [logits] = engine.linear(&last, [self.head()]);
        Head { logits, last, norm, rows }
    }

    /// Backward pass of the head: the gradient of `sum over rows of the seeded loss` by its
    /// parameters is added to `grads`, that by the states (R, C) is returned.
    pub fn head_backward(
        &self,
        engine: &E,
        head: Head<E>,
        seeds: &[SeedRow],
        temperature_scale: i32,
        grads: &mut DeviceGradients<E>,
    ) -> E::Tensor {
        let d_logits = engine.seed(&head.logits, seeds, temperature_scale);
        drop(head.logits);
        let mut grads = grads.slots();
        let grad = grads.head.take().or(grads.embedding);
        let back = Back { dy: &d_logits, w: self.head(), grad };
        let dn = engine.linear_backward(&head.last, &head.rows, vec![back]);
        let (norm, gain) = (&head.norm, &self.frozen.final_norm);
        engine.rmsnorm_backward(&dn, norm, gain, grads.final_norm, None)
    }

    /// Backward pass of the layers, from the gradient `dh` (N, C) of their states: those of their
    /// parameters and of the embedding are added to `grads`.
    pub fn backward(
        &self,
        engine: &E,
        batch: &Batch,
        forward: Forward<E>,
        mut dh: E::Tensor,
        grads: &mut DeviceGradients<E>,
    ) {
        drop(forward.states);
        let grads = grads.slots();
        let ones = self.ones(engine, batch.rows());
        let layers = self.layers(ones.as_ref()).zip(forward.kept).zip(grads.layers);
        for ((layer, kept), slots) in layers.rev() {
            let (cache, saved) = match kept {
                Kept::All(cache, saved) => (cache, saved),
                Kept::Input(mut h) => {
                    // What it clamps was counted the first time.
                    engine.count_saturations(false);
                    let again = Self::whole_layer(engine, &layer, batch, &mut h);
                    engine.count_saturations(true);
                    again
                }
            };
            dh = Self::layer_backward(engine, &layer, batch, &cache, saved, dh, slots);
        }
        if let Some(embedding) = grads.embedding {
            engine.embed_backward(&dh, batch, embedding);
        }
    }

    fn layer_backward(
        engine: &E,
        layer: &Adapted<'_, E>,
        batch: &Batch,
        cache: &E::Cache,
        mut saved: Saved<E>,
        dh: E::Tensor,
        mut slots: Slots<'_, E>,
    ) -> E::Tensor {
        use Projection::{Down, Gate, Key, Output, Query, Up, Value};
        let [attention_grad, ffn_grad] = std::mem::take(&mut slots.norms);
        let inner = &mut saved.inner;
        let dy = [(Down, &dh)];
        let da = layer.linear_backward(engine, dy, &saved.ffn_out, batch, inner, &mut slots);
        let [dg, du] = engine.swiglu_backward(&da, &saved.gate_up);
        let dy = [(Gate, &dg), (Up, &du)];
        let dn = layer.linear_backward(engine, dy, &saved.ffn_in, batch, inner, &mut slots);
        let (norm, gain) = (&saved.ffn_norm, &layer.layer.ffn_norm);
        let dh = engine.rmsnorm_backward(&dn, norm, gain, ffn_grad, Some(dh));
        let dy = [(Output, &dh)];
        let d_out =
            layer.linear_backward(engine, dy, &saved.attention_out, batch, inner, &mut slots);
        let [dq, dk, dv] = engine.attention_backward(&d_out, &saved.queries, cache, batch);
        let dy = [(Query, &dq), (Key, &dk), (Value, &dv)];
        let dn = layer.linear_backward(engine, dy, &saved.attention_in, batch, inner, &mut slots);
        let (norm, gain) = (&saved.attention_norm, &layer.layer.attention_norm);
        engine.rmsnorm_backward(&dn, norm, gain, attention_grad, Some(dh))
    }
}
