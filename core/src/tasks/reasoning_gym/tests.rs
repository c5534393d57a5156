//! Agreement with vectors recorded from Reasoning Gym 0.1.25.

use std::{collections::BTreeMap, fs};

use proptest::prelude::*;
use serde_json::Value;

use super::{TASKS, extract_answer, score};

/// Both sides compute in f64, but not always in the same order of operations.
const TOLERANCE: f64 = 1e-12;

fn data(name: &str) -> String {
    let path = format!("{}/../tests/data/{name}", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn samples() -> Vec<Value> {
    data("reasoning_gym_samples.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Any disagreement makes our published figures incomparable.
#[test]
fn score_agrees_with_every_recorded_vector() {
    let mut vectors_of_task = BTreeMap::new();
    let mut wrong = Vec::new();
    for sample in samples() {
        let task = sample["task"].as_str().unwrap();
        let reference = sample["answer"].as_str().unwrap();
        for vector in sample["scores"].as_array().unwrap() {
            let answer = vector["answer"].as_str();
            // Where the original raises, we give 0.
            let expected = vector["score"].as_f64().unwrap_or_else(|| {
                assert!(vector["score"].as_str().unwrap().starts_with("EXC:"), "{vector}");
                0.0
            });
            let got = score(task, &sample["metadata"], reference, answer);
            if (got - expected).abs() > TOLERANCE {
                wrong.push(format!("{task} {reference:?} {vector}: got {got}"));
            }
            *vectors_of_task.entry(task.to_owned()).or_insert(0) += 1;
        }
    }
    assert!(wrong.is_empty(), "{} disagree, first: {}", wrong.len(), wrong[0]);
    assert_eq!(vectors_of_task.keys().collect::<Vec<_>>(), TASKS.iter().collect::<Vec<_>>());
    assert!(vectors_of_task.values().all(|&count| count >= 200), "{vectors_of_task:?}");
}

/// The last closed pair of tags counts.
#[test]
fn extract_answer_agrees_with_every_recorded_vector() {
    let vectors: Vec<Value> = serde_json::from_str(&data("reasoning_gym_extract.json")).unwrap();
    assert!(!vectors.is_empty());
    for vector in vectors {
        let got = extract_answer(vector["completion"].as_str().unwrap());
        assert_eq!(got, vector["extract"].as_str(), "{vector}");
    }
}

proptest! {
    /// Completions are a model's: whatever they hold, scoring stays in range and does not panic.
    #[test]
    fn score_arbitrary_answers_stay_in_range(
        answer in any::<String>(),
        symbols in "[-+*/().,×0-9e ' \\[\\]]{0,40}",
        reference in "[0-9×]{0,6}",
    ) {
        let metadata = serde_json::json!({"numbers": [1, 2], "target": 3, "direction": "ascending"});
        for task in TASKS {
            for answer in [&answer, &symbols] {
                for metadata in [&metadata, &Value::Null] {
                    let score = score(task, metadata, &reference, Some(answer));
                    prop_assert!((0.0..=1.0).contains(&score), "{task} {answer:?}: {score}");
                }
            }
        }
        extract_answer(&format!("<answer>{answer}</answer>{symbols}"));
    }
}
