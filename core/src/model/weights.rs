//! One published version of a model's parameters, in the exact formats.

use manyhands_shaders::bfp::{BLOCK, Tiles};

use super::adapter::{PROJECTIONS, Projection};
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
    /// What is published is the trained value times two to this power.
    pub scale_log2: i32,
}

/// Number of tensors a layer: norm, four projections, biases of three, norm, three projections.
pub const fn layer_tensors(config: &ModelConfig) -> usize {
    2 + PROJECTIONS + if config.bias { BIASED.len() } else { 0 }
}

/// The projections that have biases, if any have.
pub const BIASED: [Projection; 3] = [Projection::Query, Projection::Key, Projection::Value];

/// What the name of a bias ends with.
const BIAS: &str = "_bias";

/// Parts of a bias of 10 bits each, which f32's 24 bits fit.
const BIAS_PARTS: usize = 3;

/// A bias is a matrix (O, 96): the sum of the columns at the beginning of each block of 32, where
/// all else is zero. Its product with ones there is an exact product like any other.
pub const BIAS_COLS: usize = BIAS_PARTS * BLOCK;

/// Values (O) as such a matrix: each part is what the parts before it leave, rounded to a tile.
pub(crate) fn bias_matrix(values: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; values.len() * BIAS_COLS];
    let mut rest = values.to_vec();
    for part in 0..BIAS_PARTS {
        let mut column = vec![0.0; values.len() * BLOCK];
        column.iter_mut().step_by(BLOCK).zip(&rest).for_each(|(c, r)| *c = *r);
        let tiles = Tiles::quantize(&column, values.len(), BLOCK);
        for (i, rest) in rest.iter_mut().enumerate() {
            let value = tiles.value(i, 0) as f32;
            out[i * BIAS_COLS + part * BLOCK] = value;
            *rest -= value;
        }
    }
    out
}

/// Values (O) of such a matrix.
pub(crate) fn bias_values(matrix: &[f32]) -> Vec<f32> {
    matrix.chunks(BIAS_COLS).map(|row| row.iter().sum()).collect()
}

impl Shape {
    /// Whether it is a bias, see [`BIAS_COLS`].
    pub fn is_bias(&self) -> bool {
        self.name.ends_with(BIAS)
    }
}

/// The tensors of a version of the weights, in their canonical order: those of the adapter where
/// there is one, else embedding, layers, final norm, and head if untied.
pub fn shapes(config: &ModelConfig) -> Vec<Shape> {
    if let Some(adapter) = &config.adapter {
        return adapter.shapes(config);
    }
    let shape = |name: String, (rows, cols)| Shape { name, rows, cols, scale_log2: 0 };
    let mut out = vec![shape("embedding".into(), (config.vocabulary, config.width))];
    for layer in 0..config.layers {
        for projection in Projection::ALL {
            let name = |own: &str| format!("layers.{layer}.{own}");
            match projection {
                Projection::Query => out.push(shape(name("attention_norm"), (1, config.width))),
                Projection::Gate => {
                    for biased in BIASED.iter().filter(|_| config.bias) {
                        let name = name(&format!("{}{BIAS}", biased.name()));
                        out.push(shape(name, (biased.shape(config).0, BIAS_COLS)));
                    }
                    out.push(shape(name("ffn_norm"), (1, config.width)));
                }
                _ => {}
            }
            out.push(shape(name(projection.name()), projection.shape(config)));
        }
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
    /// Quantises trained f32 values of the given shape.
    pub fn quantize(shape: &Shape, values: &[f32]) -> Self {
        if shape.scale_log2 != 0 {
            let scale = libm::scalbnf(1.0, shape.scale_log2);
            let values: Vec<f32> = values.iter().map(|v| v * scale).collect();
            return Self::Matrix(tiles(Path::best(), &values, shape.rows, shape.cols));
        }
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

/// A version of the weights: what a policy version's hash covers. Of a model with an adapter these
/// are the adapter's factors; the configuration names what they adapt by its hash.
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

    /// What the parameters stand for, in the order of [`shapes`]; quantising it gives them again.
    pub fn values(&self) -> Vec<Vec<f32>> {
        let values = |(shape, parameter): (Shape, &Parameter)| match parameter {
            Parameter::Gain(gain) => gain.iter().map(|g| *g as f32 / 4096.0).collect(),
            Parameter::Matrix(t) => {
                let scale = libm::scalbn(1.0, -shape.scale_log2);
                let value = |i| (t.value(i / shape.cols, i % shape.cols) * scale) as f32;
                (0..shape.rows * shape.cols).map(value).collect()
            }
        };
        shapes(&self.config).into_iter().zip(&self.parameters).map(values).collect()
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

/// Sums that a thread adds at once.
const PART: usize = 1 << 16;

/// The gradient of every parameter, in the order of [`shapes`]: `FX(16)` times the loss scale.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gradients(pub Vec<Vec<i64>>);

impl Gradients {
    /// All zeros.
    pub fn zeros(config: &ModelConfig) -> Self {
        Self(shapes(config).iter().map(|s| vec![0; s.rows * s.cols]).collect())
    }

    /// Adds another sum; integer addition, so order never matters. It wraps, which no sum of honest
    /// shares comes near: a lie must not end the program before an audit finds it.
    pub fn add(&mut self, other: &Self) {
        let tensors = self.0.iter_mut().zip(&other.0);
        let parts = tensors.flat_map(|(a, b)| a.chunks_mut(PART).zip(b.chunks(PART)));
        parallel::map(parts.collect(), |(a, b)| {
            for (a, b) in a.iter_mut().zip(b) {
                *a = a.wrapping_add(*b);
            }
        });
    }
}
