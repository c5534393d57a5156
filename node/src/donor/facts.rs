//! What the system tells about power, load and the time of day.
//!
//! `None` is an honest answer: the system does not tell.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Zoned;

/// The machine counts as idle while other programs use less than this many cores.
pub const OTHER_CORES_MAX: f64 = 0.5;
/// Shortest time over which load is measured; questions in between get the last answer.
const MEASURE_MIN: Duration = Duration::from_secs(2);

/// Minutes after local midnight.
pub fn local_minute() -> u16 {
    let now = Zoned::now();
    u16::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute()))
        .expect("hours and minutes are not negative")
}

/// The local date, as YYYY-MM-DD.
pub fn local_date() -> String {
    Zoned::now().date().to_string()
}

/// Asks the system, and remembers what load needs.
#[derive(Debug)]
pub struct System {
    measured: Instant,
    ticks: Option<Ticks>,
    idle: Option<bool>,
}

/// Processor time since boot, in the kernel's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticks {
    /// All cores, working or not.
    all: u64,
    /// All cores, working.
    busy: u64,
    /// This process.
    own: u64,
    cores: u64,
}

impl Default for System {
    fn default() -> Self {
        Self::new()
    }
}

impl System {
    /// Begins to measure. The first answer comes from the load average, in which this program has
    /// no part yet.
    pub fn new() -> Self {
        let ticks = read_ticks();
        let load = fs::read_to_string("/proc/loadavg").ok().and_then(|t| parse_load(&t));
        let idle = ticks.and(load).map(|load| load < OTHER_CORES_MAX);
        Self { measured: Instant::now(), ticks, idle }
    }

    /// Whether other programs leave the processor alone. Linux only.
    pub fn idle(&mut self) -> Option<bool> {
        let before = self.ticks?;
        if self.measured.elapsed() >= MEASURE_MIN {
            let now = read_ticks()?;
            if let Some(cores) = other_cores(before, now) {
                self.idle = Some(cores < OTHER_CORES_MAX);
            }
            self.ticks = Some(now);
            self.measured = Instant::now();
        }
        self.idle
    }

    /// Whether the machine is not on battery. Linux only.
    pub fn on_mains(&self) -> Option<bool> {
        on_mains_in(Path::new("/sys/class/power_supply"))
    }
}

/// Cores that other programs kept busy between two readings.
fn other_cores(before: Ticks, now: Ticks) -> Option<f64> {
    let all = now.all.checked_sub(before.all).filter(|&n| n > 0)?;
    let busy = now.busy.saturating_sub(before.busy);
    let own = now.own.saturating_sub(before.own);
    #[expect(clippy::cast_precision_loss, reason = "ticks of seconds, not of centuries")]
    let share = busy.saturating_sub(own) as f64 / all as f64 * now.cores as f64;
    Some(share)
}

fn read_ticks() -> Option<Ticks> {
    let machine = fs::read_to_string("/proc/stat").ok()?;
    let own = fs::read_to_string("/proc/self/stat").ok()?;
    parse_ticks(&machine, &own)
}

/// The first line of `/proc/stat`: user nice system idle iowait irq softirq steal; guests are in
/// user and nice already. Stolen time is another machine's.
fn parse_ticks(machine: &str, own: &str) -> Option<Ticks> {
    let line = machine.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|f| f.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, ..] = fields[..] else { return None };
    let busy =
        [user, nice, system, irq, softirq].iter().try_fold(0u64, |a, &b| a.checked_add(b))?;
    let cores = machine.lines().skip(1).take_while(|l| l.starts_with("cpu")).count();
    // The name in parentheses may hold anything, also parentheses.
    let mut rest = own.rsplit_once(')')?.1.split_whitespace().skip(11);
    let own = |text: Option<&str>| text?.parse::<u64>().ok();
    Some(Ticks {
        all: busy.checked_add(idle)?.checked_add(iowait)?,
        busy,
        own: own(rest.next())?.checked_add(own(rest.next())?)?,
        cores: cores.max(1) as u64,
    })
}

fn parse_load(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Reads the kernel's list of power supplies. A machine without a battery is on mains.
fn on_mains_in(dir: &Path) -> Option<bool> {
    let mut battery_drains = false;
    let mut mains = None;
    for entry in fs::read_dir(dir).ok()? {
        let path = entry.ok()?.path();
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        // A mouse has a battery too.
        if read("scope").trim() == "Device" {
            continue;
        }
        match read("type").trim() {
            "Mains" | "USB" => {
                mains = Some(mains.unwrap_or(false) || read("online").trim() == "1");
            }
            "Battery" => battery_drains |= read("status").trim() == "Discharging",
            _ => {}
        }
    }
    Some(mains == Some(true) || !battery_drains)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supplies(list: &[(&str, &[(&str, &str)])]) -> Option<bool> {
        let dir = tempfile::tempdir().unwrap();
        for (name, files) in list {
            fs::create_dir(dir.path().join(name)).unwrap();
            for (file, text) in *files {
                fs::write(dir.path().join(name).join(file), format!("{text}\n")).unwrap();
            }
        }
        on_mains_in(dir.path())
    }

    #[test]
    fn mains_are_read_from_the_kernels_list() {
        let ac = |online| ("AC", [("type", "Mains"), ("online", online)]);
        let battery = |status| ("BAT0", [("type", "Battery"), ("status", status)]);
        let (on, off) = (ac("1"), ac("0"));
        let (full, drains) = (battery("Full"), battery("Discharging"));
        let mouse = [("type", "Battery"), ("status", "Discharging"), ("scope", "Device")];
        assert_eq!(supplies(&[(on.0, &on.1), (full.0, &full.1)]), Some(true));
        assert_eq!(supplies(&[(off.0, &off.1), (drains.0, &drains.1)]), Some(false));
        assert_eq!(supplies(&[(drains.0, &drains.1)]), Some(false));
        assert_eq!(supplies(&[("mouse", &mouse)]), Some(true));
        assert_eq!(supplies(&[]), Some(true));
        assert_eq!(on_mains_in(Path::new("/nonexistent/power")), None);
    }

    #[test]
    fn other_programs_are_told_from_this_one() {
        let machine = |user: u64, idle: u64| {
            format!("cpu  {user} 0 100 {idle} 0 0 0 0 0 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n")
        };
        let own = |ticks: u64| format!("12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 {ticks} 40 0 0 20 0");
        let before = parse_ticks(&machine(1000, 5000), &own(500)).unwrap();
        assert_eq!(before, Ticks { all: 6100, busy: 1100, own: 540, cores: 2 });
        // 200 ticks on two cores: this program took 90, others 10.
        let now = parse_ticks(&machine(1100, 5100), &own(590)).unwrap();
        assert_eq!(other_cores(before, now), Some(10.0 / 200.0 * 2.0));
        assert_eq!(other_cores(now, now), None);
        assert_eq!(other_cores(now, before), None);
    }

    #[test]
    fn odd_texts_of_the_kernel_give_no_answer() {
        for bad in ["", "cpu", "cpu  1 2 3", "cpu  a b", "cpu  18446744073709551615 1 1 1 1 1 1"] {
            assert_eq!(parse_ticks(bad, "1 (x) S 1 2 3 4 5 6 7 8 9 10 1 1"), None, "{bad}");
        }
        assert_eq!(parse_ticks("cpu  1 1 1 1 1 1 1", "1 (x S"), None);
        assert_eq!(parse_load(""), None);
        assert_eq!(parse_load("0.38 0.81 1.66 4/90 14593"), Some(0.38));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_system_answers() {
        assert!(System::new().idle().is_some());
        assert!(local_minute() < 24 * 60);
        assert_eq!(local_date().len(), 10);
    }
}
