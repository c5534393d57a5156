//! Fuzzes one target: the environment variable `FUZZ_TARGET` names it. With `FUZZ_SEEDS` set to a
//! directory, its first inputs are written there: real encodings, made by the code that encodes.
//! Start at [`targets::TARGETS`]; `.ci/fuzz` runs them all.

#![no_main]

mod foreign;
mod memory;
mod seeds;
mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use targets::{TARGETS, Target};

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

static TARGET: OnceLock<&Target> = OnceLock::new();

fn start() {
    let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let Some(target) = TARGETS.iter().find(|t| t.name == name) else {
        println!("{}", names.join(" "));
        std::process::exit(0);
    };
    if let Ok(dir) = std::env::var("FUZZ_SEEDS") {
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(format!("{dir}/seed-{i:03}"), seed).expect("cannot write a seed");
            // A seed that its target would refuse explores nothing.
            assert!((target.run)(seed), "{name}: seed {i} is not accepted");
        }
    }
    TARGET.set(target).expect("started twice");
}

fuzz_target!(init: start(), |bytes: &[u8]| {
    let target = TARGET.get().expect("started");
    let peak = memory::peak_during(|| (target.run)(bytes));
    let bound = target.memory_bytes_max + memory::BYTES_A_BYTE * bytes.len();
    assert!(peak <= bound, "{peak} bytes of memory for {} bytes of input", bytes.len());
});
