//! Pausing: a file in the volunteer's directory, made by a command, a signal, or by hand.
//!
//! One file is the whole state, so that a pause outlives the program that asked for it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Name of the file whose existence pauses a volunteer.
pub const PAUSE_FILE: &str = "paused";

/// Pauses and resumes the volunteer of a directory.
#[derive(Clone, Debug)]
pub struct Control {
    file: PathBuf,
}

impl Control {
    /// Of the volunteer that keeps its state in `dir`.
    pub fn new(dir: &Path) -> Self {
        Self { file: dir.join(PAUSE_FILE) }
    }

    /// Whether it is paused.
    pub fn paused(&self) -> bool {
        self.file.exists()
    }

    /// Pauses.
    pub fn pause(&self) -> Result<()> {
        fs::write(&self.file, "delete this file, or run `manyhands resume`, to go on\n")
            .with_context(|| format!("cannot write {}", self.file.display()))
    }

    /// Resumes. Whether it was paused.
    pub fn resume(&self) -> Result<bool> {
        match fs::remove_file(&self.file) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("cannot remove {}", self.file.display()))
            }
        }
    }
}

/// SIGUSR1 pauses and SIGUSR2 resumes. Registered when made: from then on they do not kill the
/// process. Other systems have the commands only.
#[derive(Debug)]
pub struct Signals {
    #[cfg(unix)]
    pause: tokio::signal::unix::Signal,
    #[cfg(unix)]
    resume: tokio::signal::unix::Signal,
}

impl Signals {
    /// Takes over both signals. Inside a tokio runtime.
    pub fn register() -> Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let take = |kind| signal(kind).context("cannot take over a signal");
            Ok(Self {
                pause: take(SignalKind::user_defined1())?,
                resume: take(SignalKind::user_defined2())?,
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    /// Does what signals say. Runs until it is dropped.
    pub async fn run(mut self, control: Control) {
        loop {
            let done = if self.next().await { control.pause() } else { control.resume().map(drop) };
            if let Err(error) = done {
                tracing::warn!("a signal cannot be obeyed: {error:#}");
            }
        }
    }

    /// Waits for a signal: true to pause, false to resume.
    #[cfg(unix)]
    async fn next(&mut self) -> bool {
        tokio::select! {
            _ = self.pause.recv() => true,
            _ = self.resume.recv() => false,
        }
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> bool {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_and_resume_may_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let control = Control::new(dir.path());
        assert!(!control.paused());
        assert!(!control.resume().unwrap());
        control.pause().unwrap();
        control.pause().unwrap();
        assert!(control.paused());
        assert!(control.resume().unwrap());
        assert!(!control.paused());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn signals_pause_and_resume() {
        let dir = tempfile::tempdir().unwrap();
        let control = Control::new(dir.path());
        let running = tokio::spawn(Signals::register().unwrap().run(control.clone()));
        let pid = std::process::id().to_string();
        for (signal, paused) in [("-USR1", true), ("-USR2", false), ("-USR1", true)] {
            let sent = std::process::Command::new("kill").args([signal, &pid]).status().unwrap();
            assert!(sent.success());
            while control.paused() != paused {
                tokio::task::yield_now().await;
            }
        }
        running.abort();
    }
}
