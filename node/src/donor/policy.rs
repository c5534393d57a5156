//! The owner's settings, and the decision whether to work. Pure: facts come in as values.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

const DAY_MINUTES: u16 = 24 * 60;
const NO_MAINS: &str =
    "--only-on-mains has no effect: this system does not tell whether it is on battery";
const NO_IDLE: &str = "--only-idle has no effect: this system does not tell what other programs do";

/// When and how hard a volunteer works.
#[derive(Clone, Debug, Args)]
pub struct DonorPolicy {
    /// Share of the time to compute, percent: 50 rests as long as it works.
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub duty: u8,
    /// Hours of the day to work in, local time, such as 22:00-07:00 [default: always].
    #[arg(long, value_name = "FROM-TO")]
    pub hours: Option<Window>,
    /// Most bytes to send and receive a day, such as 500M or 2G [default: no limit].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub data_cap: Option<u64>,
    /// Work only while other programs leave the processor alone.
    #[arg(long)]
    pub only_idle: bool,
    /// Work only while the machine is not on battery.
    #[arg(long)]
    pub only_on_mains: bool,
}

/// A part of the day, in minutes after midnight; it may go over midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    start: u16,
    end: u16,
}

impl Window {
    /// Whether a minute of the day lies inside. The last minute is the one before the end.
    pub fn contains(&self, minute: u16) -> bool {
        if self.start < self.end {
            (self.start..self.end).contains(&minute)
        } else {
            minute >= self.start || minute < self.end
        }
    }
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let time = |text: &str| -> Option<u16> {
            let (hour, minute) = text.trim().split_once(':')?;
            let digits = |t: &str| t.len() <= 2 && t.bytes().all(|b| b.is_ascii_digit());
            if !digits(hour) || !digits(minute) || minute.len() != 2 {
                return None;
            }
            let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
            let total = hour * 60 + minute;
            (minute < 60 && total <= DAY_MINUTES).then_some(total)
        };
        let parse = || {
            let (start, end) = text.split_once('-')?;
            let (start, end) = (time(start)? % DAY_MINUTES, time(end)?);
            (start != end % DAY_MINUTES).then_some(Self { start, end })
        };
        parse().ok_or_else(|| {
            "write two different times as HH:MM-HH:MM, such as 22:00-07:00; leave it out for always"
                .into()
        })
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, end } = self;
        write!(f, "{:02}:{:02}-{:02}:{:02}", start / 60, start % 60, end / 60, end % 60)
    }
}

/// Reads a number of bytes with an optional decimal unit: k, M, G or T, with or without B.
fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_uppercase();
    let factor: u64 = match unit.strip_suffix('B').unwrap_or(&unit) {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        _ => return Err("the units are k, M, G and T, such as 500M or 2G".into()),
    };
    let number = digits.trim().parse::<u64>().map_err(|_| "write a whole number, such as 500M")?;
    number.checked_mul(factor).ok_or_else(|| "that is more than any disk holds".into())
}

/// What is so now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Minutes after local midnight.
    pub local_minute: u16,
    /// Whether the machine is not on battery; `None`: the system does not tell.
    pub on_mains: Option<bool>,
    /// Whether other programs leave the processor alone; `None`: the system does not tell.
    pub idle: Option<bool>,
    /// Bytes sent and received since local midnight.
    pub bytes_today: u64,
    /// Whether the owner paused it.
    pub paused: bool,
}

/// Whether to work now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Take a unit, and rest behind it.
    Work {
        /// How long to rest.
        duty: Duty,
    },
    /// Take none; ask again later.
    Wait {
        /// Why.
        reason: WaitReason,
    },
}

/// Why a volunteer waits. Displayed as the words that its owner reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// Its owner paused it.
    Paused,
    /// It is not within `--hours`.
    OutsideHours(Window),
    /// `--data-cap` is used up.
    DataCap,
    /// On battery, with `--only-on-mains`.
    OnBattery,
    /// Other programs compute, with `--only-idle`.
    Busy,
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Paused => f.write_str("paused; `manyhands resume` goes on"),
            Self::OutsideHours(window) => write!(f, "waiting for the hours {window}"),
            Self::DataCap => f.write_str("the day's data cap is used up; waiting for midnight"),
            Self::OnBattery => f.write_str("on battery; waiting for mains power"),
            Self::Busy => f.write_str("other programs are busy; waiting until they are not"),
        }
    }
}

/// How much of the time to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Duty {
    percent: u8,
}

impl Duty {
    /// How long to rest behind `busy` of computing.
    pub fn after(self, busy: Duration) -> Duration {
        let percent = u32::from(self.percent.clamp(1, 100));
        busy.saturating_mul(100 - percent) / percent
    }
}

/// Whether to work. What the system does not tell is no reason to wait: [`warnings`] says so once.
pub fn decide(policy: &DonorPolicy, facts: &Facts) -> Decision {
    let outside = policy.hours.filter(|w| !w.contains(facts.local_minute));
    let capped = policy.data_cap.is_some_and(|cap| facts.bytes_today >= cap);
    let reasons = [
        facts.paused.then_some(WaitReason::Paused),
        outside.map(WaitReason::OutsideHours),
        capped.then_some(WaitReason::DataCap),
        (policy.only_on_mains && facts.on_mains == Some(false)).then_some(WaitReason::OnBattery),
        (policy.only_idle && facts.idle == Some(false)).then_some(WaitReason::Busy),
    ];
    match reasons.into_iter().flatten().next() {
        Some(reason) => Decision::Wait { reason },
        None => Decision::Work { duty: Duty { percent: policy.duty } },
    }
}

/// Settings that have no effect because the system does not tell, in plain words.
pub fn warnings(policy: &DonorPolicy, facts: &Facts) -> Vec<String> {
    let blind_mains = policy.only_on_mains && facts.on_mains.is_none();
    let blind_idle = policy.only_idle && facts.idle.is_none();
    [(blind_mains, NO_MAINS), (blind_idle, NO_IDLE)]
        .into_iter()
        .filter(|(blind, _)| *blind)
        .map(|(_, text)| text.to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts =
        Facts { local_minute: 600, on_mains: None, idle: None, bytes_today: 0, paused: false };

    fn policy() -> DonorPolicy {
        DonorPolicy {
            duty: 50,
            hours: None,
            data_cap: None,
            only_idle: false,
            only_on_mains: false,
        }
    }

    fn waits(policy: &DonorPolicy, facts: Facts) -> Option<WaitReason> {
        match decide(policy, &facts) {
            Decision::Work { .. } => None,
            Decision::Wait { reason } => Some(reason),
        }
    }

    #[test]
    fn window_over_midnight_contains_both_sides() {
        let night: Window = "22:00-07:30".parse().unwrap();
        let day: Window = "9:00-17:00".parse().unwrap();
        let late: Window = "18:00-24:00".parse().unwrap();
        for (window, minute, inside) in [
            (night, 22 * 60, true),
            (night, 0, true),
            (night, 7 * 60 + 29, true),
            (night, 7 * 60 + 30, false),
            (night, 22 * 60 - 1, false),
            (day, 9 * 60, true),
            (day, 17 * 60, false),
            (day, 0, false),
            (late, 24 * 60 - 1, true),
            (late, 0, false),
        ] {
            assert_eq!(window.contains(minute), inside, "{window} {minute}");
        }
        assert_eq!(night.to_string(), "22:00-07:30");
    }

    #[test]
    fn window_that_is_no_window_is_refused() {
        for bad in [
            "",
            "22:00",
            "22-07",
            "25:00-01:00",
            "10:60-11:00",
            "+1:00-2:00",
            "1:0-2:00",
            "9:00-9:00",
            "0:00-24:00",
            "a:bc-d:ef",
        ] {
            assert!(bad.parse::<Window>().is_err(), "{bad}");
        }
    }

    #[test]
    fn size_with_a_unit_is_read_and_nonsense_refused() {
        for (text, expected) in
            [("0", 0), ("12", 12), ("3k", 3_000), ("500 MB", 500_000_000), ("2g", 2_000_000_000)]
        {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for bad in ["", "G", "1.5G", "-1", "2 GiB", "99999999999999T", "9é"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn decision_follows_each_setting() {
        let facts = FACTS;
        assert_eq!(waits(&policy(), facts), None);
        let paused = Facts { paused: true, ..facts };
        assert_eq!(waits(&policy(), paused), Some(WaitReason::Paused));

        let window = "11:00-12:00".parse().unwrap();
        let hours = DonorPolicy { hours: Some(window), ..policy() };
        assert_eq!(waits(&hours, facts), Some(WaitReason::OutsideHours(window)));
        assert_eq!(waits(&hours, Facts { local_minute: 660, ..facts }), None);

        let capped = DonorPolicy { data_cap: Some(100), ..policy() };
        assert_eq!(waits(&capped, Facts { bytes_today: 99, ..facts }), None);
        let full = Facts { bytes_today: 100, ..facts };
        assert_eq!(waits(&capped, full), Some(WaitReason::DataCap));

        let battery = Facts { on_mains: Some(false), idle: Some(false), ..facts };
        assert_eq!(waits(&policy(), battery), None);
        let mains = DonorPolicy { only_on_mains: true, ..policy() };
        assert_eq!(waits(&mains, battery), Some(WaitReason::OnBattery));
        let idle = DonorPolicy { only_idle: true, ..policy() };
        assert_eq!(waits(&idle, battery), Some(WaitReason::Busy));
        let good = Facts { on_mains: Some(true), idle: Some(true), ..facts };
        assert_eq!(waits(&mains, good), None);
        assert_eq!(waits(&idle, good), None);
    }

    /// A setting that cannot be honoured must not stop the volunteer for ever, nor silently.
    #[test]
    fn setting_the_system_cannot_answer_warns_and_works() {
        let both = DonorPolicy { only_idle: true, only_on_mains: true, ..policy() };
        assert_eq!(waits(&both, FACTS), None);
        assert_eq!(warnings(&both, &FACTS).len(), 2);
        assert!(warnings(&policy(), &FACTS).is_empty());
        let told = Facts { on_mains: Some(true), idle: Some(false), ..FACTS };
        assert!(warnings(&both, &told).is_empty());
    }

    #[test]
    fn duty_rests_in_proportion() {
        let rest = |percent, ms| Duty { percent }.after(Duration::from_millis(ms)).as_millis();
        assert_eq!(rest(100, 1000), 0);
        assert_eq!(rest(50, 1000), 1000);
        assert_eq!(rest(25, 1000), 3000);
        assert_eq!(rest(1, 1000), 99_000);
        assert!(Duty { percent: 1 }.after(Duration::MAX) > Duration::from_secs(1 << 40));
    }
}
