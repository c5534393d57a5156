//! SmolLM2-135M-Instruct against logits and greedy texts of independent software.
//!
//! `smollm2 MODEL.gguf tests/smollm2/reference.json`; `.ci/smollm2` fetches the model. The f32 pass
//! must agree to rounding, the exact one to what its formats cost.

#![expect(clippy::print_stdout, reason = "a program that reports")]
#![expect(clippy::unwrap_used, reason = "a check that cannot go on should stop")]

use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::{Batch, Engine};
use manyhands_core::import::exact::{Shifts, quantize};
use manyhands_core::import::gguf::Gguf;
use manyhands_core::import::names::Source;
use manyhands_core::import::reference::Reference;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::{Request, Sampling, generate};
use manyhands_core::run::rollout::logprob;
use manyhands_shaders::twin::Site;
use serde_json::Value;

/// Largest difference of an f32 logit from another program's.
const F32_ERROR_MAX: f64 = 1e-3;
/// Largest difference of an exact log-probability among the ten likeliest tokens: several times
/// what a mean divergence of 0.001 comes to.
const EXACT_ERROR_MAX: f64 = 0.5;
/// Greedy texts may part where the two likeliest tokens are this close, in nats.
const MARGIN: f64 = 0.3;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let bytes = std::fs::read(&args[1]).unwrap();
    let json: Value = serde_json::from_slice(&std::fs::read(&args[2]).unwrap()).unwrap();
    let file = Gguf::parse(&bytes).unwrap();
    let source = Source::from_gguf(&file).unwrap();
    let reference = Reference::read(&source).unwrap();
    let prompts = json["prompts"].as_array().unwrap();
    let peak = prompts.iter().map(|p| reference.states(&ids(&p["ids"])).peak);
    let shifts = Shifts::choose(&source, peak.fold(0.0, f32::max)).unwrap();
    let weights = quantize(&source, &shifts).unwrap();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let engine = Cpu::new(weights.config.constants(), threads, None);
    let decoder = Decoder::new(&engine, &weights);
    for prompt in prompts {
        let tokens = ids(&prompt["ids"]);
        let last = &prompt["last"];
        let (top, first) = (ids(&last["top10_ids"]), numbers(&last["first64"]));
        let states = reference.states(&tokens).rows;
        let logits = reference.logits(&states[states.len() - source.config.width..]);
        let at = first.iter().copied().enumerate();
        let at = at.chain(top.iter().map(|t| *t as usize).zip(numbers(&last["top10_logits"])));
        let f32_error = at.map(|(i, e)| (f64::from(logits[i]) - e).abs()).fold(0.0, f64::max);

        let batch = Batch::sequences([tokens.as_slice()]);
        let mut caches = decoder.caches(&engine, 1, tokens.len());
        let row = tokens.len() as u32 - 1;
        let h = engine.rows(&decoder.states(&engine, &batch, &mut caches), &[row]);
        let exact = decoder.logits(&engine, &h);
        let exact = pollster::block_on(engine.read(&exact)).unwrap();
        let value = |i: usize| f64::from(exact[i]) / 65_536.0;
        let sum = (0..exact.len()).map(|i| (value(i) - value(top[0] as usize)).exp()).sum::<f64>();
        let total = value(top[0] as usize) + sum.ln();
        let expected = numbers(&last["top10_logits"]);
        let shift = last["logsumexp"].as_f64().unwrap();
        let exact_error =
            top.iter().zip(expected).map(|(t, e)| value(*t as usize) - total - (e - shift));
        let exact_error = exact_error.fold(0.0, |m: f64, e| m.max(e.abs()));

        let sampling = Sampling {
            seed: 0,
            temperature_scale: None,
            max_new_tokens: 32,
            end: u32::MAX,
            slots: 1,
        };
        let request = [Request { prompt: tokens, stream: [0; 3] }];
        let texts = generate(&engine, &decoder, &request, &sampling, |_, _| true);
        let text = pollster::block_on(texts).unwrap().completions.remove(0);
        let expected = ids(&prompt["greedy_ids"]);
        let same = text.tokens.iter().zip(&expected).take_while(|(a, b)| a == b).count();
        let parts = numbers(&prompt["greedy_margins"]).get(same).copied();
        let logprobs = text.stats.iter().map(logprob).zip(numbers(&prompt["greedy_logprobs"]));
        let greedy_error = logprobs.take(same).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        println!(
            "{}: f32 logits within {f32_error:.6}, exact log-probabilities within {exact_error:.4}, {same} of {} greedy tokens (margin there {parts:?}), within {greedy_error:.4}",
            prompt["name"],
            expected.len(),
        );
        assert!(f32_error < F32_ERROR_MAX);
        assert!(exact_error < EXACT_ERROR_MAX && greedy_error < EXACT_ERROR_MAX);
        assert!(parts.is_none_or(|m| m < MARGIN), "the texts part where they should not");
    }
    let saturations = pollster::block_on(engine.take_saturations()).unwrap();
    let clamped: u64 = saturations.0.iter().sum::<u64>() - saturations.0[Site::Matmul as usize];
    assert_eq!(clamped, 0, "{saturations:?}");
}
