//! A whole swarm in memory: the real coordinator and real volunteers over a virtual clock and a
//! seeded network, with real arithmetic on a tiny model.
//!
//! [`lab`] is the run file and the arithmetic, [`world`] the clock, the network, the store and the
//! coordinator, [`machine`] a volunteer's computer,
//! [`attacks`] what a dishonest one does, [`outcome`] what the ledger says in the end.

pub mod attacks;
pub mod lab;
pub mod machine;
pub mod mirror;
pub mod outcome;
pub mod random;
pub mod world;
