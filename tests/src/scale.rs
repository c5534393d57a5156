//! Thousands to millions of volunteers against the real scheduler and trust, in simulated time.
//! Units are counted instead of executed; everything else that decides who gets what is the
//! coordination peer's own code. Roll-backs are counted, not carried out.

mod agenda;
mod bytes;
mod figures;
mod results;
mod volunteers;
mod world;

use manyhands_core::run::config::SwarmSection;

pub use figures::Figures;

/// A swarm to simulate.
#[derive(Clone, Debug)]
pub struct Scale {
    /// Volunteers, present or not.
    pub volunteers: usize,
    /// Steps after which it ends.
    pub steps: u64,
    /// Steps that rollouts are ahead of gradients.
    pub policy_lag: u64,
    /// Seconds that a step would take a swarm without any loss.
    pub step_seconds: f64,
    /// Share of volunteers that cheat: half of them always, half 5% of the time once trusted.
    pub cheats: f64,
    /// Share of volunteers, but for those that always cheat, that have been trusted for long: a
    /// swarm that has grown, instead of one that is new.
    pub veterans: f64,
    /// Mean seconds for which a volunteer stays; 0 for ever.
    pub stay_seconds: f64,
    /// Mean seconds for which it stays away.
    pub away_seconds: f64,
    /// What the run file says of work and its verification.
    pub policy: SwarmSection,
    /// Seed of everything.
    pub seed: u64,
}

impl Scale {
    /// A lively swarm of this size.
    pub fn new(volunteers: usize, steps: u64, policy_lag: u64) -> Self {
        Self {
            volunteers,
            steps,
            policy_lag,
            step_seconds: 120.0,
            cheats: 0.1,
            veterans: 0.0,
            stay_seconds: 3600.0,
            away_seconds: 300.0,
            policy: SwarmSection::default(),
            seed: 1,
        }
    }

    /// Runs to the end.
    pub fn simulate(&self) -> Figures {
        world::World::new(self).run()
    }
}
