//! Checks an engine against vectors of the independent integer oracle (`tests/data/oracle`).
//!
//! A file holds weights, a batch, and the oracle's logits, sampling weights and gradients. Every
//! integer must be reproduced; the first that is not is reported.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::engine::{Batch, Engine, EngineError, SeedRow};
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, DeviceGradients, Keep};
use crate::model::weights::{Parameter, Weights, shapes};
use manyhands_shaders::twin::logits::{temperature_scale, weights as sampling_weights};

/// Why a vector file was not reproduced.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The file is not what the oracle writes.
    #[error("not a vector file of the oracle: {0}")]
    Malformed(String),
    /// The file's tensors are of another shape than its configuration says.
    #[error("tensor {tensor} is missing, or not of {expected} elements")]
    Shape {
        /// Name in the file.
        tensor: String,
        /// Elements expected.
        expected: usize,
    },
    /// The first integer that differs.
    #[error(
        "tensor {tensor}, index {index}: the oracle has {expected}, this engine {got} ({differing} of {count} differ)"
    )]
    Different {
        /// Name in the file.
        tensor: String,
        /// Flat index.
        index: usize,
        /// The oracle's value.
        expected: i64,
        /// This engine's value.
        got: i64,
        /// How many differ in this tensor.
        differing: usize,
        /// Elements of this tensor.
        count: usize,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A parsed vector file.
pub struct Vectors {
    config: ModelConfig,
    floats: BTreeMap<String, Vec<f32>>,
    integers: BTreeMap<String, Vec<i64>>,
    sequences: usize,
}

impl Vectors {
    /// Parses a file of the oracle.
    pub fn parse(bytes: &[u8]) -> Result<Self, OracleError> {
        let malformed = |e: &dyn std::fmt::Display| OracleError::Malformed(e.to_string());
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| malformed(&e))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| malformed(&e))?;
        let empty = Default::default();
        let meta = header.metadata().as_ref().unwrap_or(&empty);
        let number = |key: &str| {
            let value = meta.get(key).and_then(|v| v.parse::<usize>().ok());
            value
                .filter(|v| (1..=64).contains(v))
                .ok_or_else(|| malformed(&format!("metadata `{key}`")))
        };
        let (layers, heads) = (number("layers")?, number("heads")?);
        let (mut floats, mut integers, mut dims) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (name, t) in file.tensors() {
            dims.insert(name.clone(), t.shape().to_vec());
            match t.dtype() {
                Dtype::F32 => {
                    let data = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
                    floats.insert(name, data.collect());
                }
                Dtype::I64 => {
                    let data = t.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
                    integers.insert(name, data.collect());
                }
                other => return Err(malformed(&format!("{name} is of type {other:?}"))),
            }
        }
        let dim = |name: &str, axis: usize| {
            let d = dims.get(name).and_then(|d| d.get(axis)).copied();
            d.ok_or_else(|| malformed(&format!("no tensor {name}")))
        };
        let width = dim("weight.E", 1)?;
        let config = ModelConfig {
            vocabulary: dim("weight.E", 0)?,
            layers,
            width,
            heads,
            kv_heads: heads,
            head_dim: width / heads,
            ffn: dim("weight.g0", 0)?,
            context: 128,
            rope_base: 10_000.0,
            rms_epsilon: 1e-5,
            tied: true,
            bias: false,
            adapter: None,
        };
        config.validate().map_err(|e| malformed(&e))?;
        let sequences = dim("in.tokens", 0)?;
        Ok(Self { config, floats, integers, sequences })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn floats(&self, name: String, expected: usize) -> Result<&[f32], OracleError> {
        let found = self.floats.get(&name).filter(|t| t.len() == expected);
        found.map(Vec::as_slice).ok_or(OracleError::Shape { tensor: name, expected })
    }

    fn integers(&self, name: &str, expected: usize) -> Result<&[i64], OracleError> {
        let found = self.integers.get(name).filter(|t| t.len() == expected);
        found.map(Vec::as_slice).ok_or_else(|| OracleError::Shape { tensor: name.into(), expected })
    }

    fn compare(
        &self,
        name: &str,
        got: impl ExactSizeIterator<Item = i64> + Clone,
    ) -> Result<(), OracleError> {
        let expected = self.integers(name, got.len())?;
        let differ = || expected.iter().zip(got.clone()).enumerate().filter(|(_, (e, g))| *e != g);
        match differ().next() {
            None => Ok(()),
            Some((index, (e, g))) => Err(OracleError::Different {
                tensor: name.into(),
                index,
                expected: *e,
                got: g,
                differing: differ().count(),
                count: expected.len(),
            }),
        }
    }

    /// Quantises the weights as the project does and compares them with the oracle's.
    pub fn weights(&self) -> Result<Weights, OracleError> {
        let shapes = shapes(&self.config);
        let mut master = Vec::new();
        for shape in &shapes {
            let name = format!("weight.{}", oracle_name(&shape.name));
            master.push(self.floats(name, shape.rows * shape.cols)?.to_vec());
        }
        let weights = Weights::quantize(&self.config, &master);
        for (shape, parameter) in shapes.iter().zip(&weights.parameters) {
            let name = oracle_name(&shape.name);
            match parameter {
                Parameter::Gain(g) => {
                    self.compare(&format!("gain_q12.{name}"), g.iter().map(|&x| x.into()))?;
                }
                Parameter::Matrix(t) => {
                    let m = t.mantissas.iter().map(|&x| i64::from(x));
                    self.compare(&format!("mantissa.{name}"), m)?;
                    let e = t.exponents.iter().map(|&x| i64::from(x));
                    self.compare(&format!("exponent.{name}"), e)?;
                }
            }
        }
        Ok(weights)
    }

    /// Runs forward and backward on `engine`, built for [`Self::config`], and compares logits,
    /// sampling totals and every gradient.
    pub async fn check<E: Engine>(&self, engine: &E) -> Result<(), OracleError> {
        let weights = self.weights()?;
        let rows = self.integers.get("in.tokens").map_or(0, Vec::len);
        let vocabulary = self.config.vocabulary as i64;
        let ids = |name: &str| -> Result<Vec<u32>, OracleError> {
            let ids = self.integers(name, rows)?.iter();
            ids.map(|&t| u32::try_from(t).ok().filter(|_| t < vocabulary))
                .collect::<Option<_>>()
                .ok_or_else(|| {
                    OracleError::Malformed(format!("{name} has a token outside the vocabulary"))
                })
        };
        let (tokens, targets) = (ids("in.tokens")?, ids("in.targets")?);
        let length = rows / self.sequences.max(1);
        if length == 0 || length > self.config.context || length * self.sequences != rows {
            return Err(OracleError::Malformed("in.tokens has an unusable shape".into()));
        }
        let batch = Batch::sequences(tokens.chunks_exact(length));
        let seeds: Vec<SeedRow> = self
            .integers("in.token_weights_q16", rows)?
            .iter()
            .zip(&targets)
            .map(|(&w, &target)| SeedRow { target, weight: w as i32, ..Default::default() })
            .collect();

        let decoder = Decoder::new(engine, &weights);
        let scale = temperature_scale(1.0);
        let forward = decoder.forward(engine, &batch, Keep::All);
        let all = batch.pieces(usize::MAX).remove(0);
        let head = decoder.head_forward(engine, &forward.states, all);
        let logits = engine.read(&head.logits).await?;
        self.compare("out.logits_q16", logits.iter().map(|&x| x.into()))?;
        let e = logits
            .chunks_exact(self.config.vocabulary)
            .flat_map(|row| sampling_weights(row, scale));
        let e: Vec<i64> = e.map(|(_, e)| i64::from(e)).collect();
        self.compare("out.sample_weights_q23", e.iter().copied())?;
        let stats = engine.stats(&head.logits, &targets, scale).await?;
        self.compare("out.sample_total", stats.iter().map(|s| s.total as i64))?;
        let mut grads = DeviceGradients::zeros(engine, &self.config);
        let dh = decoder.head_backward(engine, head, &seeds, scale, &mut grads);
        decoder.backward(engine, &batch, forward, dh, &mut grads);
        let grads = grads.read(engine).await?;
        for (shape, grad) in shapes(&self.config).iter().zip(&grads.0) {
            let name = format!("out.grad_q16.{}", oracle_name(&shape.name));
            self.compare(&name, grad.iter().copied())?;
        }
        Ok(())
    }
}

/// The oracle's name of a parameter tensor.
fn oracle_name(name: &str) -> String {
    let Some((layer, tensor)) = name.strip_prefix("layers.").and_then(|n| n.split_once('.')) else {
        return if name == "embedding" { "E".into() } else { "nf".into() };
    };
    match tensor {
        "attention_norm" => format!("n1_{layer}"),
        "ffn_norm" => format!("n2_{layer}"),
        "down" => format!("dn{layer}"),
        _ => format!("{}{layer}", &tensor[..1]),
    }
}
