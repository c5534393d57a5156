//! Computing [`Work`] on an engine, and computing it again to check it.

use super::work::{Output, Values, Work};
use crate::engine::{Batch, Engine, EngineError, RowStats, SeedRow};
use crate::model::decoder::{Decoder, DeviceGradients};
use crate::model::generate::{Completion, Request, Sampling, draw, generate};

/// Rows (tokens) a micro-batch holds at most, unless a single sequence is longer. Sums are
/// integers: how sequences are cut into micro-batches changes nothing but memory.
pub const MICRO_BATCH_ROWS: usize = 4096;
/// Sequences decoded at once.
pub const SLOTS: usize = 512;
/// Temperature scale of the statistics of greedy samples: temperature 1.
const UNIT_SCALE: i32 = crate::model::generate::UNIT_SCALE;

/// Computes `work`, which fits the decoder's model. `progress` is told tokens processed so far.
pub async fn execute<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    work: &Work,
    mut progress: impl FnMut(usize),
) -> Result<Output, EngineError> {
    engine.take_saturations().await?;
    let values = match work {
        Work::Sample { seed, temperature_scale, max_new_tokens, end, requests } => {
            let sampling = Sampling {
                seed: *seed,
                temperature_scale: *temperature_scale,
                max_new_tokens: *max_new_tokens as usize,
                end: *end,
                slots: SLOTS,
            };
            let report = |tokens: usize, _: &[Completion]| {
                progress(tokens);
                true
            };
            Values::Samples(generate(engine, decoder, requests, &sampling, report).await?)
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
    Ok(Output { saturations: engine.take_saturations().await?, values })
}

/// Computes `work` again, to be compared with `claimed`, which has passed [`Output::check`].
///
/// Claimed completions are not generated again: decoding equals the full forward pass bit for bit,
/// so one prefill over prompt and completion recomputes every logit and draw. If a draw gives
/// another token, the output differs from the claim there, which is all that an audit needs.
pub async fn recompute<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    work: &Work,
    claimed: &Output,
    mut progress: impl FnMut(usize),
) -> Result<Output, EngineError> {
    let (Work::Sample { seed, temperature_scale, requests, .. }, Values::Samples(completions)) =
        (work, &claimed.values)
    else {
        return execute(engine, decoder, work, progress).await;
    };
    engine.take_saturations().await?;
    let mut out = Vec::with_capacity(requests.len());
    let inputs = |(r, c): (&Request, &Completion)| {
        [r.prompt.as_slice(), &c.tokens[..c.tokens.len() - 1]].concat()
    };
    let inputs: Vec<Vec<u32>> = requests.iter().zip(completions).map(inputs).collect();
    let mut done = 0;
    for range in micro_batches(inputs.iter().map(Vec::len)) {
        let batch = Batch::sequences(inputs[range.clone()].iter().map(Vec::as_slice));
        let (mut rows, mut draws) = (Vec::new(), Vec::new());
        for (segment, i) in batch.segments.iter().zip(range.clone()) {
            let (request, count) = (&requests[i], completions[i].tokens.len());
            let first = segment.first_row + request.prompt.len() - 1;
            rows.extend((first..first + count).map(|row| row as u32));
            let drawn = (0..count).map(|t| draw(*seed, request.stream, t as u32));
            draws.extend(drawn.map(|d| temperature_scale.map(|_| d)));
        }
        let longest = batch.segments.iter().map(|s| s.rows).max().unwrap_or(0);
        let mut caches = decoder.caches(engine, batch.segments.len(), longest);
        let logits = decoder.logits(engine, &batch, &mut caches, &rows);
        let scale = temperature_scale.unwrap_or(UNIT_SCALE);
        let mut sampled = engine.sample(&logits, &draws, scale).await?.into_iter();
        for completion in &completions[range] {
            let count = completion.tokens.len();
            let (tokens, stats) = sampled.by_ref().take(count).unzip();
            out.push(Completion { tokens, stats });
        }
        done += batch.rows();
        progress(done);
    }
    Ok(Output { saturations: engine.take_saturations().await?, values: Values::Samples(out) })
}

/// Ranges of sequences whose rows fit a micro-batch.
fn micro_batches(rows: impl Iterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
    let mut out: Vec<std::ops::Range<usize>> = Vec::new();
    let mut sum = usize::MAX;
    for (i, n) in rows.enumerate() {
        match out.last_mut() {
            Some(range) if sum + n <= MICRO_BATCH_ROWS => {
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
    for range in micro_batches(sequences.iter().map(|(s, _)| s.len() - 1)) {
        let part = &sequences[range];
        let batch = Batch::sequences(part.iter().map(|(s, _)| &s[..s.len() - 1]));
        let longest = batch.segments.iter().map(|s| s.rows).max().unwrap_or(0);
        let mut caches = decoder.caches(engine, batch.segments.len(), longest);
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for ((tokens, first), segment) in part.iter().zip(&batch.segments) {
            rows.extend((first - 1..segment.rows).map(|r| (segment.first_row + r) as u32));
            targets.extend_from_slice(&tokens[*first..]);
        }
        let logits = decoder.logits(engine, &batch, &mut caches, &rows);
        let stats = engine.stats(&logits, &targets, temperature_scale).await?;
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
    for range in micro_batches(sequences.iter().map(|s| s.as_ref().len() - 1)) {
        let part = &sequences[range.clone()];
        let batch = Batch::sequences(part.iter().map(|s| {
            let s = s.as_ref();
            &s[..s.len() - 1]
        }));
        let targets: Vec<u32> = part.iter().flat_map(|s| &s.as_ref()[1..]).copied().collect();
        let seeds: Vec<SeedRow> = seeds[range].iter().flatten().copied().collect();
        assert_eq!(seeds.len(), targets.len(), "one seed a next token");
        let forward = decoder.forward(engine, &batch);
        let stats = engine.stats(&forward.logits, &targets, temperature_scale).await?;
        decoder.backward(engine, &batch, forward, &seeds, temperature_scale, grads);
        done += batch.rows();
        progress(done);
        out.extend(by_sequence(stats, batch.segments.iter().map(|s| s.rows).collect()));
    }
    Ok(out)
}
