//! Reasoning Gym's scores, reproduced so that our figures can be compared with published ones.
//!
//! **Never a training reward**: a policy would find the holes. Rewards come from
//! [`Family::score`](super::Family::score). Known holes of the original (version 0.1.25), kept
//! here on purpose:
//!
//! * the default scorer gives part credit for containing the answer: `176` scores 1/3 for `1`;
//! * countdown gives 0.01 for nothing at all and 0.05 for any expression, and compares floats;
//! * number sorting accepts every number that is off by up to 1;
//! * spell backward gives credit for each letter in place, and for anything after the word;
//! * knights and knaves ignores all words around the last name before each role;
//! * prime factorization gives 0.5 for composite factors, 0.01 for any integer, and raises an
//!   exception on other text.
//!
//! Where the original raises, [`score`] gives 0. Lengths are counted in characters, as there.
//! Exotic Python syntax (unary plus and exponents in countdown, NaN in lists, symbolic functions,
//! non-ASCII digits) is read as malformed rather than imitated.

mod countdown;
mod decimal;
mod knights_knaves;
#[cfg(test)]
mod tests;

use serde_json::Value;

/// The tasks whose scorers are reproduced.
pub const TASKS: [&str; 16] = [
    "base_conversion",
    "basic_arithmetic",
    "binary_alternation",
    "chain_sum",
    "count_bits",
    "countdown",
    "gcd",
    "knights_knaves",
    "lcm",
    "leg_counting",
    "letter_counting",
    "number_sequence",
    "number_sorting",
    "prime_factorization",
    "simple_equations",
    "spell_backward",
];

/// Largest absolute difference that number sorting forgives.
const SORTING_TOLERANCE: f64 = 1.0;

/// The score of `answer` (already extracted; `None` if there was none) for an item of `task` with
/// this `metadata` and `reference` answer: 0 to 1.
///
/// A task outside [`TASKS`] gets the original's default scorer, as most of its families do.
pub fn score(task: &str, metadata: &Value, reference: &str, answer: Option<&str>) -> f64 {
    // Countdown alone rewards the absence of an answer.
    let Some(answer) = answer else {
        return if task == "countdown" { countdown::NOTHING } else { 0.0 };
    };
    match task {
        "chain_sum" => decimal_or_contained(reference, answer),
        "countdown" => countdown::score(metadata, answer),
        "knights_knaves" => knights_knaves::score(reference, answer),
        "number_sorting" => number_sorting(metadata, reference, answer).map_or(0.0, f64::from),
        "prime_factorization" => prime_factorization(reference, answer).unwrap_or(0.0),
        "spell_backward" => spell_backward(reference, answer),
        _ => exact_or_contained(reference, answer),
    }
}

/// The text of the last `<answer>...</answer>`, without surrounding white space.
///
/// Tags are matched from the left without overlap, so `<answer><answer>3</answer>` holds
/// `<answer>3`.
pub fn extract_answer(completion: &str) -> Option<&str> {
    let (mut rest, mut last) = (completion, None);
    while let Some((_, opened)) = rest.split_once("<answer>") {
        let Some((answer, after)) = opened.split_once("</answer>") else { break };
        (rest, last) = (after, Some(answer.trim()));
    }
    last
}

/// The default scorer: 1 for equality, else the share of the answer that is the reference.
fn exact_or_contained(reference: &str, answer: &str) -> f64 {
    if answer.is_empty() || !answer.contains(reference) {
        return 0.0;
    }
    length(reference) / length(answer)
}

/// Equal as decimal numbers without commas, else the default scorer.
fn decimal_or_contained(reference: &str, answer: &str) -> f64 {
    let [reference, answer] = [reference, answer].map(|text| text.replace(',', ""));
    match (decimal::Decimal::parse(&reference), decimal::Decimal::parse(&answer)) {
        (Some(expected), Some(given)) if expected == given => 1.0,
        _ => exact_or_contained(&reference, &answer),
    }
}

/// Both lists read as JSON with either kind of quote, in order, and close to each other.
fn number_sorting(metadata: &Value, reference: &str, answer: &str) -> Option<bool> {
    let [expected, given] = [number_list(reference)?, number_list(answer)?];
    let ascending = metadata.get("direction")?.as_str()? == "ascending";
    let in_order = given.is_sorted_by(|a, b| if ascending { a <= b } else { a >= b });
    let close = expected.iter().zip(&given).all(|(a, b)| (a - b).abs() <= SORTING_TOLERANCE);
    Some(expected.len() == given.len() && in_order && close)
}

fn number_list(text: &str) -> Option<Vec<f64>> {
    let list: Vec<Value> = serde_json::from_str(&text.replace('\'', "\"")).ok()?;
    list.iter()
        .map(|item| match item {
            Value::String(text) => text.trim().parse().ok(),
            other => other.as_f64(),
        })
        .collect()
}

/// Letters in place. A full score that is not equality loses 0.2, if its sum is exactly 1.
fn spell_backward(reference: &str, answer: &str) -> f64 {
    let [reference, answer] = [reference, answer].map(str::to_lowercase);
    if reference == answer {
        return 1.0;
    }
    let share = 1.0 / length(&reference);
    let mut reward = 0.0;
    // Summed, not multiplied: six times 1/6 stays below 1 and so keeps its 0.9999999999999999.
    for _ in reference.chars().zip(answer.chars()).filter(|(a, b)| a == b) {
        reward += share;
    }
    if reward == 1.0 { reward - 0.2 } else { reward }
}

/// 1 for the same factors, 0.5 for the same product, 0.01 for integers, `None` for other text.
fn prime_factorization(reference: &str, answer: &str) -> Option<f64> {
    let [expected, given] = [factors(reference)?, factors(answer)?];
    let product = |factors: &[i128]| factors.iter().try_fold(1_i128, |a, &b| a.checked_mul(b));
    Some(if expected == given {
        1.0
    } else if product(&expected) == product(&given) {
        0.5
    } else {
        0.01
    })
}

fn factors(text: &str) -> Option<Vec<i128>> {
    let parts = text.split('×').map(str::trim).filter(|part| !part.is_empty());
    let mut factors: Vec<i128> = parts.map(|part| part.parse().ok()).collect::<Option<_>>()?;
    factors.sort_unstable();
    Some(factors)
}

fn length(text: &str) -> f64 {
    text.chars().count() as f64
}
