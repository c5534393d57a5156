//! Bounds of the coordinator itself: sessions, followers, news, questions that wait.

use std::collections::BTreeMap;

use super::*;
use crate::conformance::suite::DIGEST;
use crate::run::config::RunConfig;
use crate::run::problems::Problems;
use crate::swarm::coordinator::Start;
use crate::swarm::ids::Secret;
use crate::swarm::protocol::{Idle, PROTOCOL};

const RUN: &str = r#"{
    "name": "bounds",
    "model": {"shape": {"vocabulary": 128, "layers": 1, "width": 16, "heads": 1, "kv_heads": 1,
        "head_dim": 16, "ffn": 16, "context": 48}},
    "task": [{"family": "gcd", "level": 1}],
    "sft": {"steps": 4, "batch": 8}
}"#;

/// A coordinator at its first step, and who talks to it.
struct Host {
    coordinator: Coordinator,
    blobs: BTreeMap<Hash, Vec<u8>>,
}

impl Host {
    fn new() -> Self {
        let config: RunConfig = serde_json::from_str(RUN).unwrap();
        let problems = Problems::open(&config, |_| unreachable!("no files")).unwrap();
        let start = Start {
            config,
            problems,
            files: Vec::new(),
            secret: Secret::from_seed(&[1; 32]),
            audit_seed: [2; 32],
            token: "token".into(),
            ledger: &mut std::iter::empty(),
            snapshots: Vec::new(),
            forgotten: 0,
            promote: false,
            now_ms: 0,
            wall_ms: 0,
        };
        let coordinator = Coordinator::recover(start, &BTreeMap::new()).unwrap();
        Self { coordinator, blobs: BTreeMap::new() }
    }

    fn ask(&mut self, peer: PeerKey, request: Request) -> Option<Response> {
        let event = Event::Request { peer, token: 7, request };
        let effects = self.coordinator.handle(0, 0, event, &self.blobs);
        effects.into_iter().find_map(|effect| match effect {
            Effect::Reply { token: 7, response } => Some(response),
            _ => None,
        })
    }

    fn hello(&mut self, peer: PeerKey) -> Option<Response> {
        let hello = Request::Hello {
            protocol: PROTOCOL,
            digest: DIGEST.into(),
            agent: "a".into(),
            engine: "e".into(),
            speed: 1e9,
        };
        self.ask(peer, hello)
    }
}

fn peer(i: usize) -> PeerKey {
    let mut key = [7; 32];
    key[..8].copy_from_slice(&(i as u64).to_le_bytes());
    PeerKey(key)
}

#[test]
fn sessions_over_their_bound_are_refused_until_one_ends() {
    let mut host = Host::new();
    for i in 0..SESSIONS_MAX {
        assert!(matches!(host.hello(peer(i)), Some(Response::Welcome(_))), "session {i}");
    }
    let more = peer(SESSIONS_MAX);
    assert_eq!(host.hello(more), Some(Response::Refused(Refusal::Full)));
    assert!(matches!(host.hello(peer(3)), Some(Response::Welcome(_))), "a second hello");
    host.coordinator.handle(0, 0, Event::Left { peer: peer(3) }, &BTreeMap::new());
    assert!(matches!(host.hello(more), Some(Response::Welcome(_))));
}

#[test]
fn followers_over_their_bound_are_refused() {
    let mut host = Host::new();
    let own = PeerAddress { peer: peer(999), addresses: vec![] };
    host.coordinator.set_peers(vec![own]);
    let follow = |token: &str| Request::Follow { token: token.into(), addresses: vec![] };
    let wrong = host.ask(peer(1), follow("guess"));
    assert_eq!(wrong, Some(Response::Refused(Refusal::Token)));
    for i in 0..FOLLOWERS_MAX {
        let followed = host.ask(peer(i), follow("token"));
        assert!(matches!(followed, Some(Response::Peers(all)) if all.len() == i + 2));
    }
    let more = host.ask(peer(FOLLOWERS_MAX), follow("token"));
    assert_eq!(more, Some(Response::Refused(Refusal::Full)));
    let again = host.ask(peer(0), follow("token"));
    assert!(matches!(again, Some(Response::Peers(all)) if all.len() == FOLLOWERS_MAX + 1));
}

/// Questions that wait for work are one a session, however often it asks.
#[test]
fn question_that_waits_is_answered_when_the_next_one_comes() {
    let mut host = Host::new();
    // All work is given to the first ones.
    let mut i = 0;
    let waits = loop {
        host.hello(peer(i));
        match host.ask(peer(i), Request::Take) {
            Some(Response::Unit { .. }) => i += 1,
            None => break peer(i),
            other => panic!("{other:?}"),
        }
    };
    for _ in 0..100 {
        assert_eq!(host.ask(waits, Request::Take), Some(Response::Done), "the one before");
    }
}

/// However much there is to tell, an answer has room for so much; the rest follows.
#[test]
fn news_over_the_bound_of_one_answer_come_with_the_next() {
    let mut host = Host::new();
    host.hello(peer(0));
    let all: Vec<(Hash, u64)> = (0..NEWS_MAX as u64 + 5).map(|i| (Hash([1; 32]), i)).collect();
    host.coordinator.sessions.get_mut(&peer(0)).unwrap().news.clone_from(&all);
    host.coordinator.handle(0, 0, Event::Pause(true), &BTreeMap::new());
    let mut told = Vec::new();
    for expected in [NEWS_MAX, 5, 0] {
        let answer = host.ask(peer(0), Request::Take);
        let Some(Response::Idle { why: Idle::Paused, accepted, .. }) = answer else { panic!() };
        assert_eq!(accepted.len(), expected);
        told.extend(accepted);
    }
    assert_eq!(told, all);
}

/// One engine cannot check every auditor of a large swarm: while many checks wait, it trusts.
#[test]
fn own_checks_of_auditors_wait_while_there_are_many() {
    let Host { mut coordinator, blobs } = Host::new();
    coordinator.pipeline.config.swarm.audit_the_auditors = 1.0;
    for i in 0..OWN_CHECKS_MAX + 3 {
        let receipt = Hash::of(b"result");
        coordinator.ask(Audit {
            unit: Hash::of(&i.to_le_bytes()),
            of: peer(1),
            receipt,
            weights: Hash::of(b"weights"),
            version: None,
            urgency: Urgency::Spot,
            kind: Kind::Forward,
            cost: 1,
            given: None,
            auditor: None,
        });
        let id = coordinator.audits.last_key_value().map(|(id, _)| *id).unwrap();
        coordinator.audited_by(peer(2), id, receipt, &blobs);
    }
    assert_eq!(coordinator.scheduler.own_audits_waiting(), OWN_CHECKS_MAX);
    assert_eq!(coordinator.figures.audited, 3);
}
