//! Counting letters and spelling backward, over made-up words.

use super::{Problem, Spec, draws::Draws};

/// Few letters, so that counts above one are common.
const COUNTED_ALPHABET: &[u8] = b"abcdefg";
/// The alphabet of words to reverse.
const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz";

/// Levels: words of 3 to 5 letters, 5 to 7, 7 to 10, 10 to 14, 14 to 20, of the letters a to g.
pub(super) const LETTER_COUNTING: Spec = Spec {
    name: "letter_counting",
    draw: letter_counting,
    prompt_bytes_max: [11, 13, 16, 20, 26],
    trace_bytes_max: [12, 16, 24, 36, 54],
    unordered: false,
};

const LETTER_COUNTING_RANGES: [(u32, u32); 5] = [(3, 5), (5, 7), (7, 10), (10, 14), (14, 20)];

/// The trace spells the word with a running count after each letter: `b0a1n1`.
fn letter_counting(draws: &mut Draws, level: usize) -> Problem {
    let word = word(draws, COUNTED_ALPHABET, LETTER_COUNTING_RANGES[level]);
    let wanted = char::from(draws.pick(COUNTED_ALPHABET));
    let (mut count, mut spelled) = (0, String::new());
    for letter in word.chars() {
        count += u32::from(letter == wanted);
        spelled.push_str(&format!("{letter}{count}"));
    }
    Problem::new(format!("{wanted} in {word}:"), &spelled, count.to_string())
}

/// Levels: words of 3 or 4 letters, 5 or 6, 7 or 8, 9 to 11, 12 to 16.
pub(super) const SPELL_BACKWARD: Spec = Spec {
    name: "spell_backward",
    draw: spell_backward,
    prompt_bytes_max: [13, 15, 17, 20, 25],
    trace_bytes_max: [20, 30, 40, 55, 80],
    unordered: false,
};

const SPELL_BACKWARD_RANGES: [(u32, u32); 5] = [(3, 4), (5, 6), (7, 8), (9, 11), (12, 16)];

/// The trace spells the word with spaces, then spells it from the back: `s u n;n u s`.
fn spell_backward(draws: &mut Draws, level: usize) -> Problem {
    let word = word(draws, ALPHABET, SPELL_BACKWARD_RANGES[level]);
    let backward: String = word.chars().rev().collect();
    let reasoning = format!("{};{}", spaced(&word), spaced(&backward));
    Problem::new(format!("reverse {word}:"), &reasoning, backward)
}

fn word(draws: &mut Draws, alphabet: &[u8], length: (u32, u32)) -> String {
    (0..draws.between(length)).map(|_| char::from(draws.pick(alphabet))).collect()
}

fn spaced(word: &str) -> String {
    word.chars().map(String::from).collect::<Vec<_>>().join(" ")
}
