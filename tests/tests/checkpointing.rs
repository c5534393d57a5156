//! Gradient checkpointing and logits in pieces take less memory, and nothing else shows.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod gpu_support;

use gpu_support::with_gpu;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::twin::Twin;
use manyhands_core::engine::{Batch, Engine, PIECE_ROWS, Saturations, SeedRow};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::{Decoder, DeviceGradients, Keep};
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::{Gradients, Weights};
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

fn weights() -> Weights {
    let config = ModelConfig::preset("nano", 128, 192).unwrap();
    let mut master = master_weights(&config, 3);
    // Values that clamp: what is counted must not depend on how often it is computed.
    master.iter_mut().skip(1).step_by(3).for_each(|m| m.iter_mut().for_each(|w| *w *= 900.0));
    Weights::quantize(&config, &master)
}

/// One sequence that is cut into pieces, one that ends with a piece, and a short one.
fn batch() -> Batch {
    let sequence = |seed: u32, n: usize| -> Vec<u32> {
        (0..n as u32).map(|i| 3 + (i * 7 + seed * 11) % 90).collect()
    };
    let sequences = [sequence(0, PIECE_ROWS + 37), sequence(1, PIECE_ROWS), sequence(2, 9)];
    Batch::sequences(sequences.iter().map(Vec::as_slice))
}

fn gradient<E: Engine>(engine: &E, keep: Keep, piece: usize) -> (Gradients, Saturations) {
    let (decoder, batch, scale) =
        (Decoder::new(engine, &weights()), batch(), temperature_scale(1.0));
    let seed = |&token: &u32| SeedRow {
        target: (token * 5 + 1) % 90,
        weight: (token as i32 % 7 - 3) * 20_000,
        entropy_weight: token as i32 % 2 * 900,
        entropy_center: 100_000,
    };
    let seeds: Vec<SeedRow> = batch.tokens.iter().map(seed).collect();
    block_on(engine.take_saturations()).unwrap();
    let mut grads = DeviceGradients::zeros(engine, &decoder.config);
    let forward = decoder.forward(engine, &batch, keep);
    let mut dh = Vec::new();
    for (rows, part) in batch.pieces(piece) {
        let head = decoder.head_forward(engine, &forward.states, (rows.clone(), part));
        dh.push(decoder.head_backward(engine, head, &seeds[rows], scale, &mut grads));
    }
    let dh = engine.concat(&dh.iter().collect::<Vec<_>>());
    decoder.backward(engine, &batch, forward, dh, &mut grads);
    let grads = block_on(grads.read(engine)).unwrap();
    (grads, block_on(engine.take_saturations()).unwrap())
}

fn check<E: Engine>(name: &str, engine: &E, expected: &(Gradients, Saturations)) {
    for keep in [Keep::All, Keep::Input] {
        for piece in [1, PIECE_ROWS + 40, usize::MAX] {
            let (grads, saturations) = gradient(engine, keep, piece);
            assert!(grads.0 == expected.0.0, "{name}, {keep:?}, {piece}: another gradient");
            assert_eq!(saturations, expected.1, "{name}, {keep:?}, {piece}: other counts");
        }
    }
}

/// Breaks if a layer that is computed again counts twice, or if what a gradient is depends on the
/// memory that there was.
#[test]
fn recomputed_layers_and_pieces_of_logits_give_the_same_gradient_and_counts() {
    let constants = weights().config.constants();
    let expected = gradient(&Twin::new(constants.clone()), Keep::All, usize::MAX);
    assert!(expected.1.total() > 0, "nothing is clamped: the counts show nothing");
    check("twin", &Twin::new(constants.clone()), &expected);
    check("cpu", &Cpu::new(constants.clone(), 2, None), &expected);
    with_gpu(|gpu| check("gpu", &gpu.for_model(constants).unwrap(), &expected));
}
