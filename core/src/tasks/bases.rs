//! Numbers in other bases: conversion, and counting the ones of the binary form.

use super::{Problem, Spec, draws::Draws};

/// Levels: between ten and two to 63, the same to 255, between ten and 2 to 8 to 511, between ten
/// and 2 to 9 to 999, between any two of 2 to 16 to 999. Digits above 9 are lowercase.
pub(super) const BASE_CONVERSION: Spec = Spec {
    name: "base_conversion",
    draw: base_conversion,
    prompt_bytes_max: [23, 25, 26, 27, 27],
    trace_bytes_max: [59, 84, 97, 110, 174],
    unordered: false,
};

/// `[level - 1]` (largest base, largest number).
const RANGES: [(u32, u32); 5] = [(2, 63), (2, 255), (8, 511), (9, 999), (16, 999)];

fn base_conversion(draws: &mut Draws, level: usize) -> Problem {
    let (base_max, number_max) = RANGES[level];
    let number = draws.between((1, number_max));
    let first = draws.between((2, base_max));
    let (from, to) = match level {
        0..4 if draws.one_in(2) => (10, first),
        0..4 => (first, 10),
        // Any other: step round the circle of the 15 bases by 1 to 14.
        _ => (first, 2 + (first - 2 + draws.between((1, base_max - 2))) % (base_max - 1)),
    };
    let mut steps = Vec::new();
    if from != 10 {
        steps.extend(compose(number, from));
    }
    if to != 10 {
        steps.extend(decompose(number, to));
    }
    Problem::new(
        format!("base{from} {} to base{to}=", in_base(number, from)),
        &steps.join(";"),
        in_base(number, to),
    )
}

/// Digits of `number`, most significant first.
fn digits(mut number: u32, base: u32) -> Vec<u32> {
    let mut digits = vec![number % base];
    while number >= base {
        number /= base;
        digits.push(number % base);
    }
    digits.reverse();
    digits
}

fn in_base(number: u32, base: u32) -> String {
    digits(number, base).into_iter().filter_map(|digit| char::from_digit(digit, base)).collect()
}

/// Horner's scheme: `1*2+1=3`.
fn compose(number: u32, base: u32) -> Vec<String> {
    let digits = digits(number, base);
    let mut value = digits[0];
    let mut steps = vec![value.to_string()];
    for digit in &digits[1..] {
        let next = value * base + digit;
        steps.push(format!("{value}*{base}+{digit}={next}"));
        value = next;
    }
    steps
}

/// Repeated division, last digit first: `13/2=6r1`.
fn decompose(mut number: u32, base: u32) -> Vec<String> {
    let mut steps = Vec::new();
    while number > 0 {
        steps.push(format!("{number}/{base}={}r{}", number / base, number % base));
        number /= base;
    }
    steps
}

/// Levels: numbers to 127, 511, 2047, 32767 and 1048575.
pub(super) const COUNT_BITS: Spec = Spec {
    name: "count_bits",
    draw: count_bits,
    prompt_bytes_max: [9, 9, 10, 11, 13],
    trace_bytes_max: [34, 46, 63, 97, 147],
    unordered: false,
};

const COUNT_BITS_RANGES: [u32; 5] = [127, 511, 2047, 32_767, 1_048_575];

/// The trace halves the number and counts the odd ones: `13:1;6:1;3:2;1:3`.
fn count_bits(draws: &mut Draws, level: usize) -> Problem {
    let number = draws.between((1, COUNT_BITS_RANGES[level]));
    let (mut rest, mut count, mut steps) = (number, 0, Vec::new());
    while rest > 0 {
        count += rest % 2;
        steps.push(format!("{rest}:{count}"));
        rest /= 2;
    }
    Problem::new(format!("bits {number}="), &steps.join(";"), count.to_string())
}
