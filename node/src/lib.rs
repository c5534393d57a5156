//! The `manyhands` program: command line, files, engines, terminal.
//!
//! Thin by design: everything that decides a result lives in `manyhands-core`. Start at [`cli`].

#![expect(clippy::print_stdout, reason = "a command line program prints its results")]

#[cfg(feature = "attacks")]
pub mod attack;
pub mod bench;
pub mod blobs;
pub(crate) mod chat;
pub mod cli;
pub mod clock;
pub mod demo;
pub mod doctor;
pub mod donor;
pub mod engines;
pub mod eval;
pub mod export;
pub mod host;
pub mod http;
pub mod identity;
pub mod import;
pub mod imported;
pub mod join;
pub mod local_swarm;
pub mod net;
pub mod plot;
pub mod receipts;
pub mod remote;
pub mod replay;
pub mod sample;
pub mod storage;
pub mod store;
pub mod train;
pub mod tuning;
pub mod view;
pub mod weights;
