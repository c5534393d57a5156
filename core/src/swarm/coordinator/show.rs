//! What a coordinator shows of itself.

use std::collections::{BTreeMap, VecDeque};

use super::Coordinator;
use crate::conformance::suite::DIGEST;
use crate::run::report::StepReport;
use crate::run::state::Evaluation;
use crate::swarm::status::{
    RunState, Standing, Status, Throughput, UnitCounts, VerificationStatus, VersionStatus,
    VolunteerStatus, clean_agent,
};
use crate::swarm::trust::survival;

/// Window of the rates.
const WINDOW_MS: u64 = 60_000;
/// Events in the window of a rate.
const WINDOW_MAX: usize = 10_000;
/// Units that the survival of a cheat is stated for.
const SURVIVAL_UNITS: u64 = 100;

/// Running sums.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub messages: u64,
    pub lease_bytes: u64,
    pub result_bytes: u64,
    pub version_bytes: u64,
    pub useful: u64,
    pub own_audit: u64,
    pub delegated_audit: u64,
    pub audited: u64,
    pub invalid: u64,
    pub evaluation: Option<Evaluation>,
    last_step: Option<(StepReport, u64)>,
    accepted: VecDeque<(u64, u64)>,
    steps: VecDeque<(u64, u64)>,
}

impl Figures {
    pub(super) fn accepted(&mut self, multiply_adds: u64, now_ms: u64) {
        self.useful += multiply_adds;
        push(&mut self.accepted, now_ms, multiply_adds);
    }

    pub(super) fn step(&mut self, report: &StepReport, now_ms: u64) {
        push(&mut self.steps, now_ms, report.trained_tokens + report.sampled_tokens);
        self.last_step = Some((report.clone(), now_ms));
    }
}

fn push(window: &mut VecDeque<(u64, u64)>, now_ms: u64, value: u64) {
    window.push_back((now_ms, value));
    while window.len() > WINDOW_MAX || window.front().is_some_and(|w| w.0 + WINDOW_MS < now_ms) {
        window.pop_front();
    }
}

/// Count and sum a second over the window.
fn rate(window: &VecDeque<(u64, u64)>, now_ms: u64) -> (f64, f64) {
    let Some((first, _)) = window.front() else { return (0.0, 0.0) };
    let seconds = (now_ms.saturating_sub(*first)).max(1000) as f64 / 1e3;
    let sum: u64 = window.iter().map(|w| w.1).sum();
    (window.len() as f64 / seconds, sum as f64 / seconds)
}

fn fraction(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl Coordinator {
    /// What dashboards show; addresses and connections are the caller's to fill in.
    pub fn status(&self, now_ms: u64) -> Status {
        let figures = &self.figures;
        let (units, work) = rate(&figures.accepted, now_ms);
        let (steps, tokens) = rate(&figures.steps, now_ms);
        let ordinal = self.pipeline.ordinal();
        let total = self.pipeline.config.steps();
        let version = self.pipeline.version();
        let last = figures.last_step.as_ref();
        let remaining = (steps > 0.0).then(|| ((total - ordinal) as f64 / steps) as u64);
        Status {
            run: self.run.to_string(),
            name: self.pipeline.config.name.clone(),
            state: match (self.closed, self.halted, self.paused) {
                (true, ..) => RunState::Done,
                (_, true, _) => RunState::Failed,
                (_, _, true) => RunState::Paused,
                _ => RunState::Running,
            },
            phase: Some(self.pipeline.state().phase),
            ordinal,
            steps: total,
            weights: version.hash().to_hex().to_string(),
            parameters: self.pipeline.model().parameter_count() as u64,
            policy_version: self.pipeline.state().optimizer.update_count,
            digest: DIGEST.into(),
            coordinator: self.writer.coordinator().to_string(),
            ledger_records: self.writer.sequence(),
            volunteers: self.volunteer_status(now_ms),
            units: self.unit_counts(),
            verification: self.verification_status(),
            throughput: Throughput {
                multiply_adds_per_second: work,
                tokens_per_second: tokens,
                units_per_minute: units * 60.0,
                steps_per_hour: steps * 3600.0,
            },
            versions: VersionStatus {
                newest_ordinal: ordinal,
                final_ordinal: self.final_ordinal,
                provisional: ordinal.saturating_sub(self.final_ordinal),
                rolled_back: 0,
            },
            bytes: BTreeMap::from([
                ("units".into(), figures.lease_bytes),
                ("results".into(), figures.result_bytes),
                ("versions".into(), figures.version_bytes),
            ]),
            last_step: last.map(|(report, _)| report.clone()),
            last_evaluation: figures.evaluation.clone(),
            uptime_s: (now_ms - self.started_ms) / 1000,
            since_last_step_s: last.map(|(_, at)| (now_ms - at) / 1000),
            remaining_s: remaining,
            ..Status::default()
        }
    }

    fn volunteer_status(&self, now_ms: u64) -> Vec<VolunteerStatus> {
        let policy = &self.pipeline.config.swarm;
        let status = |(peer, v): (&_, &crate::swarm::scheduler::Volunteer)| {
            let session = self.sessions.get(peer);
            let standing = &v.standing;
            VolunteerStatus {
                peer: format!("{peer}"),
                standing: match standing.expelled {
                    Some(_) => Standing::Expelled,
                    None if standing.is_trusted(policy) => Standing::Trusted,
                    None => Standing::Newcomer,
                },
                agent: session.map(|s| clean_agent(&s.agent)).unwrap_or_default(),
                engine: session.map(|s| clean_agent(&s.engine)).unwrap_or_default(),
                speed: v.speed[2],
                units: standing.accepted,
                audited: standing.audited,
                lapsed: u64::from(v.lapses),
                streak: u64::from(standing.valid_in_a_row),
                audit_probability: standing.audit_probability(policy),
                credit: standing.credit,
                provisional_credit: standing.provisional_credit,
                leases: v.lease_count() as u32,
                connected: v.is_present,
                last_seen_s: now_ms.saturating_sub(v.seen_ms) / 1000,
                joined_s: session.map_or(0, |s| now_ms.saturating_sub(s.joined_ms) / 1000),
                expelled_for: standing.expelled,
                ..VolunteerStatus::default()
            }
        };
        let mut volunteers: Vec<_> = self.scheduler.volunteers().iter().map(status).collect();
        volunteers.sort_by(|a: &VolunteerStatus, b| a.peer.cmp(&b.peer));
        volunteers
    }

    fn unit_counts(&self) -> UnitCounts {
        let counts = &self.scheduler.counts;
        let held = self.units.values().filter(|u| u.held.is_some()).count() as u64;
        let volunteers = self.scheduler.volunteers().values();
        UnitCounts {
            leased: volunteers.clone().map(|v| v.lease_count() as u64).sum(),
            awaiting_audit: held,
            accepted: volunteers.map(|v| v.standing.accepted).sum(),
            audited: self.figures.audited,
            invalid: self.figures.invalid,
            reissued: counts.reissued,
            backup: counts.backups,
            ..UnitCounts::default()
        }
    }

    fn verification_status(&self) -> VerificationStatus {
        let figures = &self.figures;
        let policy = &self.pipeline.config.swarm;
        let volunteers = self.scheduler.volunteers().values();
        let spent = figures.own_audit + figures.delegated_audit;
        VerificationStatus {
            audited_work_fraction: fraction(spent, figures.useful).min(1.0),
            overhead_fraction: fraction(spent, figures.useful),
            audit_probability_min: policy.audit_probability_min,
            trust_after_units: u64::from(policy.newcomer_audits),
            survival_probability: survival(policy, 1.0, SURVIVAL_UNITS),
            survival_units: SURVIVAL_UNITS,
            audits: figures.audited,
            audits_failed: figures.invalid,
            audits_by_volunteers: self.scheduler.counts.delegated_audits,
            expelled: volunteers.filter(|v| v.standing.expelled.is_some()).count() as u64,
            ..VerificationStatus::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_of_a_rate_is_bounded_in_time_and_count() {
        let mut window = VecDeque::new();
        (0..WINDOW_MAX as u64 + 50).for_each(|i| push(&mut window, 1000, i));
        assert_eq!(window.len(), WINDOW_MAX);
        assert_eq!(window.front(), Some(&(1000, 50)));
        push(&mut window, 1001 + WINDOW_MS, 7);
        assert_eq!(window.len(), 1);
    }
}
