//! LoRA (Hu et al., 2106.09685): trained factors of low rank beside matrices that stay as they are.
//!
//! `y = x W^T + s (x A^T) B^T` with `A` (r, C), `B` (O, r) and `s = alpha / r`. All products are
//! exact block floating point products like any other: `x A^T` is rounded to `FX(16)` and to
//! blocks, and the second product is added to the first with saturation. `s` is a power of two, so
//! that it moves exponents only: what is published of `B` is `s B`.

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, ModelConfig};
use super::weights::Shape;
use crate::swarm::ids::Hash;

/// Matrices of a layer that can have an adapter, in the order of a layer's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Queries of attention.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// From attention to the residual stream.
    Output,
    /// The gate of SwiGLU.
    Gate,
    /// What it gates.
    Up,
    /// From SwiGLU to the residual stream.
    Down,
}

/// Number of [`Projection`]s.
pub const PROJECTIONS: usize = 7;

impl Projection {
    /// All of them, in order.
    pub const ALL: [Self; PROJECTIONS] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// Its name among the tensors of a layer.
    pub const fn name(self) -> &'static str {
        ["query", "key", "value", "output", "gate", "up", "down"][self as usize]
    }

    /// (O, C).
    pub const fn shape(self, c: &ModelConfig) -> (usize, usize) {
        match self {
            Self::Query => (c.attention_width(), c.width),
            Self::Key | Self::Value => (c.kv_width(), c.width),
            Self::Output => (c.width, c.attention_width()),
            Self::Gate | Self::Up => (c.ffn, c.width),
            Self::Down => (c.width, c.ffn),
        }
    }
}

/// Adapters on a frozen model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Hash of the frozen weights.
    pub base: Hash,
    /// r.
    pub rank: usize,
    /// `s r`; s is a power of two.
    pub alpha: usize,
    /// Which matrices of every layer, in order.
    pub targets: Vec<Projection>,
}

impl Adapter {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let error = |key, problem: String| Err(ConfigError { key, problem });
        if !(2..=256).contains(&self.rank) {
            return error("lora.rank", format!("{} is outside 2 to 256", self.rank));
        }
        if self.scale_log2().is_none() {
            let problem =
                format!("{} is not the rank {} times a power of two", self.alpha, self.rank);
            return error("lora.alpha", problem);
        }
        if self.targets.is_empty() || !self.targets.is_sorted_by(|a, b| a < b) {
            let all: Vec<&str> = Projection::ALL.iter().map(|p| p.name()).collect();
            let all = all.join(", ");
            return error(
                "lora.targets",
                format!("name each of {all} once at most, in this order"),
            );
        }
        Ok(())
    }

    /// log2 of s, from -8 to 8.
    pub fn scale_log2(&self) -> Option<i32> {
        let alpha = self.alpha.min(1 << 20);
        (-8_i32..=8).find(|k| alpha << (-k).max(0) == self.rank << (*k).max(0))
    }

    /// The trained tensors: of each layer, and of each target in order, `a` (r, C) and `b` (O, r).
    pub fn shapes(&self, c: &ModelConfig) -> Vec<Shape> {
        let scale_log2 = self.scale_log2().unwrap_or(0);
        let mut out = Vec::new();
        for layer in 0..c.layers {
            for target in &self.targets {
                let (rows, cols) = target.shape(c);
                let name = |factor| format!("layers.{layer}.{}.{factor}", target.name());
                out.push(Shape { name: name("a"), rows: self.rank, cols, scale_log2: 0 });
                out.push(Shape { name: name("b"), rows, cols: self.rank, scale_log2 });
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(rank: usize, alpha: usize) -> Adapter {
        Adapter { base: Hash([1; 32]), rank, alpha, targets: vec![Projection::Query] }
    }

    #[test]
    fn scale_is_a_power_of_two_or_refused() {
        for (rank, alpha, log2) in [(16, 32, 1), (8, 8, 0), (16, 4, -2), (6, 12, 1), (2, 512, 8)] {
            adapter(rank, alpha).validate().unwrap();
            assert_eq!(adapter(rank, alpha).scale_log2(), Some(log2));
        }
        for (rank, alpha) in [(16, 24), (16, 0), (2, 1024), (1, 1), (512, 512), (16, 17)] {
            assert!(adapter(rank, alpha).validate().is_err(), "{rank} {alpha}");
        }
        let twice = vec![Projection::Query, Projection::Query];
        assert!(Adapter { targets: twice, ..adapter(8, 8) }.validate().is_err());
        let unordered = vec![Projection::Up, Projection::Query];
        assert!(Adapter { targets: unordered, ..adapter(8, 8) }.validate().is_err());
        assert!(Adapter { targets: vec![], ..adapter(8, 8) }.validate().is_err());
    }
}
