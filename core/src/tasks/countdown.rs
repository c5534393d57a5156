//! Countdown: reach a target with given numbers. The one family whose scorer evaluates answers,
//! because many are right.

use super::{
    Problem, Spec,
    draws::Draws,
    expression::{Fraction, exact},
    final_answer,
    tree::{Shape, Tree},
};

/// Levels: 3 numbers to 9 with `+-`; 3 to 15 with `+-*`; 4 to 25; 4 or 5 to 50 with `+-*/`; 5 or 6
/// to 99. Targets are 0 or more; the numbers are shuffled, so that their order gives nothing away.
pub(super) const COUNTDOWN: Spec = Spec {
    name: "countdown",
    draw: countdown,
    prompt_bytes_max: [14, 19, 23, 26, 29],
    trace_bytes_max: [20, 30, 57, 79, 100],
    unordered: true,
};

/// `[level - 1]` (fewest and most numbers, shape of the solution).
const RANGES: [((u32, u32), Shape); 5] = [
    ((3, 3), Shape { leaf_max: 9, operators: b"+-", signed: false }),
    ((3, 3), Shape { leaf_max: 15, operators: b"++--*", signed: false }),
    ((4, 4), Shape { leaf_max: 25, operators: b"++--*", signed: false }),
    ((4, 5), Shape { leaf_max: 50, operators: b"++--*/", signed: false }),
    ((5, 6), Shape { leaf_max: 99, operators: b"++--*/", signed: false }),
];

fn countdown(draws: &mut Draws, level: usize) -> Problem {
    let (count, shape) = &RANGES[level];
    let count = draws.between(*count);
    let mut tree = Tree::random(draws, shape, count);
    draws.shuffle(&mut tree.leaves);
    let numbers = tree.leaves.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
    Problem::new(format!("{} from {numbers}:", tree.value), &tree.steps.join(";"), tree.text)
}

/// 1 for any expression of `+ - * /` and parentheses that uses every given number exactly once, no
/// other number, and has exactly the target as its value (in fractions, never in floats).
pub(super) fn score(problem: &Problem, completion: &str) -> f64 {
    if solves(&problem.prompt, completion) == Some(true) { 1.0 } else { 0.0 }
}

fn solves(prompt: &str, completion: &str) -> Option<bool> {
    let (target, numbers) = prompt.strip_suffix(':')?.split_once(" from ")?;
    let target = Fraction::whole(target.parse().ok()?);
    let mut given: Vec<i64> = numbers.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
    let (value, mut used) = exact(final_answer(completion)?)?;
    given.sort_unstable();
    used.sort_unstable();
    Some(value == target && used == given)
}
