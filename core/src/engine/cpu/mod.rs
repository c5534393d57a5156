//! The CPU engine: SIMD integer products, vectorised loops between them, threads.
//!
//! Bit-identical to [`super::twin::Twin`] in every output and every saturation count, for every
//! [`Path`] and every number of threads. Start reading at `kernel` (the product and its layouts),
//! then `gemm`, `weight_gradient` and `attention`; `amx` has large products once more, for tile
//! units. The other modules are one operation each.
//!
//! How exactness survives the speed: a value is either computed by integer instructions as its
//! definition says, or by f32 or f64 instructions on integers that those hold exactly, with one
//! rounding to nearest even. Saturations are counted by exact comparison, where bounds on exponents
//! or results do not prove first that there is nothing to count.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod attention_backward;
mod buffer;
mod cache;
mod embedding;
mod gemm;
mod gradient;
mod heads;
mod kernel;
mod logits;
mod norm;
mod operands;
mod pack;
mod path;
mod quantize;
mod rotation;
mod scalar;
mod softmax;
mod swiglu;
mod tables;
mod weight_gradient;
mod workers;

use std::sync::Arc;

use manyhands_shaders::bfp::{ACTIVATION_BITS, WEIGHT_BITS};
use manyhands_shaders::twin::{ACTIVATION_FRACTION, GRADIENT_FRACTION};

use super::{Back, Batch, Constants, Engine, EngineError, RowStats, Saturations, SeedRow, Tiles};
pub use buffer::Buffer;
pub use cache::Cache;
pub use gradient::Gradient;
pub use heads::Queries;
pub use norm::Norm;
pub use operands::{Panels, Weight};
pub use path::Path;
pub(crate) use path::simd;

use crate::parallel::Share;
use buffer::Pool;
use gemm::{Output, matmul};
use weight_gradient::TokenBlocks;
use workers::{Tally, Workers};

/// The CPU engine.
pub struct Cpu {
    constants: Arc<Constants>,
    path: Path,
    workers: Workers,
    pool: Arc<Pool>,
    tally: Tally,
    /// One a thread, if there are several.
    lanes: Vec<Self>,
}

/// A tensor (N, C).
pub struct Tensor {
    cols: usize,
    data: Buffer<i32>,
}

impl Tensor {
    /// N.
    fn rows(&self) -> usize {
        self.data.len() / self.cols
    }
}

impl Cpu {
    /// An engine for a model with these constants, on `threads` threads (at least one) and the
    /// given path, or the best of this machine.
    ///
    /// # Panics
    /// If the machine does not have the path's instructions.
    pub fn new(constants: Constants, threads: usize, path: Option<Path>) -> Self {
        let path = path.unwrap_or_else(Path::best);
        assert!(path.is_available(), "this machine has no {path} instructions");
        let (constants, workers) = (Arc::new(constants), Workers::new(threads));
        let lanes = if workers.threads() == 1 { 0 } else { workers.threads() };
        let lane = |_| Self::of(constants.clone(), path, Workers::new(1), Vec::new());
        let lanes = (0..lanes).map(lane).collect();
        Self::of(constants, path, workers, lanes)
    }

    fn of(constants: Arc<Constants>, path: Path, workers: Workers, lanes: Vec<Self>) -> Self {
        Self { constants, path, workers, pool: Arc::default(), tally: Tally::default(), lanes }
    }

    /// The instructions in use.
    pub fn path(&self) -> Path {
        self.path
    }

    /// The number of threads in use.
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// A tensor of any content.
    fn tensor_of(&self, rows: usize, cols: usize) -> Tensor {
        Tensor { cols, data: self.pool.take(rows * cols) }
    }
}

impl Engine for Cpu {
    type Tensor = Tensor;
    type Blocks = Panels;
    type Norm = Norm;
    type Weight = Weight;
    type Gain = Vec<i32>;
    type Queries = Queries;
    type Cache = Cache;
    type Gradient = Gradient;

    fn constants(&self) -> &Constants {
        &self.constants
    }

    fn weight(&self, tiles: &Tiles) -> Weight {
        Weight::new(self, tiles)
    }

    fn gain(&self, gain: &[i32]) -> Vec<i32> {
        gain.to_vec()
    }

    fn tensor(&self, data: &[i32], cols: usize) -> Tensor {
        let mut out = self.tensor_of(data.len() / cols, cols);
        out.data.copy_from_slice(data);
        out
    }

    fn cache(&self, slots: usize, capacity: usize) -> Cache {
        cache::empty(self, slots, capacity)
    }

    fn gradient(&self, rows: usize, cols: usize) -> Gradient {
        Gradient::zeros(rows * cols)
    }

    fn blocks(&self, x: &Tensor) -> Panels {
        quantize::rows(self, x, -ACTIVATION_FRACTION, ACTIVATION_BITS)
    }

    fn embed(&self, embedding: &Weight, batch: &Batch) -> Tensor {
        embedding::forward(self, embedding, &batch.tokens)
    }

    fn rmsnorm(&self, h: &Tensor, gain: &Vec<i32>) -> (Panels, Norm) {
        norm::forward(self, h, gain)
    }

    fn linear<const K: usize>(&self, x: &Panels, w: [&Weight; K]) -> [Tensor; K] {
        let mut out = w.map(|w| self.tensor_of(x.rows, w.rows));
        let w = w.map(|w| &w.forward);
        matmul(self, x, w, out.each_mut(), ACTIVATION_FRACTION, Output::Store);
        out
    }

    fn linear_add(&self, x: &Panels, w: &Weight, h: &mut Tensor) {
        assert_eq!(h.cols, w.rows, "a product of another width");
        matmul(self, x, [&w.forward], [h], ACTIVATION_FRACTION, Output::Add);
    }

    fn heads(&self, qkv: &[Tensor; 3], batch: &Batch, cache: &mut Cache) -> Queries {
        heads::forward(self, qkv, batch, cache)
    }

    fn copy_slot(&self, cache: &mut Cache, from: usize, to: usize) {
        cache::copy_slot(&self.constants.attention, cache, from, to);
    }

    fn attention(&self, q: &Queries, cache: &Cache, batch: &Batch) -> Panels {
        attention::forward(self, q, cache, batch)
    }

    fn swiglu(&self, [gate, up]: &[Tensor; 2]) -> Panels {
        swiglu::forward(self, gate, up)
    }

    fn rows(&self, x: &Tensor, rows: &[u32]) -> Tensor {
        let mut out = self.tensor_of(rows.len(), x.cols);
        for (to, &row) in out.data.chunks_exact_mut(x.cols).zip(rows) {
            to.copy_from_slice(&x.data[row as usize * x.cols..][..x.cols]);
        }
        out
    }

    fn concat(&self, parts: &[&Tensor]) -> Tensor {
        let mut out = self.tensor_of(parts.iter().map(|p| p.rows()).sum(), parts[0].cols);
        let mut rest = &mut out.data[..];
        for part in parts {
            let to;
            (to, rest) = rest.split_at_mut(part.data.len());
            to.copy_from_slice(&part.data);
        }
        out
    }

    fn seed(&self, logits: &Tensor, rows: &[SeedRow], scale: i32) -> Tensor {
        logits::seed(self, logits, rows, scale)
    }

    fn linear_backward(&self, x: &Panels, batch: &Batch, products: Vec<Back<'_, Self>>) -> Tensor {
        let mut dx = self.tensor_of(x.rows, products[0].w.cols);
        let tokens = TokenBlocks::new(&batch.segments);
        let trains = products.iter().any(|p| p.grad.is_some());
        let along = trains.then(|| weight_gradient::pack_x(self, x, &tokens));
        let mut output = Output::Store;
        for Back { dy, w, grad } in products {
            assert!(dy.cols == w.rows && dx.cols == w.cols, "a gradient of another width");
            if let (Some(grad), Some(along)) = (grad, &along) {
                weight_gradient::add(self, dy, along, &tokens, w.cols, grad);
            }
            let g = quantize::rows(self, dy, -GRADIENT_FRACTION, WEIGHT_BITS);
            matmul(self, &g, [w.backward(self)], [&mut dx], GRADIENT_FRACTION, output);
            output = Output::Add;
        }
        dx
    }

    fn rmsnorm_backward(
        &self,
        dn: &Tensor,
        norm: &Norm,
        gain: &Vec<i32>,
        grad: Option<&mut Gradient>,
        dh: Option<Tensor>,
    ) -> Tensor {
        let mut unused = vec![0; gain.len()];
        let grad = grad.map_or(&mut unused[..], Gradient::wide);
        norm::backward(self, dn, norm, gain, grad, dh)
    }

    fn swiglu_backward(&self, da: &Tensor, [gate, up]: &[Tensor; 2]) -> [Tensor; 2] {
        swiglu::backward(self, da, gate, up)
    }

    fn attention_backward(
        &self,
        d_out: &Tensor,
        q: &Queries,
        cache: &Cache,
        batch: &Batch,
    ) -> [Tensor; 3] {
        attention_backward::backward(self, d_out, q, cache, batch)
    }

    fn embed_backward(&self, dh: &Tensor, batch: &Batch, grad: &mut Gradient) {
        embedding::backward(self, dh, &batch.tokens, grad.wide());
    }

    async fn stats(
        &self,
        x: &Tensor,
        targets: &[u32],
        scale: i32,
    ) -> Result<Vec<RowStats>, EngineError> {
        Ok(logits::stats(self, x, targets, scale))
    }

    async fn sample(
        &self,
        x: &Tensor,
        draws: &[Option<u64>],
        scale: i32,
    ) -> Result<Vec<(u32, RowStats)>, EngineError> {
        Ok(logits::sample(self, x, draws, scale))
    }

    async fn read(&self, x: &Tensor) -> Result<Vec<i32>, EngineError> {
        Ok(x.data.to_vec())
    }

    async fn read_gradient(&self, grad: &Gradient) -> Result<Vec<i64>, EngineError> {
        Ok(grad.sums(self.path))
    }

    async fn take_gradients(
        &self,
        lists: Vec<Vec<Gradient>>,
    ) -> Result<Vec<Vec<i64>>, EngineError> {
        Ok(gradient::sums(self, lists))
    }

    fn count_saturations(&self, on: bool) {
        self.tally.count(on);
    }

    async fn take_saturations(&self) -> Result<Saturations, EngineError> {
        Ok(self.tally.take())
    }

    /// Tensors of so many rows stay near. Wide models have large sums of gradients, which every
    /// micro-batch reads and writes.
    fn rows_max(&self) -> usize {
        if self.constants.norm.width > 128 { 512 } else { 256 }
    }

    fn lanes(&self) -> usize {
        self.lanes.len().max(1)
    }

    fn on_lanes<R: Share>(
        &self,
        count: usize,
        own: impl FnOnce(&Self) -> R,
        other: impl Fn(&Self, usize) -> R + Share,
    ) -> Vec<R> {
        let lane = |i: usize| self.lanes.get(i).unwrap_or(self);
        self.workers.beside(count, || own(lane(0)), |i| other(lane(i), i))
    }
}
