//! Learning: from rewarded rollouts to integer weights, and from integer gradients to new weights.
//!
//! Everything here is scalar `+ - * / sqrt` in a fixed order of summation, with `libm` for
//! `exp`/`log`/`pow`/`cos`: the same bits on x86-64, aarch64 and wasm. There is no I/O, no clock
//! and no entropy; random choices are functions of a seed ([`scalar::Draws`]).
//!
//! One step of reinforcement learning reads, in order:
//!
//! 1. [`length`] shapes rewards, [`dynamic_sampling`] keeps the useful groups,
//! 2. [`advantage`] turns rewards into one advantage a rollout,
//! 3. [`weights`] combines [`objective`], [`kl`], [`entropy`] and [`aggregate`] into the `i32`
//!    per-token weights that are *all* that enters the integer backward pass,
//! 4. [`optimizer`] turns the integer gradient sum into new weights, at the rate of [`schedule`],
//! 5. [`reset`] decides whether the reference policy moves, [`staleness`] what may be sampled.
//!
//! [`passk`] and [`support`] evaluate. [`config`] gathers all settings and the two ProRL presets.
//! Deliberately absent: kernels, the model, and anything that knows about volunteers.

pub mod advantage;
pub mod aggregate;
pub mod config;
pub mod dynamic_sampling;
pub mod entropy;
pub mod kl;
pub mod length;
pub mod objective;
pub mod optimizer;
pub mod passk;
pub mod reset;
pub mod scalar;
pub mod schedule;
pub mod staleness;
pub mod support;
pub mod weights;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod identities;
