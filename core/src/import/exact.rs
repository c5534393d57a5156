//! The one rule by which foreign weights are rounded into the exact formats.
//!
//! Matrices become 10-bit tiles and gains Q3.12, as everywhere. Before that, powers of two move
//! between tensors, which changes exponents and neither mantissas of matrices nor the function:
//! - between a norm's gains and the matrices that read it, one power for 32 channels. Trained
//!   gains are often 0.02, which Q3.12 holds in six bits. A block of 32 channels is a block of the
//!   product and a column of tiles, so only the gains' precision changes.
//! - over the whole residual stream, if the original's leaves `FX(16)`: first tokens commonly carry
//!   one channel in the tens of thousands (Sun et al., "Massive Activations in Large Language
//!   Models", 2024). What writes to the stream is divided, epsilon too, and the norms do the rest.

use std::collections::BTreeMap;

use manyhands_shaders::bfp::BLOCK;
use serde::{Deserialize, Serialize};

use super::names::{Found, Source};
use super::{ImportError, error};
use crate::model::config::ModelConfig;
use crate::model::weights::{Parameter, Shape, Weights, shapes};
use crate::parallel;

/// Largest gain that Q3.12 keeps as it is.
const GAIN_MAX: f32 = 63.0;
/// What the residual stream is brought below: half of what `FX(16)` holds.
const RESIDUAL_MAX: f32 = 8192.0;

/// The powers of two that were moved. An export takes them back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shifts {
    /// The residual stream is the original's times `2^-residual`, epsilon `4^-residual`.
    pub residual: i32,
    /// By norm: for each block of 32 channels the power of two by which its gains were multiplied
    /// and the columns that read them divided.
    pub norms: BTreeMap<String, Vec<i32>>,
}

impl Shifts {
    /// The shifts for a model whose residual stream reaches `residual_peak`.
    pub fn choose(source: &Source<'_>, residual_peak: f32) -> Result<Self, ImportError> {
        let mut norms = BTreeMap::new();
        for found in source.tensors.iter().filter(|f| f.shape.rows == 1) {
            // A tied head is read without this norm, as the embedding.
            if found.shape.name != "final_norm" || !source.config.tied {
                norms.insert(found.shape.name.clone(), block_shifts(&found.read()?));
            }
        }
        let residual = (0..16).find(|r| residual_peak / (1 << r) as f32 <= RESIDUAL_MAX);
        let Some(residual) = residual else {
            let problem = format!("it reaches {residual_peak}, which no exact format holds");
            return Err(error("the residual stream", problem));
        };
        Ok(Self { residual, norms })
    }

    /// Multiplies one tensor's values by its powers of two; `back` divides. Of an adapter `a` reads
    /// what its matrix reads, and has the powers of its columns; `b` writes where it writes, and
    /// has the power of the whole.
    fn apply(&self, config: &ModelConfig, shape: &Shape, back: bool, values: &mut [f32]) {
        let (name, columns, rows) = match shape.name.rsplit_once('.') {
            Some((matrix, "a")) => (matrix, true, false),
            Some((matrix, "b")) => (matrix, false, true),
            _ => (&*shape.name, true, true),
        };
        let (layer, own) = name.rsplit_once('.').unwrap_or(("", name));
        let whole = match own {
            "embedding" | "output" | "down" if rows => -self.residual,
            "final_norm" if config.tied => self.residual,
            _ => 0,
        };
        let (norm, sign) = match own {
            "query" | "key" | "value" => (format!("{layer}.attention_norm"), -1),
            "gate" | "up" => (format!("{layer}.ffn_norm"), -1),
            "head" => ("final_norm".into(), -1),
            _ => (name.into(), 1),
        };
        let blocks = self.norms.get(&norm).filter(|_| columns);
        for row in values.chunks_mut(shape.cols) {
            for (i, block) in row.chunks_mut(BLOCK).enumerate() {
                let own = blocks.and_then(|b| b.get(i)).map_or(0, |s| sign * s);
                let shift = if back { -(whole + own) } else { whole + own };
                let factor = f32::from_bits((127 + shift).clamp(1, 254).cast_unsigned() << 23);
                block.iter_mut().for_each(|x| *x *= factor);
            }
        }
    }
}

/// For each block of 32 gains the power of two that brings the largest into [1, 2), within 2^12.
fn block_shifts(gain: &[f32]) -> Vec<i32> {
    let shift = |block: &[f32]| {
        let bits = block.iter().map(|g| g.abs().to_bits()).max().unwrap_or(0);
        // The exponent field is floor(log2 |g|) + 127.
        if bits == 0 { 0 } else { (127 - (bits >> 23).cast_signed()).clamp(-12, 12) }
    };
    gain.chunks(BLOCK).map(shift).collect()
}

/// Rounds a model, one tensor after the other.
pub fn quantize(source: &Source<'_>, shifts: &Shifts) -> Result<Weights, ImportError> {
    let mut config = source.config.clone();
    config.rms_epsilon = libm::scalbn(config.rms_epsilon, -2 * shifts.residual);
    config.validate().map_err(|e| {
        error(e.key, format!("{}, after the residual stream was scaled to fit", e.problem))
    })?;
    let round = |found: &Found<'_>| -> Result<Parameter, ImportError> {
        let mut values = found.read()?;
        shifts.apply(&config, &found.shape, false, &mut values);
        let over = values.iter().position(|g| found.shape.rows == 1 && g.abs() > GAIN_MAX);
        if let Some(at) = over {
            let problem = format!("gain {at} is {}, beyond {GAIN_MAX}", values[at]);
            return Err(error(&found.name, problem));
        }
        Ok(Parameter::quantize(&found.shape, &values))
    };
    let parameters = parallel::map(source.tensors.iter().collect(), round);
    let parameters = parameters.into_iter().collect::<Result<_, _>>()?;
    Ok(Weights { config, parameters })
}

/// What exact weights, or an adapter's factors, stand for, in f32 and at the original's scale: in
/// the order of [`shapes`].
pub fn restore(weights: &Weights, shifts: &Shifts) -> Vec<Vec<f32>> {
    let mut all = weights.values();
    for (shape, values) in shapes(&weights.config).iter().zip(&mut all) {
        shifts.apply(&weights.config, shape, true, values);
    }
    all
}
