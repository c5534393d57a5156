//! A user's own problems: one JSON object a line, `{"prompt": ..., "answer": ..., "trace": ...}`.
//!
//! `trace` is optional reasoning *before* the answer; the `#answer` of a completion is appended
//! here. Blank lines are skipped. Scoring is [`Problem::score_exact`]: the text after `#`, without
//! surrounding spaces, must equal the answer.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Problem, Split};

/// Longest line, in bytes.
pub const LINE_BYTES_MAX: usize = 16 * 1024;
/// Most problems of one file.
pub const PROBLEMS_MAX: usize = 100_000;

/// A line that cannot be used; lines count from 1, as editors do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct JsonlError {
    /// The broken line.
    pub line: usize,
    /// What is wrong and what to do.
    pub reason: JsonlReason,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonlReason {
    /// Not one JSON object of the expected keys.
    #[error(
        "{0}; expected {{\"prompt\": \"...\", \"answer\": \"...\"}} with an optional \"trace\""
    )]
    Json(String),
    /// Longer than [`LINE_BYTES_MAX`].
    #[error("{0} bytes long, the limit is {LINE_BYTES_MAX}; shorten or split the problem")]
    TooLong(usize),
    /// One problem more than [`PROBLEMS_MAX`].
    #[error("more than {PROBLEMS_MAX} problems; split the file")]
    TooMany,
    /// An empty prompt or answer.
    #[error("`{key}` is empty; fill it in or remove the line")]
    Empty {
        /// Which key.
        key: &'static str,
    },
    /// A character outside printable ASCII and, in prompt and trace, the line feed.
    #[error("`{key}` holds {character:?}, but only printable ASCII is supported; replace it")]
    Character {
        /// Which key.
        key: &'static str,
        /// The first such character.
        character: char,
    },
    /// A `#` where it would end the reasoning.
    #[error("`{key}` holds `#`, which separates reasoning from answer in completions; remove it")]
    Hash {
        /// Which key.
        key: &'static str,
    },
    /// Spaces that scoring would trim, so that no completion could match.
    #[error("`answer` begins or ends with a space, which scoring trims; remove it")]
    Padded,
    /// The same prompt twice: two answers, or double weight by accident.
    #[error("the prompt repeats line {0}; keep one of them")]
    Repeated(usize),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    answer: String,
    trace: Option<String>,
}

/// Reads a whole file, or names the first line that cannot be used.
///
/// Byte order marks and other encodings than UTF-8 are the caller's concern.
pub fn parse(text: &str) -> Result<Vec<Problem>, JsonlError> {
    let mut problems = Vec::new();
    let mut line_of_prompt = BTreeMap::new();
    for (line, json) in (1..).zip(text.lines()) {
        let fail = |reason| JsonlError { line, reason };
        if json.trim().is_empty() {
            continue;
        }
        if problems.len() == PROBLEMS_MAX {
            return Err(fail(JsonlReason::TooMany));
        }
        let problem = parse_line(json).map_err(fail)?;
        if let Some(earlier) = line_of_prompt.insert(problem.prompt.clone(), line) {
            return Err(fail(JsonlReason::Repeated(earlier)));
        }
        problems.push(problem);
    }
    Ok(problems)
}

/// Training and held-out problems, told apart by the content of the prompt alone: adding lines or
/// reordering the file moves no problem to the other side. See [`Split::of`].
pub fn split(problems: Vec<Problem>) -> (Vec<Problem>, Vec<Problem>) {
    problems.into_iter().partition(|problem| Split::of(&problem.prompt) == Split::Train)
}

fn parse_line(json: &str) -> Result<Problem, JsonlReason> {
    if json.len() > LINE_BYTES_MAX {
        return Err(JsonlReason::TooLong(json.len()));
    }
    let Line { prompt, answer, trace } =
        serde_json::from_str(json).map_err(|error| JsonlReason::Json(json_reason(&error)))?;
    let trace = trace.unwrap_or_default();
    for (key, text) in [("prompt", &prompt), ("answer", &answer), ("trace", &trace)] {
        check(key, text)?;
    }
    if answer.trim_matches(' ') != answer {
        return Err(JsonlReason::Padded);
    }
    Ok(Problem::new(prompt, &trace, answer))
}

fn check(key: &'static str, text: &str) -> Result<(), JsonlReason> {
    if text.is_empty() && key != "trace" {
        return Err(JsonlReason::Empty { key });
    }
    let allowed = |c: char| matches!(c, ' '..='~') || (c == '\n' && key != "answer");
    if let Some(character) = text.chars().find(|&c| !allowed(c)) {
        return Err(JsonlReason::Character { key, character });
    }
    if text.contains('#') && key != "prompt" {
        return Err(JsonlReason::Hash { key });
    }
    Ok(())
}

/// The parser's message without its own "at line 1", which would contradict ours.
fn json_reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    match message.strip_suffix(&place) {
        Some(reason) => format!("column {}: {reason}", error.column()),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The happy path: optional trace, blank lines, and a trace that scores 1.
    #[test]
    fn jsonl_reads_problems_with_and_without_trace() {
        let text = concat!(
            "{\"prompt\":\"2+2=\",\"answer\":\"4\"}\n\n",
            "{\"answer\":\"a b\",\"prompt\":\"q#1\\nq2\",\"trace\":\"think\"}\r\n",
        );
        let problems = parse(text).unwrap();
        assert_eq!(problems[0], Problem::new("2+2=".into(), "", "4".into()));
        assert_eq!(problems[1].trace, "think#a b");
        for problem in &problems {
            assert_eq!(problem.score_exact(&problem.trace), 1.0);
            assert_eq!(problem.score_exact(&format!("hm #  {} ", problem.answer)), 1.0);
            assert_eq!(problem.score_exact(&problem.answer), 0.0);
        }
    }

    /// Every mistake names its line and says what to fix.
    #[test]
    fn jsonl_broken_line_names_line_and_remedy() {
        let long = format!(r#"{{"prompt":"{}","answer":"1"}}"#, "x".repeat(LINE_BYTES_MAX));
        for (line, part) in [
            (r#"{"prompt":"p"}"#, "missing field `answer`"),
            (r#"{"prompt":"p","answer":4}"#, "expected a string"),
            (r#"{"prompt":"p","answer":"4","hint":"h"}"#, "unknown field `hint`"),
            (r#"{"prompt":"p","answer":"4""#, "column"),
            (r#"{"prompt":"p","answer":"4"} {}"#, "trailing"),
            (r##"{"prompt":"p","answer":"4#"}"##, "`answer` holds `#`"),
            (r##"{"prompt":"p","answer":"4","trace":"4#"}"##, "`trace` holds `#`"),
            (r#"{"prompt":"caf\u00e9","answer":"4"}"#, "`prompt` holds 'é'"),
            (r#"{"prompt":"p","answer":"4\n"}"#, "`answer` holds '\\n'"),
            (r#"{"prompt":"p","answer":" 4"}"#, "begins or ends"),
            (r#"{"prompt":"p","answer":""}"#, "`answer` is empty"),
            (r#"{"prompt":"ok","answer":"4"}"#, "repeats line 1"),
            (&long, "the limit is 16384"),
        ] {
            let text = format!("{{\"prompt\":\"ok\",\"answer\":\"1\"}}\n\n{line}\n");
            let error = parse(&text).unwrap_err();
            assert_eq!(error.line, 3, "{line}");
            let message = error.to_string();
            assert!(message.starts_with("line 3: ") && message.contains(part), "{message}");
            assert!(!message.contains("at line"), "{message}");
        }
    }

    /// The count is bounded before memory is.
    #[test]
    fn jsonl_too_many_problems_is_refused() {
        let line = |i| format!("{{\"prompt\":\"{i}\",\"answer\":\"1\"}}\n");
        let text: String = (0..=PROBLEMS_MAX).map(line).collect();
        let error = parse(&text).unwrap_err();
        assert_eq!((error.line, error.reason), (PROBLEMS_MAX + 1, JsonlReason::TooMany));
    }

    /// Reordering the file must not leak held-out problems into training.
    #[test]
    fn jsonl_split_ignores_the_order() {
        let problems: Vec<_> =
            (0..400).map(|i| Problem::new(format!("p{i}"), "", i.to_string())).collect();
        let mut reversed = problems.clone();
        reversed.reverse();
        let (train, held_out) = split(problems);
        let (mut train_again, mut held_out_again) = split(reversed);
        train_again.reverse();
        held_out_again.reverse();
        assert_eq!((&train, &held_out), (&train_again, &held_out_again));
        assert!((25..80).contains(&held_out.len()), "{}", held_out.len());
        assert_eq!(train.len() + held_out.len(), 400);
    }

    proptest! {
        /// Arbitrary bytes, and JSON with arbitrary strings, are read or refused, never a panic;
        /// what is read keeps the promises of `Problem`.
        #[test]
        fn jsonl_arbitrary_input_never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            (prompt, answer, trace) in any::<(String, String, String)>(),
        ) {
            let text = String::from_utf8_lossy(&bytes);
            let object = serde_json::json!({"prompt": prompt, "answer": answer, "trace": trace});
            for text in [text.as_ref(), &object.to_string()] {
                for problem in parse(text).unwrap_or_default() {
                    prop_assert!(problem.prompt.is_ascii() && problem.trace.is_ascii());
                    prop_assert_eq!(problem.score_exact(&problem.trace), 1.0);
                }
            }
        }
    }
}
