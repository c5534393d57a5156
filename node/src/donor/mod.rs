//! What the owner of a volunteering machine controls: when it works, how hard, and how much it
//! may send and receive.
//!
//! [`policy`] is the settings and the decision, without any I/O; [`facts`] asks the system;
//! [`usage`] counts bytes a day; [`control`] is pausing. A volunteer's loop opens a [`Donor`],
//! asks [`Donor::decide`] before each unit, and rests for [`Duty::after`] behind each.
//! The number of threads is [`crate::cli::EngineArgs`]'s.

pub mod control;
pub mod facts;
pub mod policy;
pub mod usage;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

pub use control::{Control, Signals};
pub use facts::System;
pub use policy::{Decision, DonorPolicy, Duty, Facts, WaitReason, decide, warnings};
pub use usage::Usage;

/// Everything that a volunteer's loop asks before it works.
#[derive(Debug)]
pub struct Donor {
    policy: DonorPolicy,
    control: Control,
    system: System,
    usage: Usage,
}

impl Donor {
    /// The owner's wishes, with what is remembered in the volunteer's directory.
    pub fn open(dir: &Path, policy: DonorPolicy) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let usage = Usage::open(dir, &facts::local_date())?;
        Ok(Self { policy, control: Control::new(dir), system: System::new(), usage })
    }

    /// What can pause it.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Whether to work now.
    pub fn decide(&mut self) -> Decision {
        let facts = self.facts();
        decide(&self.policy, &facts)
    }

    /// Wishes that cannot be granted because this system does not tell, in plain words. For the
    /// start: it does not change later.
    pub fn warnings(&mut self) -> Vec<String> {
        let facts = self.facts();
        warnings(&self.policy, &facts)
    }

    /// Counts bytes that were sent or received.
    pub fn count_bytes(&mut self, bytes: u64) -> Result<()> {
        self.usage.count(&facts::local_date(), bytes)
    }

    fn facts(&mut self) -> Facts {
        Facts {
            local_minute: facts::local_minute(),
            on_mains: self.system.on_mains(),
            idle: self.system.idle(),
            bytes_today: self.usage.today(&facts::local_date()),
            paused: self.control.paused(),
        }
    }
}

/// Which volunteer is meant.
#[derive(Clone, Debug, Args)]
pub struct ControlArgs {
    /// Directory of the volunteer; where `manyhands join` keeps its state by default.
    #[arg(long)]
    dir: Option<PathBuf>,
}

impl ControlArgs {
    fn control(&self) -> Result<Control> {
        let dir = self.dir.clone().unwrap_or_else(default_dir);
        if !dir.is_dir() {
            anyhow::bail!(
                "no volunteer has worked in {}; name its directory with --dir",
                dir.display()
            );
        }
        Ok(Control::new(&dir))
    }
}

/// Where a volunteer of this user keeps its state, whatever directory it is started from.
pub fn default_dir() -> PathBuf {
    default_dir_of(|name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute()))
}

fn default_dir_of(variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let home = || variable("HOME");
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        home().map(|h| h.join("Library/Application Support"))
    } else {
        variable("XDG_STATE_HOME").or_else(|| home().map(|h| h.join(".local/state")))
    };
    base.unwrap_or_default().join("manyhands").join("volunteer")
}

/// `manyhands pause`.
pub fn run_pause(args: &ControlArgs) -> Result<std::process::ExitCode> {
    args.control()?.pause()?;
    println!(
        "paused: a volunteer that runs finishes the unit it works on and takes no other, also after a restart, until `manyhands resume`"
    );
    Ok(std::process::ExitCode::SUCCESS)
}

/// `manyhands resume`.
pub fn run_resume(args: &ControlArgs) -> Result<std::process::ExitCode> {
    if args.control()?.resume()? {
        println!("resumed: a volunteer that runs takes units again within seconds");
    } else {
        println!("it was not paused");
    }
    Ok(std::process::ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        policy: DonorPolicy,
    }

    fn policy(flags: &[&str]) -> DonorPolicy {
        Cli::try_parse_from([&["x"], flags].concat()).unwrap().policy
    }

    #[test]
    fn donor_paused_and_over_its_cap_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut donor = Donor::open(dir.path(), policy(&["--data-cap", "10k"])).unwrap();
        assert!(matches!(donor.decide(), Decision::Work { .. }));
        let args = ControlArgs { dir: Some(dir.path().into()) };
        run_pause(&args).unwrap();
        assert_eq!(donor.decide(), Decision::Wait { reason: WaitReason::Paused });
        run_resume(&args).unwrap();
        donor.count_bytes(10_000).unwrap();
        assert_eq!(donor.decide(), Decision::Wait { reason: WaitReason::DataCap });
        drop(donor);
        let mut donor = Donor::open(dir.path(), policy(&["--data-cap", "10k"])).unwrap();
        assert_eq!(donor.decide(), Decision::Wait { reason: WaitReason::DataCap });
    }

    #[test]
    fn pause_without_a_volunteer_names_the_flag() {
        let dir = tempfile::tempdir().unwrap();
        let args = ControlArgs { dir: Some(dir.path().join("none")) };
        assert!(format!("{:#}", run_pause(&args).unwrap_err()).contains("--dir"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn default_dir_is_the_users() {
        let dir = |pairs: &[(&str, &str)]| {
            let find = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into());
            default_dir_of(find)
        };
        let home = Path::new("/home/a/.local/state/manyhands/volunteer");
        assert_eq!(dir(&[("HOME", "/home/a")]), home);
        let state = Path::new("/s/manyhands/volunteer");
        assert_eq!(dir(&[("HOME", "/home/a"), ("XDG_STATE_HOME", "/s")]), state);
    }
}
