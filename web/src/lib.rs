//! The network side of the tab: a volunteer that a person starts by opening a link.
//!
//! Two kinds of workers make a tab. The *network worker* (`page/volunteer.js`) holds this module:
//! `volunteer` is the machine of `core` on a `link` to the host. *Engine workers*
//! (`page/engine.js`) hold the module of `engine/`: one engine each, which proves itself and
//! computes. So heartbeats never wait for arithmetic, Stop is the end of a worker, and whatever
//! ends an engine costs the unit in hand at most.
//! `hand` cuts a unit for several engines; `chain` checks the ledger.

#[cfg(target_arch = "wasm32")]
pub mod blobs;
#[cfg(target_arch = "wasm32")]
pub mod browser;
#[cfg(target_arch = "wasm32")]
pub mod chain;
pub mod hand;
#[cfg(target_arch = "wasm32")]
pub mod link;
#[cfg(target_arch = "wasm32")]
pub mod transport;
#[cfg(target_arch = "wasm32")]
pub mod volunteer;

#[cfg(test)]
mod tests {
    use manyhands_core::conformance::suite;
    use manyhands_core::engine::cpu::Cpu;

    /// Also run for other processors: see CI.
    #[test]
    fn conformance_passes() {
        let engine = Cpu::new(suite::constants(), 1, None);
        let outcome = pollster::block_on(suite::run(&engine)).unwrap();
        assert!(outcome.passes(), "{:?}", outcome.first_difference());
    }
}
