//! Computing [`Work`] on an engine.

use super::work::{Output, Values, Work};
use crate::engine::{Batch, Engine, EngineError, RowStats, Saturations, SeedRow};
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, DeviceGradients, Keep};
use crate::model::generate::{Completion, Request, Sampling, UNIT_SCALE, draw, generate};

/// Rows (tokens) a micro-batch holds at most, unless a single sequence is longer. Sums are
/// integers: how sequences are cut into micro-batches changes nothing but memory.
const MICRO_BATCH_ROWS: usize = 4096;
/// Logits that are looked at together, and other tensors of a micro-batch, in bytes.
const TENSOR_BYTES_MAX: usize = 64 << 20;
/// What a micro-batch of several sequences keeps for its backward pass, in bytes.
const KEPT_BYTES_MAX: usize = 256 << 20;
/// What a sequence by itself keeps. One that needs more keeps the inputs of layers only.
const KEPT_BYTES_ALONE_MAX: usize = 400 << 20;
/// Most sequences decoded at once.
const SLOTS_MAX: usize = 512;
/// Keys and values of all sequences that are decoded at once, in bytes.
const CACHE_BYTES_MAX: u64 = 1 << 30;

/// Sequences of up to `length` tokens that are decoded at once; results do not depend on it.
fn slots(model: &ModelConfig, length: usize) -> usize {
    let keys = (model.layers * model.kv_width() * size_of::<i16>()) as u64;
    let bytes = 2 * keys * length as u64;
    (CACHE_BYTES_MAX / bytes.max(1)).clamp(1, SLOTS_MAX as u64) as usize
}

/// Computes `work`, which fits the decoder's model. `progress` is told tokens processed so far.
pub async fn execute<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    work: &Work,
    mut progress: impl FnMut(usize),
) -> Result<Output, EngineError> {
    engine.take_saturations().await?;
    let mut saturations = Saturations::default();
    let values = match work {
        Work::Sample { seed, temperature_scale, max_new_tokens, end, requests } => {
            let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
            let sampling = Sampling {
                seed: *seed,
                temperature_scale: *temperature_scale,
                max_new_tokens: *max_new_tokens as usize,
                end: *end,
                slots: slots(&decoder.config, longest + *max_new_tokens as usize),
            };
            let report = |tokens: usize, _: &[Completion]| {
                progress(tokens);
                true
            };
            let generated = generate(engine, decoder, requests, &sampling, report).await?;
            saturations = generated.saturations;
            Values::Samples(generated.completions)
        }
        Work::Check { seed, temperature_scale, requests, claims } => {
            let scale = *temperature_scale;
            let checked = check(engine, decoder, *seed, scale, requests, claims, progress);
            Values::Samples(checked.await?)
        }
        Work::Score { temperature_scale, sequences } => {
            let items = sequences.iter().map(|s| (s.tokens.as_slice(), s.first as usize));
            let items: Vec<_> = items.collect();
            Values::Scores(score(engine, decoder, &items, *temperature_scale, progress).await?)
        }
        Work::Gradient { temperature_scale, sequences } => {
            let mut sum = DeviceGradients::zeros(engine, &decoder.config);
            let tokens: Vec<&[u32]> = sequences.iter().map(|s| s.tokens.as_slice()).collect();
            let seeds: Vec<Vec<SeedRow>> =
                sequences.iter().map(super::work::Seeded::rows).collect();
            let stats = accumulate(
                engine,
                decoder,
                &tokens,
                &seeds,
                *temperature_scale,
                &mut sum,
                progress,
            )
            .await?;
            let trained = stats.into_iter().zip(sequences);
            let stats = trained.map(|(mut s, q)| s.split_off(q.first as usize - 1)).collect();
            Values::Gradient(stats, sum.read(engine).await?)
        }
    };
    saturations.merge(&engine.take_saturations().await?);
    Ok(Output { saturations, values })
}

/// Samples again what was claimed, by one prefill over prompt and claim.
async fn check<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    seed: u64,
    temperature_scale: Option<i32>,
    requests: &[Request],
    claims: &[Vec<u32>],
    mut progress: impl FnMut(usize),
) -> Result<Vec<Completion>, EngineError> {
    let mut out = Vec::with_capacity(requests.len());
    let input = |(r, c): (&Request, &Vec<u32>)| [r.prompt.as_slice(), &c[..c.len() - 1]].concat();
    let inputs: Vec<Vec<u32>> = requests.iter().zip(claims).map(input).collect();
    let scale = temperature_scale.unwrap_or(UNIT_SCALE);
    let mut done = 0;
    for range in micro_batches(forward_rows_max(&decoder.config), inputs.iter().map(Vec::len)) {
        let batch = Batch::sequences(inputs[range.clone()].iter().map(Vec::as_slice));
        let (mut rows, mut draws) = (Vec::new(), Vec::new());
        for (segment, i) in batch.segments.iter().zip(range.clone()) {
            let first = segment.first_row + requests[i].prompt.len() - 1;
            rows.extend((first..first + claims[i].len()).map(|row| row as u32));
            let drawn = (0..claims[i].len()).map(|t| draw(seed, requests[i].stream, t as u32));
            draws.extend(drawn.map(|d| temperature_scale.map(|_| d)));
        }
        let h = states(engine, decoder, &batch);
        let mut sampled = Vec::with_capacity(rows.len());
        let piece = head_rows_max(&decoder.config);
        for (rows, draws) in rows.chunks(piece).zip(draws.chunks(piece)) {
            let logits = decoder.logits(engine, &engine.rows(&h, rows));
            sampled.extend(engine.sample(&logits, draws, scale).await?);
        }
        let mut sampled = sampled.into_iter();
        for claim in &claims[range] {
            let (tokens, stats) = sampled.by_ref().take(claim.len()).unzip();
            out.push(Completion { tokens, stats });
        }
        done += batch.rows();
        progress(done);
    }
    Ok(out)
}

/// (N, C) the residual stream of whole sequences after all layers.
fn states<E: Engine>(engine: &E, decoder: &Decoder<E>, batch: &Batch) -> E::Tensor {
    let longest = batch.segments.iter().map(|s| s.rows).max().unwrap_or(0);
    let mut caches = decoder.caches(engine, batch.segments.len(), longest);
    decoder.states(engine, batch, &mut caches)
}

/// Rows of a tensor with `cols` columns.
fn rows_max(cols: usize) -> usize {
    (TENSOR_BYTES_MAX / (4 * cols)).clamp(1, MICRO_BATCH_ROWS)
}

/// Rows of a micro-batch.
fn forward_rows_max(model: &ModelConfig) -> usize {
    rows_max(model.ffn.max(model.width))
}

/// Rows whose logits are looked at together.
fn head_rows_max(model: &ModelConfig) -> usize {
    rows_max(model.vocabulary)
}

/// Rows of a micro-batch that is differentiated and keeps all that it needs in so many bytes.
fn gradient_rows_max(model: &ModelConfig, bytes: usize) -> usize {
    // Blocks take 2 bytes a value, norms and the inputs of SwiGLU 4.
    let attention = 2 * (2 * model.attention_width() + 2 * model.kv_width());
    let layer = attention + (2 * 2 + 2 * 4) * model.width + (2 + 2 * 4) * model.ffn;
    (bytes / (layer * model.layers)).clamp(1, forward_rows_max(model))
}

/// Ranges of sequences whose rows fit a micro-batch.
fn micro_batches(max: usize, rows: impl Iterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
    let mut out: Vec<std::ops::Range<usize>> = Vec::new();
    let mut sum = usize::MAX;
    for (i, n) in rows.enumerate() {
        match out.last_mut() {
            Some(range) if sum + n <= max => {
                range.end = i + 1;
                sum += n;
            }
            _ => {
                out.push(i..i + 1);
                sum = n;
            }
        }
    }
    out
}

/// Splits row statistics by sequence.
fn by_sequence(stats: Vec<RowStats>, lengths: Vec<usize>) -> impl Iterator<Item = Vec<RowStats>> {
    let mut rest = stats.into_iter();
    lengths.into_iter().map(move |n| rest.by_ref().take(n).collect())
}

/// Statistics of the tokens from each sequence's `first` on: a forward pass only.
pub async fn score<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    sequences: &[(&[u32], usize)],
    temperature_scale: i32,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<RowStats>>, EngineError> {
    let mut out = Vec::with_capacity(sequences.len());
    let mut done = 0;
    let rows = sequences.iter().map(|(s, _)| s.len() - 1);
    for range in micro_batches(forward_rows_max(&decoder.config), rows) {
        let part = &sequences[range];
        let batch = Batch::sequences(part.iter().map(|(s, _)| &s[..s.len() - 1]));
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for ((tokens, first), segment) in part.iter().zip(&batch.segments) {
            rows.extend((first - 1..segment.rows).map(|r| (segment.first_row + r) as u32));
            targets.extend_from_slice(&tokens[*first..]);
        }
        let h = states(engine, decoder, &batch);
        let mut stats = Vec::with_capacity(rows.len());
        let piece = head_rows_max(&decoder.config);
        for (rows, targets) in rows.chunks(piece).zip(targets.chunks(piece)) {
            let logits = decoder.logits(engine, &engine.rows(&h, rows));
            stats.extend(engine.stats(&logits, targets, temperature_scale).await?);
        }
        out.extend(by_sequence(stats, part.iter().map(|(s, first)| s.len() - first).collect()));
        done += batch.rows();
        progress(done);
    }
    Ok(out)
}

/// Adds the gradient of the seeded loss of all sequences to `grads`; returns the statistics of
/// every next token under the weights that were differentiated.
///
/// `seeds[i]` has `len - 1` rows, one a next token of sequence `i`.
pub async fn accumulate<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    sequences: &[impl AsRef<[u32]>],
    seeds: &[Vec<SeedRow>],
    temperature_scale: i32,
    grads: &mut DeviceGradients<E>,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<RowStats>>, EngineError> {
    let mut out = Vec::with_capacity(sequences.len());
    let mut done = 0;
    let rows = sequences.iter().map(|s| s.as_ref().len() - 1);
    let [rows_max, rows_alone_max] = [KEPT_BYTES_MAX, KEPT_BYTES_ALONE_MAX]
        .map(|bytes| gradient_rows_max(&decoder.config, bytes));
    for range in micro_batches(rows_max, rows) {
        let part = &sequences[range.clone()];
        let batch = Batch::sequences(part.iter().map(|s| {
            let s = s.as_ref();
            &s[..s.len() - 1]
        }));
        let targets: Vec<u32> = part.iter().flat_map(|s| &s.as_ref()[1..]).copied().collect();
        let seeds: Vec<SeedRow> = seeds[range].iter().flatten().copied().collect();
        assert_eq!(seeds.len(), targets.len(), "one seed a next token");
        let keep = if batch.rows() > rows_alone_max { Keep::Input } else { Keep::All };
        let forward = decoder.forward(engine, &batch, keep);
        let (mut stats, mut dh) = (Vec::with_capacity(batch.rows()), Vec::new());
        for piece in batch.pieces(head_rows_max(&decoder.config)) {
            let rows = piece.0.clone();
            let head = decoder.head_forward(engine, &forward.states, piece);
            let targets = &targets[rows.clone()];
            stats.extend(engine.stats(&head.logits, targets, temperature_scale).await?);
            let seeds = &seeds[rows];
            dh.push(decoder.head_backward(engine, head, seeds, temperature_scale, grads));
        }
        let dh = engine.concat(&dh.iter().collect::<Vec<_>>());
        decoder.backward(engine, &batch, forward, dh, grads);
        done += batch.rows();
        progress(done);
        out.extend(by_sequence(stats, batch.segments.iter().map(|s| s.rows).collect()));
    }
    Ok(out)
}
