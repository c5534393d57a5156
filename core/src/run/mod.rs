//! A run: one file of settings, its problems, and the training loop as a pure state machine.
//!
//! [`config`] is the file, [`problems`] what it draws on, [`state`] all that changes from step to
//! step. [`pipeline`] turns a state into [`job`]s and their outputs into the next state, without an
//! engine; [`execute`](mod@execute) computes a job's [`work`], in [`parts`] if need be; [`trainer`]
//! joins the two on one machine. [`evaluate`](mod@evaluate) is the honest measure, [`report`] what is logged.

pub mod config;
pub mod evaluate;
pub mod execute;
pub mod job;
pub mod parts;
pub mod pipeline;
pub mod problems;
pub mod report;
pub mod rollout;
pub mod state;
pub mod trainer;
pub mod work;
