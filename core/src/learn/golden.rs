//! Access to `tests/data/golden.json`: numbers that verl, TRL, AReaL and prime-rl reproduce.

use serde_json::Value;

/// The file prints gradients to 10 decimals, so half a unit of the last one is 5e-11; sums of a
/// few such roundings stay well below this.
pub(crate) const GOLDEN_TOLERANCE: f64 = 1e-9;

/// The whole file.
pub(crate) fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A JSON array of numbers, nested arrays flattened.
pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        other => vec![other.as_f64().unwrap_or_else(|| panic!("not a number: {other}"))],
    }
}

/// Asserts equality within [`GOLDEN_TOLERANCE`]; prints the first bad index and how many differ.
#[track_caller]
pub(crate) fn assert_golden(what: &str, got: &[f64], expected: &Value) {
    assert_close(what, got, &numbers(expected), GOLDEN_TOLERANCE);
}

/// Asserts element-wise closeness, absolute.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    // Written so that a NaN counts as different.
    let is_close = |i: usize| (got[i] - expected[i]).abs() <= tolerance;
    let bad: Vec<usize> = (0..got.len()).filter(|&i| !is_close(i)).collect();
    if let Some(&i) = bad.first() {
        panic!(
            "{what}: {} of {} differ, first at {i}: got {}, expected {}",
            bad.len(),
            got.len(),
            got[i],
            expected[i]
        );
    }
}
