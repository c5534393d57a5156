//! `/metrics`: the status as `OpenMetrics` text, for Prometheus.

use std::sync::atomic::AtomicU64;

use manyhands_core::swarm::status::{RunState, Standing, Status};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// What `/metrics` is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = [(&'static str, String); 1];
type FloatGauge = Gauge<f64, AtomicU64>;

/// The status as `OpenMetrics` text. Volunteers are counted, not listed: their number is for the
/// status page, and a series for each would never end.
pub fn metrics_text(status: &Status) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("manyhands");
    let info = [("run", status.run.clone()), ("name", status.name.clone())];
    registry.register("run", "The run that is coordinated", Info::new(info.to_vec()));
    gauges(&mut registry, status);
    counters(&mut registry, status);
    families(&mut registry, status);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[expect(clippy::cast_precision_loss, reason = "a chart needs no more than 53 bits")]
fn gauges(registry: &mut Registry, s: &Status) {
    let v = &s.verification;
    let t = &s.throughput;
    let reward = s.last_step.as_ref().and_then(|step| step.rl.as_ref()).map(|rl| rl.reward);
    let pass = s.last_evaluation.as_ref().and_then(|e| {
        let (_, first) = e.report.overall.pass_at_k.first_key_value()?;
        Some(first.mean)
    });
    let connected = s.volunteers.iter().filter(|v| v.connected).count();
    let values = [
        ("steps_done", "Steps of all phases that are done", Some(s.ordinal as f64)),
        ("steps_planned", "Steps in the run file", Some(s.steps as f64)),
        ("policy_version", "Optimizer updates so far", Some(s.policy_version as f64)),
        ("final_steps", "Steps that stand for good", Some(s.versions.final_ordinal as f64)),
        ("provisional_versions", "Versions not final yet", Some(s.versions.provisional as f64)),
        ("volunteers_connected", "Open connections to volunteers", Some(connected as f64)),
        ("units_waiting", "Units ready to be handed out", Some(s.units.waiting as f64)),
        ("units_leased", "Units held by volunteers", Some(s.units.leased as f64)),
        ("units_awaiting_audit", "Results held back", Some(s.units.awaiting_audit as f64)),
        ("audited_work_ratio", "Share of work computed again", Some(v.audited_work_fraction)),
        ("audit_overhead_ratio", "Audit work by useful work", Some(v.overhead_fraction)),
        ("cheat_survival_ratio", "Chance of a cheat to survive", Some(v.survival_probability)),
        ("multiply_adds_per_second", "Accepted work", Some(t.multiply_adds_per_second)),
        ("tokens_per_second", "Tokens sampled and trained on", Some(t.tokens_per_second)),
        ("uptime_seconds", "Since the program started", Some(s.uptime_s as f64)),
        ("last_step_age_seconds", "Since the last step", s.since_last_step_s.map(|n| n as f64)),
        ("reward_mean", "Mean strict reward of the last step", reward),
        ("pass_rate", "pass@k of the last evaluation, smallest k", pass),
    ];
    for (name, help, value) in values {
        let Some(value) = value else { continue };
        let gauge = FloatGauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    }
}

fn counters(registry: &mut Registry, s: &Status) {
    let v = &s.verification;
    for (name, help, value) in [
        ("units_accepted", "Results that entered the run", s.units.accepted),
        ("units_audited", "Results computed again and found right", s.units.audited),
        ("units_invalid", "Results found wrong", s.units.invalid),
        ("units_reissued", "Units handed out again after a lease lapsed", s.units.reissued),
        ("units_backup", "Units handed to a second volunteer", s.units.backup),
        ("units_local", "Units computed by the coordination peer", s.units.local),
        ("audits", "Audits", v.audits),
        ("audits_failed", "Audits that found a wrong result", v.audits_failed),
        ("volunteers_expelled", "Volunteers that were expelled", v.expelled),
        ("units_voided", "Accepted units that were taken out again", v.voided),
        ("rollbacks", "Times that the run went back", s.versions.rolled_back),
        ("ledger_records", "Records in the ledger", s.ledger_records),
    ] {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    }
}

fn families(registry: &mut Registry, status: &Status) {
    let volunteers: Family<Labels, Gauge> = Family::default();
    for (name, standing) in [
        ("newcomer", Standing::Newcomer),
        ("trusted", Standing::Trusted),
        ("expelled", Standing::Expelled),
    ] {
        let count = status.volunteers.iter().filter(|v| v.standing == standing).count();
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        volunteers.get_or_create(&[("standing", name.into())]).set(count);
    }
    registry.register("volunteers", "Volunteers by standing", volunteers);

    let states: Family<Labels, Gauge> = Family::default();
    for (name, state) in [
        ("running", RunState::Running),
        ("paused", RunState::Paused),
        ("done", RunState::Done),
        ("failed", RunState::Failed),
    ] {
        states.get_or_create(&[("state", name.into())]).set((status.state == state).into());
    }
    registry.register("state", "1 for the state that the run is in", states);

    let bytes: Family<Labels, Counter> = Family::default();
    for (purpose, count) in &status.bytes {
        bytes.get_or_create(&[("purpose", purpose.clone())]).inc_by(*count);
    }
    registry.register("moved_bytes", "Bytes moved, by purpose", bytes);
}
