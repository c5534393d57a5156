//! Work that lanes share is the same as work that one engine does by itself.

use std::cell::Cell;

use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::Request;
use manyhands_core::run::execute::execute;
use manyhands_core::run::work::{Output, Scored, Seed, Seeded, Values, Work};
use manyhands_shaders::twin::logits::temperature_scale;
use pollster::block_on;

use super::models::model;
use super::{Random, config};

const SEQUENCES: usize = 17;
const LENGTH: usize = 70;

/// Sampling, scores and a gradient, of unlike sequences.
fn works(r: &mut Random, vocabulary: usize) -> [Work; 3] {
    let scale = temperature_scale(1.0);
    let mut tokens =
        |n: usize| -> Vec<u32> { (0..n).map(|_| r.below(vocabulary) as u32).collect() };
    // Neighbours share prompts, also where the work is cut.
    let mut prompts: Vec<Vec<u32>> = (0..SEQUENCES).map(|i| tokens(3 + i % 5)).collect();
    (1..SEQUENCES).filter(|i| i % 3 > 0).for_each(|i| prompts[i] = prompts[i - 1].clone());
    let request = |(i, prompt)| Request { prompt, stream: [i as u32, 7, 9] };
    let requests: Vec<Request> = prompts.into_iter().enumerate().map(request).collect();
    let sample = Work::Sample {
        seed: 5,
        temperature_scale: Some(scale),
        max_new_tokens: 30,
        end: 0,
        requests,
    };
    let scored = |i: usize| Scored { tokens: tokens(LENGTH - 2 * i), first: 1 + i as u32 };
    let score =
        Work::Score { temperature_scale: scale, sequences: (0..SEQUENCES).map(scored).collect() };
    let seeded = |i: usize| {
        let seed = |t: usize| Seed {
            weight: (t as i32 % 5 - 2) * 40_000,
            entropy_weight: t as i32 % 3 * 300,
            entropy_center: 100_000,
        };
        let (tokens, first) = (tokens(LENGTH - i), 1 + i);
        let seeds = (first..tokens.len()).map(seed).collect();
        Seeded { tokens, first: first as u32, seeds }
    };
    let gradient = Work::Gradient {
        temperature_scale: scale,
        sequences: (0..SEQUENCES).map(seeded).collect(),
    };
    [sample, score, gradient]
}

/// The output, and what its progress reported last.
fn run(engine: &Cpu, decoder: &Decoder<Cpu>, work: &Work) -> (Output, usize) {
    let told = Cell::new(0);
    let progress = |tokens| assert!(told.replace(tokens) <= tokens, "progress went back");
    let output = block_on(execute(engine, decoder, work, progress)).expect("no device to lose");
    (output, told.get())
}

/// Breaks if a cut changes a value, a sum or a count, loses progress, or leaves counts behind.
#[test]
fn lanes_give_the_same_output_as_one_engine() {
    let config = config(64, 2, 1, 32, 96, 48, 2);
    // With weights that large everything clamps somewhere.
    for (seed, scale) in [(1, 1.0), (2, 4000.0)] {
        let weights = model(&config, seed, scale);
        let [one, three] = [1, 3].map(|threads| Cpu::new(config.constants(), threads, None));
        let [alone, shared] = [&one, &three].map(|e| Decoder::new(e, &weights));
        for work in works(&mut Random(seed), config.vocabulary) {
            let expected = run(&one, &alone, &work);
            assert!(expected.1 > 0, "no progress");
            let clamped = expected.0.saturations.0.iter().sum::<u64>();
            assert_eq!(clamped > 0, scale > 1.0, "{clamped} clamped");
            for _ in 0..2 {
                assert!(run(&three, &shared, &work) == expected, "lanes differ: {work:?}");
            }
            if let Values::Samples(_) = expected.0.values {
                let check = work.audit(&expected.0);
                let expected = run(&one, &alone, &check);
                assert!(run(&three, &shared, &check) == expected, "lanes differ in a check");
            }
        }
    }
}
