//! Exact weights back into the formats that everybody reads: the way of [`import`], backwards.
//!
//! Pure like all of this crate: values and keys in, the bytes of files out. [`Model`] holds what
//! exact weights stand for at the original's scale, [`numbers`] writes it in f32 or f16, [`gguf`]
//! and [`hub`] are the containers. Every architecture that an import reads computes what a Llama
//! does and is written as one, or as a Qwen2, which is that with biases.
//!
//! [`import`]: crate::import

pub mod gguf;
pub mod hub;
pub mod numbers;

use crate::import::exact::{Shifts, restore};
use crate::model::adapter::Adapter;
use crate::model::config::ModelConfig;
use crate::model::weights::{Shape, Weights, bias_values, shapes};
use crate::parallel;

/// The architecture of a model, by the name that GGUF and the hub give it.
pub const fn architecture(config: &ModelConfig) -> &'static str {
    if config.bias { "qwen2" } else { "llama" }
}

/// Weights that cannot be written: which tensor, and what would do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ExportError {
    /// Half precision ends at 65504.
    #[error("{tensor}: {value} is beyond half precision; write single precision (f32)")]
    Half {
        /// The tensor's name in the file.
        tensor: String,
        /// The value.
        value: f32,
    },
}

/// A file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// All of it.
    pub bytes: Vec<u8>,
    /// How many tensors it holds.
    pub tensors: usize,
    /// How many of their values half precision rounded.
    pub rounded: u64,
}

/// A tensor at the original's scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Name and shape here.
    pub shape: Shape,
    /// (rows, cols) values.
    pub values: Vec<f32>,
}

/// What exact weights stand for, at the original's scale: a whole model, or an adapter's factors
/// if the configuration has an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// The original's shape and epsilon.
    pub config: ModelConfig,
    /// In the order of [`shapes`]; biases have one row.
    pub tensors: Vec<Tensor>,
}

impl Model {
    /// Takes back the powers of two that an import moved, of its weights or of an adapter to them.
    pub fn new(weights: &Weights, shifts: &Shifts) -> Self {
        let mut config = weights.config.clone();
        config.rms_epsilon = libm::scalbn(config.rms_epsilon, 2 * shifts.residual);
        let tensors = shapes(&config).into_iter().zip(restore(weights, shifts));
        let tensor = |(mut shape, values): (Shape, Vec<f32>)| {
            if !shape.is_bias() {
                return Tensor { shape, values };
            }
            (shape.rows, shape.cols) = (1, shape.rows);
            Tensor { shape, values: bias_values(&values) }
        };
        Self { tensors: tensors.map(tensor).collect(), config }
    }

    /// Adds an adapter to the matrices that it adapts: W + s B A, computed in f64 and rounded to
    /// f32 once. Matrices without an adapter stay as they are.
    pub fn merge(&mut self, adapter: &Adapter, factors: &[Tensor]) {
        let scale = libm::scalbn(1.0, adapter.scale_log2().unwrap_or(0));
        let factor = |name: &str, own| {
            let found = factors.iter().find(|f| f.shape.name == format!("{name}.{own}"));
            found.map(|f| &*f.values)
        };
        parallel::map(self.tensors.iter_mut().collect(), |tensor: &mut Tensor| {
            let (a, b) = (factor(&tensor.shape.name, "a"), factor(&tensor.shape.name, "b"));
            let (Some(a), Some(b)) = (a, b) else { return };
            let cols = tensor.shape.cols;
            let rows = tensor.values.chunks_mut(cols).zip(b.chunks(adapter.rank));
            let mut sum = vec![0.0; cols];
            for (row, b) in rows {
                sum.fill(0.0);
                for (b, a) in b.iter().zip(a.chunks(cols)) {
                    let b = f64::from(*b) * scale;
                    sum.iter_mut().zip(a).for_each(|(s, a)| *s += b * f64::from(*a));
                }
                row.iter_mut().zip(&sum).for_each(|(w, s)| *w = (f64::from(*w) + s) as f32);
            }
        });
    }
}

/// The matrix and the factor of an adapter's tensor: `layers.0.query` and `a`.
fn split_factor(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or((name, ""))
}
