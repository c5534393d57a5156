//! The swarm: units of work, who did them, and how everybody can check it.
//!
//! Pure: events and bytes in, effects and bytes out. Sockets, clocks and disks are `node`'s.
//! Start at [`coordinator`] and [`volunteer`], the two state machines; they speak [`protocol`] about
//! [units](mod@unit), and what is accepted is written into the [`ledger`].
//! How bytes go over a stream is in [`transfer`].

pub mod chain;
pub mod chunks;
pub mod coordinator;
pub mod delta;
pub mod ids;
pub mod ledger;
pub mod packing;
mod past;
pub mod protocol;
pub mod replay;
pub mod scheduler;
pub mod share;
pub mod status;
pub mod transfer;
pub mod trust;
pub mod unit;
pub mod volunteer;
