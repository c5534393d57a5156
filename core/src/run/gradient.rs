//! Gradients and scores of whole sequences, in micro-batches.
//!
//! Sums are integers: how sequences are cut into micro-batches changes nothing but memory.

use crate::engine::{Batch, Engine, EngineError, RowStats, SeedRow};
use crate::model::decoder::{Decoder, DeviceGradients};

/// Rows (tokens) a micro-batch holds at most, unless a single sequence is longer.
pub const MICRO_BATCH_ROWS: usize = 4096;

/// Ranges of sequences whose inputs fit a micro-batch.
fn micro_batches(sequences: &[Vec<u32>]) -> Vec<std::ops::Range<usize>> {
    let mut out: Vec<std::ops::Range<usize>> = Vec::new();
    let mut rows = usize::MAX;
    for (i, s) in sequences.iter().enumerate() {
        assert!(s.len() >= 2, "a sequence needs an input and a target");
        let n = s.len() - 1;
        match out.last_mut() {
            Some(range) if rows + n <= MICRO_BATCH_ROWS => {
                range.end = i + 1;
                rows += n;
            }
            _ => {
                out.push(i..i + 1);
                rows = n;
            }
        }
    }
    out
}

/// Inputs and next-token targets of sequences.
fn inputs_and_targets(sequences: &[Vec<u32>]) -> (Batch, Vec<u32>) {
    let batch = Batch::sequences(sequences.iter().map(|s| &s[..s.len() - 1]));
    (batch, sequences.iter().flat_map(|s| &s[1..]).copied().collect())
}

/// Splits row statistics by sequence.
fn by_sequence(stats: Vec<RowStats>, batch: &Batch) -> impl Iterator<Item = Vec<RowStats>> {
    let lengths: Vec<usize> = batch.segments.iter().map(|s| s.rows).collect();
    let mut rest = stats.into_iter();
    lengths.into_iter().map(move |n| rest.by_ref().take(n).collect())
}

/// Statistics of every next token of every sequence, `len - 1` each: a forward pass only.
pub async fn score<E: Engine>(
    engine: &E,
    decoder: &Decoder<E>,
    sequences: &[Vec<u32>],
    temperature_scale: i32,
) -> Result<Vec<Vec<RowStats>>, EngineError> {
    let mut out = Vec::with_capacity(sequences.len());
    for range in micro_batches(sequences) {
        let (batch, targets) = inputs_and_targets(&sequences[range]);
        let longest = batch.segments.iter().map(|s| s.rows).max().unwrap_or(0);
        let mut caches = decoder.caches(engine, batch.segments.len(), longest);
        let rows: Vec<u32> = (0..batch.rows() as u32).collect();
        let logits = decoder.logits(engine, &batch, &mut caches, &rows);
        let stats = engine.stats(&logits, &targets, temperature_scale).await?;
        out.extend(by_sequence(stats, &batch));
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
    sequences: &[Vec<u32>],
    seeds: &[Vec<SeedRow>],
    temperature_scale: i32,
    grads: &mut DeviceGradients<E>,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<RowStats>>, EngineError> {
    let mut out = Vec::with_capacity(sequences.len());
    for range in micro_batches(sequences) {
        let (batch, targets) = inputs_and_targets(&sequences[range.clone()]);
        let seeds: Vec<SeedRow> = seeds[range].iter().flatten().copied().collect();
        assert_eq!(seeds.len(), targets.len(), "one seed a next token");
        let forward = decoder.forward(engine, &batch);
        let stats = engine.stats(&forward.logits, &targets, temperature_scale).await?;
        decoder.backward(engine, &batch, forward, &seeds, temperature_scale, grads);
        progress(batch.rows());
        out.extend(by_sequence(stats, &batch));
    }
    Ok(out)
}
