//! The engines: three implementations of one small set of operations, equal bit for bit.
//!
//! [`twin::Twin`] is the definition (plain loops), `cpu::Cpu` runs everywhere with threads and
//! SIMD, `gpu::Gpu` is wgpu. The model ([`crate::model::decoder`]) is written once over
//! [`Engine`]. Tensors live in the engine; only scalars, sampled tokens and gradients are read.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod twin;

use std::future::Future;
use std::ops::Range;

pub use crate::parallel::Share;
pub use manyhands_shaders::bfp::Tiles;
pub use manyhands_shaders::twin::logits::{RowStats, SeedRow};
pub use manyhands_shaders::twin::{Saturations, Segment};
use manyhands_shaders::twin::{
    attention::AttentionConstants, rmsnorm::NormConstants, rope::RopeTable,
};

/// Integer constants of a model that every engine needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constants {
    /// Norm over the width.
    pub norm: NormConstants,
    /// Attention shape and scales.
    pub attention: AttentionConstants,
    /// Rotary tables for the whole context.
    pub rope: RopeTable,
}

/// Tokens of one or more sequences: segment after segment, row after row, without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// (N) token ids.
    pub tokens: Vec<u32>,
    /// Which rows belong to which sequence.
    pub segments: Vec<Segment>,
}

impl Batch {
    /// Whole sequences from position 0, sequence `i` in cache slot `i`.
    pub fn sequences<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut batch = Self::default();
        for (slot, tokens) in sequences.into_iter().enumerate() {
            batch.push(slot, 0, tokens);
        }
        batch
    }

    /// Appends `tokens` of the sequence in `slot`, the first of them at `position`.
    pub fn push(&mut self, slot: usize, position: usize, tokens: &[u32]) {
        let first_row = self.tokens.len();
        self.segments.push(Segment { first_row, rows: tokens.len(), slot, position });
        self.tokens.extend_from_slice(tokens);
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The rows of whole sequences in pieces of at most `max` rows (or [`PIECE_ROWS`], if that is
    /// more), each as a batch of its own. Sequences are cut where [`PIECE_ROWS`] says, whatever
    /// `max` is: what is summed over the rows of a segment does not depend on it.
    pub fn pieces(&self, max: usize) -> Vec<(Range<usize>, Self)> {
        let mut pieces: Vec<(Range<usize>, Self)> = Vec::new();
        for segment in &self.segments {
            for position in (0..segment.rows).step_by(PIECE_ROWS) {
                let first = segment.first_row + position;
                let end = first + PIECE_ROWS.min(segment.rows - position);
                if pieces.last().is_none_or(|(rows, _)| end - rows.start > max) {
                    pieces.push((first..first, Self::default()));
                }
                let (rows, piece) = pieces.last_mut().expect("there is one now");
                piece.push(segment.slot, position, &self.tokens[first..end]);
                rows.end = end;
            }
        }
        pieces
    }
}

/// Rows after which [`Batch::pieces`] cuts a sequence: so few that the logits of a vocabulary of
/// 200,000 tokens fit the smallest buffer that WebGPU guarantees.
pub const PIECE_ROWS: usize = 128;

/// Copies part `from` of parts of `len` elements over part `to`.
fn copy_part<T: Copy>(x: &mut [T], len: usize, from: usize, to: usize) {
    x.copy_within(from * len..(from + 1) * len, to * len);
}

/// Why an engine could not finish. The CPU engines never fail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The device went away: driver reset, unplugged, or out of memory.
    #[error("the graphics device was lost ({0}); start again, or use --engine cpu")]
    DeviceLost(String),
    /// A buffer larger than the adapter allows.
    #[error(
        "a buffer of {needed} bytes is over this adapter's limit of {limit}; use a smaller batch or --engine cpu"
    )]
    BufferTooLarge {
        /// Bytes asked for.
        needed: u64,
        /// Bytes allowed.
        limit: u64,
    },
}

/// A product on its way back: `y = x W^T` gave `dy`.
pub struct Back<'a, E: Engine + ?Sized> {
    /// (N, O) gradient of the product, `FX(20)`.
    pub dy: &'a E::Tensor,
    /// (O, C).
    pub w: &'a E::Weight,
    /// Where the weights' gradient is added; `None` for weights that are not trained.
    pub grad: Option<&'a mut E::Gradient>,
}

/// One implementation of the decoder's operations. N rows, C channels, V vocabulary.
///
/// Operations that return tensors may run later; the `async` reads wait for them. Shape mismatches
/// are bugs and panic. Each operation is defined by the function of [`manyhands_shaders::twin`]
/// that its documentation names.
pub trait Engine {
    /// (N, C) `i32` fixed point.
    type Tensor;
    /// (N, C) 11-bit block floating point, blocks of 32 channels: the input of a product.
    type Blocks;
    /// What RMSNorm keeps for its backward pass.
    type Norm;
    /// A weight matrix (O, C), ready for `x W^T` and `dy W`, and as an embedding.
    type Weight: Share;
    /// (C) gains in Q3.12.
    type Gain: Share;
    /// (N, H, D) rotated queries.
    type Queries;
    /// Keys and values of one layer.
    type Cache;
    /// The integer gradient of one parameter tensor, `FX(16)`, summed in 64 bits.
    type Gradient: Share;

    /// The model's constants, given at construction.
    fn constants(&self) -> &Constants;
    /// Uploads a weight matrix.
    fn weight(&self, tiles: &Tiles) -> Self::Weight;
    /// Uploads gains (C).
    fn gain(&self, gain: &[i32]) -> Self::Gain;
    /// Uploads a tensor (N, `cols`).
    fn tensor(&self, data: &[i32], cols: usize) -> Self::Tensor;
    /// An empty cache of `slots` sequences of up to `capacity` tokens.
    fn cache(&self, slots: usize, capacity: usize) -> Self::Cache;
    /// A zero gradient of `rows` x `cols` parameters.
    fn gradient(&self, rows: usize, cols: usize) -> Self::Gradient;

    /// Quantises a tensor (N, C) in `FX(16)` to the input of a product.
    fn blocks(&self, x: &Self::Tensor) -> Self::Blocks;
    /// `twin::embedding::forward`: (N, C).
    fn embed(&self, embedding: &Self::Weight, batch: &Batch) -> Self::Tensor;
    /// `twin::rmsnorm::forward`, quantised to blocks.
    fn rmsnorm(&self, h: &Self::Tensor, gain: &Self::Gain) -> (Self::Blocks, Self::Norm);
    /// `twin::matmul::matmul` of `x` (N, C) with each of `w` (O, C): (N, O) in `FX(16)` each.
    fn linear<const K: usize>(&self, x: &Self::Blocks, w: [&Self::Weight; K]) -> [Self::Tensor; K];
    /// `h = sat(h + x W^T)`.
    fn linear_add(&self, x: &Self::Blocks, w: &Self::Weight, h: &mut Self::Tensor);
    /// `twin::attention::heads`.
    fn heads(
        &self,
        qkv: &[Self::Tensor; 3],
        batch: &Batch,
        cache: &mut Self::Cache,
    ) -> Self::Queries;
    /// What the cache holds of the sequence in slot `from` also becomes that of slot `to`.
    fn copy_slot(&self, cache: &mut Self::Cache, from: usize, to: usize);
    /// `twin::attention::forward`, quantised to blocks.
    fn attention(&self, q: &Self::Queries, cache: &Self::Cache, batch: &Batch) -> Self::Blocks;
    /// `twin::swiglu::forward` of (gate, up), quantised to blocks.
    fn swiglu(&self, gate_up: &[Self::Tensor; 2]) -> Self::Blocks;
    /// The given rows of `x`, in the given order.
    fn rows(&self, x: &Self::Tensor, rows: &[u32]) -> Self::Tensor;
    /// The rows of all of `parts`, one after another; they have the same C.
    fn concat(&self, parts: &[&Self::Tensor]) -> Self::Tensor;

    /// `twin::logits::seed`: (N, V) in `FX(20)`.
    fn seed(&self, logits: &Self::Tensor, rows: &[SeedRow], scale: i32) -> Self::Tensor;
    /// Gradient of products of one `x` (N, C), at least one: returns `dx = sat(sum of dy_k W_k)` in
    /// their order, in `FX(20)`; `grad_k +=` `twin::matmul::weight_gradient`.
    fn linear_backward(
        &self,
        x: &Self::Blocks,
        batch: &Batch,
        products: Vec<Back<'_, Self>>,
    ) -> Self::Tensor;
    /// `twin::rmsnorm::backward`: `dh = sat(dh + ...)`, `grad +=`. `dh` of `None` counts as zero,
    /// `grad` of `None` is that of gains that are not trained.
    fn rmsnorm_backward(
        &self,
        dn: &Self::Tensor,
        norm: &Self::Norm,
        gain: &Self::Gain,
        grad: Option<&mut Self::Gradient>,
        dh: Option<Self::Tensor>,
    ) -> Self::Tensor;
    /// `twin::swiglu::backward`: gradients of (gate, up).
    fn swiglu_backward(&self, da: &Self::Tensor, gate_up: &[Self::Tensor; 2]) -> [Self::Tensor; 2];
    /// `twin::attention_backward::backward`: gradients of (q, k, v) before rotation.
    fn attention_backward(
        &self,
        d_out: &Self::Tensor,
        q: &Self::Queries,
        cache: &Self::Cache,
        batch: &Batch,
    ) -> [Self::Tensor; 3];
    /// `twin::embedding::backward`: `grad +=`.
    fn embed_backward(&self, dh: &Self::Tensor, batch: &Batch, grad: &mut Self::Gradient);

    /// `twin::logits::stats` of every row for the given targets.
    fn stats(
        &self,
        logits: &Self::Tensor,
        targets: &[u32],
        scale: i32,
    ) -> impl Future<Output = Result<Vec<RowStats>, EngineError>>;
    /// `twin::logits::sample` of every row, with the statistics of the sampled token.
    /// A draw of `None` takes the most likely token.
    fn sample(
        &self,
        logits: &Self::Tensor,
        draws: &[Option<u64>],
        scale: i32,
    ) -> impl Future<Output = Result<Vec<(u32, RowStats)>, EngineError>>;
    /// Reads a tensor, for tests and tools.
    fn read(&self, x: &Self::Tensor) -> impl Future<Output = Result<Vec<i32>, EngineError>>;
    /// Reads a gradient (unpadded, row-major).
    fn read_gradient(
        &self,
        grad: &Self::Gradient,
    ) -> impl Future<Output = Result<Vec<i64>, EngineError>>;
    /// The sum of each list of gradients of one shape, for who needs them no more.
    fn take_gradients(
        &self,
        lists: Vec<Vec<Self::Gradient>>,
    ) -> impl Future<Output = Result<Vec<Vec<i64>>, EngineError>> {
        async move {
            let mut sums = Vec::with_capacity(lists.len());
            for list in lists {
                let mut sum = Vec::new();
                for gradient in &list {
                    let part = self.read_gradient(gradient).await?;
                    sum.resize(part.len(), 0);
                    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
                sums.push(sum);
            }
            Ok(sums)
        }
    }
    /// Whether saturations of what is called from now on are counted, as at first: what is computed
    /// a second time counts once.
    fn count_saturations(&self, on: bool);
    /// The saturations since the last call, which starts a new tally.
    fn take_saturations(&self) -> impl Future<Output = Result<Saturations, EngineError>>;

    /// Rows (tokens) that are computed together at most, for speed: results do not depend on it.
    fn rows_max(&self) -> usize {
        4096
    }
    /// Engines inside this one that compute at the same time, each with a thread and a tally of its
    /// own. What needs nothing of one another they compute faster than one engine's threads, which
    /// wait for each other after every operation.
    fn lanes(&self) -> usize {
        1
    }
    /// Results of `count` parts, at most one a lane: the first is that of `own`, in this thread.
    /// Lanes never wait: their futures are ready when they are polled.
    fn on_lanes<R: Share>(
        &self,
        count: usize,
        own: impl FnOnce(&Self) -> R,
        other: impl Fn(&Self, usize) -> R + Share,
    ) -> Vec<R> {
        std::iter::once(own(self)).chain((1..count).map(|i| other(self, i))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Batch, PIECE_ROWS};

    /// Breaks if a row is lost, or if where sequences are cut depends on memory.
    #[test]
    fn pieces_cover_all_rows_and_cut_at_the_same_places() {
        let tokens: Vec<u32> = (0..3 * PIECE_ROWS as u32).collect();
        let lengths = [5, 2 * PIECE_ROWS + 1, PIECE_ROWS, 1];
        let batch = Batch::sequences(lengths.map(|n| &tokens[..n]));
        let cuts = |max: usize| -> Vec<(usize, usize)> {
            let pieces = batch.pieces(max);
            let each = pieces.iter().flat_map(|(rows, piece)| {
                assert_eq!(piece.tokens, batch.tokens[rows.clone()]);
                assert!(piece.rows() <= max.max(PIECE_ROWS), "{} rows", piece.rows());
                piece.segments.iter().map(|s| (rows.start + s.first_row, s.rows))
            });
            each.collect()
        };
        let whole = cuts(usize::MAX);
        assert_eq!(whole.iter().map(|(_, rows)| rows).sum::<usize>(), batch.rows());
        for max in [1, PIECE_ROWS, PIECE_ROWS + 6, 300] {
            assert_eq!(cuts(max), whole, "{max}");
        }
    }
}
