//! Model configuration and presets.

use manyhands_shaders::bfp::BLOCK;
use manyhands_shaders::twin::attention::AttentionConstants;
use manyhands_shaders::twin::rmsnorm::NormConstants;
use manyhands_shaders::twin::rope::RopeTable;
use serde::{Deserialize, Serialize};

use super::adapter::Adapter;
use super::weights::{Shape, shapes};
use crate::engine::Constants;

/// Longest context: the exact softmax sum is a u32 up to here.
pub const CONTEXT_MAX: usize = 32_768;

/// Shape of a decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Vocabulary V.
    pub vocabulary: usize,
    /// Layers L.
    pub layers: usize,
    /// Width C of the residual stream.
    pub width: usize,
    /// Query heads H.
    pub heads: usize,
    /// Key-value heads K; H is a multiple of it.
    pub kv_heads: usize,
    /// Head size D.
    pub head_dim: usize,
    /// Inner width F of SwiGLU.
    pub ffn: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_base")]
    pub rope_base: f64,
    /// Epsilon of RMSNorm.
    #[serde(default = "default_rms_epsilon")]
    pub rms_epsilon: f64,
    /// Whether the output head is the embedding.
    #[serde(default = "default_tied")]
    pub tied: bool,
    /// Whether queries, keys and values have a bias, as Qwen2's have. Biases are not trained.
    #[serde(default, skip_serializing_if = "is_false")]
    pub bias: bool,
    /// What is trained, if not the model itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Adapter>,
}

fn default_rope_base() -> f64 {
    10_000.0
}

fn default_rms_epsilon() -> f64 {
    1e-5
}

fn default_tied() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_false(x: &bool) -> bool {
    !*x
}

/// A configuration that cannot work, with the key to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("model.{key}: {problem}")]
pub struct ConfigError {
    /// The key at fault.
    pub key: &'static str,
    /// What is wrong and what would do.
    pub problem: String,
}

/// Named shapes, from 0.3 to 135 million parameters: name, layers, width, heads, kv heads, ffn.
const PRESETS: [(&str, usize, usize, usize, usize, usize); 7] = [
    ("nano", 3, 96, 3, 3, 256),
    ("micro", 3, 128, 4, 4, 352),
    ("tiny", 4, 128, 4, 4, 384),
    ("small", 4, 256, 4, 4, 704),
    ("medium", 8, 384, 6, 3, 1024),
    ("base", 12, 576, 9, 3, 1536),
    ("smollm2-135m", 30, 576, 9, 3, 1536),
];

impl ModelConfig {
    /// The preset of that name, or `None`. Vocabulary and context are set by the caller's task.
    pub fn preset(name: &str, vocabulary: usize, context: usize) -> Option<Self> {
        let &(_, layers, width, heads, kv_heads, ffn) = PRESETS.iter().find(|p| p.0 == name)?;
        Some(Self {
            vocabulary,
            layers,
            width,
            heads,
            kv_heads,
            head_dim: width / heads,
            ffn,
            context,
            rope_base: if name == "smollm2-135m" { 100_000.0 } else { default_rope_base() },
            rms_epsilon: default_rms_epsilon(),
            tied: true,
            bias: false,
            adapter: None,
        })
    }

    /// Names of the presets, smallest first.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PRESETS.iter().map(|p| p.0)
    }

    /// Checks every bound that the exact arithmetic and the kernels rely on.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let within = |key, value: usize, low, high| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(ConfigError { key, problem: format!("{value} is outside {low} to {high}") })
        };
        within("vocabulary", self.vocabulary, 2, 1 << 18)?;
        within("layers", self.layers, 1, 256)?;
        within("width", self.width, 16, 8192)?;
        within("heads", self.heads, 1, 256)?;
        within("kv_heads", self.kv_heads, 1, self.heads)?;
        within("head_dim", self.head_dim, 2, 256)?;
        within("ffn", self.ffn, 16, 32_768)?;
        within("context", self.context, 1, CONTEXT_MAX)?;
        let error = |key, problem: String| Err(ConfigError { key, problem });
        if !self.heads.is_multiple_of(self.kv_heads) {
            return error(
                "kv_heads",
                format!("{} does not divide heads = {}", self.kv_heads, self.heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return error(
                "head_dim",
                format!("{} is odd; rotary embedding pairs channels", self.head_dim),
            );
        }
        if !(self.rope_base.is_finite() && (2.0..=1e8).contains(&self.rope_base)) {
            return error("rope_base", format!("{} is outside 2 to 1e8", self.rope_base));
        }
        if !(1e-7..=1e-2).contains(&self.rms_epsilon) {
            return error("rms_epsilon", format!("{} is outside 1e-7 to 1e-2", self.rms_epsilon));
        }
        self.adapter.as_ref().map_or(Ok(()), Adapter::validate)
    }

    /// H D, the width of the attention output.
    pub const fn attention_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// K D.
    pub const fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Integer constants for the engines. Cosines are taken with the soft-float `libm`, so the
    /// tables are the same on every machine.
    pub fn constants(&self) -> Constants {
        let half = self.head_dim / 2;
        let frequency: Vec<f64> =
            (0..half).map(|i| libm::pow(self.rope_base, -(i as f64) / half as f64)).collect();
        let q14 = |f: fn(f64) -> f64| {
            let angles =
                (0..self.context).flat_map(|t| frequency.iter().map(move |f| t as f64 * f));
            angles.map(|a| (f(a) * 16_384.0).round_ties_even() as i32).collect()
        };
        Constants {
            norm: NormConstants::new(self.width, self.rms_epsilon),
            attention: AttentionConstants::new(self.heads, self.kv_heads, self.head_dim),
            rope: RopeTable { half, cos: q14(libm::cos), sin: q14(libm::sin) },
        }
    }

    /// The model that an adapter adapts; without one, the model itself.
    pub fn frozen(&self) -> Self {
        Self { adapter: None, ..self.clone() }
    }

    /// Multiply-adds of a forward pass for one token at mean context `context`: products only.
    pub fn multiply_adds(&self, context: usize) -> u64 {
        let (frozen, trained) = self.products(context);
        frozen + trained
    }

    /// Multiply-adds of a forward and a backward pass for one token. A product that is trained has
    /// two on its way back, one that is not has one.
    pub fn gradient_multiply_adds(&self, context: usize) -> u64 {
        let (frozen, trained) = self.products(context);
        let attention = self.attention_products(context);
        2 * frozen + 3 * trained + if self.adapter.is_some() { attention } else { 0 }
    }

    /// Multiply-adds of a forward pass in matrices that stay as they are, and in all others.
    /// Attention, which has four products on its way back for two, counts as its neighbours do.
    fn products(&self, context: usize) -> (u64, u64) {
        let attention = self.attention_products(context);
        let matrices = |config: &Self| -> usize {
            let matrices = shapes(config).into_iter();
            let matrices = matrices.filter(|s| s.rows > 1 && (self.tied || s.name != "embedding"));
            matrices.map(|s| s.rows * s.cols).sum()
        };
        match &self.adapter {
            None => (0, matrices(self) as u64 + attention),
            Some(_) => (matrices(&self.frozen()) as u64 + attention, matrices(self) as u64),
        }
    }

    const fn attention_products(&self, context: usize) -> u64 {
        (self.layers * 2 * context * self.attention_width()) as u64
    }

    /// Number of parameters that are trained.
    pub fn parameter_count(&self) -> usize {
        shapes(self).iter().map(|s| s.rows * s.cols).sum()
    }

    /// Number of padded tile rows times columns of the largest matrix, an upper bound of a buffer.
    pub fn largest_matrix(&self) -> usize {
        let tiles = |s: &Shape| s.rows.div_ceil(BLOCK) * BLOCK * s.cols.div_ceil(BLOCK) * BLOCK;
        shapes(&self.frozen()).iter().map(tiles).max().unwrap_or(0)
    }
}
