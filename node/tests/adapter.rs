//! Runs on an imported model as real processes: an adapter in a swarm of different engines, and
//! the model itself.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod processes;

use std::fs;
use std::path::Path;

use processes::{join_on, manyhands, output, peer, stdout, summary, wait_for, weights};

const RUN: &str = r#"
name = "adapter"
seed = 4
[model]
import = "model"
MODEL
[[task]]
family = "count_bits"
level = 1
[sft]
steps = 12
batch = 8
[sft.optimizer]
learning_rate = 1e-2
[rl]
steps = 3
prompts = 4
group_size = 4
max_new_tokens = 12
policy_lag = 1
[eval]
problems = 4
samples = 2
k = [1]
[swarm]
unit_seconds = 0.2
newcomer_audits = 3
"#;

/// The directory of a run on a model that has been imported beside it.
fn prepare(dir: &Path, model: &str) {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny/tiny.gguf");
    let out = dir.join("model");
    output(manyhands().arg("import").arg(tiny).arg("--out").arg(out).arg("--no-report"));
    fs::write(dir.join("run.toml"), RUN.replace("MODEL", model)).unwrap();
}

/// One machine's weights, and the loss of every step.
fn train(dir: &Path) -> (String, Vec<f64>) {
    let mut train = manyhands();
    train.arg("train").arg(dir.join("run.toml")).args(["--engine", "cpu", "--dir"]);
    let weights = weights(&stdout(&output(train.arg(dir.join("solo")))));
    let log = fs::read_to_string(dir.join("solo/log.jsonl")).unwrap();
    let lines = log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    let loss = lines.filter_map(|l| l["step"]["report"]["loss"].as_f64()).collect();
    (weights, loss)
}

#[test]
fn adapter_in_a_swarm_of_two_engines_is_that_of_one_machine() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir, "[model.lora]\nrank = 4");
    let (solo, loss) = train(dir);
    assert!(loss[11] < 0.9 * loss[0], "{loss:?}");

    let (run, json) = (dir.join("run.toml"), dir.join("summary.json"));
    let args = ["--once", "--json", json.to_str().unwrap(), run.to_str().unwrap()];
    let mut host = peer(dir, "host", &args);
    // The slower engine begins.
    let _one = join_on(dir, "host", "one", "wgpu", &[]);
    let worked = || fs::read_to_string(dir.join("one/receipts.jsonl")).unwrap_or_default();
    wait_for(dir, "the graphics adapter has computed a unit", || !worked().is_empty());
    let _other = join_on(dir, "host", "other", "cpu", &[]);
    wait_for(dir, "the run is complete", || host.0.try_wait().unwrap().is_some());
    let summary = summary(dir);
    assert_eq!(summary["weights"], solo.as_str());
    let volunteers = summary["status"]["volunteers"].as_array().unwrap();
    let worked = volunteers.iter().filter(|v| v["units"].as_u64().unwrap() > 0).count();
    let logs = ["one.log", "other.log"].map(|l| fs::read_to_string(dir.join(l)).unwrap());
    assert_eq!(worked, 2, "{volunteers:?}\n{logs:?}");

    // Whoever replays has the host's directory and nothing else.
    fs::remove_dir_all(dir.join("model")).unwrap();
    let replay = output(manyhands().arg("replay").arg(dir.join("host")).arg("--json"));
    let replay: serde_json::Value = serde_json::from_str(&stdout(&replay)).unwrap();
    assert_eq!((&replay["ok"], &replay["weights"]), (&true.into(), &solo.as_str().into()));
}

/// The imported model itself can be trained, and what came out answers; another model under the
/// same name is refused.
#[test]
fn imported_model_itself_is_trained_and_answers() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir, "");
    let (_, loss) = train(dir);
    assert!(loss[11] < 0.5 * loss[0], "{loss:?}");
    let ask = |model: &Path| {
        let mut sample = manyhands();
        sample.arg("sample").arg(dir.join("solo")).arg("--model").arg(model);
        sample.args(["--engine", "cpu", "--prompt", "bits of 5:", "--count", "1", "--json"]);
        sample.args(["--max-new-tokens", "4"]).output().unwrap()
    };
    let answer: serde_json::Value =
        serde_json::from_slice(&ask(&dir.join("model")).stdout).unwrap();
    assert!(!answer["tokens"].as_array().unwrap().is_empty(), "{answer}");
    let refused = ask(&dir.join("solo"));
    assert!(!refused.status.success());
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("other weights than the run trains"), "{error}");
}
