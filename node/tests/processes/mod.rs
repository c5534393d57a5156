//! A swarm of real processes in one directory, for tests.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Two phases, lag and mini-batches, small enough for seconds.
pub(crate) const RUN: &str = r#"
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
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// A process that ends with the test.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn manyhands() -> Command {
    Command::new(env!("CARGO_BIN_EXE_manyhands"))
}

pub(crate) fn output(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}\n{text}");
    output
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn weights(text: &str) -> String {
    let line = text.lines().find(|l| l.starts_with("weights ")).unwrap();
    line.trim_start_matches("weights ").to_string()
}

/// The weights of one machine.
pub(crate) fn solo(dir: &Path) -> String {
    fs::write(dir.join("run.toml"), RUN).unwrap();
    let mut train = manyhands();
    train.arg("train").arg(dir.join("run.toml")).args(["--engine", "cpu"]);
    weights(&stdout(&output(train.arg("--dir").arg(dir.join("solo")))))
}

/// A coordination peer in the directory `name`, that is up.
pub(crate) fn peer(dir: &Path, name: &str, args: &[&str]) -> Process {
    let _ = fs::remove_file(dir.join(name).join("url"));
    let mut host = manyhands();
    host.arg("host").arg("--dir").arg(dir.join(name)).args(args);
    host.args(["--http", "127.0.0.1:0", "--listen", "127.0.0.1"]);
    let log = dir.join(format!("{name}.log"));
    let log = File::options().create(true).append(true).open(log).unwrap();
    host.stdout(Stdio::null()).stderr(log);
    let process = Process(host.spawn().unwrap());
    wait_for(dir, &format!("{name} is up"), || dir.join(name).join("url").exists());
    process
}

/// What it wrote.
pub(crate) fn summary(dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(dir.join("summary.json")).unwrap()).unwrap()
}

/// A volunteer in the directory `name`, at the address of `host`.
pub(crate) fn join(dir: &Path, host: &str, name: &str) -> Process {
    join_with(dir, host, name, &[])
}

/// The same, with more arguments.
pub(crate) fn join_with(dir: &Path, host: &str, name: &str, args: &[&str]) -> Process {
    join_on(dir, host, name, "cpu", args)
}

/// The same, on this engine.
pub(crate) fn join_on(dir: &Path, host: &str, name: &str, engine: &str, args: &[&str]) -> Process {
    let url = fs::read_to_string(dir.join(host).join("url")).unwrap();
    let mut join = manyhands();
    join.arg("join").arg(url).arg("--dir").arg(dir.join(name));
    join.args(["--threads", "1", "--engine", engine]).args(args);
    let log = File::create(dir.join(format!("{name}.log"))).unwrap();
    join.stdout(Stdio::null()).stderr(log);
    Process(join.spawn().unwrap())
}

pub(crate) fn wait_for(dir: &Path, what: &str, mut is_true: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_true() {
        if started.elapsed() > PATIENCE {
            let logs = fs::read_dir(dir).unwrap().filter_map(|entry| {
                let path = entry.unwrap().path();
                let is_log = path.extension().is_some_and(|e| e == "log");
                is_log
                    .then(|| format!("{}:\n{}", path.display(), fs::read_to_string(&path).unwrap()))
            });
            panic!("waited in vain until {what}\n{}", logs.collect::<Vec<_>>().join("\n"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Steps and evaluations that a peer has logged.
pub(crate) fn lines(dir: &Path, name: &str) -> usize {
    fs::read_to_string(dir.join(name).join("log.jsonl")).unwrap_or_default().lines().count()
}
