//! One published version of a model's parameters, in the exact formats.

use manyhands_shaders::bfp::Tiles;

use super::config::ModelConfig;
use crate::engine::cpu::{Path, simd};
use crate::parallel;

/// Name and shape of a parameter tensor. Gains have one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// For example `layers.3.query`.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

/// The tensors of a layer, in order: name, and rows and columns from the configuration.
type LayerTensor = (&'static str, fn(&ModelConfig) -> (usize, usize));

/// Number of tensors a layer.
pub const LAYER_TENSORS: usize = 9;

const LAYER: [LayerTensor; LAYER_TENSORS] = [
    ("attention_norm", |c| (1, c.width)),
    ("query", |c| (c.attention_width(), c.width)),
    ("key", |c| (c.kv_width(), c.width)),
    ("value", |c| (c.kv_width(), c.width)),
    ("output", |c| (c.width, c.attention_width())),
    ("ffn_norm", |c| (1, c.width)),
    ("gate", |c| (c.ffn, c.width)),
    ("up", |c| (c.ffn, c.width)),
    ("down", |c| (c.width, c.ffn)),
];

/// All parameter tensors in their canonical order: embedding, layers, final norm, head if untied.
pub fn shapes(config: &ModelConfig) -> Vec<Shape> {
    let shape = |name: String, (rows, cols)| Shape { name, rows, cols };
    let mut out = vec![shape("embedding".into(), (config.vocabulary, config.width))];
    for layer in 0..config.layers {
        let tensors = LAYER.iter();
        out.extend(tensors.map(|(name, f)| shape(format!("layers.{layer}.{name}"), f(config))));
    }
    out.push(shape("final_norm".into(), (1, config.width)));
    if !config.tied {
        out.push(shape("head".into(), (config.vocabulary, config.width)));
    }
    out
}

/// A parameter in its exact format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// 10-bit mantissas in 32x32 tiles.
    Matrix(Tiles),
    /// Q3.12 gains.
    Gain(Vec<i32>),
}

impl Parameter {
    /// Quantises f32 values of the given shape.
    pub fn quantize(shape: &Shape, values: &[f32]) -> Self {
        if shape.rows > 1 {
            return Self::Matrix(tiles(Path::best(), values, shape.rows, shape.cols));
        }
        // A gain is floor(v * 4096 + 1/2), kept below 2^18 (a gain of 64).
        let q12 = |v: &f32| (f64::from(*v) * 4096.0 + 0.5).floor().clamp(-262_143.0, 262_143.0);
        Self::Gain(values.iter().map(|v| q12(v) as i32).collect())
    }
}

simd! {
    /// [`Tiles::quantize`] with this machine's vectors.
    fn tiles(values: &[f32], rows: usize, cols: usize) -> Tiles {
        Tiles::quantize(values, rows, cols)
    }
}

/// A version of the weights: what a policy version's hash covers.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// Shape of the model.
    pub config: ModelConfig,
    /// In the order of [`shapes`].
    pub parameters: Vec<Parameter>,
}

impl Weights {
    /// Quantises f32 master weights, given in the order of [`shapes`].
    pub fn quantize(config: &ModelConfig, master: &[impl AsRef<[f32]> + Sync]) -> Self {
        let shapes = shapes(config);
        assert_eq!(shapes.len(), master.len(), "one master tensor a parameter");
        let pairs = shapes.iter().zip(master).collect();
        let parameters = parallel::map(pairs, |(s, m)| Parameter::quantize(s, m.as_ref()));
        Self { config: config.clone(), parameters }
    }

    /// BLAKE3 over format, configuration and every mantissa, exponent and gain, in order.
    pub fn hash(&self) -> blake3::Hash {
        let mut h = blake3::Hasher::new();
        let mut bytes = |tag: &str, data: &[u8]| {
            h.update(&(tag.len() as u64).to_le_bytes());
            h.update(tag.as_bytes());
            h.update(&(data.len() as u64).to_le_bytes());
            h.update(data);
        };
        bytes("format", manyhands_shaders::x1::FORMAT.as_bytes());
        let config = serde_json::to_vec(&self.config).expect("a configuration is plain data");
        bytes("config", &config);
        for (shape, parameter) in shapes(&self.config).iter().zip(&self.parameters) {
            match parameter {
                Parameter::Gain(gain) => bytes(&shape.name, &le_bytes(gain, |x| x.to_le_bytes())),
                Parameter::Matrix(t) => {
                    bytes(&shape.name, &le_bytes(&t.mantissas, |x| x.to_le_bytes()));
                    bytes(&shape.name, &le_bytes(&t.exponents, |x| x.to_le_bytes()));
                }
            }
        }
        h.finalize()
    }
}

fn le_bytes<T: Copy, const N: usize>(x: &[T], f: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    x.iter().flat_map(|&x| f(x)).collect()
}

/// The gradient of every parameter, in the order of [`shapes`]: `FX(16)` times the loss scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gradients(pub Vec<Vec<i64>>);

impl Gradients {
    /// All zeros.
    pub fn zeros(config: &ModelConfig) -> Self {
        Self(shapes(config).iter().map(|s| vec![0; s.rows * s.cols]).collect())
    }

    /// Adds another sum; integer addition, so order never matters. It wraps, which no sum of honest
    /// shares comes near: a lie must not end the program before an audit finds it.
    pub fn add(&mut self, other: &Self) {
        for (a, b) in self.0.iter_mut().flatten().zip(other.0.iter().flatten()) {
            *a = a.wrapping_add(*b);
        }
    }
}
