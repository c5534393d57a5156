//! The program as a user meets it: real processes, killed, interrupted, fed with broken files.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// A run that exercises every part of the state: two phases, lag, mini-batches, reference resets
/// with optimizer reset, the entropy controller, length penalty, periodic evaluation.
const RUN: &str = r#"
name = "small"
seed = 5
[model]
preset = "nano"
context = 24
[[task]]
jsonl = "problems.jsonl"
[sft]
steps = 30
batch = 16
[sft.optimizer]
learning_rate = 3e-3
[rl]
steps = 6
prompts = 4
group_size = 4
max_new_tokens = 6
updates = 2
policy_lag = 1
[rl.learn.optimizer]
learning_rate = 1e-3
[rl.learn.loss.kl]
estimator = "k2"
beta = 1e-2
[rl.learn.entropy]
low = 0.5
high = 1.0
[rl.learn.reset]
every_steps = 3
reset_optimizer = true
[rl.learn.length]
overlong = { length_max = 6, buffer = 3 }
[eval]
problems = 4
samples = 4
k = [1, 4]
every = 4
[checkpoint]
every = 5
"#;

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_manyhands"))
}

/// A directory with the run file and its problems.
fn workspace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("run.toml"), RUN).unwrap();
    let line = |i: usize| format!("{{\"prompt\":\"p{i}=\",\"answer\":\"{}\"}}\n", i % 2);
    fs::write(dir.path().join("problems.jsonl"), (0..64).map(line).collect::<String>()).unwrap();
    dir
}

fn train(workspace: &Path, dir: &str) -> Command {
    let mut command = binary();
    command.current_dir(workspace).args(["train", "run.toml", "--dir", dir]);
    command.args(["--engine", "cpu", "--threads", "1", "--json", "summary.json"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn finish(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    text(&output)
}

/// Weights of the finished run.
fn weights(workspace: &Path) -> String {
    let summary = fs::read(workspace.join("summary.json")).unwrap();
    let summary: Value = serde_json::from_slice(&summary).unwrap();
    summary["weights"].as_str().unwrap().to_string()
}

/// The log without what depends on the clock.
fn log(workspace: &Path, dir: &str) -> Vec<Value> {
    let text = fs::read_to_string(workspace.join(dir).join("log.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for kind in value.as_object_mut().unwrap().values_mut() {
            kind.as_object_mut().unwrap().remove("seconds");
            kind.as_object_mut().unwrap().remove("tokens_per_second");
        }
        value
    };
    text.lines().map(line).collect()
}

/// Steps logged so far; a line being written does not count.
fn steps_logged(workspace: &Path, dir: &str) -> usize {
    let text = fs::read_to_string(workspace.join(dir).join("log.jsonl")).unwrap_or_default();
    text.matches('\n').count()
}

/// The run without any trouble: its workspace, final weights and log.
fn reference() -> (TempDir, String, Vec<Value>) {
    let workspace = workspace();
    finish(train(workspace.path(), "whole"));
    let weights = weights(workspace.path());
    let log = log(workspace.path(), "whole");
    (workspace, weights, log)
}

/// Breaks if any part of the state is missing from a checkpoint, or a log line is lost or doubled.
#[test]
fn train_killed_again_and_again_ends_with_the_same_weights() {
    let (workspace, expected, expected_log) = reference();
    let rewards = expected_log.iter().filter_map(|l| l["step"]["report"]["reward"].as_f64());
    assert!(rewards.clone().any(|r| r > 0.0), "the run must have something to learn from");
    assert!(
        expected_log.iter().any(|l| l["step"]["report"]["reset"].is_string()),
        "a reset must happen"
    );

    let kill_after = [2, 9, 17, 29, 31, 33, 34, 36];
    for lines in kill_after {
        let mut child = train(workspace.path(), "killed").spawn().unwrap();
        let started = Instant::now();
        while steps_logged(workspace.path(), "killed") < lines {
            assert!(started.elapsed() < Duration::from_secs(120), "no progress");
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::yield_now();
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
    finish(train(workspace.path(), "killed"));
    assert_eq!(weights(workspace.path()), expected);
    assert_eq!(log(workspace.path(), "killed"), expected_log);
}

/// A damaged newest checkpoint is named and passed over; the run ends as if nothing had happened.
#[test]
fn train_damaged_checkpoint_falls_back_to_an_older_one() {
    let (workspace, expected, _) = reference();
    let newest = newest_checkpoint(&workspace.path().join("whole"));
    for (file, damage) in
        [("optimizer.safetensors", (|b| flip(b)) as fn(&mut Vec<u8>)), ("weights.safetensors", cut)]
    {
        let path = newest.join(file);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let said = finish(train(workspace.path(), "whole"));
        assert!(said.contains(file) && said.contains("damaged"), "{said}");
        assert_eq!(weights(workspace.path()), expected);
    }
}

fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
}

fn cut(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() / 2);
}

fn newest_checkpoint(run: &Path) -> PathBuf {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap();
    entries.map(|e| e.unwrap().path()).max().unwrap()
}

/// Ctrl-C saves, says how to go on, and going on gives the same weights.
#[cfg(unix)]
#[test]
fn train_interrupted_saves_and_resumes() {
    let (workspace, expected, _) = reference();
    let child = train(workspace.path(), "interrupted").spawn().unwrap();
    while steps_logged(workspace.path(), "interrupted") < 7 {
        std::thread::yield_now();
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert!(text(&output).contains("manyhands train run.toml"), "{}", text(&output));
    let said = finish(train(workspace.path(), "interrupted"));
    assert!(said.contains("resuming"), "{said}");
    assert_eq!(weights(workspace.path()), expected);
}

/// A write that fails is an error with advice, and what was saved before still resumes.
#[cfg(unix)]
#[test]
fn train_full_disk_loses_nothing() {
    let (workspace, expected, _) = reference();
    // Files may not grow beyond this; the first checkpoints of the optimizer do.
    let limited = format!(
        "trap '' XFSZ; ulimit -f 600; exec {} train run.toml --dir full --engine cpu --threads 1",
        env!("CARGO_BIN_EXE_manyhands")
    );
    let output =
        Command::new("sh").args(["-c", &limited]).current_dir(workspace.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("free some disk space"), "{}", text(&output));
    assert!(!text(&output).contains("panicked"), "{}", text(&output));
    finish(train(workspace.path(), "full"));
    assert_eq!(weights(workspace.path()), expected);
}

/// Every wrong run file gets an error that names the key and what would do.
#[test]
fn train_wrong_run_files_are_explained() {
    let cases = [
        ("steps = 30", "stepz = 30", "stepz"),
        ("preset = \"nano\"", "preset = \"nono\"", "model.preset"),
        ("group_size = 4", "group_size = 1", "rl.group_size"),
        ("max_new_tokens = 6", "max_new_tokens = 60", "rl.max_new_tokens"),
        ("beta = 1e-2", "beta = -1.0", "kl.beta"),
        ("k = [1, 4]", "k = [1, 5]", "eval.k"),
        ("jsonl = \"problems.jsonl\"", "jsonl = \"absent.jsonl\"", "absent.jsonl"),
        ("name = \"small\"", "name = \"../up\"", "name"),
        ("seed = 5", "seed = ", "line 3"),
    ];
    for (from, to, expected) in cases {
        let workspace = workspace();
        fs::write(workspace.path().join("run.toml"), RUN.replace(from, to)).unwrap();
        let output = train(workspace.path(), "wrong").output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{to}: {said}");
        assert!(said.contains(expected) && !said.contains("panicked"), "{to}: {said}");
    }
}

/// A broken line of a problem file is named by its number.
#[test]
fn train_broken_problem_file_names_the_line() {
    let workspace = workspace();
    let path = workspace.path().join("problems.jsonl");
    let broken =
        fs::read_to_string(&path).unwrap().replace("\"p9=\",\"answer\"", "\"p9=\",\"anser\"");
    fs::write(&path, broken).unwrap();
    let output = train(workspace.path(), "broken").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("line 10"), "{}", text(&output));
}

/// A directory that holds another run is not overwritten.
#[test]
fn train_refuses_the_directory_of_another_run() {
    let (workspace, ..) = reference();
    let other = RUN.replace("seed = 5", "seed = 6");
    fs::write(workspace.path().join("run.toml"), other).unwrap();
    let output = train(workspace.path(), "whole").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("another run"), "{}", text(&output));
}

/// Threads and engines change nothing; scripts find what the documentation promises.
#[test]
fn sample_and_eval_give_the_same_answers_on_every_engine() {
    let (workspace, expected, _) = reference();
    let run = |args: &[&str]| {
        let output = binary().current_dir(workspace.path()).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let sample = ["sample", "whole", "--prompt", "p3=", "--json", "--seed", "4"];
    let first = run(&[&sample[..], &["--engine", "cpu", "--threads", "1"]].concat());
    assert_eq!(first.lines().count(), 3);
    let line: Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    assert!(line["tokens"].as_array().is_some_and(|t| !t.is_empty()), "{line}");
    assert_eq!(run(&[&sample[..], &["--engine", "cpu", "--threads", "2"]].concat()), first);

    let eval = ["eval", "whole", "--json", "--problems", "3", "--samples", "2", "--k", "1,2"];
    let report = run(&[&eval[..], &["--engine", "cpu"]].concat());
    let value: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(value["weights"].as_str().unwrap(), expected);
    assert!(value["overall"]["pass_at_k"]["2"]["high"].is_f64(), "{value}");
    assert!(value["families"]["problems.jsonl"]["pass_at_k"]["1"]["mean"].is_f64(), "{value}");
    if std::env::var_os("GPU_REQUIRED").is_some() {
        assert_eq!(run(&[&sample[..], &["--engine", "wgpu"]].concat()), first);
        assert_eq!(run(&[&eval[..], &["--engine", "wgpu"]].concat()), report);
    } else {
        eprintln!("SKIPPED: the wgpu engine, because GPU_REQUIRED is not set");
    }
}

/// The doctor passes here, and finds a single wrong integer in a vector file.
#[test]
fn doctor_passes_and_names_the_first_difference() {
    let output = binary().args(["doctor", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["format"], "X1");
    let results = report["results"].as_array().unwrap();
    let engines = |name: &str| results.iter().filter(|r| r["engine"] == name).count();
    assert!(engines("twin") == 1 && engines("cpu") >= 1, "{report}");
    assert!(engines("wgpu") >= 1 || std::env::var_os("GPU_REQUIRED").is_none(), "{report}");
    let digests: Vec<&Value> = results.iter().map(|r| &r["digest"]).collect();
    assert!(digests.iter().all(|d| *d == digests[0]), "{report}");

    let vectors =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/oracle/vectors-2.safetensors");
    let good = binary().args(["doctor", "--vectors", vectors]).output().unwrap();
    assert!(good.status.success(), "{}", text(&good));
    let mut bytes = fs::read(vectors).unwrap();
    // The lowest bit of one of the oracle's integers, half way into the data.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let data = 8 + header;
    let at = data + (bytes.len() - data) / 16 * 8;
    bytes[at] ^= 1;
    let dir = tempfile::tempdir().unwrap();
    let tampered = dir.path().join("tampered.safetensors");
    fs::write(&tampered, bytes).unwrap();
    let bad = binary().args(["doctor", "--vectors"]).arg(&tampered).output().unwrap();
    assert_eq!(bad.status.code(), Some(1), "{}", text(&bad));
    assert!(text(&bad).contains("index"), "{}", text(&bad));
}
