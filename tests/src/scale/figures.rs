//! What a simulated swarm came to.

use std::fmt;

use super::bytes::PARAMETERS;

/// Sums of a simulation; multiply-adds unless they say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Steps done.
    pub steps: u64,
    /// Simulated seconds.
    pub seconds: f64,
    /// Seconds of the second half.
    pub late_seconds: f64,
    /// Work that entered the run.
    pub useful: f64,
    /// Audits by volunteers and by the coordination peer.
    pub audited: f64,
    /// Results that nobody needed: backups that lost, leases that had lapsed, false results.
    pub wasted: f64,
    /// Seconds in which honest volunteers were present.
    pub present_seconds: f64,
    /// Seconds in which they computed.
    pub busy_seconds: f64,
    /// The same two, in the second half of the run.
    pub late_present_seconds: f64,
    /// See above.
    pub late_busy_seconds: f64,
    /// Useful work of the second half.
    pub late_useful: f64,
    /// Audits of the second half.
    pub late_audited: f64,
    /// Requests to the coordination peer, each of which has one answer.
    pub messages: u64,
    /// Bytes of both, without units.
    pub message_bytes: u64,
    /// Bytes of units.
    pub unit_bytes: u64,
    /// Bytes of results.
    pub result_bytes: u64,
    /// Bytes of versions.
    pub version_bytes: u64,
    /// What happened in the simulation.
    pub events: u64,
    /// Units that were accepted.
    pub units: u64,
    /// Audits by the coordination peer itself.
    pub own_audits: u64,
    /// Units given out a second time.
    pub backups: u64,
    /// Leases that lapsed.
    pub lapsed: u64,
    /// False units that entered before their volunteer was caught.
    pub false_units: u64,
    /// Cheats that were expelled.
    pub expelled: u64,
    /// Honest volunteers that were expelled.
    pub honest_expelled: u64,
    /// Volunteers that are trusted at the end.
    pub trusted: u64,
}

impl Figures {
    /// Share of their presence in which honest volunteers computed: all, and in the second half.
    pub fn utilisation(&self) -> (f64, f64) {
        let late = self.late_busy_seconds / self.late_present_seconds.max(1.0);
        (self.busy_seconds / self.present_seconds.max(1.0), late)
    }

    /// Audits relative to useful work: all, and in the second half.
    pub fn overhead(&self) -> (f64, f64) {
        let late = self.late_audited / self.late_useful.max(1.0);
        (self.audited / self.useful.max(1.0), late)
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (utilisation, late_utilisation) = self.utilisation();
        let (overhead, late_overhead) = self.overhead();
        let steps = self.steps.max(1) as f64;
        writeln!(
            f,
            "steps            {} in {:.0} s, {:.1} s each, second half {:.1} s",
            self.steps,
            self.seconds,
            self.seconds / steps,
            self.late_seconds / (self.steps - self.steps / 2).max(1) as f64
        )?;
        writeln!(
            f,
            "utilisation      {:.1}%, second half {:.1}%",
            100.0 * utilisation,
            100.0 * late_utilisation
        )?;
        writeln!(
            f,
            "verification     {:.1}%, second half {:.1}%",
            100.0 * overhead,
            100.0 * late_overhead
        )?;
        writeln!(
            f,
            "wasted           {:.2}% of useful work",
            100.0 * self.wasted / self.useful.max(1.0)
        )?;
        writeln!(
            f,
            "units            {} accepted, {} backups, {} lapsed leases, {} own audits",
            self.units, self.backups, self.lapsed, self.own_audits
        )?;
        let a_step = |x: u64| x as f64 / steps;
        let units = self.units.max(1) as f64;
        writeln!(
            f,
            "throughput       {:.3e} multiply-adds a second, {:.0} units a second",
            self.useful / self.seconds.max(1.0),
            units / self.seconds.max(1.0)
        )?;
        writeln!(
            f,
            "messages         {:.0} a step, {:.2} a unit, {:.0} a second",
            a_step(self.messages),
            self.messages as f64 / units,
            self.messages as f64 / self.seconds.max(1.0)
        )?;
        writeln!(
            f,
            "bytes a step     messages {:.3e}, units {:.3e}, results {:.3e}, versions {:.3e} ({} M parameters)",
            a_step(self.message_bytes),
            a_step(self.unit_bytes),
            a_step(self.result_bytes),
            a_step(self.version_bytes),
            PARAMETERS / 1_000_000
        )?;
        write!(
            f,
            "cheats           {} expelled ({} honest), {} false units entered, {} trusted",
            self.expelled, self.honest_expelled, self.false_units, self.trusted
        )
    }
}
