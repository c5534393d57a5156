//! A coordination peer and its volunteers in one loop, without a network.

use std::collections::BTreeMap;
use std::sync::Arc;

use manyhands_core::conformance::suite::DIGEST;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::execute::execute;
use manyhands_core::run::job::Version;
use manyhands_core::run::problems::Problems;
use manyhands_core::run::work::{Output, Values, Work};
use manyhands_core::swarm::coordinator::{Arrival, Coordinator, Effect, Event, Start};
use manyhands_core::swarm::ids::{Hash, Secret};
use manyhands_core::swarm::ledger::receipt_message;
use manyhands_core::swarm::protocol::{PROTOCOL, Request, Response};
use manyhands_core::swarm::unit::{Unit, decode_output, encode_output};
use pollster::block_on;

/// Two phases, lag, mini-batches, an evaluation in the middle.
pub(crate) const RUN: &str = r#"
name = "replayed"
seed = 7
[model]
vocabulary = 128
[model.shape]
vocabulary = 128
layers = 1
width = 32
heads = 2
kv_heads = 1
head_dim = 16
ffn = 48
context = 24
[[task]]
jsonl = "problems"
[sft]
steps = 2
batch = 8
[rl]
steps = 3
prompts = 4
group_size = 4
max_new_tokens = 5
updates = 2
policy_lag = 1
[eval]
problems = 4
samples = 2
k = [1]
every = 2
[swarm]
newcomer_audits = 3
audit_probability_min = 0.2
"#;

pub(crate) type Blobs = BTreeMap<Hash, Vec<u8>>;

pub(crate) fn config() -> RunConfig {
    toml::from_str(RUN).unwrap()
}

pub(crate) fn file() -> String {
    (0..64).map(|i| format!("{{\"prompt\":\"p{i}=\",\"answer\":\"{}\"}}\n", i % 3)).collect()
}

/// One engine, and the decoder of the version at hand.
pub(crate) struct Machine {
    engine: Cpu,
    decoder: Option<(Hash, Decoder<Cpu>)>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let constants = config().model().unwrap().constants();
        Self { engine: Cpu::new(constants, 1, None), decoder: None }
    }

    pub(crate) fn execute(&mut self, version: &Version, work: &Work) -> Output {
        let hash = version.hash().into();
        if self.decoder.as_ref().is_none_or(|(h, _)| *h != hash) {
            self.decoder = Some((hash, Decoder::new(&self.engine, &version.weights)));
        }
        let (_, decoder) = self.decoder.as_ref().unwrap();
        block_on(execute(&self.engine, decoder, work, |_| ())).unwrap()
    }
}

/// A run by itself: a coordination peer and its volunteers in one loop.
pub(crate) struct Host {
    pub(crate) coordinator: Coordinator,
    machine: Machine,
    /// By hash of the weights: what a volunteer would have fetched.
    versions: BTreeMap<Hash, Arc<Version>>,
    pub(crate) ledger: Vec<Vec<u8>>,
    pub(crate) blobs: Blobs,
    now_ms: u64,
    restart: bool,
    /// Whether its audits find whatever was claimed.
    pub(crate) is_complicit: bool,
}

pub(crate) fn start(ledger: &[Vec<u8>], blobs: &Blobs, own: u8) -> Coordinator {
    let config = config();
    let problems = Problems::open(&config, |_| Ok(file())).unwrap();
    let start = Start {
        config,
        problems,
        files: vec![("problems".into(), Hash::of(file().as_bytes()))],
        secret: Secret::from_seed(&[own; 32]),
        audit_seed: [3; 32],
        token: String::new(),
        ledger: &mut ledger.iter().cloned(),
        snapshots: Vec::new(),
        forgotten: 0,
        promote: own != 1,
        now_ms: 0,
        wall_ms: 0,
    };
    Coordinator::recover(start, blobs).unwrap()
}

/// What a volunteer does to a result before it is sent.
pub(crate) type Attack = fn(u64, &mut Output);

impl Host {
    pub(crate) fn new() -> Self {
        let (ledger, blobs) = (Vec::new(), Blobs::new());
        let coordinator = start(&ledger, &blobs, 1);
        let machine = Machine::new();
        let versions = BTreeMap::new();
        let (restart, is_complicit) = (false, false);
        Self { coordinator, machine, versions, ledger, blobs, now_ms: 0, restart, is_complicit }
    }

    /// Handles an event and everything that follows from it; returns the answer.
    fn handle(&mut self, event: Event) -> Option<Response> {
        self.now_ms += 10;
        let mut answer = None;
        let effects = self.coordinator.handle(self.now_ms, 0, event, &self.blobs);
        let mut audits = Vec::new();
        for effect in effects {
            match effect {
                Effect::Persist { blobs, records } => {
                    self.blobs.extend(blobs);
                    self.ledger.extend(records);
                }
                Effect::Reply { response, .. } => answer = Some(response),
                Effect::Execute(execution) => audits.push(execution),
                Effect::Restart => self.restart = true,
                Effect::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
        let current = self.coordinator.pipeline().version().clone();
        self.versions.insert(current.hash().into(), current);
        for execution in audits {
            if self.restart {
                break;
            }
            let model = config().model().unwrap();
            let unit = Unit::decode(&self.blobs[&execution.unit], &model).unwrap();
            let claimed = &self.blobs[&execution.result];
            let claimed = decode_output(claimed, &unit.work, &model).unwrap();
            let version = self.versions[&unit.weights].clone();
            let output = self.machine.execute(&version, &unit.work.audit(&claimed));
            let found = Hash::of(&encode_output(&output));
            let receipt = if self.is_complicit { execution.result } else { found };
            self.handle(Event::Executed { audit: execution.audit, receipt });
        }
        answer
    }

    fn ask(&mut self, secret: &Secret, request: Request) -> Response {
        let event = Event::Request { peer: secret.key(), token: 0, request };
        self.handle(event).unwrap_or(Response::Done)
    }

    /// Lets volunteers work in turn until the run is closed. `attack` is told how many units its
    /// volunteer has sent.
    pub(crate) fn run(&mut self, volunteers: &[(Secret, Attack)]) {
        let mut sent = vec![0; volunteers.len()];
        self.greet(volunteers);
        for _ in 0..2000 {
            for (i, (secret, attack)) in volunteers.iter().enumerate() {
                if let Response::Unit { unit, .. } = self.ask(secret, Request::Take) {
                    self.compute(secret, &unit, sent[i], *attack);
                    sent[i] += 1;
                }
                if std::mem::take(&mut self.restart) {
                    self.coordinator = start(&self.ledger, &self.blobs, 1);
                    self.greet(volunteers);
                }
                self.handle(Event::Tick);
            }
            if self.coordinator.is_closed() {
                return;
            }
        }
        panic!("the run does not come to its end: {:?}", self.coordinator.scheduler().counts);
    }

    fn greet(&mut self, volunteers: &[(Secret, Attack)]) {
        for (secret, _) in volunteers {
            let (agent, engine) = ("test".into(), "cpu".into());
            let (protocol, digest) = (PROTOCOL, DIGEST.into());
            self.ask(secret, Request::Hello { protocol, digest, agent, engine, speed: 2e5 });
        }
    }

    fn compute(&mut self, secret: &Secret, bytes: &[u8], sent: u64, attack: Attack) {
        let unit = Unit::decode(bytes, &config().model().unwrap()).unwrap();
        let version = self.versions[&unit.weights].clone();
        let mut output = self.machine.execute(&version, &unit.work);
        attack(sent, &mut output);
        let result = encode_output(&output);
        let (hash, receipt) = (Hash::of(bytes), Hash::of(&result));
        let size = result.len() as u64;
        let message = receipt_message(&self.coordinator.run(), &hash, &receipt, size);
        let signature = secret.sign(&message);
        let request = Request::Receipt { unit: hash, receipt, bytes: size, signature };
        if self.ask(secret, request) == Response::Upload {
            let (peer, arrival) = (secret.key(), Arrival::Whole(result));
            self.handle(Event::Result { peer, unit: hash, arrival });
        }
    }
}

pub(crate) fn honest(_: u64, _: &mut Output) {}

/// Falsifies scores and gradients from the eighth unit on, when it is trusted.
pub(crate) fn turncoat(sent: u64, output: &mut Output) {
    if sent < 8 {
        return;
    }
    match &mut output.values {
        Values::Gradient(_, sum) => sum.0.iter_mut().flatten().for_each(|g| *g = -*g),
        Values::Scores(stats) => stats[0][0].total += 1,
        Values::Samples(samples) => samples[0].stats[0].moment += 1,
    }
}

pub(crate) fn volunteers(attack: Attack) -> Vec<(Secret, Attack)> {
    (10..14).map(|i| (Secret::from_seed(&[i; 32]), if i == 11 { attack } else { honest })).collect()
}
