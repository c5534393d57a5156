//! The volunteer: takes units, computes them, announces receipts, uploads results. Events in,
//! effects out; the connection, the engine and the clock are the caller's.
//!
//! It holds up to two units, so that the engine never waits for the network, and asks one question
//! at a time. When a coordination peer is lost it goes on computing and moves to the next one.

use std::collections::VecDeque;

use super::ids::{Hash, Secret};
use super::ledger::receipt_message;
use super::protocol::{Idle, PROTOCOL, PeerAddress, Refusal, Request, Response};
use super::scheduler::LEASES_A_VOLUNTEER_MAX;
use super::unit::Unit;
use crate::conformance::suite::DIGEST;
use crate::model::config::ModelConfig;
use crate::run::config::RunConfig;

/// Versions of the weights that are kept: policy and reference, and the next policy.
pub const WEIGHTS_MAX: usize = 3;
/// First pause before another attempt to connect.
const RETRY_MS_MIN: u64 = 500;
/// Longest pause before another attempt to connect.
const RETRY_MS_MAX: u64 = 30_000;

/// Something that happened outside.
#[derive(Debug)]
pub enum Event {
    /// A connection to the coordination peer that was dialled is open.
    Connected,
    /// It is not, or broke.
    Lost,
    /// The answer to the request at hand; `None` if none came.
    Answer(Option<Response>),
    /// Weights are loaded, or cannot be had.
    Weights {
        /// Which.
        hash: Hash,
        /// Whether they are there.
        loaded: bool,
    },
    /// The engine finished a unit.
    Computed {
        /// Which.
        unit: Hash,
        /// The result.
        bytes: Vec<u8>,
    },
    /// An upload came to an end.
    Uploaded {
        /// Which.
        unit: Hash,
    },
    /// The engine is gone, and a new one has taken its place: it has no weights, and what was
    /// being computed begins again.
    EngineLost,
    /// The owner wants it to rest, or to work. Units that were not begun are given back.
    Pause(bool),
    /// Time passes.
    Tick,
}

/// Something to be done outside.
#[derive(Debug, PartialEq)]
pub enum Effect {
    /// Dial a coordination peer.
    Connect(PeerAddress),
    /// Ask the coordination peer.
    Ask(Request),
    /// Load weights: apply these blobs in order, to `base` or to nothing.
    Load {
        /// The weights.
        want: Hash,
        /// What is changed.
        base: Option<Hash>,
        /// Blobs by hash.
        blobs: Vec<Hash>,
    },
    /// These weights are not needed any more.
    Forget(Hash),
    /// Compute.
    Compute {
        /// Its hash.
        hash: Hash,
        /// What.
        unit: Box<Unit>,
    },
    /// Send the bytes of a result.
    Upload {
        /// Of which unit.
        unit: Hash,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Keep the own signed receipt.
    Keep {
        /// The unit.
        unit: Hash,
        /// The result.
        receipt: Hash,
        /// Its size.
        bytes: u64,
    },
    /// The ledger has the unit at this position.
    Accepted {
        /// The unit.
        unit: Hash,
        /// Where.
        sequence: u64,
    },
    /// The model, once it is known.
    Model(Box<RunConfig>),
    /// The run is complete.
    Finished,
    /// No coordination peer will serve this volunteer.
    Refused(Refusal),
}

#[derive(Clone, Debug, PartialEq)]
enum Stage {
    Waiting,
    Computing,
    Computed(Vec<u8>),
    Uploading,
}

#[derive(Debug)]
struct Held {
    hash: Hash,
    unit: Unit,
    stage: Stage,
    wanted: bool,
}

impl Held {
    fn is_computed(&self, unit: &Hash) -> bool {
        self.hash == *unit && matches!(self.stage, Stage::Computed(_))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down { retry_ms: u64 },
    Dialling,
    Up { session: bool },
}

/// See the module.
#[derive(Debug)]
pub struct Volunteer {
    secret: Secret,
    agent: String,
    engine: String,
    speed: f64,
    peers: Vec<PeerAddress>,
    peer_index: usize,
    failures: u32,
    link: Link,
    asking: Option<Request>,
    run: Hash,
    model: Option<ModelConfig>,
    held: VecDeque<Held>,
    /// Given up, which the coordination peer has not heard yet.
    released: Vec<Hash>,
    /// Oldest first.
    weights: VecDeque<Hash>,
    loading: Option<Hash>,
    take_ms: u64,
    beat_ms: u64,
    beat_every_ms: u64,
    paused: bool,
    stopped: bool,
    now_ms: u64,
    effects: Vec<Effect>,
}

impl Volunteer {
    /// A volunteer that will dial the first of `peers`.
    pub fn new(
        secret: Secret,
        agent: String,
        engine: String,
        speed: f64,
        peers: Vec<PeerAddress>,
    ) -> Self {
        Self {
            secret,
            agent,
            engine,
            speed,
            peers,
            peer_index: 0,
            failures: 0,
            link: Link::Down { retry_ms: 0 },
            asking: None,
            run: Hash([0; 32]),
            model: None,
            held: VecDeque::new(),
            released: Vec::new(),
            weights: VecDeque::new(),
            loading: None,
            take_ms: 0,
            beat_ms: 0,
            beat_every_ms: 5_000,
            paused: false,
            stopped: false,
            now_ms: 0,
            effects: Vec::new(),
        }
    }

    /// The run, once known.
    pub fn run(&self) -> Hash {
        self.run
    }

    /// Whether the engine has something to do.
    pub fn is_computing(&self) -> bool {
        self.held.iter().any(|h| h.stage == Stage::Computing)
    }

    /// Units that are held.
    pub fn held_count(&self) -> usize {
        self.held.len()
    }

    /// When it wants to hear of the time again, at the latest.
    pub fn wake_ms(&self) -> u64 {
        match self.link {
            Link::Down { retry_ms } => retry_ms,
            Link::Dialling => self.now_ms + RETRY_MS_MAX,
            Link::Up { .. } if self.asking.is_some() => self.now_ms + RETRY_MS_MAX,
            Link::Up { .. } => {
                let takes = !self.paused && self.held.len() < LEASES_A_VOLUNTEER_MAX;
                let next = if takes { self.take_ms.min(self.beat_ms) } else { self.beat_ms };
                next.max(self.now_ms + 1)
            }
        }
    }

    /// Takes an event at `now_ms` of a monotonic clock.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        self.now_ms = now_ms;
        match event {
            Event::Connected => {
                if self.link == Link::Dialling {
                    self.link = Link::Up { session: false };
                }
            }
            Event::Lost => self.lost(),
            Event::Answer(None) => self.lost(),
            Event::Answer(Some(response)) => {
                if let Some(request) = self.asking.take() {
                    self.answered(&request, response);
                }
            }
            Event::Weights { hash, loaded } => {
                self.loading = None;
                if loaded {
                    self.weights.push_back(hash);
                    self.forget_surplus();
                } else {
                    // What cannot be computed goes back.
                    self.give_back(|h| h.unit.weights == hash);
                }
            }
            Event::Computed { unit, bytes } => {
                let computing = |h: &&mut Held| h.hash == unit && h.stage == Stage::Computing;
                if let Some(h) = self.held.iter_mut().find(computing) {
                    h.stage = Stage::Computed(bytes);
                }
                self.held.retain(|h| h.wanted || h.hash != unit);
            }
            Event::Uploaded { unit } => {
                self.held.retain(|h| h.hash != unit || h.stage != Stage::Uploading);
            }
            Event::EngineLost => {
                self.weights.clear();
                self.loading = None;
                for h in self.held.iter_mut().filter(|h| h.stage == Stage::Computing) {
                    h.stage = Stage::Waiting;
                }
                self.held.retain(|h| h.wanted);
            }
            Event::Pause(paused) => {
                if paused && !self.paused {
                    self.give_back(|h| h.stage == Stage::Waiting);
                }
                self.paused = paused;
            }
            Event::Tick => {}
        }
        if !self.stopped {
            self.go_on();
        }
        std::mem::take(&mut self.effects)
    }

    /// Gives back everything that is not being computed: the program is about to end.
    pub fn farewell(&mut self) -> Option<Request> {
        let held = self.held.drain(..).map(|h| h.hash);
        let units: Vec<Hash> = self.released.drain(..).chain(held).collect();
        let up = matches!(self.link, Link::Up { session: true });
        (up && !units.is_empty()).then_some(Request::Release { units })
    }

    fn lost(&mut self) {
        self.asking = None;
        self.loading = None;
        self.held.retain(|h| h.stage != Stage::Uploading);
        let pause = (RETRY_MS_MIN << self.failures.min(10)).min(RETRY_MS_MAX);
        self.failures += 1;
        self.peer_index += 1;
        self.link = Link::Down { retry_ms: self.now_ms + pause };
    }

    fn answered(&mut self, request: &Request, response: Response) {
        match (request, response) {
            (Request::Hello { .. }, Response::Welcome(welcome)) => self.welcomed(welcome),
            (Request::Take, Response::Unit { unit, accepted }) => {
                self.hear(accepted);
                self.take_ms = self.now_ms;
                let model = self.model.as_ref();
                let hash = Hash::of(&unit);
                if let Some(Ok(decoded)) = model.map(|m| Unit::decode(&unit, m)) {
                    let stage = Stage::Waiting;
                    self.held.push_back(Held { hash, unit: decoded, stage, wanted: true });
                }
                if self.paused {
                    // It was asked for before the owner's word.
                    self.give_back(|h| h.stage == Stage::Waiting);
                }
            }
            (Request::Take, Response::Idle { retry_ms, why, accepted }) => {
                self.hear(accepted);
                self.take_ms = self.now_ms + u64::from(retry_ms.max(1));
                if why == Idle::Done && self.held.is_empty() {
                    self.stopped = true;
                    self.effects.push(Effect::Finished);
                }
            }
            (Request::Beat { .. }, Response::Beat { unwanted }) => {
                for h in self.held.iter_mut().filter(|h| unwanted.contains(&h.hash)) {
                    h.wanted = false;
                }
                self.held.retain(|h| h.wanted || h.stage == Stage::Computing);
            }
            (Request::Receipt { unit, .. }, Response::Upload) => {
                if let Some(h) = self.held.iter_mut().find(|h| h.is_computed(unit)) {
                    let stage = std::mem::replace(&mut h.stage, Stage::Uploading);
                    if let Stage::Computed(bytes) = stage {
                        self.effects.push(Effect::Upload { unit: *unit, bytes });
                    }
                }
            }
            (Request::Receipt { unit, .. }, Response::Keep) => {
                let kept = self.held.iter().position(|h| h.is_computed(unit));
                kept.and_then(|at| self.held.remove(at));
            }
            (Request::Weights { want, .. }, Response::Weights { base, blobs }) => {
                self.loading = Some(*want);
                self.effects.push(Effect::Load { want: *want, base, blobs });
            }
            (Request::Weights { want, .. }, _) => {
                let want = *want;
                self.loading = None;
                self.give_back(|h| h.unit.weights == want);
            }
            (_, Response::Refused(Refusal::NoSession)) => {
                self.link = Link::Up { session: false };
            }
            (_, Response::Refused(refusal @ (Refusal::Full | Refusal::Follower))) => {
                self.lost();
                if self.peers.len() <= 1 && refusal == Refusal::Full {
                    self.failures = self.failures.max(4);
                }
            }
            (_, Response::Refused(refusal)) => {
                self.stopped = true;
                self.effects.push(Effect::Refused(refusal));
            }
            _ => {}
        }
    }

    fn welcomed(&mut self, welcome: super::protocol::Welcome) {
        let config: Option<RunConfig> = serde_json::from_str(&welcome.config).ok();
        let model = config.as_ref().and_then(|c| c.model().ok());
        let (Some(config), Some(model)) = (config, model) else { return self.lost() };
        if self.run != welcome.run {
            self.run = welcome.run;
            self.held.clear();
            self.effects.push(Effect::Model(Box::new(config)));
        }
        self.model = Some(model);
        self.failures = 0;
        self.link = Link::Up { session: true };
        self.beat_every_ms = u64::from(welcome.beat_ms.max(100));
        self.beat_ms = self.now_ms + self.beat_every_ms;
        if !welcome.peers.is_empty() {
            self.peers = welcome.peers;
            self.peer_index = 0;
        }
    }

    fn hear(&mut self, accepted: Vec<(Hash, u64)>) {
        let heard = |(unit, sequence)| Effect::Accepted { unit, sequence };
        self.effects.extend(accepted.into_iter().map(heard));
    }

    /// Drops units, and tells the coordination peer with the next question.
    fn give_back(&mut self, which: impl Fn(&Held) -> bool) {
        let units = self.held.iter().filter(|h| which(h)).map(|h| h.hash);
        self.released.extend(units.collect::<Vec<_>>());
        self.held.retain(|h| !which(h));
        self.take_ms = self.now_ms + RETRY_MS_MIN;
    }

    fn forget_surplus(&mut self) {
        while self.weights.len() > WEIGHTS_MAX {
            let unused =
                self.weights.iter().position(|w| self.held.iter().all(|h| h.unit.weights != *w));
            let Some(hash) = self.weights.remove(unused.unwrap_or(0)) else { return };
            self.effects.push(Effect::Forget(hash));
        }
    }

    fn ask(&mut self, request: Request) {
        self.asking = Some(request.clone());
        self.effects.push(Effect::Ask(request));
    }

    fn go_on(&mut self) {
        self.compute_next();
        match self.link {
            Link::Down { retry_ms } if self.now_ms >= retry_ms && !self.peers.is_empty() => {
                self.link = Link::Dialling;
                let peer = self.peers[self.peer_index % self.peers.len()].clone();
                self.effects.push(Effect::Connect(peer));
            }
            Link::Up { session } if self.asking.is_none() => {
                if let Some(request) = self.next_question(session) {
                    self.ask(request);
                }
            }
            _ => {}
        }
    }

    fn compute_next(&mut self) {
        if self.is_computing() {
            return;
        }
        let weights = &self.weights;
        let ready = |h: &&mut Held| h.stage == Stage::Waiting && weights.contains(&h.unit.weights);
        if let Some(h) = self.held.iter_mut().find(ready) {
            h.stage = Stage::Computing;
            let (hash, unit) = (h.hash, Box::new(h.unit.clone()));
            self.effects.push(Effect::Compute { hash, unit });
        }
    }

    fn next_question(&mut self, session: bool) -> Option<Request> {
        if !session {
            return Some(Request::Hello {
                protocol: PROTOCOL,
                digest: DIGEST.into(),
                agent: self.agent.clone(),
                engine: self.engine.clone(),
                speed: self.speed,
            });
        }
        if !self.released.is_empty() {
            return Some(Request::Release { units: std::mem::take(&mut self.released) });
        }
        for h in &self.held {
            // One upload at a time of units that are alike.
            let uploads = |o: &Held| o.hash == h.hash && o.stage == Stage::Uploading;
            if let Stage::Computed(bytes) = &h.stage
                && !self.held.iter().any(uploads)
            {
                let (receipt, size) = (Hash::of(bytes), bytes.len() as u64);
                let message = receipt_message(&self.run, &h.hash, &receipt, size);
                let unit = h.hash;
                self.effects.push(Effect::Keep { unit, receipt, bytes: size });
                let signature = self.secret.sign(&message);
                return Some(Request::Receipt { unit, receipt, bytes: size, signature });
            }
        }
        let missing = self.held.iter().filter(|h| h.stage == Stage::Waiting);
        let missing = missing.map(|h| h.unit.weights).find(|w| !self.weights.contains(w));
        if let Some(want) = missing.filter(|_| self.loading.is_none()) {
            let have = self.weights.iter().copied().collect();
            return Some(Request::Weights { want, have });
        }
        if self.now_ms >= self.beat_ms {
            self.beat_ms = self.now_ms + self.beat_every_ms;
            let units = self.held.iter().map(|h| h.hash).collect();
            return Some(Request::Beat { units });
        }
        let room = self.held.len() < LEASES_A_VOLUNTEER_MAX;
        (room && !self.paused && self.now_ms >= self.take_ms).then_some(Request::Take)
    }
}

#[cfg(test)]
mod tests;
