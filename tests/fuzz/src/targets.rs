//! The decoders, and what must hold of whatever they accept. A target returns whether it accepted
//! its input; a panic, or memory beyond its bound, is a finding.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use manyhands_core::checkpoint::{
    Manifest, OPTIMIZER_FILE, STATE_FILE, decode_floats, decode_weights, encode_floats,
    encode_weights,
};
use manyhands_core::conformance::oracle::Vectors;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::weights::Gradients;
use manyhands_core::run::config::RunConfig;
use manyhands_core::run::state::State;
use manyhands_core::swarm::chain::{self, Verifier};
use manyhands_core::swarm::chunks::CHUNK_BYTES;
use manyhands_core::swarm::ids::{Hash, PeerKey, Signature};
use manyhands_core::swarm::ledger::Entry;
use manyhands_core::swarm::packing::{join, pack, split, unpack};
use manyhands_core::swarm::protocol::{Request, Response};
use manyhands_core::swarm::share;
use manyhands_core::swarm::status::clean_agent;
use manyhands_core::swarm::transfer::{self, BLOB_HEADER_BYTES, RESULT_HEADER_BYTES};
use manyhands_core::swarm::unit::{Unit, decode_output, encode_output, result_bytes_max};
use manyhands_core::swarm::{delta, protocol};
use manyhands_core::tasks::reasoning_gym::extract_answer;
use manyhands_core::tasks::{Family, Split, jsonl};

use crate::{foreign, seeds};

/// A decoder under test.
#[derive(Debug)]
pub struct Target {
    /// What `FUZZ_TARGET` says.
    pub name: &'static str,
    /// Runs the decoder; whether the input was accepted.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that are accepted.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Memory that any input may take, besides a little for each of its bytes.
    pub memory_bytes_max: usize,
}

/// What a length that is not backed by bytes may allocate, a few times over: serde's caution.
const CLAIMS: usize = 8 << 20;

const fn target(name: &'static str, run: fn(&[u8]) -> bool, seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds, memory_bytes_max: CLAIMS }
}

/// All of them.
pub const TARGETS: [Target; 20] = [
    target("requests", requests, seeds::requests),
    target("responses", responses, seeds::responses),
    target("units", units, seeds::units),
    target("outputs", outputs, seeds::outputs),
    target("shares", shares, seeds::shares),
    target("versions", versions, seeds::versions),
    target("packing", packing, seeds::packing),
    target("records", records, seeds::records),
    target("chain", chain, seeds::chain),
    target("streams", streams, seeds::streams),
    target("manifests", manifests, seeds::manifests),
    target("weights", weights, seeds::weights),
    target("floats", floats, seeds::floats),
    target("states", states, seeds::states),
    target("vectors", vectors, seeds::vectors),
    target("run_files", run_files, seeds::run_files),
    target("problem_files", problem_files, seeds::problem_files),
    target("completions", completions, seeds::completions),
    target("gguf", foreign::gguf, foreign::gguf_seeds),
    target("safetensors_import", foreign::hub, foreign::hub_seeds),
];

fn requests(bytes: &[u8]) -> bool {
    let Ok(request) = Request::decode(bytes) else { return false };
    assert_eq!(Request::decode(&request.encode()), Ok(request.clone()));
    if let Request::Hello { agent, .. } = &request {
        assert!(clean_agent(agent).len() <= 4 * protocol::TEXT_BYTES_MAX);
    }
    true
}

fn responses(bytes: &[u8]) -> bool {
    let Ok(response) = Response::decode(bytes) else { return false };
    assert_eq!(Response::decode(&response.encode()), Ok(response.clone()));
    if let Response::Welcome(welcome) = response {
        run_file(serde_json::from_str(&welcome.config).ok());
    }
    true
}

fn units(bytes: &[u8]) -> bool {
    let model = seeds::model();
    let Ok(unit) = Unit::decode(bytes, &model) else { return false };
    assert_eq!(Unit::decode(&unit.encode(), &model), Ok(unit.clone()));
    let work = &unit.work;
    let cost = |i| work.item_multiply_adds(i, 1, &model);
    assert!((0..work.items()).map(cost).sum::<u64>() > 0);
    assert!(result_bytes_max(work, &model) > 0);
    assert_eq!(work.slice(0..work.items()), *work);
    true
}

/// The first byte says of which work.
fn outputs(bytes: &[u8]) -> bool {
    let Some((which, bytes)) = bytes.split_first() else { return false };
    let model = seeds::model();
    let works = seeds::works();
    let work = &works[usize::from(*which) % works.len()];
    let Ok(output) = decode_output(bytes, work, &model) else { return false };
    assert_eq!(decode_output(&encode_output(&output), work, &model).as_ref(), Ok(&output));
    let audit = work.audit(&output);
    let cost = work.multiply_adds(&output, &model);
    assert!(audit.multiply_adds(&output, &model) <= cost.max(1), "an audit dearer than the work");
    true
}

fn shares(bytes: &[u8]) -> bool {
    let model = seeds::model();
    let mut sums = Gradients::zeros(&model);
    sums.0[1].fill(i64::MAX / 2);
    let before = sums.clone();
    if share::add_decoded(bytes, &mut sums).is_err() {
        assert!(sums == before, "a share that is refused has changed the sums");
        return false;
    }
    for (sum, before) in sums.0.iter_mut().flatten().zip(before.0.iter().flatten()) {
        *sum = sum.wrapping_sub(*before);
    }
    assert!(share::encode(&sums) == bytes, "one share, two encodings");
    true
}

/// The first byte says whether there is a base.
fn versions(bytes: &[u8]) -> bool {
    let Some((with_base, bytes)) = bytes.split_first() else { return false };
    static BASE: OnceLock<manyhands_core::model::weights::Weights> = OnceLock::new();
    let base = BASE.get_or_init(|| seeds::version(0));
    let base = (*with_base != 0).then_some(base);
    let _ = delta::hashes(bytes);
    // Hashes that are right let mutations of the tensors be read to their end.
    let mut bytes = bytes.to_vec();
    if let (Some(named), Some(base)) = (bytes.get_mut(..32), base) {
        named.copy_from_slice(base.hash().as_bytes());
    }
    match delta::apply(base, &seeds::model(), &bytes) {
        Ok(next) => {
            assert!(delta::encode(base, &next) == bytes, "one version, two encodings");
            true
        }
        Err(_) => false,
    }
}

/// Two bytes of count, then packed values.
fn packing(bytes: &[u8]) -> bool {
    let Some((count, packed)) = bytes.split_first_chunk() else { return false };
    let count = usize::from(u16::from_le_bytes(*count));
    if let Some(parts) = split(packed, count % 8) {
        let parts: Vec<Vec<u8>> = parts.into_iter().map(<[u8]>::to_vec).collect();
        let mut joined = Vec::new();
        join(&parts, &mut joined);
        assert_eq!(joined, packed);
    }
    let Ok((values, rest)) = unpack(packed, count) else { return false };
    let mut again = Vec::new();
    pack(values, &mut again);
    assert_eq!([&again[..], rest].concat(), packed, "the same values, packed in two ways");
    true
}

fn records(bytes: &[u8]) -> bool {
    let Ok(record) = chain::decode(bytes) else { return false };
    assert_eq!(chain::encode(&record), bytes);
    if let Entry::Open { config, .. } = record.entry {
        run_file(serde_json::from_str(&config).ok());
    }
    true
}

/// Records with two bytes of length in front of each.
fn chain(mut bytes: &[u8]) -> bool {
    let mut verifier = Verifier::default();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes(*length));
        let Some((record, rest)) = rest.split_at_checked(length) else { return false };
        let before = verifier.sequence();
        if verifier.push(record).is_err() {
            return false;
        }
        assert_eq!(verifier.sequence(), before + 1);
        bytes = rest;
    }
    bytes.is_empty()
}

/// Headers of streams, by the first byte; a chunk list after hash and length.
fn streams(bytes: &[u8]) -> bool {
    let Some((which, bytes)) = bytes.split_first() else { return false };
    match which % 4 {
        0 => {
            let Some(prefix) = bytes.first_chunk() else { return false };
            transfer::message_length(*prefix, protocol::REQUEST_BYTES_MAX)
                .is_ok_and(|length| transfer::message_header(length) == Some(*prefix))
        }
        1 => {
            let Some(header) = bytes.first_chunk::<RESULT_HEADER_BYTES>() else { return false };
            let (unit, length) = transfer::read_result_header(header);
            assert_eq!(transfer::result_header(&unit, length), *header);
            true
        }
        2 => {
            let Some(header) = bytes.first_chunk::<BLOB_HEADER_BYTES>() else { return false };
            let (blob, wants_list) = transfer::read_blob_header(header);
            assert_eq!(transfer::blob_header(&blob, wants_list)[..32], header[..32]);
            true
        }
        _ => {
            let Some((hash, rest)) = bytes.split_first_chunk() else { return false };
            let Some((length, values)) = rest.split_first_chunk() else { return false };
            let Ok((_, length)) = transfer::read_list_header(*length) else { return false };
            let list = transfer::read_list(&Hash(*hash), length, values);
            let Some(list) = list else { return false };
            assert_eq!(transfer::list(&list), rest);
            let mut end = 0;
            for i in 0..list.count() {
                let range = list.range(i);
                assert!(range.start == end && range.end - end <= CHUNK_BYTES as u64);
                end = range.end;
                list.check(i, values);
            }
            assert_eq!(end, length);
            true
        }
    }
}

fn manifests(bytes: &[u8]) -> bool {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let names = (Hash::parse(text), PeerKey::parse(text), Signature::parse(text));
        if let (Some(hash), ..) = names {
            assert_eq!(hash.to_string(), text.to_lowercase());
        }
    }
    let Ok(manifest) = Manifest::parse(bytes) else { return false };
    let again = serde_json::to_vec(&manifest).expect("plain data");
    assert_eq!(Manifest::parse(&again).as_ref().ok(), Some(&manifest));
    manifest.files.keys().for_each(|file| drop(manifest.check(file, bytes)));
    true
}

fn weights(bytes: &[u8]) -> bool {
    let Ok(weights) = decode_weights(bytes) else { return false };
    let again = decode_weights(&encode_weights(&weights)).expect("what was read can be written");
    assert_eq!(again.hash(), weights.hash());
    true
}

fn floats(bytes: &[u8]) -> bool {
    let model = seeds::model();
    let Ok(groups) = decode_floats(&model, bytes) else { return false };
    assert!(groups.values().flatten().flatten().all(|x| x.is_finite()));
    let again = encode_floats(&model, &groups);
    assert_eq!(decode_floats(&model, &again).as_ref().ok(), Some(&groups));
    true
}

/// The state's JSON, beside tensors that fit it.
fn states(bytes: &[u8]) -> bool {
    static FILES: OnceLock<BTreeMap<String, Vec<u8>>> = OnceLock::new();
    let mut files = FILES.get_or_init(seeds::checkpoint).clone();
    files.insert(STATE_FILE.into(), bytes.to_vec());
    let Ok((config, state)) = State::load(&files) else { return false };
    let model = config.model().expect("it was validated");
    let (_, again) = state.save(&config, &model);
    assert!(again.get(OPTIMIZER_FILE) == files.get(OPTIMIZER_FILE), "other tensors");
    state.ordinal(&config);
    true
}

fn vectors(bytes: &[u8]) -> bool {
    let Ok(vectors) = Vectors::parse(bytes) else { return false };
    let _ = vectors.weights();
    true
}

fn run_files(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let json = run_file(serde_json::from_str(text).ok());
    run_file(toml::from_str(text).ok()) || json
}

fn run_file(config: Option<RunConfig>) -> bool {
    let Some(config) = config else { return false };
    let model: Option<ModelConfig> = config.model().ok();
    if config.validate().is_err() {
        return false;
    }
    assert!(model.is_some(), "a run file without a model is valid");
    config.steps();
    let json = serde_json::to_string(&config).expect("plain data");
    let again: RunConfig = serde_json::from_str(&json).expect("what was read can be written");
    assert_eq!(again, config, "the identity of a run is that of its JSON");
    true
}

fn problem_files(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let Ok(problems) = jsonl::parse(text) else { return false };
    assert!(problems.iter().all(|p| p.score_exact(&p.trace) == 1.0), "an answer no one can give");
    let count = problems.len();
    let (train, held_out) = jsonl::split(problems);
    assert_eq!(train.len() + held_out.len(), count);
    true
}

/// What a volunteer says that a model wrote, scored as an answer to every kind of problem.
fn completions(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    extract_answer(text);
    let score = |family: Family| {
        let problem = family.generate(1, 0, 3, Split::Train);
        let score = family.score(&problem, text);
        assert!(score == 0.0 || score == 1.0, "{family}: part credit {score}");
        score == 1.0
    };
    // All are asked, whatever the first ones say.
    Family::ALL.into_iter().filter(|f| score(*f)).count() > 0
}
