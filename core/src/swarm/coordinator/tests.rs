//! Bounds of the coordinator itself: sessions, followers, news, questions that wait. And disputes
//! between volunteers.

use std::collections::BTreeMap;

use super::*;
use crate::conformance::suite::DIGEST;
use crate::engine::{RowStats, Saturations};
use crate::model::weights::Gradients;
use crate::run::config::RunConfig;
use crate::run::problems::Problems;
use crate::run::work::{Output, Seeded, Values, Work};
use crate::swarm::chain;
use crate::swarm::coordinator::Start;
use crate::swarm::ids::{Secret, Signature};
use crate::swarm::ledger::{UnitEntry, Verdict, receipt_message};
use crate::swarm::protocol::{Idle, PROTOCOL, Request};
use crate::swarm::unit::encode_output;

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
    ledger: Vec<Entry>,
    executing: Option<TaskId>,
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
        Self { coordinator, blobs: BTreeMap::new(), ledger: Vec::new(), executing: None }
    }

    fn ask(&mut self, peer: PeerKey, request: Request) -> Option<Response> {
        self.send(Event::Request { peer, token: 7, request })
    }

    /// Carries out what is to be kept; returns the answer, if the event was a question that got one.
    fn send(&mut self, event: Event) -> Option<Response> {
        let mut answer = None;
        for effect in self.coordinator.handle(0, 0, event, &self.blobs) {
            match effect {
                Effect::Reply { token: 7, response } => answer = Some(response),
                Effect::Persist { blobs, records } => {
                    self.blobs.extend(blobs);
                    self.ledger.extend(records.iter().map(|r| chain::decode(r).unwrap().entry));
                }
                Effect::Execute(execution) => self.executing = Some(execution.audit),
                _ => {}
            }
        }
        answer
    }

    /// The bytes of the unit that `who` is given, if it is given one.
    fn take(&mut self, who: &Secret) -> Option<Vec<u8>> {
        match self.ask(who.key(), Request::Take)? {
            Response::Unit { unit, .. } => Some(unit),
            _ => None,
        }
    }

    fn announce(
        &mut self,
        who: &Secret,
        unit: &[u8],
        receipt: Hash,
        bytes: u64,
    ) -> Option<Response> {
        let unit = Hash::of(unit);
        let message = receipt_message(&self.coordinator.run(), &unit, &receipt, bytes);
        let signature = who.sign(&message);
        self.ask(who.key(), Request::Receipt { unit, receipt, bytes, signature })
    }

    /// Announces a made-up result and uploads it; returns its receipt.
    fn deliver(&mut self, who: &Secret, unit: &[u8], number: i64) -> Hash {
        let bytes = made_up(unit, &self.coordinator, number);
        let receipt = Hash::of(&bytes);
        let answer = self.announce(who, unit, receipt, bytes.len() as u64);
        assert_eq!(answer, Some(Response::Upload));
        let arrival = Arrival::Whole(bytes);
        self.send(Event::Result { peer: who.key(), unit: Hash::of(unit), arrival });
        assert!(!self.coordinator.scheduler.is_expelled(&who.key()));
        receipt
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
    let Host { mut coordinator, blobs, .. } = Host::new();
    coordinator.pipeline.config.swarm.audit_the_auditors = 1.0;
    let all = OWN_CHECKS_MAX as u64 + 3;
    for i in 0..all {
        let entry = UnitEntry {
            path: coordinator.pipeline.jobs().next().unwrap().job.path,
            first: 0,
            count: 1,
            unit: Hash::of(&i.to_le_bytes()),
            receipt: Hash::of(b"result"),
            result_bytes: 6,
            volunteer: peer(1),
            signature: Signature([0; 64]),
            multiply_adds: 1,
        };
        let accepted = coordinator.enter(entry, Hash::of(b"weights"), i);
        coordinator.audit_accepted(peer(1), accepted, Urgency::Spot);
        let id = coordinator.audits.last_key_value().map(|(id, _)| *id).unwrap();
        coordinator.audited_by(peer(2), id, entry.receipt, &blobs);
    }
    assert_eq!(coordinator.scheduler.own_audits_waiting(), OWN_CHECKS_MAX);
    assert_eq!(coordinator.figures.audited, all, "nothing waits for the own engine");
}

/// A newcomer's result waits, an auditor looks at it, and the own engine is busy.
struct Dispute {
    host: Host,
    accused: Secret,
    auditor: Secret,
    /// Is here, and trusted.
    third: Secret,
    unit: Vec<u8>,
    receipt: Hash,
    found: Hash,
}

/// What a gradient unit could give, told apart by one number.
fn made_up(unit: &[u8], coordinator: &Coordinator, number: i64) -> Vec<u8> {
    let model = coordinator.pipeline.model();
    let Work::Gradient { sequences, .. } = Unit::decode(unit, model).unwrap().work else {
        panic!()
    };
    let certain = RowStats { total: 1 << 23, ..RowStats::default() };
    let trained = |s: &Seeded| vec![certain; s.seeds.len()];
    let mut sum = Gradients::zeros(model);
    sum.0[0][0] = number;
    let values = Values::Gradient(sequences.iter().map(trained).collect(), sum);
    encode_output(&Output { saturations: Saturations::default(), values })
}

impl Dispute {
    /// The auditor has the unit.
    fn begun() -> Self {
        let mut host = Host::new();
        let [accused, auditor, third] = [3, 4, 5].map(|seed| Secret::from_seed(&[seed; 32]));
        host.coordinator.executing = Some(TaskId::MAX);
        for peer in [&accused, &auditor, &third] {
            host.hello(peer.key());
        }
        let unit = host.take(&accused).unwrap();
        let receipt = host.deliver(&accused, &unit, 1);
        for trusted in [&auditor, &third] {
            host.coordinator.scheduler.standing(trusted.key()).valid_in_a_row = 100_000;
        }
        host.coordinator.pipeline.config.swarm.audit_probability_min = 0.0;
        assert_eq!(host.take(&auditor), Some(unit.clone()), "to be audited");
        let found = Hash::of(&made_up(&unit, &host.coordinator, 2));
        Self { host, accused, auditor, third, unit, receipt, found }
    }

    fn new() -> Self {
        let mut d = Self::begun();
        let answer = d.host.announce(&d.auditor, &d.unit.clone(), d.found, 1);
        assert_eq!(answer, Some(Response::Keep));
        d
    }

    /// The own engine comes to it and finds this.
    fn judge(&mut self, receipt: Hash) {
        self.host.coordinator.executing = None;
        self.host.send(Event::Tick);
        let audit = self.host.executing.unwrap();
        self.host.send(Event::Executed { audit, receipt });
    }

    /// Whose results of the unit entered, who was audited with which verdict, who was expelled.
    fn written(&self) -> (Vec<PeerKey>, Vec<(PeerKey, Verdict)>, Vec<PeerKey>) {
        let (mut units, mut audits, mut expelled) = (Vec::new(), Vec::new(), Vec::new());
        for entry in &self.host.ledger {
            match entry {
                Entry::Unit(u) if u.unit == Hash::of(&self.unit) => units.push(u.volunteer),
                Entry::Audit { volunteer, verdict, .. } => audits.push((*volunteer, *verdict)),
                Entry::Expelled { volunteer, .. } => expelled.push(*volunteer),
                _ => {}
            }
        }
        (units, audits, expelled)
    }
}

#[test]
fn disputed_unit_goes_to_others_and_its_volunteer_waits_for_the_judgement() {
    let mut d = Dispute::new();
    let answer = d.host.ask(d.accused.key(), Request::Take);
    assert!(matches!(answer, Some(Response::Idle { why: Idle::Waiting, .. })), "{answer:?}");
    assert_eq!(d.host.take(&d.third), Some(d.unit.clone()));
    assert_eq!(d.written(), (vec![], vec![], vec![]));

    // The accused was wrong.
    d.judge(d.found);
    assert_eq!(
        d.written(),
        (vec![], vec![(d.accused.key(), Verdict::Invalid)], vec![d.accused.key()])
    );
    d.host.deliver(&d.third, &d.unit, 2);
    assert_eq!(d.written().0, [d.third.key()]);
}

#[test]
fn disputed_result_that_was_right_enters_if_nobody_was_faster() {
    let mut d = Dispute::new();
    assert_eq!(d.host.take(&d.third), Some(d.unit.clone()));
    d.judge(d.receipt);
    let (accused, auditor) = (d.accused.key(), d.auditor.key());
    assert_eq!(d.written(), (vec![accused], vec![(accused, Verdict::Valid)], vec![auditor]));
    assert!(d.host.take(&d.accused).is_some(), "it may work again");
    let late = d.host.announce(&d.third, &d.unit, d.receipt, 1);
    assert_eq!(late, Some(Response::Keep), "nothing is wanted of whoever was slower");
}

/// A check by the own engine of what an auditor found right: nothing waits for it, it counts once,
/// and if both lied both go.
#[test]
fn auditor_is_checked_after_its_word_has_counted() {
    for lied in [false, true] {
        let mut d = Dispute::begun();
        d.host.coordinator.pipeline.config.swarm.audit_the_auditors = 1.0;
        let (accused, auditor) = (d.accused.key(), d.auditor.key());
        let unit = d.unit.clone();
        assert_eq!(d.host.announce(&d.auditor, &unit, d.receipt, 1), Some(Response::Keep));
        let valid = (accused, Verdict::Valid);
        assert_eq!(d.written(), (vec![accused], vec![valid], vec![]));
        d.judge(if lied { d.found } else { d.receipt });
        let (_, audits, expelled) = d.written();
        let standing = *d.host.coordinator.scheduler.standing(accused);
        if lied {
            assert_eq!(audits, [valid, (accused, Verdict::Invalid)]);
            assert_eq!(expelled, [accused, auditor]);
        } else {
            assert_eq!((audits, expelled), (vec![valid, valid], vec![]));
            assert_eq!((standing.audited, standing.valid_in_a_row), (1, 1));
        }
    }
}

#[test]
fn disputed_result_that_comes_too_late_costs_only_the_auditor_its_place() {
    let mut d = Dispute::new();
    assert_eq!(d.host.take(&d.third), Some(d.unit.clone()));
    d.host.deliver(&d.third, &d.unit, 1);
    d.judge(d.receipt);
    assert_eq!(d.written(), (vec![d.third.key()], vec![], vec![d.auditor.key()]));
    assert!(d.host.take(&d.accused).is_some(), "it may work again");
}
