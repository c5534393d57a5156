//! End-to-end tests. The library is what several of them share.

pub mod scale;
pub mod swarm;
