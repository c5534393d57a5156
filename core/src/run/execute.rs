//! Computing [`Work`] on an engine.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use super::work::{Output, Values, Work};
use crate::engine::{Batch, Engine, EngineError, RowStats, Saturations, SeedRow};
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, DeviceGradients, Keep};
use crate::model::generate::{Completion, Request, Sampling, UNIT_SCALE, draw, generate};
use crate::model::weights::Gradients;

/// What all lanes keep for their backward passes, and their sums of gradients, in bytes.
const LANES_BYTES_MAX: usize = 1 << 30;
/// Rows of which a lane makes a gradient, at least: its sums cost as much as a hundred rows.
const LANE_ROWS_MIN: usize = 256;
/// A model of more parameters comes from far away for every step of decoding: whoever reads it
/// decodes for several requests,
const NEAR_PARAMETERS_MAX: usize = 16 << 20;
/// of which there are so many.
const FAR_REQUESTS_MIN: usize = 8;
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
fn slots(model: &ModelConfig, length: usize, cache_bytes: u64) -> usize {
    let keys = (model.layers * model.kv_width() * size_of::<i16>()) as u64;
    let bytes = 2 * keys * length as u64;
    (cache_bytes / bytes.max(1)).clamp(1, SLOTS_MAX as u64) as usize
}

/// Computes `work`, which fits the decoder's model. `progress` is told tokens processed so far.
pub async fn execute<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    work: &Work,
    mut progress: impl FnMut(usize),
) -> Result<Output, EngineError> {
    let count = parts(engine, &decoder.config, work);
    if count < 2 {
        let part = whole(engine, decoder, work, CACHE_BYTES_MAX, progress).await?;
        return join(engine, vec![part]).await;
    }
    let items = work.items();
    let range = |i: usize| i * items / count..(i + 1) * items / count;
    let total = AtomicUsize::new(0);
    let part = |lane: &E, i: usize, progress: &mut dyn FnMut(usize)| {
        let mut told = 0;
        let report = |tokens: usize| {
            let before = total.fetch_add(tokens - told, Ordering::Relaxed);
            progress(before + tokens - told);
            told = tokens;
        };
        let cache = CACHE_BYTES_MAX / count as u64;
        ready(whole(lane, decoder, &work.slice(range(i)), cache, report))
    };
    let own = |lane: &E| part(lane, 0, &mut progress);
    let parts = engine.on_lanes(count, own, |lane, i| part(lane, i, &mut |_| ()));
    progress(total.into_inner());
    join(engine, parts.into_iter().collect::<Result<_, _>>()?).await
}

/// What a lane computed: its output, in which the gradient is not yet read.
struct Part<E: Engine> {
    output: Output,
    gradients: Option<DeviceGradients<E>>,
}

/// The output of all parts of a work, which come in its order.
async fn join<E: Engine>(engine: &E, parts: Vec<Part<E>>) -> Result<Output, EngineError> {
    let (outputs, gradients): (Vec<_>, Vec<_>) =
        parts.into_iter().map(|p| (p.output, p.gradients)).unzip();
    let mut outputs = outputs.into_iter();
    let mut all = outputs.next().expect("a work has a part");
    for Output { saturations, values } in outputs {
        all.saturations.merge(&saturations);
        match (&mut all.values, values) {
            (Values::Samples(all), Values::Samples(part)) => all.extend(part),
            (Values::Scores(all), Values::Scores(part))
            | (Values::Gradient(all, _), Values::Gradient(part, _)) => all.extend(part),
            _ => unreachable!("parts of one work"),
        }
    }
    if let Values::Gradient(_, sums) = &mut all.values {
        let gradients = gradients.into_iter().flatten().collect();
        *sums = DeviceGradients::read_sum(gradients, engine).await?;
    }
    Ok(all)
}

/// The output of a future that never waits.
fn ready<T>(future: impl Future<Output = T>) -> T {
    let mut context = Context::from_waker(Waker::noop());
    match pin!(future).poll(&mut context) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("a lane waits for nothing"),
    }
}

/// How many parts of `work` to compute at the same time, each on a lane of its own. The output does
/// not depend on it.
fn parts<E: Engine>(engine: &E, model: &ModelConfig, work: &Work) -> usize {
    let lanes = engine.lanes();
    let far = model.frozen().parameter_count() > NEAR_PARAMETERS_MAX;
    let most = match work {
        Work::Gradient { sequences, .. } => {
            let rows: usize = sequences.iter().map(|s| s.tokens.len() - 1).sum();
            let kept = gradient_rows_max(engine, model, KEPT_BYTES_MAX) * kept_row_bytes(model);
            (LANES_BYTES_MAX / (8 * model.parameter_count() + kept)).min(rows / LANE_ROWS_MIN)
        }
        Work::Sample { requests, .. } if far => requests.len() / FAR_REQUESTS_MIN,
        _ => lanes,
    };
    // All threads on each operation of a large model are better than most of them at rest.
    if far && 2 * most < lanes { 1 } else { most.min(lanes).min(work.items()) }
}

/// [`execute`] on this engine itself, with so many bytes for keys and values.
async fn whole<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    work: &Work,
    cache_bytes: u64,
    mut progress: impl FnMut(usize),
) -> Result<Part<E>, EngineError> {
    engine.take_saturations().await?;
    let mut gradients = None;
    let mut saturations = Saturations::default();
    let values = match work {
        Work::Sample { seed, temperature_scale, max_new_tokens, end, requests } => {
            let longest = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
            let sampling = Sampling {
                seed: *seed,
                temperature_scale: *temperature_scale,
                max_new_tokens: *max_new_tokens as usize,
                end: *end,
                slots: slots(&decoder.config, longest + *max_new_tokens as usize, cache_bytes),
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
            gradients = Some(sum);
            Values::Gradient(stats, Gradients::default())
        }
    };
    saturations.merge(&engine.take_saturations().await?);
    Ok(Part { output: Output { saturations, values }, gradients })
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
    for range in
        micro_batches(forward_rows_max(engine, &decoder.config), inputs.iter().map(Vec::len))
    {
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
        let piece = head_rows_max(engine, &decoder.config);
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
fn rows_max(engine: &impl Engine, cols: usize) -> usize {
    (TENSOR_BYTES_MAX / (4 * cols)).clamp(1, engine.rows_max())
}

/// Rows of a micro-batch, unless a single sequence is longer. Sums are integers: how sequences are
/// cut into micro-batches changes nothing but memory and time.
fn forward_rows_max(engine: &impl Engine, model: &ModelConfig) -> usize {
    rows_max(engine, model.ffn.max(model.width))
}

/// Rows whose logits are looked at together.
fn head_rows_max(engine: &impl Engine, model: &ModelConfig) -> usize {
    rows_max(engine, model.vocabulary)
}

/// What a row keeps for the backward pass, in bytes.
fn kept_row_bytes(model: &ModelConfig) -> usize {
    // Blocks take 2 bytes a value, norms and the inputs of SwiGLU 4.
    let attention = 2 * (2 * model.attention_width() + 2 * model.kv_width());
    let layer = attention + (2 * 2 + 2 * 4) * model.width + (2 + 2 * 4) * model.ffn;
    layer * model.layers
}

/// Rows of a micro-batch that is differentiated and keeps all that it needs in so many bytes.
fn gradient_rows_max(engine: &impl Engine, model: &ModelConfig, bytes: usize) -> usize {
    (bytes / kept_row_bytes(model)).clamp(1, forward_rows_max(engine, model))
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
    for range in micro_batches(forward_rows_max(engine, &decoder.config), rows) {
        let part = &sequences[range];
        let batch = Batch::sequences(part.iter().map(|(s, _)| &s[..s.len() - 1]));
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for ((tokens, first), segment) in part.iter().zip(&batch.segments) {
            rows.extend((first - 1..segment.rows).map(|r| (segment.first_row + r) as u32));
            targets.extend_from_slice(&tokens[*first..]);
        }
        let h = states(engine, decoder, &batch);
        let mut stats = Vec::with_capacity(rows.len());
        let piece = head_rows_max(engine, &decoder.config);
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
        .map(|bytes| gradient_rows_max(engine, &decoder.config, bytes));
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
        for piece in batch.pieces(head_rows_max(engine, &decoder.config)) {
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

#[cfg(all(test, feature = "threads"))]
mod tests {
    use super::*;
    use crate::engine::cpu::Cpu;
    use crate::run::work::Seeded;

    /// Breaks if lanes rest that could work, or if more of them compute than memory has room for.
    #[test]
    fn work_is_cut_into_as_many_parts_as_pay() {
        let cut = |preset: &str, threads: usize, work: &Work| {
            let model = ModelConfig::preset(preset, 256, 512).expect("a preset");
            parts(&Cpu::new(model.constants(), threads, None), &model, work)
        };
        let gradient = |count: usize, rows: usize| {
            let tokens = vec![1; rows + 1];
            let sequence = Seeded { tokens, first: 1, seeds: Vec::new() };
            Work::Gradient { temperature_scale: UNIT_SCALE, sequences: vec![sequence; count] }
        };
        let sample = |count: usize| Work::Sample {
            seed: 0,
            temperature_scale: None,
            max_new_tokens: 9,
            end: 0,
            requests: vec![Request { prompt: vec![1], stream: [0; 3] }; count],
        };
        assert_eq!(cut("tiny", 1, &sample(64)), 1);
        assert_eq!(cut("tiny", 4, &sample(64)), 4);
        assert_eq!(cut("tiny", 4, &sample(3)), 3);
        assert_eq!(cut("tiny", 4, &gradient(16, 64)), 4);
        assert_eq!(cut("tiny", 4, &gradient(8, 64)), 2);
        assert_eq!(cut("tiny", 4, &gradient(1, 400)), 1);
        // A large model is read by as few as have enough to do, or by all together.
        assert_eq!(cut("base", 2, &sample(16)), 2);
        assert_eq!(cut("base", 2, &sample(4)), 1);
        assert_eq!(cut("base", 8, &sample(16)), 1);
        // Two sums of its gradients fit memory, those of the largest do not.
        assert_eq!(cut("base", 2, &gradient(16, 256)), 2);
        assert_eq!(cut("smollm2-135m", 2, &gradient(16, 256)), 1);
    }
}
