//! Conformance: proof that an engine on this machine gives the bits that the number system defines.

pub mod oracle;
pub mod suite;
