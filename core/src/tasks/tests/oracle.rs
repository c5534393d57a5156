//! Answers and working checked by other methods than the generators'.

use crate::tasks::{
    Family, Problem,
    expression::{Fraction, exact},
};

/// The answer by another method than the generator's; `None` where any of many is right.
pub(super) fn answer_of(family: Family, prompt: &str) -> Option<String> {
    let n = numbers(prompt);
    let word = prompt.trim_end_matches(':').rsplit(' ').next().unwrap();
    Some(match family {
        Family::ChainSum | Family::BasicArithmetic => {
            value(prompt.strip_suffix('=').unwrap()).to_whole().unwrap().to_string()
        }
        Family::SimpleEquations => {
            let (left, right) = prompt.strip_suffix(";x=").unwrap().split_once('=').unwrap();
            let solves = |x: &i64| substitute(left, *x) == substitute(right, *x);
            let solutions: Vec<i64> = (-60..=60).filter(solves).collect();
            assert_eq!(solutions.len(), 1, "{prompt}");
            solutions[0].to_string()
        }
        Family::Countdown => return None,
        Family::LetterCounting => word.matches(&prompt[..1]).count().to_string(),
        Family::NumberSorting => {
            let mut counts = [0; 1000];
            n.iter().for_each(|&number| counts[number as usize] += 1);
            let sorted = (0..1000).flat_map(|number| vec![number.to_string(); counts[number]]);
            sorted.collect::<Vec<_>>().join(" ")
        }
        Family::SpellBackward => word.bytes().rev().map(char::from).collect(),
        Family::BaseConversion => {
            let parts: Vec<&str> = prompt.trim_end_matches('=').split(' ').collect();
            let base = |part: &str| part.strip_prefix("base").unwrap().parse::<u32>().unwrap();
            let (from, to) = (base(parts[0]), base(parts[3]));
            assert_ne!(from, to);
            let mut rest = u32::from_str_radix(parts[1], from).unwrap();
            let width = (0..).find(|&width| to.pow(width) > rest).unwrap();
            let mut digits = String::new();
            for place in (0..width).rev() {
                digits.push(char::from_digit(rest / to.pow(place), to).unwrap());
                rest %= to.pow(place);
            }
            digits
        }
        Family::Gcd => {
            let divides = |d: &u64| n.iter().all(|n| n.is_multiple_of(*d));
            (1..=n[0]).rev().find(divides).unwrap().to_string()
        }
        Family::CountBits => n[0].count_ones().to_string(),
        Family::Lcm => {
            (1..).map(|k| k * n[0]).find(|m: &u64| m.is_multiple_of(n[1])).unwrap().to_string()
        }
        Family::ModularAddition => {
            let (modulus, terms) = n.split_last().unwrap();
            terms.iter().fold(0, |sum, term| (sum + term) % modulus).to_string()
        }
        Family::PrimeFactorization => {
            let prime = |n: &u64| !(2..*n).any(|d| n.is_multiple_of(d));
            let mut rest = n[0];
            let mut factors = Vec::new();
            for p in (2..=n[0]).filter(|p| n[0].is_multiple_of(*p)).filter(prime) {
                while rest.is_multiple_of(p) {
                    rest /= p;
                    factors.push(p.to_string());
                }
            }
            factors.join("*")
        }
    })
}

/// Every step of a trace that claims an equality must hold.
pub(super) fn check_steps(problem: &Problem) {
    let reasoning = problem.trace.split('#').next().unwrap();
    // What x stands for, in equations.
    let x = problem.answer.parse().unwrap_or(0);
    for step in reasoning.split(';').filter(|step| step.contains('=')) {
        let n = numbers(step);
        if step.contains('%') {
            assert_eq!((n.len(), n[0] % n[1]), (3, n[2]), "{step} {problem:?}");
        } else if step.contains('r') {
            assert_eq!((n.len(), n[0] / n[1], n[0] % n[1]), (4, n[2], n[3]), "{step} {problem:?}");
        } else {
            let values: Vec<Fraction> = step.split('=').map(|side| substitute(side, x)).collect();
            assert!(values.windows(2).all(|pair| pair[0] == pair[1]), "{step} {problem:?}");
        }
    }
}

/// All numbers of a text, in order.
fn numbers(text: &str) -> Vec<u64> {
    let runs = text.split(|c: char| !c.is_ascii_digit()).filter(|run| !run.is_empty());
    runs.map(|run| run.parse().unwrap()).collect()
}

fn value(text: &str) -> Fraction {
    exact(text).unwrap_or_else(|| panic!("no value: {text}")).0
}

/// The value of `3(x+4)` with a number in place of x. Products are spelled out, and a leading minus
/// becomes a difference from zero, because [`exact`] knows neither.
fn substitute(side: &str, x: i64) -> Fraction {
    let mut text = String::new();
    let mut before = '(';
    for letter in side.chars() {
        match letter {
            'x' | '(' if before.is_ascii_digit() => text.push('*'),
            '-' if before == '(' => text.push('0'),
            _ => {}
        }
        match letter {
            'x' => text.push_str(&format!("(0{x:+})")),
            _ => text.push(letter),
        }
        before = letter;
    }
    value(&text)
}
