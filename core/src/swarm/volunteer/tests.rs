use super::*;
use crate::model::generate::Request as Prompt;
use crate::run::work::Work;
use crate::swarm::protocol::Welcome;

const RUN: &str = r#"{"name": "x", "model": {"preset": "nano"},
    "task": [{"family": "count_bits", "level": 1}],
    "sft": {"steps": 1, "batch": 1, "optimizer": {"learning_rate": 1e-3}}}"#;

/// A volunteer, and the question that it waits with.
struct Table {
    volunteer: Volunteer,
    asked: Option<Request>,
    effects: Vec<Effect>,
    now_ms: u64,
}

impl Table {
    fn new() -> Self {
        let peer = PeerAddress { peer: Secret::from_seed(&[2; 32]).key(), addresses: vec![] };
        let (agent, engine) = ("agent".into(), "engine".into());
        let secret = Secret::from_seed(&[1; 32]);
        let volunteer = Volunteer::new(secret, agent, engine, 1e9, vec![peer]);
        let mut table = Self { volunteer, asked: None, effects: Vec::new(), now_ms: 0 };
        table.tell(Event::Tick);
        table.tell(Event::Connected);
        let welcome = Welcome {
            run: Hash([7; 32]),
            config: RUN.into(),
            ordinal: 0,
            beat_ms: 1_000_000,
            peers: vec![],
        };
        table.answer(Response::Welcome(welcome));
        table
    }

    fn tell(&mut self, event: Event) {
        self.now_ms += 1_000;
        self.effects = self.volunteer.handle(self.now_ms, event);
        for effect in &self.effects {
            if let Effect::Ask(request) = effect {
                assert_eq!(self.asked, None, "one question at a time");
                self.asked = Some(request.clone());
            }
        }
    }

    fn answer(&mut self, response: Response) {
        self.asked = None;
        self.tell(Event::Answer(Some(response)));
    }

    fn question(&self) -> Option<&Request> {
        self.asked.as_ref()
    }

    fn computes(&self) -> Option<Hash> {
        let mut effects = self.effects.iter();
        effects.find_map(|e| if let Effect::Compute { hash, .. } = e { Some(*hash) } else { None })
    }

    /// Gives it a unit with this seed, which it asked for.
    fn give(&mut self, seed: u64) -> Hash {
        assert_eq!(self.question(), Some(&Request::Take));
        let requests = vec![Prompt { prompt: vec![3], stream: [0; 3] }];
        let work =
            Work::Sample { seed, temperature_scale: None, max_new_tokens: 1, end: 2, requests };
        let unit = Unit { weights: Hash([9; 32]), work }.encode();
        let hash = Hash::of(&unit);
        self.answer(Response::Unit { unit, accepted: vec![] });
        hash
    }

    /// Answers the question for weights, and says that they are loaded.
    fn load(&mut self) {
        let want = Hash([9; 32]);
        assert_eq!(self.question(), Some(&Request::Weights { want, have: vec![] }));
        self.answer(Response::Weights { base: None, blobs: vec![Hash([8; 32])] });
        self.tell(Event::Weights { hash: want, loaded: true });
    }
}

#[test]
fn engine_lost_begins_the_unit_again_with_weights_from_nothing() {
    let mut table = Table::new();
    let unit = table.give(1);
    table.load();
    assert_eq!(table.computes(), Some(unit));
    let other = table.give(2);
    table.tell(Event::EngineLost);
    assert_eq!(table.computes(), None, "the new engine has no weights");
    table.load();
    assert_eq!(table.computes(), Some(unit));
    table.tell(Event::Computed { unit, bytes: vec![1] });
    assert_eq!(table.computes(), Some(other));
    assert!(matches!(table.question(), Some(Request::Receipt { unit: u, .. }) if *u == unit));
}

#[test]
fn pause_gives_back_what_was_not_begun_and_finishes_the_rest() {
    let mut table = Table::new();
    let unit = table.give(1);
    table.load();
    let other = table.give(2);
    table.tell(Event::Pause(true));
    assert_eq!(table.question(), Some(&Request::Release { units: vec![other] }));
    table.answer(Response::Done);
    assert_eq!(table.question(), None, "it takes nothing new");
    table.tell(Event::Computed { unit, bytes: vec![1] });
    assert!(matches!(table.question(), Some(Request::Receipt { .. })));
    table.answer(Response::Keep);
    table.tell(Event::Pause(false));
    assert_eq!(table.question(), Some(&Request::Take));
}

#[test]
fn unit_that_comes_after_the_pause_is_given_back() {
    let mut table = Table::new();
    table.tell(Event::Pause(true));
    let unit = table.give(1);
    assert_eq!(table.question(), Some(&Request::Release { units: vec![unit] }));
}
