//! What messages weigh: lengths of real encodings, for a model of the size that the simulated
//! costs stand for.

use manyhands_core::conformance::suite::DIGEST;
use manyhands_core::engine::{RowStats, Saturations};
use manyhands_core::model::generate::{Completion, Request as Prompt};
use manyhands_core::run::work::{Output, Seed, Seeded, Values, Work};
use manyhands_core::swarm::ids::{Hash, Signature};
use manyhands_core::swarm::protocol::{Idle, PROTOCOL, Request, Response};
use manyhands_core::swarm::scheduler::Kind;
use manyhands_core::swarm::unit::{Unit, encode_output};

/// Tokens of a prompt, and of its completion.
const PROMPT: usize = 16;
const NEW: usize = 64;
/// Parameters of the model: a multiply-add a parameter and token.
pub(super) const PARAMETERS: u64 = super::world::ITEM_COST / (PROMPT + NEW) as u64;
/// Bits of a gradient share a parameter: between 11.8 and 19.5 were measured (`core/examples/codec.rs`).
const SHARE_BITS: u64 = 15;
/// Bits of a version a parameter, for one step: between 0.03 and 4.2 were measured; a quarter here.
const VERSIONS_A_BIT: u64 = 4;
/// A message's length stands in front of it.
const FRAME: u64 = 4;

/// Bytes on the wire of everything that the simulation counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) hello: u64,
    pub(super) take: u64,
    pub(super) idle: u64,
    pub(super) beat: u64,
    pub(super) receipt: u64,
    /// Question and answer about weights.
    pub(super) weights: u64,
    /// Of one item, in a unit and in a result: by kind.
    unit_item: [u64; 3],
    result_item: [u64; 3],
}

impl Sizes {
    pub(super) fn new() -> Self {
        let hash = Hash([200; 32]);
        let request = |r: Request| FRAME + r.encode().len() as u64;
        let response = |r: Response| FRAME + r.encode().len() as u64;
        let text = || "manyhands 0.1.0".to_string();
        let hello = Request::Hello {
            protocol: PROTOCOL,
            digest: DIGEST.into(),
            agent: text(),
            engine: text(),
            speed: 1e10,
        };
        let idle = Response::Idle { retry_ms: 500, why: Idle::Waiting, accepted: Vec::new() };
        let receipt = Request::Receipt {
            unit: hash,
            receipt: hash,
            bytes: 1 << 20,
            signature: Signature([200; 64]),
        };
        let weights = request(Request::Weights { want: hash, have: vec![hash] })
            + response(Response::Weights { base: Some(hash), blobs: vec![hash] });
        let prompt = || Prompt { prompt: vec![100; PROMPT], stream: [1 << 20; 3] };
        let seeds = vec![Seed { weight: -9000, entropy_weight: 900, entropy_center: 90_000 }; NEW];
        let seeded = || Seeded { tokens: vec![100; PROMPT + NEW], first: 16, seeds: seeds.clone() };
        let row = RowStats { t: 1 << 17, total: 1 << 28, moment: 1 << 30, greedy: 0 };
        let sample = |n| Work::Sample {
            seed: 1,
            temperature_scale: Some(1 << 24),
            max_new_tokens: NEW as u32,
            end: 2,
            requests: vec![prompt(); n],
        };
        let check = |n| Work::Check {
            seed: 1,
            temperature_scale: Some(1 << 24),
            requests: vec![prompt(); n],
            claims: vec![vec![100; NEW]; n],
        };
        let gradient =
            |n| Work::Gradient { temperature_scale: 1 << 24, sequences: vec![seeded(); n] };
        let unit = |work| Unit { weights: hash, work }.encode().len() as u64;
        let completion = || Completion { tokens: vec![100; NEW], stats: vec![row; NEW] };
        let result = |n| {
            let values = Values::Samples(vec![completion(); n]);
            encode_output(&Output { saturations: Saturations([0; _]), values }).len() as u64
        };
        let sampled = result(2) - result(1);
        Self {
            hello: request(hello),
            take: request(Request::Take),
            idle: response(idle),
            beat: request(Request::Beat { units: vec![hash; 2] })
                + response(Response::Beat { unwanted: Vec::new() }),
            receipt: request(receipt) + response(Response::Upload),
            weights,
            unit_item: [
                unit(sample(2)) - unit(sample(1)),
                unit(check(2)) - unit(check(1)),
                unit(gradient(2)) - unit(gradient(1)),
            ],
            result_item: [sampled, sampled, sampled],
        }
    }

    /// The unit of so many items.
    pub(super) fn unit(&self, kind: usize, items: u64) -> u64 {
        self.unit_item[kind] * items
    }

    /// The result of so many items.
    pub(super) fn result(&self, kind: usize, items: u64) -> u64 {
        let share = if kind == Kind::Gradient as usize { PARAMETERS * SHARE_BITS / 8 } else { 0 };
        share + self.result_item[kind] * items
    }

    /// What a version costs whoever has the one before.
    pub(super) fn version(&self) -> u64 {
        PARAMETERS / (8 * VERSIONS_A_BIT)
    }
}
