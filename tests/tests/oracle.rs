//! Every engine reproduces the independent integer oracle, to the last bit of every gradient.

use manyhands_core::conformance::{oracle::Vectors, suite};
use manyhands_core::engine::twin::Twin;

const FILES: [&[u8]; 2] = [
    include_bytes!("../data/oracle/vectors-1.safetensors"),
    include_bytes!("../data/oracle/vectors-2.safetensors"),
];

/// Breaks if any primitive, twin or the order of the model's operations changes.
#[test]
fn oracle_twin_reproduces_every_integer() {
    for file in FILES {
        let vectors = Vectors::parse(file).expect("a vector file");
        let engine = Twin::new(vectors.config().constants());
        pollster::block_on(vectors.check(&engine)).expect("equal");
    }
}

/// Breaks if the number system changes in any bit: a new format needs a new name.
#[test]
fn suite_twin_has_the_published_digest() {
    let outcome = pollster::block_on(suite::run(&Twin::new(suite::constants()))).expect("runs");
    assert_eq!(outcome.first_difference(), None, "{outcome:?}");
    assert!(outcome.passes(), "{outcome:?}");
}
