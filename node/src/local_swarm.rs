//! A swarm of this program's own processes on the loopback device: a host and its volunteers.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use manyhands_core::run::config::RunConfig;
use serde_json::Value;

use crate::cli::EngineArgs;
use crate::host::{INTERRUPTED, URL_FILE};
use crate::store::{read_bounded, write_atomic};

/// How long a host may take to say where it is.
const START: Duration = Duration::from_secs(60);
/// How long volunteers may take to hear that the run is complete.
const FAREWELL: Duration = Duration::from_secs(15);
/// Largest summary that a host writes.
const SUMMARY_BYTES_MAX: u64 = 64 << 20;

/// Who takes part.
pub struct LocalSwarm<'a> {
    /// Honest volunteers.
    pub honest: usize,
    /// What one more volunteer does, in a build with volunteers that lie.
    pub attack: Option<&'a str>,
    /// Engine of the volunteers, and threads of each.
    pub engine: EngineArgs,
    /// Whether the host shows its progress.
    pub shows: bool,
}

/// Processes that end with this one.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl LocalSwarm<'_> {
    /// Makes a run, or goes on with it, in `dir`. What the host's summary says; `None`: the host
    /// was interrupted.
    pub fn run(&self, config: &RunConfig, dir: &Path) -> Result<Option<Value>> {
        let volunteers = dir.join("volunteers");
        fs::create_dir_all(&volunteers)
            .with_context(|| format!("cannot make {}", volunteers.display()))?;
        let (run, url) = (dir.join("run.toml"), dir.join(URL_FILE));
        let summary = dir.join("summary.json");
        write_atomic(&run, toml::to_string(config)?.as_bytes())?;
        let _ = fs::remove_file(&url);
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut host = Command::new(&program);
        host.arg("host").arg(&run).arg("--dir").arg(dir).arg("--json").arg(&summary);
        host.args(["--http", "127.0.0.1:0", "--listen", "127.0.0.1"]).stdout(Stdio::null());
        if !self.shows {
            host.stderr(Stdio::null());
        }
        let mut host = Processes(vec![host.spawn().context("cannot start the host")?]);
        let started = Instant::now();
        while !url.exists() {
            if let Some(status) = host.0[0].try_wait()? {
                bail!("the host ended at once: {status}");
            }
            ensure!(started.elapsed() < START, "the host does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        let url = fs::read_to_string(&url)?;
        let mut joined = Processes(Vec::new());
        for i in 0..self.honest + self.attack.map_or(0, |_| 1) {
            let log = volunteers.join(format!("{}.log", i + 1));
            let log =
                File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
            let mut join = Command::new(&program);
            join.arg("join").arg(&url).arg("--dir").arg(volunteers.join(format!("{}", i + 1)));
            join.args(["--threads", &self.engine.threads.to_string()]);
            join.args(["--engine", &self.engine.engine.to_string()]);
            if i == self.honest {
                join.args(["--attack", self.attack.unwrap_or_default()]);
            }
            join.stdout(Stdio::null()).stderr(log);
            joined.0.push(join.spawn().context("cannot start a volunteer")?);
        }
        let status = host.0[0].wait()?;
        if status.code() == Some(i32::from(INTERRUPTED)) {
            return Ok(None);
        }
        ensure!(status.success(), "the host ended with {status}");
        let patience = Instant::now();
        while patience.elapsed() < FAREWELL
            && joined.0.iter_mut().take(self.honest).any(|c| matches!(c.try_wait(), Ok(None)))
        {
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Some(serde_json::from_slice(&read_bounded(&summary, SUMMARY_BYTES_MAX)?)?))
    }
}
