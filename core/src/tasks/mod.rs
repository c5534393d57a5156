//! Tasks with verifiable rewards: problems out of a seed, and strict scorers for them.
//!
//! Start at [`Family`]: a closed list of generators. Everything is a pure function of
//! `(seed, index, level, split)`, so a trainer, a volunteer and an auditor that share those four
//! numbers hold the same problem without sending it.
//!
//! Three promises, each kept by construction rather than by care:
//!
//! * **Held-out problems are disjoint from training problems.** Membership is a hash of the
//!   problem's content ([`Split::of`]), never of the seed, so no choice of seeds can mix them.
//! * **No part credit, no lenient parsing.** The answer must equal the one canonical text; only
//!   countdown, where many answers are right, is checked by evaluating the expression, exactly.
//! * **Text is ASCII and short**, made for byte-level models with contexts of 64 to 256 tokens:
//!   see [`Family::prompt_bytes_max`] and [`Family::trace_bytes_max`].
//!
//! [`jsonl`] reads a user's own problems, and [`reasoning_gym`] reproduces another
//! project's scores for comparison only.

mod arithmetic;
mod bases;
mod countdown;
mod divisors;
mod draws;
mod equations;
mod expression;
pub mod jsonl;
mod letters;
pub mod reasoning_gym;
mod sorting;
mod split;
mod tree;

#[cfg(test)]
mod tests;

pub use split::{HELD_OUT_ONE_IN, Split};

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use draws::Draws;

/// Levels of difficulty run from 1 to this.
pub const LEVEL_MAX: u32 = 5;

/// Draws made for one problem before the generator is declared broken.
///
/// About one problem in [`HELD_OUT_ONE_IN`] is held out, and the tests assert that no family and
/// level has a share below a quarter of that; missing 1024 times in a row then has a probability
/// below 1e-14, so running out is a bug of the generator and panics.
const ATTEMPTS_MAX: u16 = 1024;

/// A question, its answer, and a worked solution to imitate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What the model reads: ASCII.
    pub prompt: String,
    /// The canonical answer: ASCII, no `#`, no spaces at either end.
    pub answer: String,
    /// A full target completion, `reasoning#answer`, for supervised fine-tuning.
    pub trace: String,
}

impl Problem {
    /// Joins reasoning and answer into a problem whose trace is a completion that scores 1.
    fn new(prompt: String, reasoning: &str, answer: String) -> Self {
        let trace = format!("{reasoning}#{answer}");
        Self { prompt, answer, trace }
    }

    /// 1 if the completion's final answer is exactly the canonical one, else 0.
    ///
    /// Equality with one canonical text *is* the grammar of answers: `+7`, `07`, `7.0` and `1,000`
    /// are wrong without any parser deciding so.
    pub fn score_exact(&self, completion: &str) -> f64 {
        if final_answer(completion) == Some(self.answer.as_str()) { 1.0 } else { 0.0 }
    }
}

/// The text after the single `#` of a completion, without surrounding spaces.
///
/// `None` if there is no `#`, more than one (a model must commit to one answer), or nothing but
/// spaces after it. Only the space character is trimmed; the end-of-sequence token is not text and
/// must be cut off by the caller.
pub fn final_answer(completion: &str) -> Option<&str> {
    let (_reasoning, answer) = completion.split_once('#')?;
    let answer = answer.trim_matches(' ');
    (!answer.is_empty() && !answer.contains('#')).then_some(answer)
}

/// A kind of problem. The numbers are part of the random streams: never reuse or renumber one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Family {
    /// `12+7-3=` solved by running totals.
    ChainSum = 0,
    /// `(3+4)*5=`: precedence, parentheses and exact division.
    BasicArithmetic = 1,
    /// `3x+4=19;x=`: one linear equation with an integer solution.
    SimpleEquations = 2,
    /// `22 from 3 5 7:`: an expression that uses each number exactly once.
    Countdown = 3,
    /// `a in banana:`: how often a letter occurs.
    LetterCounting = 4,
    /// `sort 31 4 15:`: ascending order.
    NumberSorting = 5,
    /// `reverse stone:`.
    SpellBackward = 6,
    /// `base10 13 to base2=`.
    BaseConversion = 7,
    /// `gcd(12,18)=` by Euclid's algorithm.
    Gcd = 8,
    /// `bits 13=`: ones in the binary form.
    CountBits = 9,
    /// `lcm(4,6)=`.
    Lcm = 10,
    /// `(7+9)%5=`.
    ModularAddition = 11,
    /// `factor 12=` with the answer `2*2*3`.
    PrimeFactorization = 12,
}

/// What the registry knows of a family; each family's file holds its own.
struct Spec {
    /// Name in configuration files; equal to serde's.
    name: &'static str,
    /// Draws one problem of level 1 to 5, of either split.
    draw: fn(&mut Draws, usize) -> Problem,
    /// `[level - 1]` longest prompt.
    prompt_bytes_max: [usize; LEVEL_MAX as usize],
    /// `[level - 1]` longest trace, `#answer` included.
    trace_bytes_max: [usize; LEVEL_MAX as usize],
    /// Whether problems whose prompts hold the same words in another order count as one problem,
    /// so that `gcd(12,18)` cannot be trained on while `gcd(18,12)` is held out.
    unordered: bool,
}

impl Family {
    /// Every family, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::ChainSum,
        Self::BasicArithmetic,
        Self::SimpleEquations,
        Self::Countdown,
        Self::LetterCounting,
        Self::NumberSorting,
        Self::SpellBackward,
        Self::BaseConversion,
        Self::Gcd,
        Self::CountBits,
        Self::Lcm,
        Self::ModularAddition,
        Self::PrimeFactorization,
    ];

    const fn spec(self) -> &'static Spec {
        match self {
            Self::ChainSum => &arithmetic::CHAIN_SUM,
            Self::BasicArithmetic => &arithmetic::BASIC_ARITHMETIC,
            Self::SimpleEquations => &equations::SIMPLE_EQUATIONS,
            Self::Countdown => &countdown::COUNTDOWN,
            Self::LetterCounting => &letters::LETTER_COUNTING,
            Self::NumberSorting => &sorting::NUMBER_SORTING,
            Self::SpellBackward => &letters::SPELL_BACKWARD,
            Self::BaseConversion => &bases::BASE_CONVERSION,
            Self::Gcd => &divisors::GCD,
            Self::CountBits => &bases::COUNT_BITS,
            Self::Lcm => &divisors::LCM,
            Self::ModularAddition => &arithmetic::MODULAR_ADDITION,
            Self::PrimeFactorization => &divisors::PRIME_FACTORIZATION,
        }
    }

    /// The name used in configuration files and reports.
    pub const fn name(self) -> &'static str {
        self.spec().name
    }

    /// Longest prompt of a level (clamped to 1..=[`LEVEL_MAX`]), in bytes.
    pub fn prompt_bytes_max(self, level: u32) -> usize {
        self.spec().prompt_bytes_max[level_index(level)]
    }

    /// Longest trace of a level (clamped to 1..=[`LEVEL_MAX`]), `#answer` included, in bytes.
    pub fn trace_bytes_max(self, level: u32) -> usize {
        self.spec().trace_bytes_max[level_index(level)]
    }

    /// Problem number `index` of a stream; the same arguments always give the same problem.
    ///
    /// `difficulty` is a level, clamped to 1..=[`LEVEL_MAX`]; each family's file states its ranges.
    /// Problems are drawn until one belongs to `split`. Small spaces (123 problems in the smallest)
    /// make streams repeat themselves; they never make the splits overlap.
    pub fn generate(self, seed: u64, index: u64, difficulty: u32, split: Split) -> Problem {
        let level = level_index(difficulty);
        for attempt in 0..ATTEMPTS_MAX {
            let mut draws =
                Draws::new(seed, index, [self as u8, level as u8, split as u8], attempt);
            let problem = (self.spec().draw)(&mut draws, level);
            if self.split_of(&problem) == split {
                return problem;
            }
        }
        panic!("{self} level {} never drew a {split:?} problem", level + 1);
    }

    /// Which split a problem of this family belongs to: a function of its content alone.
    pub fn split_of(self, problem: &Problem) -> Split {
        if !self.spec().unordered {
            return Split::of(&problem.prompt);
        }
        let words = problem.prompt.split(|c: char| !c.is_ascii_alphanumeric());
        let mut words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
        words.sort_unstable();
        Split::of(&words.join(" "))
    }

    /// The training reward: 1 if the completion's [`final_answer`] is right, else 0.
    ///
    /// Never panics, whatever the completion. Countdown accepts every valid solution; all other
    /// families accept only the canonical answer. No family gives part credit.
    pub fn score(self, problem: &Problem, completion: &str) -> f64 {
        match self {
            Self::Countdown => countdown::score(problem, completion),
            _ => problem.score_exact(completion),
        }
    }
}

/// A level's place in the tables of a [`Spec`].
fn level_index(level: u32) -> usize {
    level.clamp(1, LEVEL_MAX) as usize - 1
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no family's.
#[derive(Debug, thiserror::Error)]
#[error("unknown task family `{0}`, expected one of {known}", known = Family::ALL.map(Family::name).join(", "))]
pub struct UnknownFamily(pub String);

impl FromStr for Family {
    type Err = UnknownFamily;

    fn from_str(name: &str) -> Result<Self, UnknownFamily> {
        Self::ALL
            .into_iter()
            .find(|family| family.name() == name)
            .ok_or_else(|| UnknownFamily(name.to_owned()))
    }
}
