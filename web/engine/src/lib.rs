//! The engines of a tab: what an engine worker (`page/engine.js`) holds.
//!
//! `bench` loads weights and computes units on one engine, which has proved itself by the
//! conformance suite; `adapter` finds how the browser's graphics adapter likes to work, `speed`
//! measures. The network is another module, in another worker.
#![cfg(target_arch = "wasm32")]

mod adapter;
mod bench;
mod speed;

use manyhands_core::conformance::suite;
use manyhands_core::engine::cpu::{Cpu, Path};
use wasm_bindgen::prelude::*;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = performance, js_name = now)]
    fn performance_now() -> f64;
}

/// Milliseconds of a monotonic clock.
fn now_ms() -> f64 {
    performance_now()
}

/// The suite's outcome on the CPU engine: verdict, digest, path, and what differs.
#[wasm_bindgen]
pub fn conformance() -> String {
    let engine = Cpu::new(suite::constants(), 1, None);
    match pollster::block_on(suite::run(&engine)) {
        Ok(outcome) => {
            let verdict = if outcome.passes() { "PASS" } else { "FAIL" };
            let wrong = outcome.first_difference().unwrap_or("");
            format!("{verdict} {} {} {wrong}", outcome.digest, Path::best())
        }
        Err(error) => format!("FAIL {error}"),
    }
}
