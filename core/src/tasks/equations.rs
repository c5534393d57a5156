//! Linear equations in one unknown with an integer solution.

use super::{Problem, Spec, draws::Draws};

/// Levels, with numbers of the prompt drawn before the right-hand side is worked out:
/// 1. `x+b=c`, x to 20, b from -20 to 20;
/// 2. `ax+b=c`, a to 9, x to 12;
/// 3. `ax+b=dx+e`, x to 20;
/// 4. the same, a and d to 20, x from -30 to 30;
/// 5. `a(x+b)+c=dx+e`, x from -50 to 50.
pub(super) const SIMPLE_EQUATIONS: Spec = Spec {
    name: "simple_equations",
    draw: simple_equations,
    prompt_bytes_max: [11, 12, 15, 17, 20],
    trace_bytes_max: [14, 24, 24, 30, 46],
    unordered: false,
};

fn simple_equations(draws: &mut Draws, level: usize) -> Problem {
    match level {
        0 => {
            let (x, b) = (signed(draws, 1, 20), nonzero(draws, 20));
            let c = x + b;
            let [b, undo] = [b, -b].map(term);
            Problem::new(format!("x{b}={c};x="), &format!("x={c}{undo}={x}"), x.to_string())
        }
        1 => linear(signed(draws, 2, 9), nonzero(draws, 20), 0, signed(draws, 1, 12)),
        2 => two_sided(draws, 9, 20, (1, 20)),
        3 => two_sided(draws, 20, 50, (-30, 30)),
        _ => bracketed(draws),
    }
}

fn two_sided(draws: &mut Draws, slope_max: i64, shift_max: i64, x: (i64, i64)) -> Problem {
    let d = signed(draws, 1, slope_max - 1);
    let a = signed(draws, d + 1, slope_max);
    linear(a, nonzero(draws, shift_max), d, signed(draws, x.0, x.1))
}

/// `ax+b=dx+e` with `a > d >= 0`, for the `e` that makes `x` the solution.
fn linear(a: i64, b: i64, d: i64, x: i64) -> Problem {
    let e = (a - d) * x + b;
    let left = format!("{}{}", unknown(a), term(b));
    Problem::new(format!("{left}={};x=", side(d, e)), &isolate(a, b, d, e), x.to_string())
}

/// `a(x+b)+c=dx+e`, solved by multiplying out first.
fn bracketed(draws: &mut Draws) -> Problem {
    let d = signed(draws, 1, 8);
    let a = signed(draws, d + 1, 9);
    let (b, c, x) = (nonzero(draws, 20), nonzero(draws, 50), signed(draws, -50, 50));
    let e = (a - d) * x + a * b + c;
    let right = side(d, e);
    let expanded = format!("{}{}{}={right}", unknown(a), term(a * b), term(c));
    Problem::new(
        format!("{a}(x{}){}={right};x=", term(b), term(c)),
        &format!("{expanded};{}", isolate(a, a * b + c, d, e)),
        x.to_string(),
    )
}

/// The steps from `ax+b=dx+e` to `x`: collect, then divide.
fn isolate(a: i64, b: i64, d: i64, e: i64) -> String {
    let (slope, rest) = (a - d, e - b);
    let collected = format!("{}={e}{}={rest}", unknown(slope), term(-b));
    if slope == 1 { collected } else { format!("{collected};x={rest}/{slope}") }
}

/// `dx+e`, leaving out what is zero.
fn side(d: i64, e: i64) -> String {
    match (d, e) {
        (0, _) => e.to_string(),
        (_, 0) => unknown(d),
        _ => format!("{}{}", unknown(d), term(e)),
    }
}

/// `x`, `3x`.
fn unknown(slope: i64) -> String {
    if slope == 1 { "x".to_owned() } else { format!("{slope}x") }
}

/// A summand with its sign; zero vanishes.
fn term(value: i64) -> String {
    if value == 0 { String::new() } else { format!("{value:+}") }
}

/// A number of `low..=high`.
fn signed(draws: &mut Draws, low: i64, high: i64) -> i64 {
    low + i64::from(draws.below((high - low + 1) as u32))
}

/// A number of `-max..=max` other than zero.
fn nonzero(draws: &mut Draws, max: i64) -> i64 {
    let magnitude = signed(draws, 1, max);
    if draws.one_in(2) { -magnitude } else { magnitude }
}
