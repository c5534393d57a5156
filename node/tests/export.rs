//! `export`, and what other programs find: the program as a user meets it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const RUN: &str = r#"
name = "tiny"
[model]
import = "model"
LORA
[[task]]
family = "chain_sum"
level = 1
[sft]
steps = 1
batch = 2
[sft.optimizer]
learning_rate = 1e-3
"#;

fn run(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_manyhands"));
    command.current_dir(dir).args(args).stdin(Stdio::null()).output().unwrap()
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let output = run(dir, &[args, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refusal(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

fn export(dir: &Path, from: &str, format: &str, out: &str) -> Value {
    json(dir, &["export", from, "--format", format, "--out", out])
}

fn import(dir: &Path, from: &str, out: &str) -> Value {
    let args = ["import", from, "--out", out, "--no-report"];
    json(dir, &[&args[..], &["--engine", "cpu", "--threads", "1"]].concat())
}

/// A directory in which the tiny model has been imported as `model` from one of its containers.
fn imported(container: &str) -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny").join(container);
    let summary = import(dir.path(), data.to_str().unwrap(), "model");
    (dir, summary)
}

/// The same, and a run that has trained it for a step; `lora` is a section of the run file.
fn trained(lora: &str) -> TempDir {
    let (dir, _) = imported("hub");
    fs::write(dir.path().join("tiny.toml"), RUN.replace("LORA", lora)).unwrap();
    let args = ["train", "tiny.toml", "--dir", "run", "--engine", "cpu", "--threads", "1"];
    let output = run(dir.path(), &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    dir
}

fn weights_hash(dir: &Path) -> Value {
    let manifest = fs::read(dir.join("manifest.json")).unwrap();
    serde_json::from_slice::<Value>(&manifest).unwrap()["weights"].clone()
}

/// The newest checkpoint of `run`.
fn checkpoint(dir: &Path) -> PathBuf {
    let entries = fs::read_dir(dir.join("run/checkpoints")).unwrap();
    entries.map(|e| e.unwrap().path()).max().unwrap()
}

/// Token ids of a conversation, as the imported model in `model` asks.
fn chat(dir: &Path, model: &str) -> Value {
    let args = ["sample", model, "--prompt", " the naïve 12", "--count", "1", "--greedy"];
    let args =
        [&args[..], &["--max-new-tokens", "6", "--engine", "cpu", "--threads", "1"]].concat();
    json(dir, &args)
}

/// Breaks if weights, tokenizer, marks or chat template do not survive a container.
#[test]
fn exports_import_again_as_the_same_model() {
    for container in ["tiny.gguf", "hub"] {
        let (dir, original) = imported(container);
        let dir = dir.path();
        for (format, out, tensors) in [("gguf", "out/model.gguf", 21), ("safetensors", "hf", 21)] {
            let summary = export(dir, "model", format, out);
            assert_eq!((&summary["tensors"], &summary["rounded"]), (&tensors.into(), &0.into()));
            let again = import(dir, out, &format!("again-{format}"));
            assert_eq!(again["weights"], original["weights"], "{container} by {format}");
            assert_eq!(chat(dir, &format!("again-{format}")), chat(dir, "model"), "{format}");
            let error = refusal(dir, &["export", "model", "--format", format, "--out", out]);
            assert!(error.contains("exists already"), "{error}");
        }
        // Nothing but the exports is left behind.
        let hidden = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
        let hidden: Vec<_> = hidden.filter(|n| n.to_string_lossy().starts_with('.')).collect();
        assert!(hidden.is_empty(), "{hidden:?}");
    }
}

/// A run that trained all weights is exported with them, at the scale of what was imported.
#[test]
fn trained_weights_are_exported() {
    let dir = trained("");
    let dir = dir.path();
    export(dir, "run", "safetensors", "hf");
    let again = import(dir, "hf", "again");
    assert_eq!(again["weights"], weights_hash(&checkpoint(dir)));
    assert_ne!(again["weights"], weights_hash(&dir.join("model")));
    let error = refusal(dir, &["export", "run", "--format", "lora", "--out", "lora"]);
    assert!(error.contains("there is no adapter") && !dir.join("lora").exists(), "{error}");
}

/// An adapter is merged into a whole model, or written alone; the imported model may have moved.
#[test]
fn adapter_is_exported_merged_and_alone() {
    let dir = trained("[model.lora]\nrank = 4\nalpha = 8\ntargets = [\"query\", \"down\"]");
    let dir = dir.path();
    fs::rename(dir.join("model"), dir.join("moved")).unwrap();
    let args = |format: &'static str, out: &'static str| {
        ["export", "run", "--format", format, "--out", out, "--model", "moved"]
    };
    let error = refusal(dir, &args("gguf", "merged.gguf")[..6]);
    assert!(error.contains("say with --model"), "{error}");
    json(dir, &args("gguf", "merged.gguf"));
    json(dir, &args("safetensors", "hf"));
    let hashes = ["merged.gguf", "hf"]
        .map(|from| import(dir, from, &format!("from-{from}"))["weights"].clone());
    assert_eq!(hashes[0], hashes[1]);
    assert_ne!(hashes[0], weights_hash(&dir.join("moved")), "the adapter is lost");
    assert_eq!(json(dir, &args("lora", "lora"))["tensors"], 8);
    assert_eq!(json(dir, &args("gguf-lora", "lora.gguf"))["tensors"], 8);
    assert!(fs::read(dir.join("lora.gguf")).unwrap().starts_with(b"GGUF"));
    let config: Value =
        serde_json::from_slice(&fs::read(dir.join("lora/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "down_proj"]));
    let base = config["base_model_name_or_path"].as_str().unwrap();
    assert!(base.ends_with("tests/data/tiny/hub"), "{base}");
    assert!(dir.join("lora/adapter_model.safetensors").is_file());
}

/// What has no place in other programs is refused, with what to do instead.
#[test]
fn export_names_what_is_wrong() {
    let (dir, _) = imported("hub");
    let dir = dir.path();
    for (from, format, problem) in [
        ("model", "lora", "an import has none"),
        ("model", "gguf-lora", "an import has none"),
        ("nowhere", "gguf", "nowhere"),
    ] {
        let error = refusal(dir, &["export", from, "--format", format, "--out", "out"]);
        assert!(error.contains(problem) && !dir.join("out").exists(), "{error}");
    }
    let run_file = RUN.replace("import = \"model\"\nLORA", "preset = \"nano\"");
    fs::write(dir.join("own.toml"), run_file).unwrap();
    let args = ["train", "own.toml", "--dir", "run", "--engine", "cpu", "--threads", "1"];
    let output = run(dir, &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let error = refusal(dir, &["export", "run", "--format", "gguf", "--out", "out"]);
    assert!(error.contains("byte tokens"), "{error}");
}
