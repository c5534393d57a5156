//! Greatest common divisor, least common multiple, prime factors.

use super::{Problem, Spec, draws::Draws};

/// Levels: two numbers `g*a` and `g*b` with g to 6, 9, 20, 30, 99 and a, b to 10, 11, 20, 33, 101,
/// so that the answer is seldom 1.
pub(super) const GCD: Spec = Spec {
    name: "gcd",
    draw: gcd,
    prompt_bytes_max: [11, 11, 13, 13, 15],
    trace_bytes_max: [43, 43, 67, 79, 133],
    unordered: true,
};

/// Levels: as for the gcd, with g to 4, 6, 9, 12, 20 and a, b to 8, 10, 12, 16, 30.
pub(super) const LCM: Spec = Spec {
    name: "lcm",
    draw: lcm,
    prompt_bytes_max: [11, 11, 13, 13, 13],
    trace_bytes_max: [54, 57, 60, 74, 96],
    unordered: true,
};

/// `[level - 1]` (largest common factor, largest cofactor).
const GCD_RANGES: [(u32, u32); 5] = [(6, 10), (9, 11), (20, 20), (30, 33), (99, 101)];
const LCM_RANGES: [(u32, u32); 5] = [(4, 8), (6, 10), (9, 12), (12, 16), (20, 30)];

fn gcd(draws: &mut Draws, level: usize) -> Problem {
    let (a, b) = related(draws, GCD_RANGES[level]);
    let (gcd, steps) = euclid(a, b);
    Problem::new(format!("gcd({a},{b})="), &steps.join(";"), gcd.to_string())
}

fn lcm(draws: &mut Draws, level: usize) -> Problem {
    let (a, b) = related(draws, LCM_RANGES[level]);
    let (gcd, mut steps) = euclid(a, b);
    let lcm = a / gcd * b;
    steps.push(format!("{a}/{gcd}*{b}={lcm}"));
    Problem::new(format!("lcm({a},{b})="), &steps.join(";"), lcm.to_string())
}

/// Two numbers with a common factor.
fn related(draws: &mut Draws, (factor_max, cofactor_max): (u32, u32)) -> (u32, u32) {
    let factor = draws.between((1, factor_max));
    (factor * draws.between((1, cofactor_max)), factor * draws.between((1, cofactor_max)))
}

/// Euclid's algorithm and its divisions, `18%12=6`.
fn euclid(mut a: u32, mut b: u32) -> (u32, Vec<String>) {
    let mut steps = Vec::new();
    while b > 0 {
        steps.push(format!("{a}%{b}={}", a % b));
        (a, b) = (b, a % b);
    }
    (a, steps)
}

/// Levels: numbers from 2 to 124, 255, 999, 2999 and 9999.
pub(super) const PRIME_FACTORIZATION: Spec = Spec {
    name: "prime_factorization",
    draw: prime_factorization,
    prompt_bytes_max: [11, 11, 11, 12, 12],
    trace_bytes_max: [54, 65, 89, 114, 142],
    unordered: false,
};

const PRIME_FACTORIZATION_RANGES: [u32; 5] = [124, 255, 999, 2999, 9999];

/// The trace divides by the smallest prime left: `12/2=6;6/2=3;3/3=1`.
fn prime_factorization(draws: &mut Draws, level: usize) -> Problem {
    let number = draws.between((2, PRIME_FACTORIZATION_RANGES[level]));
    let (mut rest, mut factors, mut steps) = (number, Vec::new(), Vec::new());
    let mut divisor = 2;
    while rest > 1 {
        while rest.is_multiple_of(divisor) {
            steps.push(format!("{rest}/{divisor}={}", rest / divisor));
            factors.push(divisor.to_string());
            rest /= divisor;
        }
        divisor += 1;
    }
    Problem::new(format!("factor {number}="), &steps.join(";"), factors.join("*"))
}
