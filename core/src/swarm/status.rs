//! What a coordination peer shows of itself: plain data for the dashboard, `/api/status` and
//! metrics.
//!
//! Nothing here decides anything and nothing here is signed: proofs are in the ledger. Field names
//! are a stable interface. Hashes and identities are hexadecimal text, empty when there is none.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ledger::Offence;
use crate::run::report::{Phase, StepReport};
use crate::run::state::Evaluation;

/// Longest [`VolunteerStatus::agent`], in characters. What a volunteer says about itself is cut.
pub const AGENT_CHARS_MAX: usize = 64;

/// What a run is doing as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Units are handed out.
    #[default]
    Running,
    /// The operator paused it: results in flight are taken, nothing new is handed out.
    Paused,
    /// All steps are done and final.
    Done,
    /// It cannot go on; [`Status::warnings`] says why.
    Failed,
}

/// How far a volunteer is trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Every unit is audited before it enters the run.
    #[default]
    Newcomer,
    /// Units enter at once; a random part of them is audited later.
    Trusted,
    /// No longer served.
    Expelled,
}

/// A run, as its coordination peer sees it now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Identity of the run: hash of its opening record.
    pub run: String,
    /// Name in the run file.
    pub name: String,
    /// What the run is doing as a whole.
    pub state: RunState,
    /// Phase of training; `None` until the first step is prepared.
    pub phase: Option<Phase>,
    /// Steps of all phases that are done.
    pub ordinal: u64,
    /// Steps of all phases in the run file.
    pub steps: u64,
    /// Hash of the newest weights.
    pub weights: String,
    /// Size of a complete copy of the weights, bytes.
    pub weights_bytes: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Optimizer updates behind the newest weights.
    pub policy_version: u64,
    /// Digest of the arithmetic that every volunteer must reproduce.
    pub digest: String,
    /// Identity of the coordination peer that writes the ledger.
    pub coordinator: String,
    /// Version of its program.
    pub version: String,
    /// What a volunteer gives to `manyhands join`; empty: the address of this page.
    pub join: String,
    /// Addresses at which volunteers reach it, as multiaddresses.
    pub addresses: Vec<String>,
    /// Records in the ledger.
    pub ledger_records: u64,
    /// Hash of the newest record: two peers that show the same one agree on everything before.
    pub ledger_head: String,
    /// Every volunteer that did a unit or is connected, by identity.
    pub volunteers: Vec<VolunteerStatus>,
    /// Units of work.
    pub units: UnitCounts,
    /// What checking costs and what it is worth.
    pub verification: VerificationStatus,
    /// Speed, over the last minutes.
    pub throughput: Throughput,
    /// Which weights stand for good.
    pub versions: VersionStatus,
    /// Bytes moved since the start, by purpose.
    pub bytes: BTreeMap<String, u64>,
    /// The newest step.
    pub last_step: Option<StepReport>,
    /// The newest evaluation on held-out problems.
    pub last_evaluation: Option<Evaluation>,
    /// What an operator should look at, in plain words, newest last.
    pub warnings: Vec<String>,
    /// Since the coordination peer's program started, seconds.
    pub uptime_s: u64,
    /// Since the newest step was done, seconds; `None` before the first.
    pub since_last_step_s: Option<u64>,
    /// Estimate of the time to the last step at the present speed, seconds.
    pub remaining_s: Option<u64>,
}

/// One volunteer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolunteerStatus {
    /// Its identity.
    pub peer: String,
    /// How far it is trusted.
    pub standing: Standing,
    /// What it says it runs, at most [`AGENT_CHARS_MAX`] characters. Its own words: not checked.
    pub agent: String,
    /// What it says it computes with. Its own words: not checked.
    pub engine: String,
    /// Accepted work a second of lease time, multiply-adds per second.
    pub speed: f64,
    /// Results that entered the run.
    pub units: u64,
    /// Results that were computed again and found right.
    pub audited: u64,
    /// Results that were found wrong.
    pub invalid: u64,
    /// Leases that lapsed without a result.
    pub lapsed: u64,
    /// Valid results in a row since the last invalid one; what trust rests on.
    pub streak: u64,
    /// Probability that its next unit is audited, 0 to 1.
    pub audit_probability: f64,
    /// Work that stands for good, multiply-adds.
    pub credit: u64,
    /// Work whose version is not final yet, multiply-adds.
    pub provisional_credit: u64,
    /// Units that it holds now.
    pub leases: u32,
    /// Whether a connection to it is open.
    pub connected: bool,
    /// Since it was last heard of, seconds.
    pub last_seen_s: u64,
    /// Since it joined, seconds.
    pub joined_s: u64,
    /// Bytes sent to it.
    pub sent_bytes: u64,
    /// Bytes received from it.
    pub received_bytes: u64,
    /// Why it was expelled, if it was.
    pub expelled_for: Option<Offence>,
}

/// Units of work, by what happened to them since the run began; the first two are as of now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitCounts {
    /// Ready, not handed out yet.
    pub waiting: u64,
    /// Held by volunteers.
    pub leased: u64,
    /// Done, held back until an audit.
    pub awaiting_audit: u64,
    /// Entered the run.
    pub accepted: u64,
    /// Computed again and found right.
    pub audited: u64,
    /// Found wrong.
    pub invalid: u64,
    /// Handed out again because a lease lapsed.
    pub reissued: u64,
    /// Handed to a second volunteer because the first was slow.
    pub backup: u64,
    /// Computed by the coordination peer itself for want of a volunteer.
    pub local: u64,
}

/// What checking costs and what it is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VerificationStatus {
    /// Accepted work that was computed again, as a share of all accepted work, 0 to 1.
    pub audited_work_fraction: f64,
    /// Multiply-adds spent on audits, as a share of all useful ones.
    pub overhead_fraction: f64,
    /// Probability at which a long-trusted volunteer's unit is audited: the floor of the policy.
    pub audit_probability_min: f64,
    /// Valid units in a row that make a newcomer trusted.
    pub trust_after_units: u64,
    /// Chance that a cheat who falsifies every unit survives [`Self::survival_units`] of them.
    pub survival_probability: f64,
    /// The number of units that [`Self::survival_probability`] is about.
    pub survival_units: u64,
    /// Audits that were done.
    pub audits: u64,
    /// Audits that found a wrong result.
    pub audits_failed: u64,
    /// Audits that other volunteers did; the rest were done by the coordination peer.
    pub audits_by_volunteers: u64,
    /// Volunteers that were expelled.
    pub expelled: u64,
    /// Accepted units that were taken out again.
    pub voided: u64,
}

/// Speed, over the last minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Accepted multiply-adds per second, all volunteers together.
    pub multiply_adds_per_second: f64,
    /// Tokens sampled and trained on per second.
    pub tokens_per_second: f64,
    /// Accepted units per minute.
    pub units_per_minute: f64,
    /// Steps per hour.
    pub steps_per_hour: f64,
}

/// Which weights stand for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionStatus {
    /// Steps behind the newest weights, final or not.
    pub newest_ordinal: u64,
    /// Steps up to which every contributor passed a later audit.
    pub final_ordinal: u64,
    /// Versions in between.
    pub provisional: u64,
    /// Times that the run went back because a false unit had entered.
    pub rolled_back: u64,
}

/// Something that happened, told at once to everybody who watches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum StatusEvent {
    /// A step is done.
    Step {
        /// Steps of all phases that are done now.
        ordinal: u64,
        /// Its numbers.
        report: Box<StepReport>,
    },
    /// Weights were evaluated on held-out problems.
    Evaluation {
        /// Steps of all phases behind the weights.
        ordinal: u64,
        /// Its numbers.
        evaluation: Box<Evaluation>,
    },
    /// New weights are published. They may still be taken back.
    Version {
        /// Steps of all phases behind them.
        ordinal: u64,
        /// Optimizer updates behind them.
        policy_version: u64,
        /// Hash of the weights.
        weights: String,
    },
    /// Weights stand for good.
    Final {
        /// Steps of all phases behind them.
        ordinal: u64,
    },
    /// A volunteer is no longer served.
    Expelled {
        /// Who.
        peer: String,
        /// Why.
        offence: Offence,
    },
    /// False units had entered: the run goes on from an earlier version.
    RolledBack {
        /// Steps that still stand.
        ordinal: u64,
    },
    /// A volunteer arrived.
    Joined {
        /// Who.
        peer: String,
        /// What it says it runs.
        agent: String,
    },
    /// A volunteer's connection ended.
    Left {
        /// Who.
        peer: String,
    },
    /// The run's state changed.
    State {
        /// To this.
        state: RunState,
    },
    /// Something that an operator should look at.
    Warning {
        /// In plain words.
        text: String,
    },
}

impl StatusEvent {
    /// The event's name: the `event` field of its JSON and of a server-sent event.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Step { .. } => "step",
            Self::Evaluation { .. } => "evaluation",
            Self::Version { .. } => "version",
            Self::Final { .. } => "final",
            Self::Expelled { .. } => "expelled",
            Self::RolledBack { .. } => "rolled_back",
            Self::Joined { .. } => "joined",
            Self::Left { .. } => "left",
            Self::State { .. } => "state",
            Self::Warning { .. } => "warning",
        }
    }
}

/// Cuts what a volunteer says about itself to [`AGENT_CHARS_MAX`] characters that a terminal can
/// show: control characters would let it write elsewhere on an operator's screen.
pub fn clean_agent(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(AGENT_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Vec<StatusEvent> {
        let peer = || "ab".to_string();
        vec![
            StatusEvent::Version { ordinal: 3, policy_version: 6, weights: "cd".into() },
            StatusEvent::Final { ordinal: 2 },
            StatusEvent::Expelled { peer: peer(), offence: Offence::WrongResult },
            StatusEvent::RolledBack { ordinal: 1 },
            StatusEvent::Joined { peer: peer(), agent: "x".into() },
            StatusEvent::Left { peer: peer() },
            StatusEvent::State { state: RunState::Paused },
            StatusEvent::Warning { text: "w".into() },
        ]
    }

    /// A browser dispatches on the name: it must be the tag of the JSON.
    #[test]
    fn status_event_name_is_the_tag_and_survives_json() {
        for event in events() {
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["event"], event.name());
            assert_eq!(serde_json::from_value::<StatusEvent>(json).unwrap(), event);
        }
    }

    #[test]
    fn agent_with_control_characters_is_cleaned_and_cut() {
        assert_eq!(clean_agent("a\x1b[2Jb\n"), "a[2Jb");
        let long = "é".repeat(AGENT_CHARS_MAX + 1);
        assert_eq!(clean_agent(&long).chars().count(), AGENT_CHARS_MAX);
    }

    /// The field names are an interface: dashboards and scripts read them.
    #[test]
    fn status_field_names_are_stable() {
        let status = Status { volunteers: vec![VolunteerStatus::default()], ..Default::default() };
        let json = serde_json::to_value(&status).unwrap();
        let mut names = Vec::new();
        collect("", &json, &mut names);
        assert_eq!(names.join("\n"), include_str!("status_fields.txt").trim_end());
        let back: Status = serde_json::from_value(json).unwrap();
        assert_eq!(back, status);
    }

    /// Paths of all fields below `value`, in order of declaration.
    fn collect(prefix: &str, value: &serde_json::Value, names: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                for (key, value) in map {
                    names.push(format!("{prefix}{key}"));
                    collect(&format!("{prefix}{key}."), value, names);
                }
            }
            serde_json::Value::Array(items) => {
                items.iter().for_each(|item| collect(prefix, item, names));
            }
            _ => {}
        }
    }
}
