//! First inputs of every target: small real encodings, so that mutations start from what passes.

use std::collections::BTreeMap;

use manyhands_core::checkpoint::{
    Manifest, OPTIMIZER_FILE, STATE_FILE, encode_floats, encode_weights,
};
use manyhands_core::conformance::suite::DIGEST;
use manyhands_core::engine::{RowStats, Saturations};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::generate::{Completion, Request as Prompt};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::{Gradients, Weights};
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::job::{JobPath, Stage};
use manyhands_core::run::state::State;
use manyhands_core::run::work::{Output, Scored, Seed, Seeded, Values, Work};
use manyhands_core::swarm::chain::Writer;
use manyhands_core::swarm::chunks::ChunkList;
use manyhands_core::swarm::ids::{Hash, Secret, Signature};
use manyhands_core::swarm::ledger::{Entry, Offence, UnitEntry, Verdict};
use manyhands_core::swarm::packing::{join, pack};
use manyhands_core::swarm::protocol::{
    Idle, PROTOCOL, PeerAddress, Refusal, Request, Response, Welcome,
};
use manyhands_core::swarm::transfer;
use manyhands_core::swarm::unit::{Unit, encode_output};
use manyhands_core::swarm::{delta, share};
use manyhands_core::tasks::{Family, Split};

const TOKENS: [u32; 5] = [1, 7, 9, 30, 2];

/// The smallest decoder that has every kind of tensor and edges in its tiles.
pub fn model() -> ModelConfig {
    ModelConfig {
        vocabulary: 34,
        layers: 1,
        width: 16,
        heads: 1,
        kv_heads: 1,
        head_dim: 16,
        ffn: 16,
        context: 16,
        ..ModelConfig::preset("nano", 34, 16).expect("a preset")
    }
}

fn hash(name: &str) -> Hash {
    Hash::of(name.as_bytes())
}

/// Weights that differ a little by `seed`.
pub fn version(seed: u64) -> Weights {
    let mut master = master_weights(&model(), 1);
    let moves = master_weights(&model(), seed + 1);
    for (x, d) in master.iter_mut().flatten().zip(moves.iter().flatten()) {
        *x += 0.01 * d;
    }
    Weights::quantize(&model(), &master)
}

/// One of every kind.
pub fn works() -> Vec<Work> {
    let requests = || vec![Prompt { prompt: vec![1, 7], stream: [1, 2, 3] }];
    let scale = 4_000_000;
    let seeds = vec![Seed { weight: -900, entropy_weight: 3, entropy_center: 7 }; 3];
    vec![
        Work::Sample {
            seed: 1,
            temperature_scale: Some(scale),
            max_new_tokens: 5,
            end: 2,
            requests: requests(),
        },
        Work::Check {
            seed: 1,
            temperature_scale: None,
            requests: requests(),
            claims: vec![TOKENS[2..].to_vec()],
        },
        Work::Score {
            temperature_scale: scale,
            sequences: vec![Scored { tokens: TOKENS.to_vec(), first: 2 }],
        },
        Work::Gradient {
            temperature_scale: scale,
            sequences: vec![Seeded { tokens: TOKENS.to_vec(), first: 2, seeds }],
        },
    ]
}

/// A path, and a run in it that names every section.
fn run_file() -> RunConfig {
    let text = r#"
        name = "fuzz"
        [model.shape]
        vocabulary = 128
        layers = 1
        width = 16
        heads = 1
        kv_heads = 1
        head_dim = 16
        ffn = 16
        context = 48
        [[task]]
        family = "gcd"
        level = 1
        [sft]
        steps = 3
        batch = 2
        [sft.optimizer]
        learning_rate = 2e-3
        [rl]
        steps = 3
        prompts = 2
        group_size = 2
        max_new_tokens = 8
        policy_lag = 1
        [eval]
        problems = 2
        samples = 2
        k = [1, 2]
        [checkpoint]
        every = 2
        [swarm]
        unit_seconds = 1.0
    "#;
    let config: RunConfig = toml::from_str(text).expect("a run file");
    config.validate().expect("a valid one");
    config
}

pub fn requests() -> Vec<Vec<u8>> {
    let text = || "text".to_string();
    let all = [
        Request::Hello {
            protocol: PROTOCOL,
            digest: DIGEST.into(),
            agent: text(),
            engine: text(),
            speed: 1e9,
        },
        Request::Take,
        Request::Beat { units: vec![hash("unit"); 2] },
        Request::Receipt {
            unit: hash("unit"),
            receipt: hash("receipt"),
            bytes: 1234,
            signature: Signature([5; 64]),
        },
        Request::Release { units: vec![hash("unit")] },
        Request::Weights { want: hash("want"), have: vec![hash("have")] },
        Request::Ledger { from: 300, limit: 1000 },
        Request::Peers,
        Request::Follow { token: text(), addresses: vec![text()] },
    ];
    all.iter().map(Request::encode).collect()
}

pub fn responses() -> Vec<Vec<u8>> {
    let peer = Secret::from_seed(&[1; 32]).key();
    let peers = vec![PeerAddress { peer, addresses: vec!["/ip4/127.0.0.1/tcp/1".into()] }];
    let accepted = vec![(hash("unit"), 3)];
    let all = [
        Response::Welcome(Welcome {
            run: hash("run"),
            config: serde_json::to_string(&run_file()).expect("plain data"),
            ordinal: 2,
            beat_ms: 7500,
            peers: peers.clone(),
        }),
        Response::Refused(Refusal::Expelled(Offence::WrongResult)),
        Response::Unit { unit: units().remove(0), accepted: accepted.clone() },
        Response::Idle { retry_ms: 100, why: Idle::Waiting, accepted },
        Response::Beat { unwanted: vec![hash("unit")] },
        Response::Upload,
        Response::Keep,
        Response::Weights { base: Some(hash("base")), blobs: vec![hash("blob")] },
        Response::Records(records()),
        Response::Peers(peers),
        Response::Done,
    ];
    all.iter().map(Response::encode).collect()
}

pub fn units() -> Vec<Vec<u8>> {
    let unit = |work| Unit { weights: hash("weights"), work }.encode();
    works().into_iter().map(unit).collect()
}

pub fn outputs() -> Vec<Vec<u8>> {
    let row = RowStats { t: 3 << 16, total: 1 << 25, moment: 1 << 27, greedy: 0 };
    let completion = Completion { tokens: TOKENS[2..].to_vec(), stats: vec![row; 3] };
    let gradient = Values::Gradient(vec![vec![row; 3]], gradients());
    let values = [
        Values::Samples(vec![completion.clone()]),
        Values::Samples(vec![completion]),
        Values::Scores(vec![vec![row; 3]]),
        gradient,
    ];
    let output = |(which, values): (u8, Values)| {
        let output = Output { saturations: Saturations([3; _]), values };
        [&[which][..], &encode_output(&output)].concat()
    };
    (0..).zip(values).map(output).collect()
}

/// Sums of all sizes.
fn gradients() -> Gradients {
    let mut gradients = Gradients::zeros(&model());
    let mut x: i64 = 1;
    for g in gradients.0.iter_mut().flatten() {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *g = x >> (40 + (x & 15));
    }
    gradients
}

pub fn shares() -> Vec<Vec<u8>> {
    vec![share::encode(&Gradients::zeros(&model())), share::encode(&gradients())]
}

pub fn versions() -> Vec<Vec<u8>> {
    let (base, next) = (version(0), version(7));
    let with = |which: u8, bytes: Vec<u8>| [vec![which], bytes].concat();
    vec![
        with(0, delta::encode(None, &next)),
        with(1, delta::encode(Some(&base), &next)),
        with(1, delta::encode(Some(&base), &base)),
    ]
}

pub fn packing() -> Vec<Vec<u8>> {
    let packed = |values: &[u64]| {
        let mut out = (values.len() as u16).to_le_bytes().to_vec();
        pack(values.iter().copied(), &mut out);
        out
    };
    let mut joined = 264_u16.to_le_bytes().to_vec();
    pack([0; 264], &mut joined);
    join(&[], &mut joined);
    let mixed: Vec<u64> = (0..300).map(|i| i * i).collect();
    vec![packed(&mixed), packed(&[u64::MAX, 0, 5]), packed(&[0; 400]), joined]
}

/// A ledger with an entry of every kind.
fn ledger() -> Vec<Vec<u8>> {
    let (host, other) = (Secret::from_seed(&[1; 32]), Secret::from_seed(&[2; 32]));
    let volunteer = other.key();
    let (unit, weights) = (hash("unit"), hash("weights"));
    let open = Entry::Open {
        config: serde_json::to_string(&run_file()).expect("plain data"),
        files: vec![("problems.jsonl".into(), hash("problems"))],
        digest: DIGEST.into(),
        weights,
        full: hash("full"),
        coordinator: host.key(),
    };
    let accepted = UnitEntry {
        path: JobPath { ordinal: 1, stage: Stage::Rollout { draw: 0 } },
        first: 0,
        count: 4,
        unit,
        receipt: hash("receipt"),
        result_bytes: 300,
        volunteer,
        signature: Signature([7; 64]),
        multiply_adds: 1 << 40,
    };
    let audit = Entry::Audit {
        unit,
        volunteer,
        auditor: host.key(),
        verdict: Verdict::Valid,
        receipt: hash("receipt"),
        multiply_adds: 1 << 40,
    };
    let version = Entry::Version {
        ordinal: 1,
        update: 0,
        weights,
        delta: hash("delta"),
        delta_bytes: 900,
        base: hash("base"),
        full: Some(hash("full")),
    };
    let entries = [
        open,
        Entry::Unit(accepted),
        audit,
        version,
        Entry::Expelled { volunteer, offence: Offence::WrongResult, unit: Some(unit) },
        Entry::Voided { unit, volunteer },
        Entry::Final { ordinal: 1 },
        Entry::RolledBack { ordinal: 1 },
        Entry::Follower { coordinator: volunteer },
        Entry::Closed { weights },
    ];
    let mut writer = Writer::new(host);
    (1_800_000_000_000..).zip(entries).map(|(time, entry)| writer.append(time, entry).1).collect()
}

pub fn records() -> Vec<Vec<u8>> {
    ledger()
}

pub fn chain() -> Vec<Vec<u8>> {
    let mut bytes = Vec::new();
    for record in ledger() {
        bytes.extend_from_slice(&(record.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&record);
    }
    vec![bytes]
}

pub fn streams() -> Vec<Vec<u8>> {
    let upload = transfer::result_header(&hash("unit"), 1 << 20);
    let blob = transfer::blob_header(&hash("blob"), true);
    let list = |bytes: &[u8]| {
        [&[3], &Hash::of(bytes).0[..], &transfer::list(&ChunkList::of(bytes))].concat()
    };
    vec![
        vec![0, 0, 16, 0, 0],
        [&[1], &upload[..]].concat(),
        [&[2], &blob[..]].concat(),
        list(b""),
        list(b"small"),
        list(&vec![3; (5 << 20) + 77]),
    ]
}

pub fn manifests() -> Vec<Vec<u8>> {
    let files = BTreeMap::from([("state.json".to_string(), b"{}".to_vec())]);
    let manifest = Manifest::new(3, version(0).hash(), &files);
    vec![serde_json::to_vec(&manifest).expect("plain data")]
}

pub fn weights() -> Vec<Vec<u8>> {
    vec![encode_weights(&version(0))]
}

pub fn floats() -> Vec<Vec<u8>> {
    let groups = BTreeMap::from([("master".to_string(), master_weights(&model(), 1))]);
    vec![encode_floats(&model(), &groups)]
}

/// The files of a run's first state.
pub fn checkpoint() -> BTreeMap<String, Vec<u8>> {
    let config = run_file();
    let model = config.model().expect("a model");
    State::new(&config, &model, None).save(&config, &model).1
}

pub fn states() -> Vec<Vec<u8>> {
    let mut files = checkpoint();
    assert!(files.contains_key(OPTIMIZER_FILE));
    vec![files.remove(STATE_FILE).expect("every checkpoint has one")]
}

/// Only what decides about acceptance: a file of the oracle has many more tensors.
pub fn vectors() -> Vec<Vec<u8>> {
    let header = r#"{"__metadata__":{"layers":"1","heads":"1"},
        "weight.E":{"dtype":"F32","shape":[2,16],"data_offsets":[0,128]},
        "weight.g0":{"dtype":"F32","shape":[16,1],"data_offsets":[128,192]},
        "in.tokens":{"dtype":"I64","shape":[2,2],"data_offsets":[192,224]}}"#;
    let length = (header.len() as u64).to_le_bytes();
    vec![[&length[..], header.as_bytes(), &[0; 224]].concat()]
}

pub fn run_files() -> Vec<Vec<u8>> {
    let config = run_file();
    vec![
        toml::to_string(&config).expect("plain data").into_bytes(),
        serde_json::to_vec(&config).expect("plain data"),
        include_bytes!("../../../node/runs/demo.toml").to_vec(),
        include_bytes!("../../../node/runs/prorl_v1.toml").to_vec(),
        include_bytes!("../../../node/runs/prorl_v2.toml").to_vec(),
    ]
}

pub fn problem_files() -> Vec<Vec<u8>> {
    let lines = concat!(
        r#"{"prompt": "2+2=", "answer": "4", "trace": "two twos"}"#,
        "\n\n",
        r#"{"prompt": "capital of France?", "answer": "Paris"}"#,
    );
    vec![lines.into()]
}

pub fn completions() -> Vec<Vec<u8>> {
    let trace = |family: &Family| family.generate(1, 0, 3, Split::Train).trace.into_bytes();
    Family::ALL.iter().map(trace).collect()
}
