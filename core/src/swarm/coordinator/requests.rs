//! Answering volunteers.

use super::{Blobs, Coordinator, Effect, FOLLOWERS_MAX, InFlight, Offer, SESSIONS_MAX, Session};
use crate::conformance::suite::DIGEST;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Offence, receipt_message};
use crate::swarm::protocol::{Idle, PROTOCOL, PeerAddress, Refusal, Request, Response, Welcome};
use crate::swarm::scheduler::TaskId;
use crate::swarm::status::StatusEvent;
use crate::swarm::unit::result_bytes_max;

impl Coordinator {
    pub(super) fn request(
        &mut self,
        peer: PeerKey,
        token: u64,
        request: Request,
        blobs: &dyn Blobs,
    ) {
        self.figures.messages += 1;
        if let Some(offence) = self.expelled_for(&peer) {
            return self.refuse(token, Refusal::Expelled(offence));
        }
        // Reading is free; working takes a session.
        let response = match request {
            Request::Ledger { from, limit } => {
                return self.effect(Effect::ReplyRecords { token, from, limit });
            }
            Request::Weights { want, have } => match self.versions.plan(want, &have) {
                Some((base, blobs)) => Response::Weights { base, blobs },
                None => Response::Refused(Refusal::UnknownWeights),
            },
            Request::Peers => Response::Peers(self.peers.clone()),
            Request::Follow { token, addresses } => self.follow(peer, &token, addresses),
            Request::Hello { protocol, digest, agent, engine, speed } => {
                self.hello(peer, protocol, &digest, agent, engine, speed)
            }
            _ if !self.is_here(&peer) => Response::Refused(Refusal::NoSession),
            Request::Take => match self.take(peer, blobs) {
                Some(response) => response,
                // Who has nothing else to do waits for the answer instead of asking again.
                None if self.is_free(peer) => return self.hold(peer, token),
                None => self.idle(peer, Idle::Waiting),
            },
            Request::Beat { units } => {
                let wanted = |unit: &Hash| self.is_wanted(peer, unit);
                Response::Beat { unwanted: units.into_iter().filter(|u| !wanted(u)).collect() }
            }
            Request::Receipt { unit, receipt, bytes, signature } => {
                self.receipt(peer, unit, Offer { receipt, bytes, signature }, blobs)
            }
            Request::Release { units } => {
                let tasks = units.iter().filter_map(|u| self.task_of(peer, u));
                for task in tasks.collect::<Vec<_>>() {
                    self.scheduler.release(peer, task);
                }
                Response::Done
            }
        };
        self.scheduler.touch(peer, self.now_ms);
        self.effect(Effect::Reply { token, response });
    }

    /// Whether a session is open; whoever fell silent begins another.
    fn is_here(&self, peer: &PeerKey) -> bool {
        let volunteer = self.scheduler.volunteers().get(peer);
        self.sessions.contains_key(peer) && volunteer.is_some_and(|v| v.is_present)
    }

    fn refuse(&mut self, token: u64, refusal: Refusal) {
        self.effect(Effect::Reply { token, response: Response::Refused(refusal) });
    }

    fn expelled_for(&self, peer: &PeerKey) -> Option<Offence> {
        self.scheduler.volunteers().get(peer).and_then(|v| v.standing.expelled)
    }

    fn hello(
        &mut self,
        peer: PeerKey,
        protocol: u32,
        digest: &str,
        agent: String,
        engine: String,
        speed: f64,
    ) -> Response {
        if protocol != PROTOCOL {
            return Response::Refused(Refusal::Protocol(PROTOCOL));
        }
        if digest != DIGEST {
            return Response::Refused(Refusal::Digest);
        }
        if self.sessions.len() >= SESSIONS_MAX && !self.sessions.contains_key(&peer) {
            return Response::Refused(Refusal::Full);
        }
        self.scheduler.arrive(peer, speed, self.now_ms);
        let joined_ms = self.now_ms;
        let session = self
            .sessions
            .entry(peer)
            .or_insert_with(|| Session { joined_ms, ..Session::default() });
        (session.agent, session.engine) = (agent.clone(), engine);
        self.announce(StatusEvent::Joined { peer: peer.to_string(), agent });
        Response::Welcome(Welcome {
            run: self.run,
            config: self.config_json.clone(),
            ordinal: self.pipeline.ordinal(),
            beat_ms: (self.pipeline.config.swarm.silence_seconds * 250.0) as u32,
            peers: self.peers.clone(),
        })
    }

    pub(super) fn left(&mut self, peer: PeerKey) {
        if self.sessions.remove(&peer).is_some() {
            self.stop_waiting(&peer);
            self.scheduler.leave(peer);
            self.announce(StatusEvent::Left { peer: peer.to_string() });
        }
    }

    fn follow(&mut self, peer: PeerKey, token: &str, addresses: Vec<String>) -> Response {
        let same = token.len() == self.token.len()
            && blake3::hash(token.as_bytes()) == blake3::hash(self.token.as_bytes());
        if !same || self.token.is_empty() {
            return Response::Refused(Refusal::Token);
        }
        let known = self.peers.iter().position(|p| p.peer == peer);
        if known.is_none() && self.peers.len() > FOLLOWERS_MAX {
            return Response::Refused(Refusal::Full);
        }
        let address = PeerAddress { peer, addresses };
        match known {
            Some(i) => self.peers[i] = address,
            None => {
                self.peers.push(address);
                self.write(Entry::Follower { coordinator: peer });
            }
        }
        Response::Peers(self.peers.clone())
    }

    /// The audit that `peer` holds in the form of `unit`.
    fn audit_of(&self, peer: PeerKey, unit: &Hash) -> Option<TaskId> {
        let is_given = |id: &TaskId| self.audits.get(id).is_some_and(|a| a.given == Some(*unit));
        self.scheduler.held(peer).into_iter().find(is_given)
    }

    /// The first unit of these bytes that fits: items that are alike make units that are.
    pub(super) fn in_flight(
        &self,
        unit: &Hash,
        fits: impl Fn(&InFlight) -> bool,
    ) -> Option<(Hash, TaskId)> {
        let mut same = self.units.range((*unit, TaskId::MIN)..=(*unit, TaskId::MAX));
        same.find(|(_, u)| fits(u)).map(|(key, _)| *key)
    }

    fn task_of(&self, peer: PeerKey, unit: &Hash) -> Option<TaskId> {
        let held = self.in_flight(unit, |u| self.scheduler.holds(peer, u.task));
        held.map(|(_, task)| task).or_else(|| self.audit_of(peer, unit))
    }

    fn is_wanted(&self, peer: PeerKey, unit: &Hash) -> bool {
        self.task_of(peer, unit).is_some()
    }

    fn receipt(&mut self, peer: PeerKey, unit: Hash, offer: Offer, blobs: &dyn Blobs) -> Response {
        let message = receipt_message(&self.run, &unit, &offer.receipt, offer.bytes);
        if !peer.verifies(&message, &offer.signature) {
            self.convict(peer, Offence::BadSignature, None);
            return Response::Refused(Refusal::Expelled(Offence::BadSignature));
        }
        if let Some(audit) = self.audit_of(peer, &unit) {
            self.audited_by(peer, audit, offer.receipt, blobs);
            return Response::Keep;
        }
        let model = self.pipeline.model();
        let open = |u: &InFlight| u.held.is_none() && self.scheduler.holds(peer, u.task);
        let key = self
            .in_flight(&unit, |u| open(u) && !u.offers.contains_key(&peer))
            .or_else(|| self.in_flight(&unit, open));
        let Some(in_flight) = key.and_then(|key| self.units.get_mut(&key)) else {
            // Somebody was faster, and that is no lapse.
            if let Some(task) = self.task_of(peer, &unit) {
                self.scheduler.release(peer, task);
            }
            return Response::Keep;
        };
        if offer.bytes > result_bytes_max(&in_flight.unit.work, model) {
            self.convict(peer, Offence::Malformed, Some(unit));
            return Response::Refused(Refusal::Expelled(Offence::Malformed));
        }
        in_flight.offers.insert(peer, offer);
        let (receipt, bytes) = (offer.receipt, offer.bytes);
        self.effect(Effect::Expect { peer, unit, receipt, bytes });
        Response::Upload
    }
}
