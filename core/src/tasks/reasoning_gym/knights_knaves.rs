//! Knights and knaves as Reasoning Gym scores it: a set of (name, role) pairs.

use std::collections::BTreeSet;

const ROLES: [&str; 14] = [
    "altruist", "angel", "devil", "egoist", "fool", "hero", "knave", "knight", "laggard",
    "pioneer", "sage", "saint", "sinner", "villain",
];

/// 1 for the same pairs, else 0.3 and a share of 0.7 for what agrees, if there are as many pairs.
pub(super) fn score(reference: &str, answer: &str) -> f64 {
    if answer.is_empty() {
        return 0.0;
    }
    let [reference, answer] = [reference, answer].map(normalised);
    let [expected, given] = [assignments(&reference), assignments(&answer)];
    let matching = expected.intersection(&given).count();
    if expected == given {
        1.0
    } else if expected.len() == given.len() && matching > 0 {
        0.3 + 0.7 * matching as f64 / expected.len() as f64
    } else {
        0.0
    }
}

fn normalised(text: &str) -> String {
    text.to_lowercase().replace(['.', ',', '(', ')'], " ").replace(" and ", " ")
}

/// Each role with the last other word before it.
fn assignments(text: &str) -> BTreeSet<(&str, &str)> {
    let (mut name, mut pairs) = (None, BTreeSet::new());
    for word in text.split_whitespace().filter(|word| !matches!(*word, "is" | "a" | "an")) {
        if ROLES.contains(&word) {
            pairs.extend(name.take().map(|name| (name, word)));
        } else {
            name = Some(word);
        }
    }
    pairs
}
