//! AdamW (Loshchilov and Hutter, 1711.05101) from exact integer gradients, the same bits anywhere.
//!
//! ```text
//! g = sum * 2^-(16+S) / divisor * clip          clip = min(1, grad_norm_max / |g|)
//! m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
//! step = lr / (1-b1^t);  c = 1 / (1-b2^t)
//! x = x (1 - lr wd) - step (m / (sqrt(v c) + eps))
//! ```
//!
//! Master weights and moments are stored in f32, arithmetic is f64 and rounds once a stored value.
//! f32 moments suffice: one update changes them by at least `1 - b2` of the gradient's share, far
//! above 2^-24, and squares of gradients stay above f32's smallest normal for |g| > 1e-19; f64
//! would double the size of a checkpoint. Weight decay touches matrices only, not gains or vectors.
//!
//! Speed and order: the bias corrections are scalars, so that an element costs one division and one
//! root; each takes longer than all the rest. [`update`] is elementwise, so a caller may split a
//! tensor over threads anywhere and get the same bits. Norms are sums over fixed chunks of
//! [`NORM_CHUNK`] with eight fixed lanes, then over chunks in order: split at chunk borders. There
//! is no `mul_add`.
//!
//! Departure from PyTorch: the norm is not increased by 1e-6 before clipping.

use serde::{Deserialize, Serialize};

use crate::engine::cpu::{Path, simd};
use crate::parallel;

use super::config::{ConfigError, require};
use super::schedule::Schedule;
use super::weights::{GradientScale, LOSS_SCALE_LOG2_MAX, WEIGHT_FRACTION_BITS};

/// Elements whose squares are summed before they meet those of other chunks.
pub const NORM_CHUNK: usize = 4096;
/// Elements that one thread takes at a time: whole norm chunks, so that sums keep their order.
const PIECE: usize = 16 * NORM_CHUNK;
const LANES: usize = 8;

/// Settings of the optimizer. The rate is ProRL v1's, constant; the paper reports neither betas nor decay,
/// so those are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Base rate; default 2e-6.
    pub learning_rate: f64,
    /// Decay of the first moment; default 0.9.
    pub beta1: f64,
    /// Decay of the second moment; default 0.999.
    pub beta2: f64,
    /// Added to the root of the second moment; default 1e-8.
    pub eps: f64,
    /// Decoupled decay of matrices; default 0.01.
    pub weight_decay: f64,
    /// Gradients of a larger global norm are scaled down to it; default 1.
    pub grad_norm_max: Option<f64>,
    /// Factor of the base rate; default constant, no warm-up.
    pub schedule: Schedule,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            learning_rate: 2e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            grad_norm_max: Some(1.0),
            schedule: Schedule::default(),
        }
    }
}

impl AdamWConfig {
    /// Checks ranges.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let from_zero = |x: f64| x.is_finite() && x >= 0.0;
        let rate = self.learning_rate;
        require(from_zero(rate), "optimizer.learning_rate", rate, "use 0 or more, such as 2e-6")?;
        for (key, beta) in [("optimizer.beta1", self.beta1), ("optimizer.beta2", self.beta2)] {
            require((0.0..1.0).contains(&beta), key, beta, "use 0 up to, but not including, 1")?;
        }
        let fits = self.eps.is_finite() && self.eps > 0.0;
        require(fits, "optimizer.eps", self.eps, "use a positive number, such as 1e-8")?;
        let decay = self.weight_decay;
        require(from_zero(decay), "optimizer.weight_decay", decay, "use 0 or more, such as 0.01")?;
        let norm = self.grad_norm_max.unwrap_or(1.0);
        let fits = norm.is_finite() && norm > 0.0;
        let fix = "use a positive norm, or leave it out";
        require(fits, "optimizer.grad_norm_max", norm, fix)?;
        self.schedule.validate()
    }
}

/// Why an update was refused; nothing has changed then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OptimizerError {
    /// The batch had no token, or its divisor is not a positive number.
    #[error("the gradient's divisor is {0}: the batch has no token to learn from, skip the update")]
    Divisor(f64),
    /// Gradients do not fit the tensors.
    #[error("tensor {tensor}: {got} gradients for {expected} weights")]
    Shape {
        /// Index of the tensor, or of the first that is missing or too many.
        tensor: usize,
        /// Length of the gradient.
        got: usize,
        /// Length of the tensor.
        expected: usize,
    },
}

/// One parameter tensor, flat. All three vectors have one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorState {
    /// Master weights.
    pub master: Vec<f32>,
    /// First moments `m`.
    pub first_moment: Vec<f32>,
    /// Second moments `v`.
    pub second_moment: Vec<f32>,
    /// Whether weight decay applies: true for matrices, false for gains and vectors.
    pub decays: bool,
    /// What is published, and differentiated, is the master weight times two to this power.
    pub scale_log2: i32,
}

impl TensorState {
    /// A tensor that has seen no gradient.
    pub fn new(master: Vec<f32>, decays: bool) -> Self {
        let zeros = vec![0.0; master.len()];
        Self { first_moment: zeros.clone(), second_moment: zeros, master, decays, scale_log2: 0 }
    }

    /// `d loss / d master` over `d loss / d published`.
    fn gradient_scale(&self) -> f64 {
        libm::scalbn(1.0, self.scale_log2)
    }
}

/// The optimizer's whole state: what a checkpoint must keep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    /// Updates since the start or the last [`AdamW::reset`]: t of the bias correction.
    pub moment_step: u64,
    /// Updates since the start of the run: drives the schedule.
    pub update_count: u64,
    /// In the model's order.
    pub tensors: Vec<TensorState>,
}

/// The scalars of one update, the same for all tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdatePlan {
    /// Factor of the integer sums: scale, divisor and clip.
    pub gradient_factor: f64,
    /// Scheduled learning rate.
    pub learning_rate: f64,
    /// `1 - learning_rate * weight_decay`.
    pub decay_factor: f64,
    /// Global norm of the mean gradient, before clipping.
    pub grad_norm: f64,
    /// Whether the norm was clipped.
    pub is_clipped: bool,
    beta1: f64,
    beta2: f64,
    eps: f64,
    /// Learning rate over the bias correction of `m`.
    step_size: f64,
    /// One over the bias correction of `v`.
    second_factor: f64,
}

impl AdamW {
    /// An optimizer that has made no update.
    pub fn new(tensors: Vec<TensorState>) -> Self {
        Self { moment_step: 0, update_count: 0, tensors }
    }

    /// Clears moments and bias correction, as ProRL v1 does with a reference reset. Master weights
    /// and the schedule go on.
    pub fn reset(&mut self) {
        self.moment_step = 0;
        for tensor in &mut self.tensors {
            tensor.first_moment.fill(0.0);
            tensor.second_moment.fill(0.0);
        }
    }

    /// Counts one update and fixes its scalars. `square_sums` are those of all tensors' chunks, in
    /// order (see [`square_sums`]). Then apply [`update`] once to every element.
    pub fn begin(
        &mut self,
        config: &AdamWConfig,
        scale: GradientScale,
        square_sums: &[f64],
    ) -> Result<UpdatePlan, OptimizerError> {
        if !(scale.divisor > 0.0 && scale.divisor.is_finite()) {
            return Err(OptimizerError::Divisor(scale.divisor));
        }
        assert!(scale.loss_scale_log2 <= LOSS_SCALE_LOG2_MAX, "loss scale beyond its bound");
        let unit = f64::from(1_u32 << (WEIGHT_FRACTION_BITS + scale.loss_scale_log2));
        let factor = 1.0 / (unit * scale.divisor);
        let grad_norm = square_sums.iter().fold(0.0, |a, b| a + b).sqrt() * factor;
        let clip = match config.grad_norm_max {
            Some(limit) if grad_norm > limit => limit / grad_norm,
            _ => 1.0,
        };
        self.moment_step += 1;
        self.update_count += 1;
        let t = self.moment_step as f64;
        let learning_rate = config.learning_rate * config.schedule.factor(self.update_count);
        Ok(UpdatePlan {
            gradient_factor: factor * clip,
            learning_rate,
            decay_factor: 1.0 - learning_rate * config.weight_decay,
            grad_norm,
            is_clipped: clip < 1.0,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            step_size: learning_rate / (1.0 - libm::pow(config.beta1, t)),
            second_factor: 1.0 / (1.0 - libm::pow(config.beta2, t)),
        })
    }

    /// A whole update, on all threads. `gradients[k]` are the integer sums of tensor k, `FX(16) x 2^S`.
    pub fn step(
        &mut self,
        config: &AdamWConfig,
        scale: GradientScale,
        gradients: &[&[i64]],
    ) -> Result<UpdatePlan, OptimizerError> {
        for tensor in 0..self.tensors.len().max(gradients.len()) {
            let got = gradients.get(tensor).map_or(0, |g| g.len());
            let expected = self.tensors.get(tensor).map_or(0, |t| t.master.len());
            if got != expected {
                return Err(OptimizerError::Shape { tensor, got, expected });
            }
        }
        let scales: Vec<f64> = self.tensors.iter().map(TensorState::gradient_scale).collect();
        let chunks = gradients.iter().zip(&scales);
        let chunks = chunks.flat_map(|(g, s)| g.chunks(PIECE).map(move |g| (g, s * s)));
        let squares = |(g, square): (&[i64], f64)| {
            let mut sums = square_sums(g);
            sums.iter_mut().for_each(|s| *s *= square);
            sums
        };
        let sums = parallel::map(chunks.collect(), squares).concat();
        let plan = self.begin(config, scale, &sums)?;
        let mut pieces = vec![];
        for ((tensor, gradient), scale) in self.tensors.iter_mut().zip(gradients).zip(scales) {
            let decays = tensor.decays;
            let gradient_factor = plan.gradient_factor * scale;
            let plan = UpdatePlan { gradient_factor, ..plan };
            let parts = gradient
                .chunks(PIECE)
                .zip(tensor.master.chunks_mut(PIECE))
                .zip(tensor.first_moment.chunks_mut(PIECE))
                .zip(tensor.second_moment.chunks_mut(PIECE));
            pieces.extend(parts.map(|(((g, x), m), v)| (plan, decays, g, x, m, v)));
        }
        parallel::map(pieces, |(plan, decays, g, x, m, v)| update(&plan, decays, g, x, m, v));
        Ok(plan)
    }
}

/// Sums of squares of a tensor's integer gradient, one a chunk of [`NORM_CHUNK`] elements.
pub fn square_sums(gradient: &[i64]) -> Vec<f64> {
    let path = Path::best();
    gradient.chunks(NORM_CHUNK).map(|chunk| chunk_square_sum(path, chunk)).collect()
}

simd! {
/// Lane j sums elements j, j+8, ...; then the lanes are added from the first to the last.
fn chunk_square_sum(chunk: &[i64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let mut rows = chunk.chunks_exact(LANES);
    for row in &mut rows {
        for lane in 0..LANES {
            let g = row[lane] as f64;
            lanes[lane] += g * g;
        }
    }
    for (lane, &g) in lanes.iter_mut().zip(rows.remainder()) {
        let g = g as f64;
        *lane += g * g;
    }
    lanes.iter().sum()
}
}

/// Updates any part of a tensor. All slices cover the same elements, `(n)`; `master` and both moments
/// are assigned. Elementwise: however a tensor is split, the bits are the same.
pub fn update(
    plan: &UpdatePlan,
    decays: bool,
    gradient: &[i64],
    master: &mut [f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
) {
    let n = gradient.len();
    assert!(
        master.len() == n && first_moment.len() == n && second_moment.len() == n,
        "an update's slices must have one length"
    );
    update_run(Path::best(), plan, decays, gradient, master, first_moment, second_moment);
}

simd! {
/// [`update`] of slices of one length.
fn update_run(
    plan: &UpdatePlan,
    decays: bool,
    gradient: &[i64],
    master: &mut [f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
) {
    let n = gradient.len();
    let (master, first_moment, second_moment) =
        (&mut master[..n], &mut first_moment[..n], &mut second_moment[..n]);
    let decay_factor = if decays { plan.decay_factor } else { 1.0 };
    let (gain1, gain2) = (1.0 - plan.beta1, 1.0 - plan.beta2);
    for i in 0..n {
        let g = gradient[i] as f64 * plan.gradient_factor;
        let m = plan.beta1 * f64::from(first_moment[i]) + gain1 * g;
        let v = plan.beta2 * f64::from(second_moment[i]) + gain2 * (g * g);
        let direction = m / ((v * plan.second_factor).sqrt() + plan.eps);
        let x = f64::from(master[i]) * decay_factor - plan.step_size * direction;
        first_moment[i] = m as f32;
        second_moment[i] = v as f32;
        master[i] = x as f32;
    }
}
}

#[cfg(test)]
mod tests;
