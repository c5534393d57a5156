//! A volunteer's computer: the real volunteer, its speed, its connection and its fate.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_core::swarm::coordinator;
use manyhands_core::swarm::ids::{Hash, PeerKey, Secret, Signature};
use manyhands_core::swarm::ledger::receipt_message;
use manyhands_core::swarm::protocol::{Refusal, Request};
use manyhands_core::swarm::unit::Unit;
use manyhands_core::swarm::volunteer::{Effect, Event, Volunteer};

use super::attacks::{Attack, Upload};
use super::random::Random;
use super::world::{Happening, World};

/// What a volunteer is like.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Multiply-adds a second.
    pub speed: f64,
    /// Mean delay of a message, one way.
    pub latency_ms: u64,
    /// Share of the messages that are lost.
    pub loss: f64,
    /// Mean time between two strokes of fate; 0 for a steady volunteer.
    pub churn_ms: u64,
    /// When it comes.
    pub joins_ms: u64,
    /// What it does to the run; nothing, if it is honest.
    pub attack: Option<Attack>,
}

impl Default for Profile {
    fn default() -> Self {
        Self { speed: 3e6, latency_ms: 10, loss: 0.0, churn_ms: 0, joins_ms: 0, attack: None }
    }
}

impl Profile {
    /// Anybody: speeds over 20x, and latency, loss and churn in proportion to `trouble`.
    pub fn random(random: &mut Random, trouble: f64) -> Self {
        let churns = random.chance(trouble);
        Self {
            speed: random.between(5e5, 1e7),
            latency_ms: random.between(1.0, 1.0 + 200.0 * trouble) as u64,
            loss: 0.03 * trouble * random.unit(),
            churn_ms: if churns { 1500 + random.below(6000) } else { 0 },
            joins_ms: random.below(1 + (3000.0 * trouble) as u64),
            attack: None,
        }
    }
}

/// A computer.
pub struct Machine {
    /// What it is like.
    pub profile: Profile,
    /// The program, while it runs.
    pub volunteer: Option<Volunteer>,
    /// The connection at hand; older ones are dead.
    pub link: u64,
    /// Uploads that the coordinator waits for: receipt and size.
    pub expected: BTreeMap<Hash, (Hash, u64)>,
    /// Units that it was told are in the ledger.
    pub accepted: u64,
    /// Why it is not served.
    pub refused: Option<Refusal>,
    /// False results that it announced as its own work.
    pub lies: u64,
    /// Requests that it sent, newest last, while it replays them.
    pub sent: Vec<Request>,
    /// Whether it heard that the run is complete.
    pub finished: bool,
    secret: Secret,
    weights: BTreeSet<Hash>,
    wake_ms: Option<u64>,
}

impl Machine {
    /// A computer whose program does not run yet.
    pub fn new(seed: u64, index: usize, profile: Profile) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(index as u64).to_le_bytes());
        Self {
            profile,
            volunteer: None,
            link: 0,
            expected: BTreeMap::new(),
            accepted: 0,
            refused: None,
            lies: 0,
            sent: Vec::new(),
            finished: false,
            secret: Secret::from_seed(&key),
            weights: BTreeSet::new(),
            wake_ms: None,
        }
    }

    /// Who it is.
    pub fn key(&self) -> PeerKey {
        self.secret.key()
    }

    /// Signs a receipt.
    pub fn sign(&self, run: &Hash, unit: &Hash, receipt: &Hash, bytes: u64) -> Signature {
        self.secret.sign(&receipt_message(run, unit, receipt, bytes))
    }

    /// For people.
    pub fn describe(&self) -> String {
        let held = self.volunteer.as_ref().map(Volunteer::held_count);
        format!("{:?}: holds {held:?}, refused {:?}, {:?}", self.key(), self.refused, self.profile)
    }
}

impl World<'_> {
    /// The program starts.
    pub(super) fn start_program(&mut self, i: usize) {
        let claimed = self.random.between(0.5, 2.0) * self.machines[i].profile.speed;
        let machine = &mut self.machines[i];
        let (agent, engine) = ("simulated".into(), "cpu".into());
        let volunteer =
            Volunteer::new(machine.secret.clone(), agent, engine, claimed, Self::peers());
        machine.volunteer = Some(volunteer);
        machine.weights.clear();
        self.schedule_churn(i);
        self.hear(i, Event::Tick);
    }

    fn schedule_churn(&mut self, i: usize) {
        let mean = self.machines[i].profile.churn_ms;
        if mean > 0 {
            let delay = self.random.below(2 * mean);
            self.after(delay, Happening::Churn(i));
        }
    }

    /// A broken connection, a closed program, or one that falls silent without a word.
    pub(super) fn churn(&mut self, i: usize) {
        if self.machines[i].volunteer.is_none() {
            return;
        }
        let fate = self.random.below(3);
        if fate == 0 {
            self.break_link(i);
            return self.schedule_churn(i);
        }
        let link = self.machines[i].link;
        self.machines[i].volunteer = None;
        self.machines[i].link = link + 1;
        if fate == 1 {
            self.after(1, Happening::Gone(i, link + 1));
        }
        let pause = self.random.below(4000);
        self.after(100 + pause, Happening::Return(i));
    }

    /// Ends the connection for both sides.
    pub(super) fn break_link(&mut self, i: usize) {
        let latency = self.latency(i);
        self.machines[i].link += 1;
        let link = self.machines[i].link;
        self.after(1, Happening::Gone(i, link));
        self.after(latency, Happening::Hear(i, Some(link), Event::Lost));
    }

    /// Tells a volunteer, and carries out what it wants.
    pub(super) fn hear(&mut self, i: usize, event: Event) {
        let now_ms = self.now_ms;
        let machine = &mut self.machines[i];
        machine.wake_ms = machine.wake_ms.filter(|at| *at > now_ms);
        let Some(volunteer) = &mut machine.volunteer else { return };
        for effect in volunteer.handle(now_ms, event) {
            self.volunteer_wants(i, effect);
        }
        let machine = &mut self.machines[i];
        let Some(volunteer) = &machine.volunteer else { return };
        let wake_ms = volunteer.wake_ms().max(now_ms + 1);
        if !machine.finished
            && machine.refused.is_none()
            && machine.wake_ms.is_none_or(|at| at > wake_ms)
        {
            machine.wake_ms = Some(wake_ms);
            self.after(wake_ms - now_ms, Happening::Wake(i));
        }
    }

    fn volunteer_wants(&mut self, i: usize, effect: Effect) {
        match effect {
            Effect::Connect(_) => {
                let latency = 2 * self.latency(i);
                self.machines[i].link += 1;
                let link = self.machines[i].link;
                self.after(latency, Happening::Hear(i, Some(link), Event::Connected));
            }
            Effect::Ask(request) => self.send(i, &request),
            Effect::Load { want, base, blobs } => {
                let loaded = self.load(i, want, base, &blobs);
                let latency = 2 * self.latency(i);
                let event = Event::Weights { hash: want, loaded };
                self.after(latency, Happening::Hear(i, None, event));
            }
            Effect::Forget(hash) => drop(self.machines[i].weights.remove(&hash)),
            Effect::Compute { hash, unit } => self.compute(i, hash, &unit),
            Effect::Upload { unit, bytes } => {
                let delay = self.latency(i) + bytes.len() as u64 / 10_000;
                let lost = self.random.chance(self.machines[i].profile.loss);
                let link = self.machines[i].link;
                let (bytes, delay) = match self.tampered(i, bytes) {
                    Upload::Bytes(bytes) => ((!lost).then_some(bytes), delay),
                    Upload::Drips => (None, delay + 400),
                };
                self.after(delay, Happening::Upload(i, link, unit, bytes));
            }
            Effect::Accepted { .. } => self.machines[i].accepted += 1,
            Effect::Finished => self.machines[i].finished = true,
            Effect::Refused(refusal) => self.machines[i].refused = Some(refusal),
            Effect::Keep { .. } | Effect::Model(_) => {}
        }
    }

    fn send(&mut self, i: usize, request: &Request) {
        let link = self.machines[i].link;
        let latency = self.latency(i);
        let Some(bytes) = self.forged(i, request) else { return };
        if self.random.chance(self.machines[i].profile.loss) {
            let lost = Event::Answer(None);
            return self.after(1500, Happening::Hear(i, Some(link), lost));
        }
        self.after(latency, Happening::Request(i, link, bytes));
    }

    /// Weights from blobs that the coordinator keeps, on top of what the machine has.
    fn load(&mut self, i: usize, want: Hash, base: Option<Hash>, blobs: &[Hash]) -> bool {
        let has = base.is_none_or(|b| self.machines[i].weights.contains(&b));
        assert!(has, "the base of a version is something that the volunteer has");
        let mut at = base;
        for blob in blobs {
            let bytes = &self.store.blobs[blob];
            let (from, to) = manyhands_core::swarm::delta::hashes(bytes).expect("a version");
            assert!(from.is_none() || from == at, "versions follow each other");
            at = Some(to);
            self.lab.apply(bytes);
        }
        assert_eq!(at, Some(want), "the plan leads to what was wanted");
        self.machines[i].weights.insert(want);
        true
    }

    fn compute(&mut self, i: usize, hash: Hash, unit: &Unit) {
        assert!(self.machines[i].weights.contains(&unit.weights), "computed without its weights");
        if let Some(adapter) = &self.lab.model.adapter {
            assert!(self.machines[i].weights.contains(&adapter.base), "adapts what it has not");
        }
        let output = self.lab.compute(unit);
        let cost = unit.work.multiply_adds(&output, &self.lab.model);
        let jitter = self.random.between(0.7, 1.4);
        let took_ms = 1 + (cost as f64 / self.machines[i].profile.speed * 1e3 * jitter) as u64;
        let Some(bytes) = self.result(i, hash, unit, output) else { return };
        let event = Event::Computed { unit: hash, bytes };
        self.after(took_ms, Happening::Hear(i, None, event));
    }

    /// What the coordinator thinks of a machine.
    pub fn is_trusted(&self, i: usize) -> bool {
        let key = self.machines[i].key();
        let scheduler = self.coordinator.as_ref().map(coordinator::Coordinator::scheduler);
        scheduler.is_some_and(|s| s.is_trusted(&key))
    }
}
