//! The decoder: a Llama-style transformer (RMSNorm, RoPE, grouped-query attention, SwiGLU).
//!
//! [`config`] shapes it, [`weights`] is one published version of its parameters, [`decoder`] runs
//! it forward and backward on any engine, [`generate`] samples from it.

pub mod adapter;
pub mod config;
pub mod decoder;
pub mod generate;
pub mod init;
pub mod tokenizer;
pub mod weights;
