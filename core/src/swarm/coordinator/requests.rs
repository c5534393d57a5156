//! Answering volunteers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{
    Blobs, Coordinator, Effect, FOLLOWERS_MAX, InFlight, NEWS_MAX, Offer, SESSIONS_MAX, Session,
};
use crate::conformance::suite::DIGEST;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::ledger::{Entry, Offence, receipt_message};
use crate::swarm::protocol::{Idle, PROTOCOL, PeerAddress, Refusal, Request, Response, Welcome};
use crate::swarm::scheduler::{Assignment, SEARCH_MAX, TaskId};
use crate::swarm::status::StatusEvent;
use crate::swarm::unit::{Unit, decode_output, result_bytes_max};

/// Longest wait for work within one question.
const HOLD_MS: u64 = 5_000;
/// Queues of those who wait: who may not audit, and who may.
const UNTRUSTED: usize = 0;
const TRUSTED: usize = 1;

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
                // Who has nothing else to do waits for the answer instead of asking again.
                Response::Idle { why: Idle::Waiting, .. } if self.is_free(peer) => {
                    return self.hold(peer, token);
                }
                response => response,
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

    fn news(&mut self, peer: PeerKey) -> Vec<(Hash, u64)> {
        let Some(session) = self.sessions.get_mut(&peer) else { return Vec::new() };
        let told = session.news.len().min(NEWS_MAX);
        session.news.drain(..told).collect()
    }

    fn take(&mut self, peer: PeerKey, blobs: &dyn Blobs) -> Response {
        let why = match (self.closed, self.paused) {
            (true, _) => Some(Idle::Done),
            (_, true) => Some(Idle::Paused),
            _ => None,
        };
        let assignment = if why.is_none() { self.scheduler.take(peer, self.now_ms) } else { None };
        let unit = match assignment {
            Some(Assignment::Unit { task, path, first, count }) => {
                self.issue(task, path, first, count)
            }
            Some(Assignment::Audit { audit }) => self.issue_audit(peer, audit, blobs),
            None => None,
        };
        let accepted = self.news(peer);
        match unit {
            Some(unit) => {
                self.figures.lease_bytes += unit.len() as u64;
                Response::Unit { unit, accepted }
            }
            None => {
                let unit_ms = self.pipeline.config.swarm.unit_seconds * 1e3;
                let retry_ms = (unit_ms / 10.0).clamp(100.0, 2000.0) as u32;
                Response::Idle { retry_ms, why: why.unwrap_or(Idle::Waiting), accepted }
            }
        }
    }

    /// Whether work that comes up could be given to `peer` at once.
    fn is_free(&self, peer: PeerKey) -> bool {
        let volunteer = self.scheduler.volunteers().get(&peer);
        volunteer.is_some_and(|v| v.may_work(self.now_ms) && v.lease_count() == 0)
    }

    /// Keeps a question for work until there is some.
    fn hold(&mut self, peer: PeerKey, token: u64) {
        self.scheduler.touch(peer, self.now_ms);
        let session = self.sessions.get_mut(&peer);
        let before = session.and_then(|s| s.waiting.replace(token));
        match before {
            Some(token) => self.effect(Effect::Reply { token, response: Response::Done }),
            None => {
                let silence_ms = self.pipeline.config.swarm.silence_seconds * 1e3;
                let hold_ms = HOLD_MS.min((silence_ms / 4.0) as u64);
                let queue = if self.scheduler.is_trusted(&peer) { TRUSTED } else { UNTRUSTED };
                self.waiting[queue].push_back((self.now_ms + hold_ms, peer));
            }
        }
    }

    /// Answers those who wait, as far as there is work; and those who waited long enough.
    pub(super) fn serve_waiting(&mut self, blobs: &dyn Blobs) {
        self.serve_queue(TRUSTED, blobs);
        self.serve_queue(UNTRUSTED, blobs);
    }

    fn serve_queue(&mut self, queue: usize, blobs: &dyn Blobs) {
        let all_hear = self.closed || self.paused;
        let mut in_vain = 0;
        while let Some(&(until_ms, peer)) = self.waiting[queue].front() {
            let due = self.now_ms >= until_ms || all_hear;
            let has_work = self.scheduler.has_units(self.now_ms)
                || queue == TRUSTED && self.scheduler.audits_waiting() > 0;
            if !due && (!has_work || in_vain == SEARCH_MAX) {
                return;
            }
            self.waiting[queue].pop_front();
            let Some(token) = self.sessions.get(&peer).and_then(|s| s.waiting) else { continue };
            let response = self.take(peer, blobs);
            if matches!(response, Response::Idle { why: Idle::Waiting, .. }) && !due {
                // What there is does not suit it: others come first now. All wait at most twice as
                // long as they should.
                self.waiting[queue].push_back((until_ms, peer));
                in_vain += 1;
                continue;
            }
            if let Some(session) = self.sessions.get_mut(&peer) {
                session.waiting = None;
            }
            self.scheduler.touch(peer, self.now_ms);
            self.effect(Effect::Reply { token, response });
        }
    }

    /// The bytes of a unit that was just leased.
    fn issue(
        &mut self,
        task: TaskId,
        path: crate::run::job::JobPath,
        first: usize,
        count: usize,
    ) -> Option<Vec<u8>> {
        let job = &self.pipeline.job(path)?.job;
        let version = Arc::clone(&job.version);
        let unit =
            Unit { weights: version.hash().into(), work: job.work.slice(first..first + count) };
        let bytes = unit.encode();
        let offers = BTreeMap::new();
        self.units.entry((Hash::of(&bytes), task)).or_insert(InFlight {
            task,
            path,
            first,
            count,
            unit,
            version,
            offers,
            held: None,
        });
        Some(bytes)
    }

    /// The bytes of an audit that was just leased: the unit, in the form that is cheapest to check.
    fn issue_audit(&mut self, peer: PeerKey, id: TaskId, blobs: &dyn Blobs) -> Option<Vec<u8>> {
        let audit = self.audits.get_mut(&id)?;
        let model = self.pipeline.model();
        let issue = || {
            let unit = Unit::decode(&blobs.get(&audit.unit)?, model).ok()?;
            let claimed = decode_output(&blobs.get(&audit.receipt)?, &unit.work, model).ok()?;
            Some(Unit { weights: unit.weights, work: unit.work.audit(&claimed) }.encode())
        };
        match issue() {
            Some(bytes) => {
                audit.given = Some(Hash::of(&bytes));
                Some(bytes)
            }
            None => {
                // Without its blobs only the coordination peer's own error report helps.
                self.scheduler.release(peer, id);
                None
            }
        }
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
