//! The twin engine: every operation by the loops that define it. Slow, obvious, never tuned.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use manyhands_shaders::bfp::WEIGHT_BITS;
use manyhands_shaders::bfp::{ACTIVATION_BITS, Bfp};
use manyhands_shaders::twin::attention::{self, Cache, HeadVectors};
use manyhands_shaders::twin::rmsnorm::{self, RowScale};
use manyhands_shaders::twin::{
    ACTIVATION_FRACTION, GRADIENT_FRACTION, add, attention_backward, embedding, logits, matmul,
    swiglu,
};

use super::{
    Back, Batch, Constants, Engine, EngineError, RowStats, Saturations, SeedRow, Tiles, copy_part,
};

/// Runs the twins.
pub struct Twin {
    constants: Constants,
    saturations: Mutex<Saturations>,
    uncounted: AtomicBool,
}

impl Twin {
    /// An engine for a model with these constants.
    pub fn new(constants: Constants) -> Self {
        Self { constants, saturations: Mutex::default(), uncounted: AtomicBool::new(false) }
    }

    /// Runs `f` with the tally.
    fn counted<T>(&self, f: impl FnOnce(&mut Saturations) -> T) -> T {
        if self.uncounted.load(Ordering::Relaxed) {
            return f(&mut Saturations::default());
        }
        f(&mut self.saturations.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A tensor (N, C).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// C.
    pub cols: usize,
    /// (N, C).
    pub data: Vec<i32>,
}

/// A weight matrix in both orientations.
pub struct Weight {
    tiles: Tiles,
    forward: Bfp,
    backward: Bfp,
}

/// A gradient (R, C).
pub struct Gradient {
    cols: usize,
    data: Vec<i64>,
}

/// Normalised rows and their scales.
pub struct Norm {
    unit: Vec<i32>,
    scales: Vec<RowScale>,
}

fn blocks(x: &[i32], cols: usize) -> Bfp {
    Bfp::from_rows(x, cols, ACTIVATION_FRACTION, ACTIVATION_BITS)
}

impl Engine for Twin {
    type Tensor = Tensor;
    type Blocks = Bfp;
    type Norm = Norm;
    type Weight = Weight;
    type Gain = Vec<i32>;
    type Queries = HeadVectors;
    type Cache = Cache;
    type Gradient = Gradient;

    fn constants(&self) -> &Constants {
        &self.constants
    }

    fn weight(&self, tiles: &Tiles) -> Weight {
        Weight { tiles: tiles.clone(), forward: tiles.forward(), backward: tiles.backward() }
    }

    fn gain(&self, gain: &[i32]) -> Vec<i32> {
        gain.to_vec()
    }

    fn tensor(&self, data: &[i32], cols: usize) -> Tensor {
        Tensor { cols, data: data.to_vec() }
    }

    fn cache(&self, slots: usize, capacity: usize) -> Cache {
        Cache::new(slots, capacity, &self.constants.attention)
    }

    fn gradient(&self, rows: usize, cols: usize) -> Gradient {
        Gradient { cols, data: vec![0; rows * cols] }
    }

    fn blocks(&self, x: &Tensor) -> Bfp {
        blocks(&x.data, x.cols)
    }

    fn embed(&self, embedding: &Weight, batch: &Batch) -> Tensor {
        let data = self.counted(|s| embedding::forward(&embedding.tiles, &batch.tokens, s));
        Tensor { cols: embedding.tiles.cols, data }
    }

    fn rmsnorm(&self, h: &Tensor, gain: &Vec<i32>) -> (Bfp, Norm) {
        let (unit, out, scales) =
            self.counted(|s| rmsnorm::forward(&h.data, gain, &self.constants.norm, s));
        (blocks(&out, h.cols), Norm { unit, scales })
    }

    fn linear<const K: usize>(&self, x: &Bfp, w: [&Weight; K]) -> [Tensor; K] {
        w.map(|w| {
            let cols = w.tiles.rows;
            let f = ACTIVATION_FRACTION;
            let data = self.counted(|s| matmul::matmul(x, &w.forward, cols, f, s));
            Tensor { cols, data }
        })
    }

    fn linear_add(&self, x: &Bfp, w: &Weight, h: &mut Tensor) {
        let [y] = self.linear(x, [w]);
        self.counted(|s| add(&mut h.data, &y.data, s));
    }

    fn heads(&self, [q, k, v]: &[Tensor; 3], batch: &Batch, cache: &mut Cache) -> HeadVectors {
        let c = &self.constants;
        self.counted(|s| {
            let segments = &batch.segments;
            attention::heads(&q.data, &k.data, &v.data, segments, &c.attention, &c.rope, cache, s)
        })
    }

    fn copy_slot(&self, cache: &mut Cache, from: usize, to: usize) {
        for vectors in [&mut cache.keys, &mut cache.values] {
            copy_part(
                &mut vectors.mantissas,
                cache.capacity * vectors.heads * vectors.dim,
                from,
                to,
            );
            copy_part(&mut vectors.exponents, cache.capacity * vectors.heads, from, to);
        }
    }

    fn attention(&self, q: &HeadVectors, cache: &Cache, batch: &Batch) -> Bfp {
        let c = &self.constants.attention;
        let out = self.counted(|s| attention::forward(q, cache, &batch.segments, c, s));
        blocks(&out, c.heads * c.head_dim)
    }

    fn swiglu(&self, [gate, up]: &[Tensor; 2]) -> Bfp {
        let out = self.counted(|s| swiglu::forward(&gate.data, &up.data, s));
        blocks(&out, gate.cols)
    }

    fn rows(&self, x: &Tensor, rows: &[u32]) -> Tensor {
        let row = |r: &u32| &x.data[*r as usize * x.cols..][..x.cols];
        Tensor { cols: x.cols, data: rows.iter().flat_map(row).copied().collect() }
    }

    fn concat(&self, parts: &[&Tensor]) -> Tensor {
        let data = parts.iter().flat_map(|p| &p.data).copied().collect();
        Tensor { cols: parts[0].cols, data }
    }

    fn seed(&self, logits: &Tensor, rows: &[SeedRow], scale: i32) -> Tensor {
        let data = self.counted(|s| {
            let each = logits.data.chunks_exact(logits.cols).zip(rows);
            each.flat_map(|(x, row)| logits::seed(x, row, scale, s)).collect()
        });
        Tensor { cols: logits.cols, data }
    }

    fn linear_backward(&self, x: &Bfp, batch: &Batch, products: Vec<Back<'_, Self>>) -> Tensor {
        let mut dx: Option<Tensor> = None;
        for Back { dy, w, grad } in products {
            let (rows, cols) = (w.tiles.rows, w.tiles.cols);
            let y = self.counted(|s| {
                if let Some(grad) = grad {
                    let segments = &batch.segments;
                    matmul::weight_gradient(&dy.data, x, segments, rows, cols, &mut grad.data, s);
                }
                let g = Bfp::from_rows(&dy.data, rows, GRADIENT_FRACTION, WEIGHT_BITS);
                matmul::matmul(&g, &w.backward, cols, GRADIENT_FRACTION, s)
            });
            match &mut dx {
                None => dx = Some(Tensor { cols, data: y }),
                Some(dx) => self.counted(|s| add(&mut dx.data, &y, s)),
            }
        }
        dx.expect("at least one product")
    }

    fn rmsnorm_backward(
        &self,
        dn: &Tensor,
        norm: &Norm,
        gain: &Vec<i32>,
        grad: Option<&mut Gradient>,
        dh: Option<Tensor>,
    ) -> Tensor {
        let c = &self.constants.norm;
        let mut unused = vec![0; gain.len()];
        let grad = grad.map_or(&mut unused, |g| &mut g.data);
        self.counted(|s| {
            let (unit, scales) = (&norm.unit, &norm.scales);
            let dx = rmsnorm::backward(&dn.data, unit, scales, gain, c, grad, s);
            match dh {
                None => Tensor { cols: dn.cols, data: dx },
                Some(mut dh) => {
                    add(&mut dh.data, &dx, s);
                    dh
                }
            }
        })
    }

    fn swiglu_backward(&self, da: &Tensor, [gate, up]: &[Tensor; 2]) -> [Tensor; 2] {
        let (dg, du) = self.counted(|s| swiglu::backward(&da.data, &gate.data, &up.data, s));
        [dg, du].map(|data| Tensor { cols: da.cols, data })
    }

    fn attention_backward(
        &self,
        d_out: &Tensor,
        q: &HeadVectors,
        cache: &Cache,
        batch: &Batch,
    ) -> [Tensor; 3] {
        let Constants { attention: c, rope, .. } = &self.constants;
        let g = self.counted(|s| {
            attention_backward::backward(&d_out.data, q, cache, &batch.segments, c, rope, s)
        });
        let kv = c.kv_heads * c.head_dim;
        [(g.dq, d_out.cols), (g.dk, kv), (g.dv, kv)].map(|(data, cols)| Tensor { cols, data })
    }

    fn embed_backward(&self, dh: &Tensor, batch: &Batch, grad: &mut Gradient) {
        embedding::backward(&dh.data, &batch.tokens, grad.cols, &mut grad.data);
    }

    async fn stats(
        &self,
        x: &Tensor,
        targets: &[u32],
        scale: i32,
    ) -> Result<Vec<RowStats>, EngineError> {
        let each = x.data.chunks_exact(x.cols).zip(targets);
        Ok(each.map(|(x, &target)| logits::stats(x, target, scale)).collect())
    }

    async fn sample(
        &self,
        x: &Tensor,
        draws: &[Option<u64>],
        scale: i32,
    ) -> Result<Vec<(u32, RowStats)>, EngineError> {
        let each = x.data.chunks_exact(x.cols).zip(draws);
        Ok(each
            .map(|(x, &draw)| {
                let token = match draw {
                    Some(draw) => logits::sample(x, scale, draw),
                    None => logits::stats(x, 0, scale).greedy,
                };
                (token, logits::stats(x, token, scale))
            })
            .collect())
    }

    async fn read(&self, x: &Tensor) -> Result<Vec<i32>, EngineError> {
        Ok(x.data.clone())
    }

    async fn read_gradient(&self, grad: &Gradient) -> Result<Vec<i64>, EngineError> {
        Ok(grad.data.clone())
    }

    fn count_saturations(&self, on: bool) {
        self.uncounted.store(!on, Ordering::Relaxed);
    }

    async fn take_saturations(&self) -> Result<Saturations, EngineError> {
        Ok(self.counted(std::mem::take))
    }
}
