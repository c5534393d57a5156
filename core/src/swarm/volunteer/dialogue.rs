//! What a volunteer asks, and what it makes of the answers.

use super::{Effect, Held, Link, PEERS_EVERY_MS, RETRY_MS_MIN, Stage, Volunteer};
use crate::conformance::suite::DIGEST;
use crate::run::config::RunConfig;
use crate::swarm::ids::Hash;
use crate::swarm::ledger::receipt_message;
use crate::swarm::protocol::{Idle, PROTOCOL, PeerAddress, Refusal, Request, Response, Welcome};
use crate::swarm::scheduler::LEASES_A_VOLUNTEER_MAX;
use crate::swarm::unit::Unit;

impl Volunteer {
    pub(super) fn answered(&mut self, request: &Request, response: Response) {
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
            (Request::Peers, Response::Peers(peers)) => self.meet(peers),
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
                let (want, base) = (*want, self.base());
                self.loading = None;
                self.give_back(|h| h.unit.weights == want || base == Some(want));
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

    fn welcomed(&mut self, welcome: Welcome) {
        let config: Option<RunConfig> = serde_json::from_str(&welcome.config).ok();
        let model = config.as_ref().and_then(|c| c.model().ok());
        let (Some(config), Some(model)) = (config, model) else { return self.lost() };
        if self.run != welcome.run {
            self.run = welcome.run;
            self.has_base = false;
            self.held.clear();
            self.effects.push(Effect::Model(Box::new(config)));
        }
        self.model = Some(model);
        self.failures = 0;
        self.link = Link::Up { session: true };
        self.beat_every_ms = u64::from(welcome.beat_ms.max(100));
        self.beat_ms = self.now_ms + self.beat_every_ms;
        self.meet(welcome.peers);
    }

    /// Learns who coordinates and who follows, and goes on from where it is.
    fn meet(&mut self, peers: Vec<PeerAddress>) {
        self.peers_ms = self.now_ms + PEERS_EVERY_MS;
        if peers.is_empty() {
            return;
        }
        let here = self.peers.get(self.peer_index % self.peers.len().max(1)).map(|p| p.peer);
        self.peer_index = peers.iter().position(|p| Some(p.peer) == here).unwrap_or(0);
        self.peers = peers;
    }

    fn hear(&mut self, accepted: Vec<(Hash, u64)>) {
        let heard = |(unit, sequence)| Effect::Accepted { unit, sequence };
        self.effects.extend(accepted.into_iter().map(heard));
    }

    /// Drops units, and tells the coordination peer with the next question.
    pub(super) fn give_back(&mut self, which: impl Fn(&Held) -> bool) {
        let units = self.held.iter().filter(|h| which(h)).map(|h| h.hash);
        self.released.extend(units.collect::<Vec<_>>());
        self.held.retain(|h| !which(h));
        self.take_ms = self.now_ms + RETRY_MS_MIN;
    }

    pub(super) fn ask(&mut self, request: Request) {
        self.asking = Some(request.clone());
        self.effects.push(Effect::Ask(request));
    }

    pub(super) fn next_question(&mut self, session: bool) -> Option<Request> {
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
            return Some(match self.base().filter(|_| !self.has_base) {
                Some(base) => Request::Weights { want: base, have: Vec::new() },
                None => Request::Weights { want, have },
            });
        }
        if self.now_ms >= self.beat_ms {
            self.beat_ms = self.now_ms + self.beat_every_ms;
            let units = self.held.iter().map(|h| h.hash).collect();
            return Some(Request::Beat { units });
        }
        if self.now_ms >= self.peers_ms {
            return Some(Request::Peers);
        }
        let room = self.held.len() < LEASES_A_VOLUNTEER_MAX;
        (room && !self.paused && self.now_ms >= self.take_ms).then_some(Request::Take)
    }
}
