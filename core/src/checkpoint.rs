//! Checkpoints as bytes: safetensors files under a manifest of BLAKE3 hashes.
//!
//! A checkpoint is a set of named files. This module encodes and decodes them; writing them
//! atomically is the caller's business. Decoding trusts nothing: sizes are bounded by the input,
//! hashes are compared before contents are read, and every error names file and tensor.

use std::collections::{BTreeMap, HashMap};

use manyhands_shaders::bfp::{BLOCK, Tiles, WEIGHT_BITS, WEIGHT_EXPONENT_RANGE};
use manyhands_shaders::x1::FORMAT;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::model::config::ModelConfig;
use crate::model::weights::{Parameter, Shape, Weights, shapes};

/// The published weights, in the exact formats.
pub const WEIGHTS_FILE: &str = "weights.safetensors";
/// f32 tensors of the optimizer: master weights, moments, reference.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Scalars: counters, controllers, configuration.
pub const STATE_FILE: &str = "state.json";
/// Hashes of the others; written last.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Largest `manifest.json` or `state.json` that is read.
pub const JSON_BYTES_MAX: usize = 256 << 20;

/// Key under which a file keeps its own description.
const METADATA_KEY: &str = "manyhands";

/// A checkpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file of the manifest is missing.
    #[error("{file} is missing")]
    Missing {
        /// The file.
        file: String,
    },
    /// A file is not the one that the manifest names.
    #[error(
        "{file} is damaged: its BLAKE3 hash is {got}, the manifest says {expected}; use an older checkpoint or copy it again"
    )]
    Damaged {
        /// The file.
        file: String,
        /// Hash in the manifest.
        expected: String,
        /// Hash of the bytes.
        got: String,
    },
    /// A file cannot be parsed.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor is missing or has another shape, type or range.
    #[error("{file}: tensor {tensor}: {problem}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
}

/// Size and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Bytes.
    pub bytes: u64,
    /// BLAKE3, hexadecimal.
    pub blake3: String,
}

/// What a checkpoint consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this layout.
    pub layout: u32,
    /// Number system.
    pub format: String,
    /// Optimizer steps so far.
    pub step: u64,
    /// [`Weights::hash`] of the weights.
    pub weights: String,
    /// Every other file.
    pub files: BTreeMap<String, FileEntry>,
}

/// Version of the checkpoint layout.
pub const LAYOUT: u32 = 1;

impl Manifest {
    /// The manifest of `files`.
    pub fn new(step: u64, weights: blake3::Hash, files: &BTreeMap<String, Vec<u8>>) -> Self {
        let entry = |bytes: &Vec<u8>| FileEntry {
            bytes: bytes.len() as u64,
            blake3: blake3::hash(bytes).to_hex().to_string(),
        };
        Self {
            layout: LAYOUT,
            format: FORMAT.into(),
            step,
            weights: weights.to_hex().to_string(),
            files: files.iter().map(|(name, bytes)| (name.clone(), entry(bytes))).collect(),
        }
    }

    /// Parses `manifest.json`.
    pub fn parse(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let malformed =
            |problem: String| CheckpointError::Malformed { file: MANIFEST_FILE.into(), problem };
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
        if manifest.layout != LAYOUT || manifest.format != FORMAT {
            let (layout, format) = (manifest.layout, &manifest.format);
            return Err(malformed(format!(
                "layout {layout} and format {format} are not this program's ({LAYOUT}, {FORMAT})"
            )));
        }
        Ok(manifest)
    }

    /// Checks the bytes of one file against its entry.
    pub fn check(&self, file: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let entry =
            self.files.get(file).ok_or_else(|| CheckpointError::Missing { file: file.into() })?;
        let got = blake3::hash(bytes).to_hex().to_string();
        if got != entry.blake3 {
            let expected = entry.blake3.clone();
            return Err(CheckpointError::Damaged { file: file.into(), expected, got });
        }
        Ok(())
    }
}

/// Serialises tensors with one description, deterministically.
fn serialize(tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)], description: &str) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        (name.clone(), view.expect("the bytes have the stated shape"))
    });
    // One key only: the library writes metadata in the order of a hash map.
    let metadata = HashMap::from([(METADATA_KEY.to_string(), description.to_string())]);
    safetensors::serialize(views, Some(metadata)).expect("names are unique")
}

/// The published weights as a safetensors file.
pub fn encode_weights(weights: &Weights) -> Vec<u8> {
    let mut tensors = Vec::new();
    for (shape, parameter) in shapes(&weights.config).iter().zip(&weights.parameters) {
        let mut push = |suffix: &str, dtype, dims: Vec<usize>, bytes: Vec<u8>| {
            tensors.push((format!("{}{suffix}", shape.name), dtype, dims, bytes));
        };
        match parameter {
            Parameter::Gain(g) => {
                let bytes = g.iter().flat_map(|x| x.to_le_bytes()).collect();
                push(".gain_q12", Dtype::I32, vec![g.len()], bytes);
            }
            Parameter::Matrix(t) => {
                let (rows, cols) = tile_dims(shape);
                let bytes = t.mantissas.iter().flat_map(|x| x.to_le_bytes()).collect();
                push(".mantissas", Dtype::I16, vec![rows * BLOCK, cols * BLOCK], bytes);
                let bytes = t.exponents.iter().flat_map(|x| x.to_le_bytes()).collect();
                push(".exponents", Dtype::I8, vec![rows, cols], bytes);
            }
        }
    }
    let config = serde_json::to_string(&weights.config).expect("a configuration is plain data");
    serialize(&tensors, &config)
}

/// Tiles of 32 rows, tiles of 32 columns.
fn tile_dims(shape: &Shape) -> (usize, usize) {
    (shape.rows.div_ceil(BLOCK), shape.cols.div_ceil(BLOCK))
}

/// A safetensors file being read.
struct Reader<'a> {
    file: &'a str,
    tensors: SafeTensors<'a>,
    description: String,
}

impl<'a> Reader<'a> {
    fn new(file: &'a str, bytes: &'a [u8]) -> Result<Self, CheckpointError> {
        let malformed = |problem: String| CheckpointError::Malformed { file: file.into(), problem };
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|e| malformed(e.to_string()))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| malformed(e.to_string()))?;
        let description = header.metadata().as_ref().and_then(|m| m.get(METADATA_KEY)).cloned();
        let description = description
            .ok_or_else(|| malformed(format!("no `{METADATA_KEY}` entry in the header")))?;
        Ok(Self { file, tensors, description })
    }

    fn error(&self, tensor: &str, problem: String) -> CheckpointError {
        CheckpointError::Tensor { file: self.file.into(), tensor: tensor.into(), problem }
    }

    /// The little-endian bytes of a tensor of known type and shape.
    fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], CheckpointError> {
        let t = self.tensors.tensor(name).map_err(|e| self.error(name, e.to_string()))?;
        if t.dtype() != dtype || t.shape() != shape {
            let got = format!("{:?} {:?}, expected {dtype:?} {shape:?}", t.dtype(), t.shape());
            return Err(self.error(name, got));
        }
        // The view borrows from the file, which outlives this reader.
        Ok(t.data())
    }
}

/// Reads published weights. Every mantissa, exponent and gain is checked to be in its range, so
/// that no input can take the arithmetic out of its bounds.
pub fn decode_weights(bytes: &[u8]) -> Result<Weights, CheckpointError> {
    let r = Reader::new(WEIGHTS_FILE, bytes)?;
    let malformed =
        |problem: String| CheckpointError::Malformed { file: WEIGHTS_FILE.into(), problem };
    let config: ModelConfig =
        serde_json::from_str(&r.description).map_err(|e| malformed(e.to_string()))?;
    config.validate().map_err(|e| malformed(e.to_string()))?;
    let mut parameters = Vec::new();
    for shape in shapes(&config) {
        parameters.push(decode_parameter(&r, &shape)?);
    }
    Ok(Weights { config, parameters })
}

fn decode_parameter(r: &Reader<'_>, shape: &Shape) -> Result<Parameter, CheckpointError> {
    let out_of_range = |name: &str| r.error(name, "a value is out of range".into());
    if shape.rows == 1 {
        let name = format!("{}.gain_q12", shape.name);
        let bytes = r.bytes(&name, Dtype::I32, &[shape.cols])?;
        let gain: Vec<i32> = bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        if gain.iter().any(|g| g.unsigned_abs() >= 1 << 18) {
            return Err(out_of_range(&name));
        }
        return Ok(Parameter::Gain(gain));
    }
    let (rows, cols) = tile_dims(shape);
    let name = format!("{}.mantissas", shape.name);
    let bytes = r.bytes(&name, Dtype::I16, &[rows * BLOCK, cols * BLOCK])?;
    let mantissas: Vec<i16> = bytes.as_chunks().0.iter().map(|b| i16::from_le_bytes(*b)).collect();
    let max = (1_u16 << (WEIGHT_BITS - 1)) - 1;
    let stride = cols * BLOCK;
    let padding = |i: usize| i / stride >= shape.rows || i % stride >= shape.cols;
    let wrong = |(i, m): (usize, &i16)| m.unsigned_abs() > max || (*m != 0 && padding(i));
    if mantissas.iter().enumerate().any(wrong) {
        return Err(out_of_range(&name));
    }
    let name = format!("{}.exponents", shape.name);
    let bytes = r.bytes(&name, Dtype::I8, &[rows, cols])?;
    let exponents: Vec<i8> = bytes.iter().map(|b| b.cast_signed()).collect();
    if exponents.iter().any(|e| !WEIGHT_EXPONENT_RANGE.contains(&i32::from(*e))) {
        return Err(out_of_range(&name));
    }
    Ok(Parameter::Matrix(Tiles { rows: shape.rows, cols: shape.cols, mantissas, exponents }))
}

/// Groups of f32 tensors (master weights, moments, ...), each in the order of [`shapes`].
pub fn encode_floats(config: &ModelConfig, groups: &BTreeMap<String, Vec<Vec<f32>>>) -> Vec<u8> {
    let mut tensors = Vec::new();
    for (group, values) in groups {
        for (shape, v) in shapes(config).iter().zip(values) {
            let bytes = v.iter().flat_map(|x| x.to_le_bytes()).collect();
            let name = format!("{group}.{}", shape.name);
            tensors.push((name, Dtype::F32, vec![shape.rows, shape.cols], bytes));
        }
    }
    let names: Vec<&String> = groups.keys().collect();
    serialize(&tensors, &serde_json::to_string(&names).expect("names are plain data"))
}

/// Reads what [`encode_floats`] wrote. Values must be finite.
pub fn decode_floats(
    config: &ModelConfig,
    bytes: &[u8],
) -> Result<BTreeMap<String, Vec<Vec<f32>>>, CheckpointError> {
    let r = Reader::new(OPTIMIZER_FILE, bytes)?;
    let groups: Vec<String> = serde_json::from_str(&r.description).map_err(|e| {
        CheckpointError::Malformed { file: OPTIMIZER_FILE.into(), problem: e.to_string() }
    })?;
    let mut out = BTreeMap::new();
    for group in groups {
        let mut values = Vec::new();
        for shape in shapes(config) {
            let name = format!("{group}.{}", shape.name);
            let bytes = r.bytes(&name, Dtype::F32, &[shape.rows, shape.cols])?;
            let v: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            if v.iter().any(|x| !x.is_finite()) {
                return Err(r.error(&name, "a value is not finite".into()));
            }
            values.push(v);
        }
        out.insert(group, values);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::init::master_weights;
    use proptest::prelude::*;

    fn config() -> ModelConfig {
        ModelConfig { width: 48, ffn: 40, layers: 1, ..ModelConfig::preset("nano", 34, 8).unwrap() }
    }

    fn sample() -> (Weights, Vec<u8>) {
        let c = ModelConfig { heads: 3, kv_heads: 3, head_dim: 16, ..config() };
        let weights = Weights::quantize(&c, &master_weights(&c, 3));
        let bytes = encode_weights(&weights);
        (weights, bytes)
    }

    #[test]
    fn weights_round_trip_and_encode_deterministically() {
        let (weights, bytes) = sample();
        let back = decode_weights(&bytes).unwrap();
        assert_eq!(back, weights);
        assert_eq!(back.hash(), weights.hash());
        assert_eq!(encode_weights(&back), bytes);
    }

    #[test]
    fn floats_round_trip() {
        let (weights, _) = sample();
        let c = &weights.config;
        let groups = BTreeMap::from([
            ("master".to_string(), master_weights(c, 3)),
            ("moment1".to_string(), master_weights(c, 4)),
        ]);
        let bytes = encode_floats(c, &groups);
        assert_eq!(decode_floats(c, &bytes).unwrap(), groups);
    }

    #[test]
    fn manifest_names_the_damaged_file() {
        let (weights, bytes) = sample();
        let mut files = BTreeMap::from([(WEIGHTS_FILE.to_string(), bytes)]);
        let manifest = Manifest::new(1, weights.hash(), &files);
        let text = serde_json::to_vec(&manifest).unwrap();
        let manifest = Manifest::parse(&text).unwrap();
        let file = files.get_mut(WEIGHTS_FILE).unwrap();
        manifest.check(WEIGHTS_FILE, file).unwrap();
        let last = file.len() - 1;
        file[last] ^= 1;
        let error = manifest.check(WEIGHTS_FILE, file).unwrap_err().to_string();
        assert!(error.contains(WEIGHTS_FILE) && error.contains("damaged"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Cut or flipped anywhere, a file is either refused or decodes within all ranges.
        #[test]
        fn decode_weights_never_panics(cut in 0_usize..10_000, at in 0_usize..10_000, bit in 0..8) {
            let (_, mut bytes) = sample();
            let n = bytes.len();
            bytes[at * 7919 % n] ^= 1_u8 << bit;
            bytes.truncate(n - cut * 31 % n);
            if let Ok(w) = decode_weights(&bytes) {
                prop_assert!(w.config.validate().is_ok());
            }
        }

        #[test]
        fn decoders_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode_weights(&bytes);
            let _ = decode_floats(&config(), &bytes);
            let _ = Manifest::parse(&bytes);
        }
    }
}
