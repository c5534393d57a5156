//! The trait's operations as dispatches.

use std::ops::Range;

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::{ACTIVATION_FRACTION, rmsnorm::NormConstants};
use manyhands_shaders::twin::{GRADIENT_FRACTION, SITE_COUNT};
use manyhands_shaders::wgsl::{GAIN_ROWS, Id, STATS_WORDS};

use super::memory::Buf;
use super::recorder::Recorder;
use super::{Blocks, Cache, Gain, Gpu, Gradient, Norm, Queries, Tensor, Weight};
use crate::engine::{
    Back, Batch, Constants, Engine, EngineError, RowStats, Saturations, SeedRow, Tiles,
};

/// What `logits.stats` is asked for at a row: (mode, token, draw low, draw high).
type Request = [u32; 4];

const GIVEN: u32 = 0;
const GREEDY: u32 = 1;
const DRAW: u32 = 2;

/// Mantissas in pairs, the even one in the low half.
fn pairs(mantissas: impl IntoIterator<Item = i16>) -> Vec<u32> {
    let mut out = Vec::new();
    let mut mantissas = mantissas.into_iter().map(|m| u32::from(m.cast_unsigned()));
    while let Some(even) = mantissas.next() {
        out.push(even | (mantissas.next().unwrap_or(0) << 16));
    }
    out
}

/// Of the kernels at the logits, for a range of rows.
fn logits_uniform(rows: &Range<usize>, cols: usize, scale: i32) -> [u32; 4] {
    [rows.end as u32, cols as u32, scale.cast_unsigned(), rows.start as u32]
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | (u64::from(high) << 32)
}

impl Gpu {
    fn norm_uniform(&self, rows: usize, accumulate: bool) -> [u32; 8] {
        let NormConstants { width, epsilon, root, root_shift, inverse_width } = self.constants.norm;
        [
            rows as u32,
            width as u32,
            epsilon as u32,
            (epsilon >> 32) as u32,
            root,
            root_shift.cast_unsigned(),
            inverse_width.cast_unsigned(),
            u32::from(accumulate),
        ]
    }

    /// (N, 8) statistics of the rows of logits.
    fn row_stats(&self, logits: &Tensor, requests: &[Request], scale: i32) -> Buf {
        assert_eq!(logits.rows, requests.len(), "one request a row");
        let out = self.recorder.alloc(logits.rows * STATS_WORDS);
        let requests = self.recorder.upload(requests);
        let row_work = logits.cols * 32;
        for rows in self.recorder.row_chunks(Id::LogitsStats, logits.rows, row_work) {
            self.recorder.run(
                Id::LogitsStats,
                &logits_uniform(&rows, logits.cols, scale),
                &[&logits.data, &requests, &out],
                Recorder::grid(rows.len()),
                rows.len() * row_work,
            );
        }
        out
    }

    async fn read_stats(
        &self,
        logits: &Tensor,
        requests: &[Request],
        scale: i32,
    ) -> Result<Vec<(u32, RowStats)>, EngineError> {
        let stats = self.row_stats(logits, requests, scale);
        let words = self.recorder.read_words(&stats, logits.rows * STATS_WORDS).await?;
        let row = |w: &[u32; STATS_WORDS]| {
            let (total, moment) = (join(w[2], w[3]), join(w[4], w[5]));
            (w[0], RowStats { t: w[1].cast_signed(), total, moment, greedy: w[6] })
        };
        Ok(words.as_chunks::<STATS_WORDS>().0.iter().map(row).collect())
    }
}

impl Engine for Gpu {
    type Tensor = Tensor;
    type Blocks = Blocks;
    type Norm = Norm;
    type Weight = Weight;
    type Gain = Gain;
    type Queries = Queries;
    type Cache = Cache;
    type Gradient = Gradient;

    fn constants(&self) -> &Constants {
        &self.constants
    }

    fn weight(&self, tiles: &Tiles) -> Weight {
        let (tile_rows, tile_cols) = (tiles.rows.div_ceil(BLOCK), tiles.cols.div_ceil(BLOCK));
        let exponents: Vec<i32> = tiles.exponents.iter().map(|&e| i32::from(e)).collect();
        let transposed_exponents: Vec<i32> = (0..tile_cols)
            .flat_map(|c| (0..tile_rows).map(move |r| (r, c)))
            .map(|(r, c)| exponents[r * tile_cols + c])
            .collect();
        Weight {
            rows: tiles.rows,
            cols: tiles.cols,
            forward: self.recorder.upload(&pairs(tiles.mantissas.iter().copied())),
            forward_exponents: self.recorder.upload(&exponents),
            backward_exponents: self.recorder.upload(&transposed_exponents),
        }
    }

    fn gain(&self, gain: &[i32]) -> Gain {
        Gain(self.recorder.upload(gain))
    }

    fn tensor(&self, data: &[i32], cols: usize) -> Tensor {
        Tensor { rows: data.len() / cols, cols, data: self.recorder.upload(data) }
    }

    fn cache(&self, slots: usize, capacity: usize) -> Cache {
        self.empty_cache(slots, capacity)
    }

    fn gradient(&self, rows: usize, cols: usize) -> Gradient {
        let [low, high] = std::array::from_fn(|_| self.recorder.zeros(rows * cols));
        Gradient { rows, cols, low, high }
    }

    fn blocks(&self, x: &Tensor) -> Blocks {
        self.activation_blocks(x)
    }

    fn embed(&self, embedding: &Weight, batch: &Batch) -> Tensor {
        let tables = self.batch_tables(batch);
        let out = self.empty(batch.rows(), embedding.cols);
        let col_blocks = embedding.cols.div_ceil(BLOCK);
        self.recorder.run(
            Id::EmbeddingForward,
            &[out.rows as u32, out.cols as u32, col_blocks as u32],
            &[&tables.tokens, &embedding.forward, &embedding.forward_exponents, &out.data],
            self.recorder.lanes_grid(out.rows * out.cols),
            out.rows * out.cols * 4,
        );
        out
    }

    fn rmsnorm(&self, h: &Tensor, gain: &Gain) -> (Blocks, Norm) {
        let out = self.empty_blocks(h.rows, h.cols);
        let unit = self.recorder.alloc(h.rows * h.cols);
        let scales = self.recorder.alloc(h.rows * 2);
        self.recorder.run(
            Id::RmsnormForward,
            &self.norm_uniform(h.rows, false),
            &[&h.data, &gain.0, &out.words, &out.exponents, &unit, &scales],
            Recorder::grid(h.rows),
            h.rows * h.cols * 16,
        );
        (out, Norm { unit, scales })
    }

    fn linear<const K: usize>(&self, x: &Blocks, w: [&Weight; K]) -> [Tensor; K] {
        w.map(|w| {
            let out = self.empty(x.rows, w.rows);
            self.product(x, &w.forward(), ACTIVATION_FRACTION, &out, false);
            out
        })
    }

    fn linear_add(&self, x: &Blocks, w: &Weight, h: &mut Tensor) {
        self.product(x, &w.forward(), ACTIVATION_FRACTION, h, true);
    }

    fn heads(&self, qkv: &[Tensor; 3], batch: &Batch, cache: &mut Cache) -> Queries {
        self.quantize_heads(qkv, batch, cache)
    }

    fn copy_slot(&self, cache: &mut Cache, from: usize, to: usize) {
        self.copy_cache_slot(cache, from, to);
    }

    fn attention(&self, q: &Queries, cache: &Cache, batch: &Batch) -> Blocks {
        self.activation_blocks(&self.attention_rows(q, cache, batch))
    }

    fn swiglu(&self, [gate, up]: &[Tensor; 2]) -> Blocks {
        let out = self.empty_blocks(gate.rows, gate.cols);
        self.recorder.run(
            Id::SwigluForward,
            &[gate.rows as u32, gate.cols as u32],
            &[&gate.data, &up.data, &out.words, &out.exponents],
            self.recorder.lanes_grid(gate.rows * gate.cols.div_ceil(BLOCK)),
            gate.rows * gate.cols * 16,
        );
        out
    }

    fn rows(&self, x: &Tensor, rows: &[u32]) -> Tensor {
        let out = self.empty(rows.len(), x.cols);
        self.recorder.run(
            Id::EmbeddingRows,
            &[out.rows as u32, out.cols as u32],
            &[&self.recorder.upload(rows), &x.data, &out.data],
            self.recorder.lanes_grid(out.rows * out.cols),
            out.rows * out.cols,
        );
        out
    }

    fn concat(&self, parts: &[&Tensor]) -> Tensor {
        let out = self.empty(parts.iter().map(|p| p.rows).sum(), parts[0].cols);
        let mut at = 0;
        for part in parts {
            let words = part.rows * part.cols;
            self.recorder.copy(&part.data, &out.data, at, words);
            at += words;
        }
        out
    }

    fn seed(&self, logits: &Tensor, rows: &[SeedRow], scale: i32) -> Tensor {
        let stats = self.row_stats(logits, &vec![[GIVEN, 0, 0, 0]; rows.len()], scale);
        let seeds: Vec<[i32; 4]> = rows
            .iter()
            .map(|r| [r.target.cast_signed(), r.weight, r.entropy_weight, r.entropy_center])
            .collect();
        let out = self.empty(logits.rows, logits.cols);
        let seeds = self.recorder.upload(&seeds);
        let row_work = out.cols * 32;
        for rows in self.recorder.row_chunks(Id::LogitsSeed, out.rows, row_work) {
            self.recorder.run(
                Id::LogitsSeed,
                &logits_uniform(&rows, out.cols, scale),
                &[&logits.data, &seeds, &stats, &out.data],
                self.recorder.lanes_grid(rows.len() * out.cols),
                rows.len() * row_work,
            );
        }
        out
    }

    fn linear_backward(&self, x: &Blocks, batch: &Batch, products: Vec<Back<'_, Self>>) -> Tensor {
        let tables = self.batch_tables(batch);
        let dx = self.empty(x.rows, x.cols);
        for (k, Back { dy, w, grad }) in products.into_iter().enumerate() {
            if let Some(grad) = grad {
                self.weight_gradient(dy, x, &tables, grad);
            }
            let rows = self.gradient_blocks(&dy.data, [dy.rows, dy.cols]);
            let transposed = self.transpose(w);
            self.product(&rows, &w.backward(&transposed), GRADIENT_FRACTION, &dx, k > 0);
        }
        dx
    }

    fn rmsnorm_backward(
        &self,
        dn: &Tensor,
        norm: &Norm,
        gain: &Gain,
        grad: Option<&mut Gradient>,
        dh: Option<Tensor>,
    ) -> Tensor {
        let uniform = self.norm_uniform(dn.rows, dh.is_some());
        let dh = dh.unwrap_or_else(|| self.empty(dn.rows, dn.cols));
        self.recorder.run(
            Id::RmsnormBackward,
            &uniform,
            &[&dn.data, &gain.0, &norm.unit, &norm.scales, &dh.data],
            Recorder::grid(dn.rows),
            dn.rows * dn.cols * 24,
        );
        let Some(grad) = grad else { return dh };
        let chunks = dn.rows.div_ceil(GAIN_ROWS as usize);
        let groups = dn.cols.div_ceil(self.recorder.lanes as usize);
        self.recorder.run(
            Id::RmsnormBackwardGain,
            &uniform,
            &[&dn.data, &norm.unit, &grad.low, &grad.high],
            [groups as u32, chunks as u32, 1],
            dn.rows * dn.cols * 8,
        );
        dh
    }

    fn swiglu_backward(&self, da: &Tensor, [gate, up]: &[Tensor; 2]) -> [Tensor; 2] {
        let [dg, du] = std::array::from_fn(|_| self.empty(da.rows, da.cols));
        self.recorder.run(
            Id::SwigluBackward,
            &[da.rows as u32, da.cols as u32],
            &[&gate.data, &up.data, &da.data, &dg.data, &du.data],
            self.recorder.lanes_grid(da.rows * da.cols),
            da.rows * da.cols * 24,
        );
        [dg, du]
    }

    fn attention_backward(
        &self,
        d_out: &Tensor,
        q: &Queries,
        cache: &Cache,
        batch: &Batch,
    ) -> [Tensor; 3] {
        self.attention_gradients(d_out, q, cache, batch)
    }

    fn embed_backward(&self, dh: &Tensor, batch: &Batch, grad: &mut Gradient) {
        let tables = self.batch_tables(batch);
        self.recorder.run(
            Id::EmbeddingBackward,
            &[dh.rows as u32, dh.cols as u32],
            &[&tables.tokens, &dh.data, &grad.low, &grad.high],
            self.recorder.lanes_grid(dh.rows * dh.cols),
            dh.rows * dh.cols * 4,
        );
    }

    async fn stats(
        &self,
        logits: &Tensor,
        targets: &[u32],
        scale: i32,
    ) -> Result<Vec<RowStats>, EngineError> {
        let requests: Vec<Request> = targets.iter().map(|&t| [GIVEN, t, 0, 0]).collect();
        let stats = self.read_stats(logits, &requests, scale).await?;
        Ok(stats.into_iter().map(|(_, s)| s).collect())
    }

    async fn sample(
        &self,
        logits: &Tensor,
        draws: &[Option<u64>],
        scale: i32,
    ) -> Result<Vec<(u32, RowStats)>, EngineError> {
        let request = |draw: &Option<u64>| match *draw {
            Some(draw) => [DRAW, 0, draw as u32, (draw >> 32) as u32],
            None => [GREEDY, 0, 0, 0],
        };
        let requests: Vec<Request> = draws.iter().map(request).collect();
        self.read_stats(logits, &requests, scale).await
    }

    async fn read(&self, x: &Tensor) -> Result<Vec<i32>, EngineError> {
        let words = self.recorder.read_words(&x.data, x.rows * x.cols).await?;
        Ok(words.into_iter().map(u32::cast_signed).collect())
    }

    async fn read_gradient(&self, grad: &Gradient) -> Result<Vec<i64>, EngineError> {
        let count = grad.rows * grad.cols;
        let low = self.recorder.read_words(&grad.low, count).await?;
        let high = self.recorder.read_words(&grad.high, count).await?;
        Ok(low.into_iter().zip(high).map(|(l, h)| join(l, h).cast_signed()).collect())
    }

    fn count_saturations(&self, on: bool) {
        self.recorder.count(on);
    }

    async fn take_saturations(&self) -> Result<Saturations, EngineError> {
        let words = self.recorder.take_counters().await?;
        Ok(Saturations(std::array::from_fn(|i| join(words[i], words[i + SITE_COUNT]))))
    }
}
