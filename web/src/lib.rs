//! The tab: the engines of Manyhands compiled to WebAssembly.
//!
//! So far it holds one thing, the proof that everything else rests on: the conformance suite of
//! the CPU engine in wasm SIMD128, whose digest must be that of every native engine.
//! `web/conformance.mjs` runs it.

use std::sync::OnceLock;

use manyhands_core::conformance::suite;
use manyhands_core::engine::cpu::{Cpu, Path};

/// Digest and verdict, kept alive for the caller to read.
static REPORT: OnceLock<String> = OnceLock::new();

/// The suite's outcome on the CPU engine: digest, path, and what differs.
pub fn report() -> &'static str {
    REPORT.get_or_init(|| {
        let engine = Cpu::new(suite::constants(), 1, None);
        match pollster::block_on(suite::run(&engine)) {
            Ok(outcome) => {
                let verdict = if outcome.passes() { "PASS" } else { "FAIL" };
                let wrong = outcome.first_difference().unwrap_or("");
                format!("{verdict} {} {} {wrong}", outcome.digest, Path::best())
            }
            Err(error) => format!("FAIL {error}"),
        }
    })
}

/// Address of the report, UTF-8.
#[expect(unsafe_code, reason = "an export that JavaScript can call needs a plain name")]
#[unsafe(no_mangle)]
pub extern "C" fn report_address() -> *const u8 {
    report().as_ptr()
}

/// Length of the report in bytes.
#[expect(unsafe_code, reason = "an export that JavaScript can call needs a plain name")]
#[unsafe(no_mangle)]
pub extern "C" fn report_length() -> usize {
    report().len()
}

#[cfg(test)]
mod tests {
    /// Also run for other processors: see CI.
    #[test]
    fn report_passes() {
        assert!(super::report().starts_with("PASS "), "{}", super::report());
    }
}
