//! The exact number system X1 of Manyhands.
//!
//! Start with [`x1`] (scalar primitives), then [`bfp`] (block floating point), then [`twin`]:
//! one module an op family, the obvious loops over integers, which *define* what every kernel
//! must return. The WGSL kernels in `wgsl/` and the CPU engine reproduce them bit for bit.

pub mod bfp;
pub mod tables;
pub mod twin;
pub mod wgsl;
pub mod x1;
