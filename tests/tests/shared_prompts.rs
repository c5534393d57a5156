//! Requests that share a prompt share its pass, and nothing of it shows.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod gpu_support;

use gpu_support::with_gpu;
use manyhands_core::engine::Engine;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::twin::Twin;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::{Generated, Request, Sampling, generate};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::Weights;
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

fn weights() -> Weights {
    let config = ModelConfig::preset("nano", 128, 96).unwrap();
    let mut master = master_weights(&config, 3);
    // Values that clamp: what is counted must not depend on who shares.
    master.iter_mut().skip(1).step_by(3).for_each(|m| m.iter_mut().for_each(|w| *w *= 900.0));
    Weights::quantize(&config, &master)
}

fn prompt(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| 3 + (i * 7 + seed * 11) % 90).collect()
}

/// Groups of several sizes and lengths, a prompt of one token, and one that comes back.
fn requests() -> Vec<Request> {
    let groups = [(0, 40, 3), (1, 5, 1), (2, 1, 2), (3, 33, 4), (0, 40, 2)];
    let prompts = groups.into_iter().flat_map(|(seed, length, count)| {
        std::iter::repeat_n(prompt(seed, length), count as usize)
    });
    let stream = |i: usize| [i as u32, 5, 0];
    prompts.enumerate().map(|(i, prompt)| Request { prompt, stream: stream(i) }).collect()
}

fn run<E: Engine>(engine: &E, requests: &[Request], slots: usize) -> Generated {
    let decoder = Decoder::new(engine, &weights());
    let sampling = Sampling {
        seed: 8,
        temperature_scale: Some(temperature_scale(1.0)),
        max_new_tokens: 6,
        end: 2,
        slots,
    };
    block_on(generate(engine, &decoder, requests, &sampling, |_, _| true)).unwrap()
}

fn alone<E: Engine>(engine: &E) -> Generated {
    let mut all = Generated::default();
    for request in requests() {
        let one = run(engine, &[request], 1);
        all.completions.extend(one.completions);
        all.saturations.merge(&one.saturations);
    }
    all
}

fn check<E: Engine>(engine: &E, expected: &Generated) {
    for slots in [1, 2, 5, 12] {
        assert!(run(engine, &requests(), slots) == *expected, "{slots} slots");
    }
}

#[test]
fn shared_prompts_give_what_each_request_gives_alone() {
    let constants = weights().config.constants();
    let twin = Twin::new(constants.clone());
    let expected = alone(&twin);
    assert!(expected.saturations.total() > 0, "nothing is clamped: the counts show nothing");
    check(&twin, &expected);
    let cpu = Cpu::new(constants, 2, None);
    assert!(alone(&cpu) == expected);
    check(&cpu, &expected);
}

#[test]
fn shared_prompts_on_the_graphics_adapter_too() {
    with_gpu(|gpu| {
        let constants = weights().config.constants();
        let expected = alone(&Twin::new(constants.clone()));
        check(&gpu.for_model(constants).unwrap(), &expected);
    });
}
