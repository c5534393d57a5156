//! A swarm of real processes: a host that is killed, volunteers that come and go, one that lies.
//! The weights are those of one machine, and the ledger replays.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Two phases, lag and mini-batches, small enough for seconds.
const RUN: &str = r#"
name = "swarm"
seed = 4
[model]
preset = "nano"
context = 64
[[task]]
family = "count_bits"
level = 1
[[task]]
family = "spell_backward"
level = 1
[sft]
steps = 60
batch = 32
[sft.optimizer]
learning_rate = 3e-3
[rl]
steps = 6
prompts = 4
group_size = 4
max_new_tokens = 16
updates = 2
policy_lag = 1
[rl.learn.optimizer]
learning_rate = 1e-3
[eval]
problems = 8
samples = 2
k = [1, 2]
[checkpoint]
every = 10
[swarm]
unit_seconds = 0.2
newcomer_audits = 3
silence_seconds = 5.0
"#;

/// No run of this size takes longer.
const PATIENCE: Duration = Duration::from_secs(240);

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn manyhands() -> Command {
    Command::new(env!("CARGO_BIN_EXE_manyhands"))
}

fn output(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{text}");
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn weights(text: &str) -> String {
    let line = text.lines().find(|l| l.starts_with("weights ")).unwrap();
    line.trim_start_matches("weights ").to_string()
}

fn host(dir: &Path) -> Process {
    let _ = fs::remove_file(dir.join("host/url"));
    let mut host = manyhands();
    host.arg("host").arg(dir.join("run.toml")).arg("--dir").arg(dir.join("host"));
    host.args(["--http", "127.0.0.1:0", "--listen", "127.0.0.1", "--once"]);
    host.arg("--json").arg(dir.join("summary.json"));
    let log = File::options().create(true).append(true).open(dir.join("host.log")).unwrap();
    host.stdout(Stdio::null()).stderr(log);
    let process = Process(host.spawn().unwrap());
    wait_for(dir, "the host is up", || dir.join("host/url").exists());
    process
}

fn join(dir: &Path, name: &str, attack: Option<&str>) -> Process {
    let url = fs::read_to_string(dir.join("host/url")).unwrap();
    let mut join = manyhands();
    join.arg("join").arg(url).arg("--dir").arg(dir.join(name));
    join.args(["--threads", "1", "--engine", "cpu"]);
    if let Some(attack) = attack {
        join.args(["--attack", attack]);
    }
    let log = File::create(dir.join(format!("{name}.log"))).unwrap();
    join.stdout(Stdio::null()).stderr(log);
    Process(join.spawn().unwrap())
}

fn wait_for(dir: &Path, what: &str, mut is_true: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_true() {
        if started.elapsed() > PATIENCE {
            let log = fs::read_to_string(dir.join("host.log")).unwrap_or_default();
            panic!("waited in vain until {what}; the host says\n{log}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn lines(dir: &Path) -> usize {
    fs::read_to_string(dir.join("host/log.jsonl")).unwrap_or_default().lines().count()
}

#[test]
fn host_killed_and_volunteers_that_change_give_the_weights_of_one_machine() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("run.toml"), RUN).unwrap();
    let solo = manyhands()
        .arg("train")
        .arg(dir.join("run.toml"))
        .args(["--engine", "cpu"])
        .arg("--dir")
        .arg(dir.join("solo"))
        .output()
        .unwrap();
    let solo = weights(&stdout(&solo));

    let mut first = host(dir);
    let _stays = join(dir, "stays", None);
    let mut goes = join(dir, "goes", None);
    wait_for(dir, "some steps are done", || lines(dir) > 15);
    goes.0.kill().unwrap();
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    let before = lines(dir);
    assert!(before < 60, "the run was over before the host was killed");

    let mut second = host(dir);
    let _late = join(dir, "late", None);
    wait_for(dir, "the run is complete", || second.0.try_wait().unwrap().is_some());
    let summary: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("summary.json")).unwrap()).unwrap();
    assert_eq!(summary["weights"], solo.as_str());

    let replay = output(manyhands().arg("replay").arg(dir.join("host")).args([
        "--recompute",
        "20",
        "--json",
    ]));
    let replay: serde_json::Value = serde_json::from_str(&stdout(&replay)).unwrap();
    assert_eq!((&replay["ok"], &replay["weights"]), (&true.into(), &solo.as_str().into()));
    assert_eq!(replay["recomputed"], 20);
    let receipts = fs::read_to_string(dir.join("stays/receipts.jsonl")).unwrap();
    assert!(receipts.lines().count() > 5, "the volunteer keeps its receipts");
}

/// Only in a build with volunteers that can lie.
#[cfg(feature = "attacks")]
#[test]
fn liar_is_expelled_and_changes_nothing() {
    for attack in ["sign-flip", "random"] {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::write(dir.join("run.toml"), RUN).unwrap();
        let solo = manyhands()
            .arg("train")
            .arg(dir.join("run.toml"))
            .args(["--engine", "cpu"])
            .arg("--dir")
            .arg(dir.join("solo"))
            .output()
            .unwrap();
        let mut host = host(dir);
        let _liar = join(dir, "liar", Some(attack));
        wait_for(dir, "the liar is expelled", || {
            fs::read_to_string(dir.join("host.log")).unwrap().contains("expelled")
        });
        let _honest = join(dir, "honest", None);
        wait_for(dir, "the run is complete", || host.0.try_wait().unwrap().is_some());
        let summary: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("summary.json")).unwrap()).unwrap();
        assert_eq!(summary["weights"], weights(&stdout(&solo)).as_str(), "{attack}");
        let volunteers = summary["status"]["volunteers"].as_array().unwrap();
        let expelled = volunteers.iter().filter(|v| v["standing"] == "expelled").count();
        assert_eq!(expelled, 1, "{attack}: {volunteers:?}");
    }
}
