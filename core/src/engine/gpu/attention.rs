//! Attention and its gradient: several dispatches each, over chunks of rows so that the
//! probabilities of a chunk fit a buffer of bounded size.

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS, padded};
use manyhands_shaders::twin::attention::AttentionConstants;
use manyhands_shaders::twin::matmul::term_limit;
use manyhands_shaders::twin::{GRADIENT_FRACTION, Segment};
use manyhands_shaders::wgsl::Id;

use super::batch::BatchTables;
use super::memory::Buf;
use super::recorder::Recorder;
use super::{Cache, Gpu, Queries, Tensor};
use crate::engine::Batch;

/// Bytes of the probabilities of one chunk of rows.
const SCRATCH_BYTES: usize = 64 << 20;
/// The backward pass repeats the forward's scores without counting.
const UNCOUNTED: i32 = i32::MAX;

/// Which query heads a dispatch works on: `first`, `first + step`, ... of `count`.
#[derive(Clone, Copy)]
struct Heads {
    first: usize,
    step: usize,
    count: usize,
}

/// Consecutive rows of a batch, with the stride of their scores.
#[derive(Clone, Copy)]
struct Chunk {
    first_row: usize,
    rows: usize,
    /// L, a multiple of [`BLOCK`].
    keys: usize,
}

/// A matrix in block floating point that belongs to a chunk: (rows, K, L) with blocks along L.
struct ChunkBlocks {
    words: Buf,
    exponents: Buf,
}

/// Words of a head vector: pairs of D padded.
fn head_words(c: &AttentionConstants) -> usize {
    padded(c.head_dim) / 2
}

impl Gpu {
    pub(super) fn empty_cache(&self, slots: usize, capacity: usize) -> Cache {
        let c = &self.constants.attention;
        let vectors = slots * capacity * c.kv_heads;
        let [keys, values] = std::array::from_fn(|_| self.recorder.alloc(vectors * head_words(c)));
        let [key_exponents, value_exponents] =
            std::array::from_fn(|_| self.recorder.alloc(vectors));
        Cache { capacity, keys, key_exponents, values, value_exponents }
    }

    /// Slot `from` also becomes slot `to`.
    pub(super) fn copy_cache_slot(&self, cache: &Cache, from: usize, to: usize) {
        let c = &self.constants.attention;
        let vectors = cache.capacity * c.kv_heads;
        for (buf, words) in [
            (&cache.keys, vectors * head_words(c)),
            (&cache.values, vectors * head_words(c)),
            (&cache.key_exponents, vectors),
            (&cache.value_exponents, vectors),
        ] {
            self.recorder.copy_part(buf, words, from, to);
        }
    }

    /// Rotates and quantises the heads of `x` into `words` and `exponents`.
    fn head_vectors(
        &self,
        x: &Tensor,
        tables: &BatchTables,
        heads: usize,
        bits: u32,
        rotate: bool,
        capacity: Option<usize>,
        [words, exponents]: [&Buf; 2],
    ) {
        let c = &self.constants.attention;
        let uniform = [
            x.rows as u32,
            heads as u32,
            c.head_dim as u32,
            head_words(c) as u32,
            bits,
            u32::from(rotate),
            u32::from(capacity.is_some()),
            capacity.unwrap_or(0) as u32,
        ];
        let buffers = [&x.data, &tables.rows, &self.rope, words, exponents];
        let groups = self.recorder.lanes_grid(x.rows * heads);
        self.recorder.run(Id::HeadsForward, &uniform, &buffers, groups, x.rows * x.cols * 16);
    }

    pub(super) fn quantize_heads(
        &self,
        [q, k, v]: &[Tensor; 3],
        batch: &Batch,
        cache: &Cache,
    ) -> Queries {
        let c = &self.constants.attention;
        let tables = self.batch_tables(batch);
        let words = self.recorder.alloc(q.rows * c.heads * head_words(c));
        let exponents = self.recorder.alloc(q.rows * c.heads);
        let into_queries = [&words, &exponents];
        self.head_vectors(q, &tables, c.heads, ACTIVATION_BITS, true, None, into_queries);
        let capacity = Some(cache.capacity);
        let keys = [&cache.keys, &cache.key_exponents];
        self.head_vectors(k, &tables, c.kv_heads, WEIGHT_BITS, true, capacity, keys);
        let values = [&cache.values, &cache.value_exponents];
        self.head_vectors(v, &tables, c.kv_heads, WEIGHT_BITS, false, capacity, values);
        Queries { rows: q.rows, words, exponents }
    }

    fn attention_uniform(
        &self,
        chunk: Chunk,
        heads: Heads,
        cache: &Cache,
        score_limit: i32,
    ) -> [u32; 13] {
        let c = &self.constants.attention;
        [
            chunk.first_row as u32,
            chunk.rows as u32,
            heads.count as u32,
            heads.step as u32,
            heads.first as u32,
            c.heads as u32,
            c.kv_heads as u32,
            c.head_dim as u32,
            head_words(c) as u32,
            cache.capacity as u32,
            chunk.keys as u32,
            c.score_scale.cast_unsigned(),
            score_limit.cast_unsigned(),
        ]
    }

    /// Probabilities (rows, heads, L) in Q24 of a chunk.
    fn probabilities(
        &self,
        q: &Queries,
        cache: &Cache,
        tables: &BatchTables,
        chunk: Chunk,
        heads: Heads,
        score_limit: i32,
    ) -> Buf {
        let count = chunk.rows * heads.count;
        let out = self.recorder.alloc(count * chunk.keys);
        self.recorder.run(
            Id::AttentionProbabilities,
            &self.attention_uniform(chunk, heads, cache, score_limit),
            &[&q.words, &q.exponents, &cache.keys, &cache.key_exponents, &tables.rows, &out],
            Recorder::grid(count),
            count * chunk.keys * (self.constants.attention.head_dim + 64),
        );
        out
    }

    /// Attention of `q` against the cache: (N, H D) in `FX(16)`.
    pub(super) fn attention_rows(&self, q: &Queries, cache: &Cache, batch: &Batch) -> Tensor {
        let c = &self.constants.attention;
        let tables = self.batch_tables(batch);
        let out = self.empty(q.rows, c.heads * c.head_dim);
        let heads = Heads { first: 0, step: 1, count: c.heads };
        let row_scores = (c.heads * tables.keys).max(1);
        let limit = term_limit(c.head_dim.div_ceil(BLOCK));
        let fits = |id, work_a_score| self.recorder.budget(id) / (row_scores * work_a_score);
        let rows_max = (SCRATCH_BYTES / 4 / row_scores)
            .min(fits(Id::AttentionProbabilities, c.head_dim + 64))
            .min(fits(Id::AttentionForward, c.head_dim))
            .max(1);
        for first_row in (0..q.rows).step_by(rows_max) {
            let rows = rows_max.min(q.rows - first_row);
            let chunk = Chunk { first_row, rows, keys: tables.keys };
            let p = self.probabilities(q, cache, &tables, chunk, heads, limit);
            self.recorder.run(
                Id::AttentionForward,
                &self.attention_uniform(chunk, heads, cache, limit),
                &[&cache.values, &cache.value_exponents, &out.data, &tables.rows, &p],
                Recorder::grid(rows * c.heads),
                rows * row_scores * c.head_dim,
            );
        }
        out
    }

    /// Gradients of queries, keys and values before rotation.
    pub(super) fn attention_gradients(
        &self,
        d_out: &Tensor,
        q: &Queries,
        cache: &Cache,
        batch: &Batch,
    ) -> [Tensor; 3] {
        let c = &self.constants.attention;
        let tables = self.batch_tables(batch);
        let dq = self.empty(q.rows, c.heads * c.head_dim);
        let [dk, dv] = std::array::from_fn(|_| self.empty(q.rows, c.kv_heads * c.head_dim));
        let whole = batch.segments.iter().all(|s| s.position == 0);
        assert!(whole, "a gradient needs whole sequences");
        let d_rows = self.gradient_blocks(&d_out.data, [q.rows * c.heads, c.head_dim]);
        let (d_tokens, d_token_exponents) = self.quantize_tokens(d_out, &tables);
        let pass = Backward { gpu: self, q, cache, tables: &tables };
        let budget = self.recorder.budget(Id::AttentionBackwardScores) / (c.head_dim + 64);
        let entries_max = (SCRATCH_BYTES / 4).min(budget);
        for chunk in chunks(&batch.segments, c.kv_heads, entries_max) {
            for head in 0..c.heads / c.kv_heads {
                let (p, ds) = pass.score_gradients(chunk, head, [&d_rows.words, &d_rows.exponents]);
                let p_by_key = pass.by_key(chunk, head, &p, ACTIVATION_BITS, 24, false);
                drop(p);
                let tokens = [&d_tokens, &d_token_exponents];
                pass.value_gradient(chunk, head, &p_by_key, tokens, &dv);
                let by_query = pass.by_query(chunk, head, &ds);
                pass.combine(Id::AttentionBackwardQueryGradient, chunk, head, &by_query, &dq);
                let by_key = pass.by_key(chunk, head, &ds, WEIGHT_BITS, GRADIENT_FRACTION, true);
                pass.combine(Id::AttentionBackwardKeyGradient, chunk, head, &by_key, &dk);
            }
        }
        self.rotate_back(&dq, c.heads, &tables);
        self.rotate_back(&dk, c.kv_heads, &tables);
        [dq, dk, dv]
    }

    fn rotate_back(&self, x: &Tensor, heads: usize, tables: &BatchTables) {
        let c = &self.constants.attention;
        let pairs = x.rows * heads * c.head_dim / 2;
        self.recorder.run(
            Id::HeadsInverse,
            &[x.rows as u32, heads as u32, c.head_dim as u32],
            &[&x.data, &tables.rows, &self.rope],
            self.recorder.lanes_grid(pairs),
            pairs * 32,
        );
    }
}

/// What all dispatches of a backward pass share.
struct Backward<'a> {
    gpu: &'a Gpu,
    q: &'a Queries,
    cache: &'a Cache,
    tables: &'a BatchTables,
}

impl Backward<'_> {
    /// The kernels' uniforms; `head` is the query head's index in its group.
    fn uniform(
        &self,
        chunk: Chunk,
        head: usize,
        bits: u32,
        fraction: i32,
        fold: bool,
    ) -> [u32; 14] {
        let c = &self.gpu.constants.attention;
        [
            chunk.first_row as u32,
            chunk.rows as u32,
            (c.heads / c.kv_heads) as u32,
            head as u32,
            c.kv_heads as u32,
            c.head_dim as u32,
            head_words(c) as u32,
            self.cache.capacity as u32,
            chunk.keys as u32,
            bits,
            fraction.cast_unsigned(),
            u32::from(fold),
            self.tables.block_count as u32,
            c.inverse_root.cast_unsigned(),
        ]
    }

    /// Entries of a (rows, K, L) matrix.
    fn entries(&self, chunk: Chunk) -> usize {
        chunk.rows * self.gpu.constants.attention.kv_heads * chunk.keys
    }

    fn empty(&self, chunk: Chunk) -> ChunkBlocks {
        let (entries, recorder) = (self.entries(chunk), &self.gpu.recorder);
        let words = recorder.alloc(entries / 2);
        ChunkBlocks { words, exponents: recorder.alloc(entries / BLOCK) }
    }

    /// P and dS, both (rows, K, L).
    fn score_gradients(
        &self,
        chunk: Chunk,
        head: usize,
        [d_words, d_exponents]: [&Buf; 2],
    ) -> (Buf, Buf) {
        let c = &self.gpu.constants.attention;
        let heads = Heads { first: head, step: c.heads / c.kv_heads, count: c.kv_heads };
        let p = self.gpu.probabilities(self.q, self.cache, self.tables, chunk, heads, UNCOUNTED);
        let ds = self.gpu.recorder.alloc(self.entries(chunk));
        let (values, exponents) = (&self.cache.values, &self.cache.value_exponents);
        self.gpu.recorder.run(
            Id::AttentionBackwardScores,
            &self.uniform(chunk, head, 0, 0, false),
            &[&self.tables.rows, d_words, d_exponents, values, exponents, &p, &ds],
            Recorder::grid(chunk.rows * c.kv_heads),
            self.entries(chunk) * (c.head_dim + 64),
        );
        (p, ds)
    }

    fn by_query(&self, chunk: Chunk, head: usize, x: &Buf) -> ChunkBlocks {
        let out = self.empty(chunk);
        self.gpu.recorder.run(
            Id::AttentionBackwardByQuery,
            &self.uniform(chunk, head, WEIGHT_BITS, GRADIENT_FRACTION, true),
            &[&self.tables.rows, x, &self.cache.key_exponents, &out.words, &out.exponents],
            self.gpu.recorder.lanes_grid(self.entries(chunk) / BLOCK),
            self.entries(chunk) * 4,
        );
        out
    }

    /// The transpose of `x`, quantised along the queries; `fold` folds their exponents in.
    fn by_key(
        &self,
        chunk: Chunk,
        head: usize,
        x: &Buf,
        bits: u32,
        fraction: i32,
        fold: bool,
    ) -> ChunkBlocks {
        let out = self.empty(chunk);
        self.gpu.recorder.run(
            Id::AttentionBackwardByKey,
            &self.uniform(chunk, head, bits, fraction, fold),
            &[&self.tables.rows, x, &self.q.exponents, &out.words, &out.exponents],
            self.gpu.recorder.lanes_grid(self.entries(chunk) / BLOCK),
            self.entries(chunk) * 4,
        );
        out
    }

    fn value_gradient(
        &self,
        chunk: Chunk,
        head: usize,
        p: &ChunkBlocks,
        [d_words, d_exponents]: [&Buf; 2],
        dv: &Tensor,
    ) {
        self.gpu.recorder.run(
            Id::AttentionBackwardValueGradient,
            &self.uniform(chunk, head, 0, 0, false),
            &[&self.tables.rows, &p.words, &p.exponents, d_words, d_exponents, &dv.data],
            self.gpu.recorder.lanes_grid(chunk.rows * dv.cols),
            chunk.rows * dv.cols * chunk.keys,
        );
    }

    /// `out`: dS times keys, or its transpose times queries.
    fn combine(&self, id: Id, chunk: Chunk, head: usize, ds: &ChunkBlocks, out: &Tensor) {
        let c = &self.gpu.constants.attention;
        let right = match id {
            Id::AttentionBackwardQueryGradient => &self.cache.keys,
            _ => &self.q.words,
        };
        let pairs = chunk.rows * c.kv_heads * c.head_dim / 2;
        self.gpu.recorder.run(
            id,
            &self.uniform(chunk, head, 0, 0, false),
            &[&self.tables.rows, &ds.words, &ds.exponents, right, &out.data],
            self.gpu.recorder.lanes_grid(pairs),
            2 * pairs * chunk.keys,
        );
    }
}

/// Whole segments in chunks whose (rows, K, L) matrices have so many entries at most; a segment
/// that does not fit alone is a chunk of its own, because the gradient of a key is one sum over
/// all its queries.
fn chunks(segments: &[Segment], kv_heads: usize, entries_max: usize) -> Vec<Chunk> {
    let mut out: Vec<Chunk> = Vec::new();
    for s in segments.iter().filter(|s| s.rows > 0) {
        let keys = padded(s.rows);
        if let Some(last) = out.last_mut() {
            let (rows, keys) = (last.rows + s.rows, last.keys.max(keys));
            if rows * kv_heads * keys <= entries_max {
                (last.rows, last.keys) = (rows, keys);
                continue;
            }
        }
        out.push(Chunk { first_row: s.first_row, rows: s.rows, keys });
    }
    out
}
