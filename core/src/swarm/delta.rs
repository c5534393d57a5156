//! Bytes of a version of the weights: what changes against a base, exact, in one encoding.
//!
//! ```text
//! delta    hash of the base (zeros: from nothing), hash of the result; length of every tensor's
//!          bytes: u64 each; tensors
//! gain     sequence of differences
//! matrix   sequence of exponent differences, a tile each; then, for every `SEGMENT` values or
//!          so, in whole rows, a sequence of mantissa residuals
//! sequence number of values that are not 0; then, if these are more than a quarter, all values,
//!          else a gap and a lowest bit for each of them, and a sequence of what is left of them
//! ```
//!
//! Exponents come first: when a tile's exponent moves, its mantissas all change, and the base
//! rescaled to the new exponent predicts them. Numbers are packed as in a share (see `packing`).
//! Rice codes spend a bit on every value, so where few values change it is gaps that are coded.
//! Whatever is decoded is checked for range before anything is computed from it.
//!
//! Measured (`examples/codec.rs`; bytes, and bits a value of which the dense form takes 16; one
//! AdamW step from 2160 tokens):
//!
//! ```text
//!                        micro, untrained  micro, 60 steps  small, untrained   small, 60 steps
//! from nothing             679714   8.78     684401   8.84    3683347   9.08    3685148   9.08
//! step at 2e-3             326701   4.22     145177   1.88    2082486   5.13     862924   2.13
//! step at 1e-4              71519   0.92      15867   0.21     530385   1.31     102430   0.25
//! step at 1e-5              12102   0.16       2612   0.034    101598   0.25      15417   0.038
//! ```
//!
//! Where a few values in a hundred change by one, that is the entropy of which and of the signs
//! to within 1%. One core of an EPYC server encodes 110 to 160 million values a second and
//! applies 100 to 200, hashing included.

use std::sync::Arc;

use manyhands_shaders::bfp::{BLOCK, Tiles, WEIGHT_BITS, WEIGHT_EXPONENT_RANGE, padded};
use manyhands_shaders::x1::rne;

use crate::model::config::ModelConfig;
use crate::model::weights::{Parameter, Shape, Weights, shapes};
use crate::parallel;

use super::ids::Hash;
use super::packing::{PackingError, join, pack, split, unpack, unzigzag, zigzag};

/// Values whose residuals are decoded at a time, unless a row has more: bounds scratch memory.
const SEGMENT: usize = 1 << 18;
/// A sequence with at most one non-zero value in so many is coded by gaps.
const SPARSE_ONE_IN: usize = 4;
/// Bytes of the two hashes.
const HEADER_BYTES: usize = 64;
/// What stands for the base when there is none.
const NOTHING: Hash = Hash([0; 32]);
/// Largest mantissa.
const MANTISSA_MAX: i64 = (1 << (WEIGHT_BITS - 1)) - 1;
/// Gains lie below this in magnitude: 64 in Q3.12.
const GAIN_END: u64 = 1 << 18;

/// Why bytes do not make a version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// Too short, or lengths that do not add up.
    #[error("{0} bytes are not a version of this model: header or lengths do not fit")]
    Malformed(u64),
    /// Made against other weights.
    #[error("the version changes {}, not {}", weights(.expected), weights(.got))]
    Base {
        /// The base that the bytes name; `None` is no base.
        expected: Option<Hash>,
        /// The base that was given.
        got: Option<Hash>,
    },
    /// A tensor's bytes are wrong.
    #[error("{tensor}: {error}")]
    Tensor {
        /// Name in `model::weights::shapes`.
        tensor: String,
        /// What is wrong.
        error: TensorError,
    },
    /// All could be read, but it is not what the bytes promise.
    #[error("the version makes weights {got}, but it names {expected}")]
    Result {
        /// The hash in the bytes.
        expected: Hash,
        /// The hash of what they make.
        got: Hash,
    },
    /// Neither a base nor bytes.
    #[error("nothing says how the weights {0} are made")]
    Nothing(Hash),
}

/// Why a tensor of a version cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// Not packed as [`encode`] packs.
    #[error(transparent)]
    Packing(#[from] PackingError),
    /// A mantissa, an exponent or a gain beyond what the arithmetic is exact for.
    #[error("a value is out of range")]
    Range,
}

fn weights(hash: &Option<Hash>) -> String {
    hash.map_or("nothing".into(), |hash| format!("weights {hash}"))
}

/// The bytes that make `next` from `base`, or from nothing.
///
/// # Panics
/// If the two have different shapes.
pub fn encode(base: Option<&Weights>, next: &Weights) -> Vec<u8> {
    assert!(base.is_none_or(|b| b.config == next.config), "a version keeps its model's shape");
    let jobs = next.parameters.iter().enumerate().collect();
    let tensors = parallel::map(jobs, |(i, next): (usize, &Parameter)| {
        let mut out = vec![];
        match (next, base.map(|b| &b.parameters[i])) {
            (Parameter::Gain(next), base) => encode_gain(base.map(gain), next, &mut out),
            (Parameter::Matrix(next), base) => encode_matrix(base.map(tiles), next, &mut out),
        }
        out
    });
    let base = base.map_or(NOTHING, |b| b.hash().into());
    let mut out = [base.0, Hash::from(next.hash()).0].concat();
    join(&tensors, &mut out);
    out
}

/// The hashes that the bytes of a version name: its base, if it has one, and its result.
pub fn hashes(bytes: &[u8]) -> Result<(Option<Hash>, Hash), DeltaError> {
    let malformed = DeltaError::Malformed(bytes.len() as u64);
    let ([base, result], _) = bytes.as_chunks().0.split_first_chunk().ok_or(malformed)?;
    Ok(((*base != NOTHING.0).then_some(Hash(*base)), Hash(*result)))
}

/// The version that `bytes` make from `base`. The bytes name both by hash: another base is
/// refused, and so is another result. Memory is bounded by the shapes of `config`.
///
/// # Panics
/// If `base` is not of this configuration: both are the caller's own.
pub fn apply(
    base: Option<&Weights>,
    config: &ModelConfig,
    bytes: &[u8],
) -> Result<Weights, DeltaError> {
    assert!(base.is_none_or(|b| b.config == *config), "the base is of another configuration");
    let (expected, result) = hashes(bytes)?;
    let got = base.map(|b| b.hash().into());
    if expected != got {
        return Err(DeltaError::Base { expected, got });
    }
    let shapes = shapes(config);
    let parts = split(&bytes[HEADER_BYTES..], shapes.len());
    let parts = parts.ok_or(DeltaError::Malformed(bytes.len() as u64))?;
    let jobs = shapes.iter().zip(parts).enumerate().collect();
    let parameters = parallel::map(jobs, |(i, (shape, part)): (usize, (&Shape, &[u8]))| {
        let base = base.map(|b| &b.parameters[i]);
        let parameter = if shape.rows > 1 {
            apply_matrix(base.map(tiles), shape, part).map(Parameter::Matrix)
        } else {
            apply_gain(base.map(gain), shape.cols, part).map(Parameter::Gain)
        };
        parameter.map_err(|error| DeltaError::Tensor { tensor: shape.name.clone(), error })
    });
    let parameters = parameters.into_iter().collect::<Result<_, _>>()?;
    let weights = Weights { config: config.clone(), parameters };
    let got = weights.hash().into();
    if got != result {
        return Err(DeltaError::Result { expected: result, got });
    }
    Ok(weights)
}

/// The weights `want`: `blobs` applied in order, to `base` or to nothing.
///
/// # Panics
/// As [`apply`].
pub fn build<B: AsRef<[u8]>>(
    want: Hash,
    base: Option<Arc<Weights>>,
    blobs: impl IntoIterator<Item = B>,
    config: &ModelConfig,
) -> Result<Arc<Weights>, DeltaError> {
    let change = |weights: Option<Arc<Weights>>, bytes: B| {
        apply(weights.as_deref(), config, bytes.as_ref()).map(|next| Some(Arc::new(next)))
    };
    let weights = blobs.into_iter().try_fold(base, change)?.ok_or(DeltaError::Nothing(want))?;
    let got = Hash::from(weights.hash());
    if got == want { Ok(weights) } else { Err(DeltaError::Result { expected: want, got }) }
}

fn gain(parameter: &Parameter) -> &[i32] {
    let Parameter::Gain(gain) = parameter else { panic!("a tensor of one row is a gain") };
    gain
}

fn tiles(parameter: &Parameter) -> &Tiles {
    let Parameter::Matrix(tiles) = parameter else { panic!("a tensor of many rows is a matrix") };
    tiles
}

fn encode_gain(base: Option<&[i32]>, next: &[i32], out: &mut Vec<u8>) {
    let change = |(i, x): (usize, &i32)| i64::from(*x) - base.map_or(0, |b| i64::from(b[i]));
    let changes: Vec<u64> = next.iter().enumerate().map(|x| zigzag(change(x))).collect();
    encode_sequence(changes, out);
}

fn apply_gain(base: Option<&[i32]>, count: usize, bytes: &[u8]) -> Result<Vec<i32>, TensorError> {
    let (changes, rest) = decode_sequence(bytes, count)?;
    ends(rest)?;
    let value = |(i, z): (usize, &u64)| {
        let value = base.map_or(0, |b| i64::from(b[i])).checked_add(unzigzag(*z));
        let value = value.filter(|v| v.unsigned_abs() < GAIN_END);
        value.and_then(|v| i32::try_from(v).ok()).ok_or(TensorError::Range)
    };
    changes.iter().enumerate().map(value).collect()
}

fn encode_matrix(base: Option<&Tiles>, next: &Tiles, out: &mut Vec<u8>) {
    let base_exponent = |i: usize| base.map_or(0, |b| i64::from(b.exponents[i]));
    let change = |(i, e): (usize, &i8)| zigzag(i64::from(*e) - base_exponent(i));
    encode_sequence(next.exponents.iter().enumerate().map(change).collect(), out);
    let rows = segment_rows(next.cols);
    for first in (0..next.rows).step_by(rows) {
        let count = rows.min(next.rows - first);
        let mut residuals = Vec::with_capacity(count * next.cols);
        for row in first..first + count {
            residuals.extend((0..next.cols).map(|col| {
                let predicted = predict(base, row, col, next.exponent(row, col));
                zigzag(i64::from(next.mantissa(row, col)) - predicted)
            }));
        }
        encode_sequence(residuals, out);
    }
}

fn apply_matrix(base: Option<&Tiles>, shape: &Shape, bytes: &[u8]) -> Result<Tiles, TensorError> {
    let (rows, cols, stride) = (shape.rows, shape.cols, padded(shape.cols));
    let (changes, mut rest) = decode_sequence(bytes, padded(rows) / BLOCK * (stride / BLOCK))?;
    let exponent = |(i, z): (usize, &u64)| {
        let value = base.map_or(0, |b| i64::from(b.exponents[i])).checked_add(unzigzag(*z));
        let value = value.and_then(|e| i32::try_from(e).ok());
        let value =
            value.filter(|e| WEIGHT_EXPONENT_RANGE.contains(e)).ok_or(TensorError::Range)?;
        Ok(value as i8)
    };
    let exponents = changes.iter().enumerate().map(exponent).collect::<Result<_, TensorError>>()?;
    let mantissas = vec![0; padded(rows) * stride];
    let mut out = Tiles { rows, cols, mantissas, exponents };
    for first in (0..rows).step_by(segment_rows(cols)) {
        let count = segment_rows(cols).min(rows - first);
        let residuals;
        (residuals, rest) = decode_sequence(rest, count * cols)?;
        for (row, residuals) in (first..).zip(residuals.chunks(cols)) {
            for (col, z) in residuals.iter().enumerate() {
                let predicted = predict(base, row, col, out.exponent(row, col));
                let value = predicted.checked_add(unzigzag(*z));
                let value = value.filter(|m| m.abs() <= MANTISSA_MAX).ok_or(TensorError::Range)?;
                out.mantissas[row * stride + col] = value as i16;
            }
        }
    }
    ends(rest)?;
    Ok(out)
}

/// Whole rows whose residuals are coded together.
fn segment_rows(cols: usize) -> usize {
    (SEGMENT / cols).max(1)
}

/// The base's mantissa under another exponent; 0 without a base.
fn predict(base: Option<&Tiles>, row: usize, col: usize, exponent: i32) -> i64 {
    let Some(base) = base else { return 0 };
    let mantissa = i64::from(base.mantissa(row, col));
    rne(mantissa, exponent - base.exponent(row, col)).clamp(-MANTISSA_MAX, MANTISSA_MAX)
}

fn ends(rest: &[u8]) -> Result<(), PackingError> {
    if rest.is_empty() { Ok(()) } else { Err(PackingError::Trailing(rest.len() as u64)) }
}

/// Appends a sequence: see the head of this file.
fn encode_sequence(mut values: Vec<u64>, out: &mut Vec<u8>) {
    loop {
        let count = values.iter().filter(|v| **v != 0).count();
        pack([count as u64], out);
        if count == 0 {
            return;
        }
        if count > values.len() / SPARSE_ONE_IN {
            return pack(values, out);
        }
        let (mut gaps, mut left) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut gap = 0;
        for value in values {
            match value.checked_sub(1) {
                None => gap += 1,
                Some(v) => {
                    // The lowest bit is the sign of a change: as good as random.
                    gaps.push(gap << 1 | v & 1);
                    left.push(v >> 1);
                    gap = 0;
                }
            }
        }
        pack(gaps, out);
        values = left;
    }
}

/// Reads a sequence of `length` values; returns them and the bytes that follow.
fn decode_sequence(bytes: &[u8], length: usize) -> Result<(Vec<u64>, &[u8]), PackingError> {
    let (count, rest) = unpack(bytes, 1)?;
    let count = usize::try_from(count[0]).unwrap_or(usize::MAX);
    if count == 0 {
        return Ok((vec![0; length], rest));
    }
    if count > length {
        return Err(PackingError::NotCanonical);
    }
    if count > length / SPARSE_ONE_IN {
        let (values, rest) = unpack(rest, length)?;
        let found = values.iter().filter(|v| **v != 0).count();
        return if found == count { Ok((values, rest)) } else { Err(PackingError::NotCanonical) };
    }
    let (gaps, rest) = unpack(rest, count)?;
    // At most a quarter as long each time: the recursion is shallow.
    let (left, rest) = decode_sequence(rest, count)?;
    let mut values = vec![0; length];
    let mut at = 0_usize;
    for (gap, left) in gaps.iter().zip(left) {
        let gap_values = usize::try_from(gap >> 1).unwrap_or(usize::MAX);
        let position = at.checked_add(gap_values).filter(|p| *p < length);
        let position = position.ok_or(PackingError::NotCanonical)?;
        let value = left.checked_mul(2).and_then(|v| (v | gap & 1).checked_add(1));
        values[position] = value.ok_or(PackingError::NotCanonical)?;
        at = position + 1;
    }
    Ok((values, rest))
}

#[cfg(test)]
mod tests;
