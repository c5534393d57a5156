//! Clock, network, durable store and coordinator of a simulation. Everything that happens is an
//! entry of one queue, ordered by virtual time; all chance comes from one seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use manyhands_core::swarm::chain;

use manyhands_core::swarm::coordinator::{
    Arrival, Coordinator, Effect, Event, Execution, Files, Start,
};
use manyhands_core::swarm::ids::{Hash, PeerKey, Secret};
use manyhands_core::swarm::ledger::Entry;
use manyhands_core::swarm::protocol::{PeerAddress, Request, Response};
use manyhands_core::swarm::scheduler::TaskId;
use manyhands_core::swarm::unit::{Unit, decode_output, encode_output};
use manyhands_core::swarm::volunteer;

use super::lab::Lab;
use super::machine::{Machine, Profile};
use super::mirror::Mirror;
use super::random::Random;

/// Pause between two ticks of the coordinator.
const TICK_MS: u64 = 200;
/// How long a volunteer waits for an answer that was lost.
const TIMEOUT_MS: u64 = 1500;
/// Multiply-adds a second of the coordinator's own engine.
const OWN_SPEED: f64 = 4e6;
/// States that are kept.
const SNAPSHOTS: usize = 2;

/// What survives a crash.
#[derive(Default)]
pub struct Store {
    /// Blobs by hash.
    pub blobs: BTreeMap<Hash, Vec<u8>>,
    /// The ledger.
    pub records: Vec<Vec<u8>>,
    /// States by step.
    pub snapshots: BTreeMap<u64, Files>,
}

/// Something in the queue. Machines are named by index; `link` tells connections apart.
pub enum Happening {
    /// The coordinator hears of the time.
    Tick,
    /// A volunteer does.
    Wake(usize),
    /// A volunteer hears something; what belongs to an older connection is dropped.
    Hear(usize, Option<u64>, volunteer::Event),
    /// A request reaches the coordinator.
    Request(usize, u64, Vec<u8>),
    /// The last byte of an upload reaches the coordinator; `None` if it broke off.
    Upload(usize, u64, Hash, Option<Vec<u8>>),
    /// A connection breaks, and the coordinator notices.
    Gone(usize, u64),
    /// Fate strikes a volunteer.
    Churn(usize),
    /// A program starts again.
    Return(usize),
    /// A request whose answer nobody wants.
    Inject(usize, Request),
    /// The own engine is done.
    Executed(u64, TaskId, Hash),
}

/// Why effects were not carried out to the end.
enum Outage {
    Crash,
    Restart,
}

/// A swarm.
pub struct World<'a> {
    /// Run file and arithmetic.
    pub lab: &'a mut Lab,
    /// All chance.
    pub random: Random,
    /// Virtual time.
    pub now_ms: u64,
    /// What is durable.
    pub store: Store,
    /// The coordinator, while it runs.
    pub coordinator: Option<Coordinator>,
    /// Volunteers.
    pub machines: Vec<Machine>,
    /// Effects carried out so far.
    pub effects: u64,
    /// Crashes to come: after so many effects.
    pub crashes: VecDeque<u64>,
    /// Whether a crash leaves a part of what was being written: blobs, and the first records.
    pub is_torn: bool,
    /// Records that were in the ledger at each crash.
    pub crashed_at: Vec<usize>,
    /// Roll-backs so far.
    pub restarts: u64,
    /// Weights that the coordinator closed the run with.
    pub closed: Option<Hash>,
    /// Versions in the order in which they were published.
    pub history: Vec<Hash>,
    /// Units that colluders lied about, all in the same way.
    pub shared_lies: BTreeSet<Hash>,
    /// The newest honest result of each kind of work.
    pub newest: BTreeMap<&'static str, Vec<u8>>,
    /// Multiply-adds a second of the coordinator's own engine.
    pub own_speed: f64,
    /// Samples given out that were in the ledger already.
    pub computed_again: u64,
    /// A follower, which goes on when the coordinator crashes.
    pub mirror: Option<Mirror>,
    /// Who coordinates.
    secret: Secret,
    queue: BTreeMap<(u64, u64), Happening>,
    next: u64,
    /// Incarnation of the coordinator.
    incarnation: u64,
    /// Requests that wait for an answer: machine and connection.
    tokens: BTreeMap<u64, (usize, u64)>,
    sampled: BTreeSet<Hash>,
}

impl<'a> World<'a> {
    /// A coordinator that starts a run, and volunteers that will come.
    pub fn new(lab: &'a mut Lab, seed: u64, profiles: Vec<Profile>) -> Self {
        let machine = |(i, p): (usize, Profile)| Machine::new(seed, i, p);
        let mut world = Self {
            lab,
            random: Random::new(seed),
            now_ms: 0,
            store: Store::default(),
            coordinator: None,
            machines: profiles.into_iter().enumerate().map(machine).collect(),
            effects: 0,
            crashes: VecDeque::new(),
            is_torn: false,
            crashed_at: Vec::new(),
            restarts: 0,
            closed: None,
            history: Vec::new(),
            shared_lies: BTreeSet::new(),
            newest: BTreeMap::new(),
            own_speed: OWN_SPEED,
            computed_again: 0,
            mirror: None,
            secret: Self::secret(),
            queue: BTreeMap::new(),
            next: 0,
            incarnation: 0,
            tokens: BTreeMap::new(),
            sampled: BTreeSet::new(),
        };
        world.after(0, Happening::Tick);
        for i in 0..world.machines.len() {
            let joins_ms = world.machines[i].profile.joins_ms;
            world.after(joins_ms, Happening::Return(i));
        }
        world
    }

    /// Puts something into the queue.
    pub fn after(&mut self, delay_ms: u64, happening: Happening) {
        self.queue.insert((self.now_ms + delay_ms, self.next), happening);
        self.next += 1;
    }

    /// Lets somebody follow, who will be promoted when the coordinator crashes.
    pub fn follow(&mut self, mirror: Mirror) {
        self.mirror = Some(mirror);
    }

    /// The follower makes itself known.
    fn introduce(&mut self) {
        let Some(peer) = self.mirror.as_ref().map(|m| m.secret.key()) else { return };
        self.next += 1;
        let request = Request::Follow { token: "token".into(), addresses: Vec::new() };
        self.coordinate(Event::Request { peer, token: self.next, request });
    }

    /// The coordinator is lost for good: the follower goes on with what it has.
    fn promote(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        if !mirror.store.records.iter().any(|r| names(r, &mirror.secret.key())) {
            return;
        }
        self.secret = mirror.secret.clone();
        self.store = std::mem::take(&mut mirror.store);
        self.mirror = None;
        self.sampled.clear();
    }

    /// Who coordinates first.
    pub fn secret() -> Secret {
        Secret::from_seed(&[77; 32])
    }

    /// Where the coordinator is reached.
    pub fn peers() -> Vec<PeerAddress> {
        vec![PeerAddress { peer: Self::secret().key(), addresses: Vec::new() }]
    }

    /// Lets time pass until the run is closed.
    ///
    /// # Panics
    /// If it is not by `limit_ms`: nobody makes progress.
    pub fn run(&mut self, limit_ms: u64) -> Hash {
        self.recover();
        self.introduce();
        loop {
            if let Some(weights) = self.closed {
                return weights;
            }
            let ((at, _), happening) = self.queue.pop_first().expect("the clock always ticks");
            self.now_ms = at;
            assert!(at <= limit_ms, "no end by {limit_ms} ms: {}", self.describe());
            self.happen(happening);
        }
    }

    fn describe(&self) -> String {
        let Some(c) = &self.coordinator else { return "no coordinator".into() };
        let jobs: Vec<_> = c.pipeline().jobs().map(|j| j.job.path).collect();
        let held: Vec<_> = self.machines.iter().map(Machine::describe).collect();
        let status = c.status(self.now_ms);
        format!(
            "step {} of {}, jobs {jobs:?}, units {:?}, records {}, volunteers {held:#?}",
            status.ordinal,
            status.steps,
            status.units,
            self.store.records.len(),
        )
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Tick => {
                self.after(TICK_MS, Happening::Tick);
                self.coordinate(Event::Tick);
            }
            Happening::Wake(i) => self.hear(i, volunteer::Event::Tick),
            Happening::Hear(i, link, event) => {
                if link.is_none_or(|link| self.machines[i].link == link) {
                    self.hear(i, event);
                }
            }
            Happening::Request(i, link, bytes) => {
                if self.machines[i].link == link {
                    self.requested(i, link, &bytes);
                }
            }
            Happening::Inject(i, request) => {
                self.next += 1;
                let (peer, token) = (self.machines[i].key(), self.next);
                self.coordinate(Event::Request { peer, token, request });
            }
            Happening::Upload(i, link, unit, bytes) => {
                if self.machines[i].link == link {
                    self.uploaded(i, unit, bytes);
                    let latency = self.latency(i);
                    let event = volunteer::Event::Uploaded { unit };
                    self.after(latency, Happening::Hear(i, Some(link), event));
                }
            }
            Happening::Gone(i, link) => {
                if self.machines[i].link == link || self.machines[i].volunteer.is_none() {
                    self.coordinate(Event::Left { peer: self.machines[i].key() });
                }
            }
            Happening::Churn(i) => self.churn(i),
            Happening::Return(i) => self.start_program(i),
            Happening::Executed(incarnation, audit, receipt) => {
                if incarnation == self.incarnation {
                    self.coordinate(Event::Executed { audit, receipt });
                }
            }
        }
    }

    fn requested(&mut self, i: usize, link: u64, bytes: &[u8]) {
        let peer = self.machines[i].key();
        let Ok(request) = Request::decode(bytes) else {
            return self.coordinate(Event::Malformed { peer });
        };
        self.next += 1;
        let token = self.next;
        self.tokens.insert(token, (i, link));
        self.coordinate(Event::Request { peer, token, request });
    }

    fn uploaded(&mut self, i: usize, unit: Hash, bytes: Option<Vec<u8>>) {
        let Some((receipt, size)) = self.machines[i].expected.remove(&unit) else { return };
        let arrival = match bytes {
            None => Arrival::Failed,
            Some(b) if b.len() as u64 == size && Hash::of(&b) == receipt => Arrival::Whole(b),
            Some(_) => Arrival::Differs,
        };
        self.coordinate(Event::Result { peer: self.machines[i].key(), unit, arrival });
    }

    /// Tells the coordinator, and carries out what it wants; again after every crash.
    pub fn coordinate(&mut self, event: Event) {
        let Some(coordinator) = &mut self.coordinator else { return };
        let effects = coordinator.handle(self.now_ms, self.now_ms, event, &self.store.blobs);
        match self.carry_out(effects) {
            None => {}
            Some(Outage::Crash) => {
                self.crashed_at.push(self.store.records.len());
                self.incarnation += 1;
                self.tokens.clear();
                for i in 0..self.machines.len() {
                    self.machines[i].expected.clear();
                    self.break_link(i);
                }
                self.promote();
                self.recover();
            }
            Some(Outage::Restart) => {
                self.restarts += 1;
                self.incarnation += 1;
                self.recover();
            }
        }
    }

    fn recover(&mut self) {
        let config = self.lab.config.clone();
        let snapshots = self.store.snapshots.iter().rev();
        let mut files = Vec::new();
        for (name, bytes) in &self.lab.files {
            files.push((name.clone(), Hash::of(bytes)));
            self.store.blobs.insert(Hash::of(bytes), bytes.clone());
        }
        let start = Start {
            config,
            problems: self.lab.problems.clone(),
            files,
            secret: self.secret.clone(),
            audit_seed: [9; 32],
            token: "token".into(),
            ledger: &mut self.store.records.clone().into_iter(),
            snapshots: snapshots.map(|(o, files)| (*o, files.1.clone())).collect(),
            forgotten: 0,
            promote: true,
            now_ms: self.now_ms,
            wall_ms: self.now_ms,
        };
        let mut coordinator =
            Coordinator::recover(start, &self.store.blobs).expect("a store recovers");
        coordinator.set_peers(Self::peers());
        self.coordinator = Some(coordinator);
        self.coordinate(Event::Tick);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) -> Option<Outage> {
        for effect in effects {
            let restarts = matches!(effect, Effect::Restart);
            self.effects += 1;
            let crashes = self.crashes.front().is_some_and(|at| *at <= self.effects);
            match effect {
                Effect::Persist { blobs, mut records } if crashes && self.is_torn => {
                    records.truncate(self.random.below(records.len() as u64 + 1) as usize);
                    self.persist(blobs, records);
                }
                effect => self.carry(effect),
            }
            if crashes {
                self.crashes.pop_front();
                return Some(Outage::Crash);
            }
            if restarts {
                return Some(Outage::Restart);
            }
        }
        None
    }

    fn carry(&mut self, effect: Effect) {
        match effect {
            Effect::Persist { blobs, records } => self.persist(blobs, records),
            Effect::Snapshot { ordinal, files } => {
                self.store.snapshots.insert(ordinal, *files);
                while self.store.snapshots.len() > SNAPSHOTS {
                    self.store.snapshots.pop_first();
                }
            }
            Effect::DropSnapshots { after } => drop(self.store.snapshots.split_off(&(after + 1))),
            Effect::Reply { token, response } => self.reply(token, &response),
            Effect::ReplyRecords { token, from, limit } => {
                let records = self.store.records.iter().skip(from as usize).take(limit as usize);
                self.reply(token, &Response::Records(records.cloned().collect()));
            }
            Effect::Expect { peer, unit, receipt, bytes } => {
                if let Some(i) = self.machine_of(&peer) {
                    self.machines[i].expected.insert(unit, (receipt, bytes));
                }
            }
            Effect::Ban(peer) => {
                if let Some(i) = self.machine_of(&peer) {
                    self.break_link(i);
                }
            }
            Effect::Execute(execution) => self.execute(&execution),
            Effect::Announce(_) | Effect::Restart => {}
            Effect::Closed(weights) => self.closed = Some(weights),
            Effect::Failed(error) => panic!("the run failed: {error}"),
        }
    }

    fn persist(&mut self, blobs: Vec<(Hash, Vec<u8>)>, records: Vec<Vec<u8>>) {
        for (hash, bytes) in blobs {
            assert_eq!(hash, Hash::of(&bytes), "blobs are named by their hash");
            self.store.blobs.insert(hash, bytes);
        }
        for bytes in records {
            match chain::decode(&bytes).expect("the coordinator writes records").entry {
                Entry::Open { weights, full: blob, .. }
                | Entry::Version { weights, delta: blob, .. } => {
                    assert_eq!(self.lab.apply(&self.store.blobs[&blob]), weights);
                    self.history.push(weights);
                }
                Entry::Unit(unit) => drop(self.sampled.insert(unit.unit)),
                Entry::Voided { unit, .. } => drop(self.sampled.remove(&unit)),
                _ => {}
            }
            self.store.records.push(bytes);
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.catch_up(self.lab, &self.store);
        }
    }

    fn reply(&mut self, token: u64, response: &Response) {
        if let Response::Unit { unit, .. } = response {
            let samples = Unit::decode(unit, &self.lab.model)
                .is_ok_and(|u| matches!(u.work, manyhands_core::run::work::Work::Sample { .. }));
            self.computed_again += u64::from(samples && self.sampled.contains(&Hash::of(unit)));
        }
        let Some((i, link)) = self.tokens.remove(&token) else { return };
        let response = Response::decode(&response.encode()).expect("an answer is a message");
        let lost = self.random.chance(self.machines[i].profile.loss);
        let delay = if lost { TIMEOUT_MS } else { self.latency(i) };
        let event = volunteer::Event::Answer((!lost).then_some(response));
        self.after(delay, Happening::Hear(i, Some(link), event));
    }

    fn execute(&mut self, execution: &Execution) {
        let unit = &self.store.blobs[&execution.unit];
        let unit = Unit::decode(unit, &self.lab.model).expect("an accepted unit is a unit");
        assert_eq!(unit.weights, execution.weights, "an execution names the weights of its unit");
        let claimed = &self.store.blobs[&execution.result];
        let claimed = decode_output(claimed, &unit.work, &self.lab.model);
        let claimed = claimed.expect("a result that is audited was decoded before");
        let work = unit.work.audit(&claimed);
        let output = self.lab.compute(&Unit { weights: unit.weights, work });
        let cost = unit.work.multiply_adds(&output, &self.lab.model);
        let delay = 1 + (cost as f64 / self.own_speed * 1e3) as u64;
        let receipt = Hash::of(&encode_output(&output));
        self.after(delay, Happening::Executed(self.incarnation, execution.audit, receipt));
    }

    /// The machine of an identity.
    pub fn machine_of(&self, peer: &PeerKey) -> Option<usize> {
        self.machines.iter().position(|m| m.key() == *peer)
    }

    /// One way, with jitter, so that messages of different volunteers overtake each other.
    pub fn latency(&mut self, i: usize) -> u64 {
        let latency = self.machines[i].profile.latency_ms;
        1 + latency / 2 + self.random.below(latency + 1)
    }
}

/// Whether a record names this follower.
fn names(record: &[u8], follower: &PeerKey) -> bool {
    let entry = chain::decode(record).expect("a record").entry;
    matches!(entry, Entry::Follower { coordinator } if coordinator == *follower)
}
