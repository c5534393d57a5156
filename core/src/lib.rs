//! Engines, model, learning and tasks of Manyhands.
//!
//! Pure by design: no I/O, no clock, no entropy. Seeds, bytes and a `wgpu::Device` come in as
//! arguments; what to do comes out as values, so that one machine can run a whole swarm in a test.

pub mod checkpoint;
pub mod conformance;
pub mod engine;
pub mod export;
pub mod import;
#[cfg(feature = "language")]
pub mod language;
pub mod learn;
pub mod model;
mod parallel;
pub mod run;
pub mod swarm;
pub mod tasks;
