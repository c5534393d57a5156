//! Sums, expressions and sums modulo a number.

use super::{
    Problem, Spec,
    draws::Draws,
    tree::{Shape, Tree},
};

/// Levels: 2 or 3 terms of 1 or 2 digits, then 3 of 2 digits (both never below zero), then 3 or 4
/// of 2 or 3 digits, 4 or 5 of 3 digits, 5 or 6 of 3 or 4 digits.
pub(super) const CHAIN_SUM: Spec = Spec {
    name: "chain_sum",
    draw: chain_sum,
    prompt_bytes_max: [9, 9, 16, 20, 30],
    trace_bytes_max: [24, 24, 49, 65, 97],
    unordered: false,
};

/// `[level - 1]` (fewest and most terms, smallest and largest term).
const CHAIN_SUM_RANGES: [((u32, u32), (u32, u32)); 5] = [
    ((2, 3), (1, 99)),
    ((3, 3), (10, 99)),
    ((3, 4), (10, 999)),
    ((4, 5), (100, 999)),
    ((5, 6), (100, 9999)),
];

fn chain_sum(draws: &mut Draws, level: usize) -> Problem {
    let (count, term) = CHAIN_SUM_RANGES[level];
    let mut total = i64::from(draws.between(term));
    let (mut sum, mut steps) = (total.to_string(), Vec::new());
    for _ in 1..draws.between(count) {
        let term = i64::from(draws.between(term));
        let minus = draws.one_in(2) && (level >= 2 || term <= total);
        let (sign, next) = if minus { ('-', total - term) } else { ('+', total + term) };
        sum.push_str(&format!("{sign}{term}"));
        steps.push(format!("{total}{sign}{term}={next}"));
        total = next;
    }
    Problem::new(format!("{sum}="), &steps.join(";"), total.to_string())
}

/// Levels: 3 numbers to 9 without division; 3 to 20; 4 to 20; 4 or 5 to 50; 5 or 6 to 99. Values
/// are whole at every step; products stay below 10,000 and differences may be negative.
pub(super) const BASIC_ARITHMETIC: Spec = Spec {
    name: "basic_arithmetic",
    draw: basic_arithmetic,
    prompt_bytes_max: [8, 11, 16, 21, 26],
    trace_bytes_max: [22, 28, 58, 80, 101],
    unordered: false,
};

/// `[level - 1]` (fewest and most numbers, their shape).
const BASIC_ARITHMETIC_RANGES: [((u32, u32), Shape); 5] = [
    ((3, 3), Shape { leaf_max: 9, operators: b"+-*", signed: true }),
    ((3, 3), Shape { leaf_max: 20, operators: b"+-*/", signed: true }),
    ((4, 4), Shape { leaf_max: 20, operators: b"+-*/", signed: true }),
    ((4, 5), Shape { leaf_max: 50, operators: b"+-*/", signed: true }),
    ((5, 6), Shape { leaf_max: 99, operators: b"+-*/", signed: true }),
];

fn basic_arithmetic(draws: &mut Draws, level: usize) -> Problem {
    let (count, shape) = &BASIC_ARITHMETIC_RANGES[level];
    let count = draws.between(*count);
    let tree = Tree::random(draws, shape, count);
    Problem::new(format!("{}=", tree.text), &tree.steps.join(";"), tree.value.to_string())
}

/// Levels: 2 terms to 9 modulo 2 to 9; 2 to 49 modulo 12; 2 to 99 modulo 20; 3 to 99 modulo 50;
/// 4 to 999 modulo 97.
pub(super) const MODULAR_ADDITION: Spec = Spec {
    name: "modular_addition",
    draw: modular_addition,
    prompt_bytes_max: [8, 11, 11, 14, 21],
    trace_bytes_max: [15, 20, 22, 25, 34],
    unordered: false,
};

/// `[level - 1]` (terms, largest term, largest modulus).
const MODULAR_ADDITION_RANGES: [(u32, u32, u32); 5] =
    [(2, 9, 9), (2, 49, 12), (2, 99, 20), (3, 99, 50), (4, 999, 97)];

fn modular_addition(draws: &mut Draws, level: usize) -> Problem {
    let (count, term_max, modulus_max) = MODULAR_ADDITION_RANGES[level];
    let terms: Vec<u32> = (0..count).map(|_| draws.between((0, term_max))).collect();
    let modulus = draws.between((2, modulus_max));
    let sum: u32 = terms.iter().sum();
    let text = terms.iter().map(u32::to_string).collect::<Vec<_>>().join("+");
    Problem::new(
        format!("({text})%{modulus}="),
        &format!("{text}={sum};{sum}%{modulus}={}", sum % modulus),
        (sum % modulus).to_string(),
    )
}
