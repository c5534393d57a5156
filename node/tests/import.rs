//! `import`, and what becomes of the checkpoint: the program as a user meets it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/tiny").join(name)
}

fn run(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_manyhands"));
    command.current_dir(dir).args(args).args(["--engine", "cpu", "--threads", "1"]);
    command.stdin(Stdio::null()).output().unwrap()
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let output = run(dir, args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refusal(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

/// A directory in which the tiny model has been imported as `model`, and what that printed.
fn imported() -> (TempDir, Value) {
    let dir = tempfile::tempdir().unwrap();
    let source = data("tiny.gguf");
    let args = ["import", source.to_str().unwrap(), "--out", "model", "--json"];
    let summary = json(dir.path(), &args);
    (dir, summary)
}

/// The same model in two containers gives the same weights, at a measured and small cost.
#[test]
fn import_of_gguf_and_of_hub_files_is_the_same_model() {
    let (dir, gguf) = imported();
    assert!(gguf["kl"].as_f64().unwrap() < 0.01, "{gguf}");
    assert!(gguf["top1"].as_f64().unwrap() > 0.9, "{gguf}");
    let ratio = gguf["ppl_exact"].as_f64().unwrap() / gguf["ppl_source"].as_f64().unwrap();
    assert!((ratio - 1.0).abs() < 0.02, "{gguf}");
    assert_eq!((&gguf["saturation"], &gguf["tensors"]), (&serde_json::json!({}), &21.into()));
    assert_eq!(gguf["formats"], serde_json::json!(["BF16", "F32"]));
    let hub = data("hub");
    let args = ["import", hub.to_str().unwrap(), "--out", "again", "--no-report", "--json"];
    let hub = json(dir.path(), &args);
    assert_eq!((&hub["weights"], &hub["kl"]), (&gguf["weights"], &Value::Null));
    let error = refusal(dir.path(), &args);
    assert!(error.contains("exists already"), "{error}");
}

/// Token ids and text are those of the tokenizer that made the files, with either container's.
#[test]
fn sample_tokenizes_as_the_original_and_says_so() {
    let (dir, _) = imported();
    let hub = data("hub");
    json(dir.path(), &["import", hub.to_str().unwrap(), "--out", "hub", "--no-report", "--json"]);
    let reference: Value =
        serde_json::from_slice(&fs::read(data("reference.json")).unwrap()).unwrap();
    for model in ["model", "hub"] {
        let battery = reference["battery"].as_array().unwrap();
        let mut args = vec!["sample", model, "--raw", "--json", "--count", "1"];
        args.extend(["--max-new-tokens", "1"]);
        args.extend(battery.iter().flat_map(|c| ["--prompt", c["text"].as_str().unwrap()]));
        let output = run(dir.path(), &args);
        let lines = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Value> = lines.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), battery.len());
        for (line, case) in lines.iter().zip(battery) {
            assert_eq!(line["prompt_ids"], case["ids"], "{case}");
        }
        let chat = [
            "sample",
            model,
            "--prompt",
            " hi ",
            "--json",
            "--count",
            "1",
            "--max-new-tokens",
            "1",
        ];
        let battery = &reference["battery"][2]["ids"].as_array().unwrap().clone();
        let ids = json(dir.path(), &chat)["prompt_ids"].as_array().unwrap().clone();
        // The template strips the message and lets the assistant begin.
        assert_eq!(ids[..battery.len()], battery[..]);
        assert!(ids.len() > battery.len() + 3 && ids[battery.len() + 1] == 1, "{ids:?}");
    }
}

/// Greedy continuations of token ids name the likeliest token, whatever the model's end is.
#[test]
fn sample_greedy_continues_token_ids() {
    let (dir, _) = imported();
    let reference: Value =
        serde_json::from_slice(&fs::read(data("reference.json")).unwrap()).unwrap();
    let ids: Vec<String> =
        reference["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let ids = ids.join(",");
    let args = ["sample", "model", "--prompt-ids", &ids, "--greedy", "--json", "--count", "1"];
    let args = [&args[..], &["--max-new-tokens", "5", "--ignore-end"]].concat();
    let line = json(dir.path(), &args);
    let last: Vec<f64> =
        reference["logits"][2].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
    let sum: f64 = last.iter().map(|x| (x - last[best]).exp()).sum();
    assert_eq!(line["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(line["tokens"][0].as_u64().unwrap() as usize, best);
    assert!((line["logprobs"][0].as_f64().unwrap() + sum.ln()).abs() < 0.05, "{line}");
    assert_eq!(json(dir.path(), &args), line);
    let error = refusal(dir.path(), &["sample", "model", "--prompt-ids", "264"]);
    assert!(error.contains("264 is outside the vocabulary of 264"), "{error}");
}

/// Lines from the input are answered one after the other, each with all that was said before.
#[test]
fn sample_chats_over_the_input() {
    let (dir, _) = imported();
    let chat = |lines: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_manyhands"));
        command.current_dir(dir.path()).args(["sample", "model", "--max-new-tokens", "8"]);
        command.args(["--greedy", "--engine", "cpu", "--threads", "1"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (first, both) = (chat("hi\n"), chat("hi\nand then?\n"));
    assert!(first.len() > 1 && both.starts_with(&first), "{first:?}, {both:?}");
    let second = &both[first.len()..];
    assert_ne!(second, first);
    assert_ne!(second, chat("and then?\n"), "what was said before plays no part");
    assert_eq!(chat("hi\n\n/new\nhi\n"), [&*first, &*first].concat());
}

/// An imported model is examined on tasks that the command names.
#[test]
fn eval_examines_an_imported_model() {
    let (dir, summary) = imported();
    let error = refusal(dir.path(), &["eval", "model"]);
    assert!(error.contains("--family"), "{error}");
    let args = ["eval", "model", "--family", "chain_sum", "--problems", "3", "--samples", "2"];
    let report = json(dir.path(), &[&args[..], &["--max-new-tokens", "8", "--json"]].concat());
    assert_eq!(report["weights"], summary["weights"]);
    assert_eq!(report["overall"]["problems"], 3);
    assert!(report["token_entropy"].as_f64().unwrap() > 0.0);
}

/// A copy of the hub's directory with one file changed.
fn hub_with(file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(data("hub")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join(file);
    fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
    dir
}

/// What is wrong with a foreign file is said with its name, and leaves nothing behind.
#[test]
fn import_names_what_is_wrong() {
    let replaced = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(from), "{from} is not in {text}");
            text.replace(from, to).into_bytes()
        }
    };
    let cases = [
        (hub_with("config.json", replaced("\"llama\"", "\"mamba\"")), "model_type"),
        (hub_with("config.json", |_| b"{".to_vec()), "config.json"),
        (hub_with("tokenizer.json", replaced("\":263", "\":264")), "token 264"),
        (hub_with("tokenizer.json", |b| b[..100].to_vec()), "tokenizer.json"),
        (hub_with("tokenizer_config.json", |_| b"{}".to_vec()), "eos_token"),
        (hub_with("tokenizer_config.json", replaced("{% endfor %}", "")), "chat template"),
        (
            hub_with("model-00002-of-00002.safetensors", |b| b[..b.len() / 2].to_vec()),
            "model-00002-of-00002.safetensors",
        ),
    ];
    for (dir, subject) in cases {
        let error = refusal(dir.path(), &["import", ".", "--out", "out"]);
        assert!(error.contains(subject), "{error:?} does not name {subject}");
        assert!(!dir.path().join("out").exists());
    }
    let empty = tempfile::tempdir().unwrap();
    for (source, subject) in
        [("nowhere.gguf", "nowhere.gguf"), (".", "GGUF"), ("hf:one", "OWNER/NAME")]
    {
        let error = refusal(empty.path(), &["import", source]);
        assert!(error.contains(subject), "{error:?} does not name {subject}");
    }
}

/// A checkpoint whose tokenizer was swapped is refused as damaged.
#[test]
fn sample_refuses_a_changed_tokenizer() {
    let (dir, _) = imported();
    let path = dir.path().join("model/tokenizer.json");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() = b' ';
    fs::write(&path, bytes).unwrap();
    let error = refusal(dir.path(), &["sample", "model", "--prompt", "hi"]);
    assert!(error.contains("tokenizer.json is damaged"), "{error}");
}
