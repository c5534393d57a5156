//! The swarm: units of work, who did them, and how everybody can check it.
//!
//! Pure: events and bytes in, effects and bytes out. Sockets, clocks and disks are `node`'s.

pub mod chain;
pub mod chunks;
pub mod delta;
pub mod ids;
pub mod ledger;
pub mod packing;
pub mod scheduler;
pub mod share;
pub mod trust;
