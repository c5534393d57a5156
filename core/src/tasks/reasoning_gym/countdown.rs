//! Countdown as Reasoning Gym scores it: a float, and the integers that appear in the text.

use serde_json::Value;

use crate::tasks::expression::{Operator, evaluate, parse};

/// For no answer, or one that has no value.
pub(super) const NOTHING: f64 = 0.01;
/// For an expression that has a value.
const EXPRESSION: f64 = 0.05;
/// `numpy.isclose`: absolute, and relative to the target.
const TOLERANCE_ABSOLUTE: f64 = 1e-6;
const TOLERANCE_RELATIVE: f64 = 1e-5;

pub(super) fn score(metadata: &Value, answer: &str) -> f64 {
    let Some(value) = value(answer) else { return NOTHING };
    match solves(metadata, answer, value) {
        Some(true) => 1.0,
        Some(false) => EXPRESSION,
        None => NOTHING,
    }
}

fn value(answer: &str) -> Option<f64> {
    let value = evaluate(
        &parse(answer.trim())?,
        |literal| literal.parse::<f64>().ok(),
        |x| Some(-x),
        |operator, x, y| match operator {
            Operator::Add => Some(x + y),
            Operator::Subtract => Some(x - y),
            Operator::Multiply => Some(x * y),
            Operator::Divide => (y != 0.0).then_some(x / y),
            Operator::Power => Some(libm::pow(x, y)),
            Operator::Negate => None,
        },
    )?;
    value.is_finite().then_some(value)
}

/// `None` if the metadata is not countdown's.
fn solves(metadata: &Value, answer: &str, value: f64) -> Option<bool> {
    let target = metadata.get("target")?.as_f64()?;
    let mut given: Vec<u64> =
        metadata.get("numbers")?.as_array()?.iter().map(Value::as_u64).collect::<Option<_>>()?;
    // Runs of digits, so that `1.5` counts as 1 and 5; one too long to hold is no given number.
    let runs = answer.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
    let mut used: Vec<u64> = runs.map(|run| run.parse().unwrap_or(u64::MAX)).collect();
    given.sort_unstable();
    used.sort_unstable();
    let close = (value - target).abs() <= TOLERANCE_ABSOLUTE + TOLERANCE_RELATIVE * target.abs();
    Some(used == given && close)
}
