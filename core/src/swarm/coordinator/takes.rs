//! Questions for work, and their answers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Blobs, Coordinator, Effect, InFlight, NEWS_MAX};
use crate::run::job::JobPath;
use crate::swarm::ids::{Hash, PeerKey};
use crate::swarm::protocol::{Idle, Response};
use crate::swarm::scheduler::{Assignment, TaskId, Turn};
use crate::swarm::unit::{Unit, decode_output};

/// Longest wait for work within one question.
const HOLD_MS: u64 = 5_000;
/// Queues of those who wait: who may not audit, and who may.
const UNTRUSTED: usize = 0;
const TRUSTED: usize = 1;

impl Coordinator {
    /// Work for `peer`, or why there is none for anybody; nothing if there is only none for it.
    pub(super) fn take(&mut self, peer: PeerKey, blobs: &dyn Blobs) -> Option<Response> {
        match (self.closed, self.paused) {
            (true, _) => return Some(self.idle(peer, Idle::Done)),
            (_, true) => return Some(self.idle(peer, Idle::Paused)),
            _ => {}
        }
        let unit = match self.scheduler.take(peer, self.now_ms)? {
            Assignment::Unit { task, path, first, count } => self.issue(task, path, first, count),
            Assignment::Audit { audit } => self.issue_audit(peer, audit, blobs),
        }?;
        self.figures.lease_bytes += unit.len() as u64;
        Some(Response::Unit { unit, accepted: self.news(peer) })
    }

    pub(super) fn idle(&mut self, peer: PeerKey, why: Idle) -> Response {
        let unit_ms = self.pipeline.config.swarm.unit_seconds * 1e3;
        let retry_ms = (unit_ms / 10.0).clamp(100.0, 2000.0) as u32;
        Response::Idle { retry_ms, why, accepted: self.news(peer) }
    }

    fn news(&mut self, peer: PeerKey) -> Vec<(Hash, u64)> {
        let Some(session) = self.sessions.get_mut(&peer) else { return Vec::new() };
        let told = session.news.len().min(NEWS_MAX);
        session.news.drain(..told).collect()
    }

    /// Whether work that comes up could be given to `peer` at once.
    pub(super) fn is_free(&self, peer: PeerKey) -> bool {
        let volunteer = self.scheduler.volunteers().get(&peer);
        volunteer.is_some_and(|v| v.may_work(self.now_ms) && v.lease_count() == 0)
    }

    /// Keeps a question for work until there is some.
    pub(super) fn hold(&mut self, peer: PeerKey, token: u64) {
        self.scheduler.touch(peer, self.now_ms);
        let before = self.stop_waiting(&peer);
        let silence_ms = self.pipeline.config.swarm.silence_seconds * 1e3;
        let until_ms = self.now_ms + HOLD_MS.min((silence_ms / 4.0) as u64);
        let queue = if self.scheduler.is_trusted(&peer) { TRUSTED } else { UNTRUSTED };
        let speed = self.scheduler.volunteers().get(&peer).map_or(0.0, |v| v.speed[2]);
        self.waiting[queue].hold(peer, speed, until_ms, token);
        if let Some(token) = before {
            self.effect(Effect::Reply { token, response: Response::Done });
        }
    }

    /// Forgets the question of `peer`.
    pub(super) fn stop_waiting(&mut self, peer: &PeerKey) -> Option<u64> {
        self.waiting.iter_mut().find_map(|queue| queue.release(peer))
    }

    /// Answers those who wait, as far as there is work; and those who waited long enough.
    pub(super) fn serve_waiting(&mut self, blobs: &dyn Blobs) {
        self.serve_queue(TRUSTED, blobs);
        self.serve_queue(UNTRUSTED, blobs);
    }

    fn serve_queue(&mut self, queue: usize, blobs: &dyn Blobs) {
        let all_hear = self.closed || self.paused;
        let now_ms = if all_hear { u64::MAX } else { self.now_ms };
        while let Some(peer) = self.waiting[queue].due(now_ms) {
            let response = self.take(peer, blobs);
            let response = response.unwrap_or_else(|| self.idle(peer, Idle::Waiting));
            self.answer_waiting(queue, peer, response);
        }
        let mut turn = Turn::of_the_oldest();
        while queue == TRUSTED
            && self.scheduler.audits_waiting() > 0
            && let Some(peer) = self.waiting[queue].next(&mut turn)
        {
            self.try_waiting(queue, peer, &mut turn, blobs);
        }
        let mut turn = Turn::of_the_fastest();
        while self.scheduler.has_units(self.now_ms)
            && let Some(peer) = self.waiting[queue].next(&mut turn)
        {
            self.try_waiting(queue, peer, &mut turn, blobs);
        }
    }

    fn try_waiting(&mut self, queue: usize, peer: PeerKey, turn: &mut Turn, blobs: &dyn Blobs) {
        match self.take(peer, blobs) {
            Some(response) => self.answer_waiting(queue, peer, response),
            None => turn.in_vain += 1,
        }
    }

    fn answer_waiting(&mut self, queue: usize, peer: PeerKey, response: Response) {
        self.scheduler.touch(peer, self.now_ms);
        if let Some(token) = self.waiting[queue].release(&peer) {
            self.effect(Effect::Reply { token, response });
        }
    }

    /// The bytes of a unit that was just leased.
    fn issue(
        &mut self,
        task: TaskId,
        path: JobPath,
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
}
