//! The volunteer: takes units, computes them, announces receipts, uploads results. Events in,
//! effects out; the connection, the engine and the clock are the caller's.
//!
//! It holds up to two units, so that the engine never waits for the network, and asks one question
//! at a time. When a coordination peer is lost it goes on computing and moves to the next one.

mod dialogue;

use std::collections::VecDeque;

use super::ids::{Hash, Secret};
use super::protocol::{PeerAddress, Refusal, Request, Response};
use super::scheduler::LEASES_A_VOLUNTEER_MAX;
use super::unit::Unit;
use crate::model::config::ModelConfig;
use crate::run::config::RunConfig;

/// Versions of the weights that are kept: policy and reference, and the next policy.
pub const WEIGHTS_MAX: usize = 3;
/// First pause before another attempt to connect.
const RETRY_MS_MIN: u64 = 500;
/// Longest pause before another attempt to connect.
const RETRY_MS_MAX: u64 = 30_000;

/// Pause between two questions for who coordinates and who follows.
const PEERS_EVERY_MS: u64 = 60_000;

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
    /// Whether the model that adapters adapt is loaded; it stays.
    has_base: bool,
    loading: Option<Hash>,
    take_ms: u64,
    beat_ms: u64,
    beat_every_ms: u64,
    peers_ms: u64,
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
            has_base: false,
            loading: None,
            take_ms: 0,
            beat_ms: 0,
            beat_every_ms: 5_000,
            peers_ms: 0,
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

    /// Who coordinates and who follows: whoever of them has a blob may give it.
    pub fn peers(&self) -> &[PeerAddress] {
        &self.peers
    }

    /// What the run's adapters adapt.
    fn base(&self) -> Option<Hash> {
        self.model.as_ref()?.adapter.as_ref().map(|a| a.base)
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
                if self.base() == Some(hash) {
                    self.has_base = loaded;
                    if !loaded {
                        self.give_back(|h| h.stage == Stage::Waiting);
                    }
                } else if loaded {
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
                self.has_base = false;
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

    fn forget_surplus(&mut self) {
        while self.weights.len() > WEIGHTS_MAX {
            let unused =
                self.weights.iter().position(|w| self.held.iter().all(|h| h.unit.weights != *w));
            let Some(hash) = self.weights.remove(unused.unwrap_or(0)) else { return };
            self.effects.push(Effect::Forget(hash));
        }
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
}

#[cfg(test)]
mod tests;
