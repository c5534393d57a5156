//! A run: one file of settings, its problems, and the training loop as a pure state machine.
//!
//! [`config`] is the file, [`problems`] what it draws on, [`trainer`] the state and its steps
//! ([`sft`], [`rl`]), [`evaluate`] the honest measure, [`report`] what is logged.

pub mod config;
pub mod evaluate;
pub mod gradient;
pub mod problems;
pub mod report;
pub mod rl;
pub mod rollout;
pub mod sft;
pub mod trainer;
