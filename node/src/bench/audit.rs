//! What an audit of rollouts costs: one prefill over prompt and claim, against generating them.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::model::generate::Request;
use manyhands_core::model::init::master_weights;
use manyhands_core::model::weights::Weights;
use manyhands_core::run::execute::execute;
use manyhands_core::run::work::Work;
use manyhands_shaders::twin::logits::temperature_scale;

use super::{Row, Table, median};

/// Tokens of a prompt.
const PROMPT: usize = 16;
/// Sequences of a unit, and new tokens of each: wide, narrow, and long.
const SHAPES: [(usize, usize); 3] = [(64, 64), (8, 64), (16, 240)];

/// The same requests on the same engine, generated and audited in turn.
pub(super) fn run(table: &mut Table, threads: &[usize], rounds: usize) -> Result<()> {
    for preset in ["tiny", "small"] {
        for &threads in threads {
            for (sequences, new) in SHAPES {
                one(table, preset, threads, sequences, new, rounds)?;
            }
        }
    }
    Ok(())
}

fn one(
    table: &mut Table,
    preset: &str,
    threads: usize,
    sequences: usize,
    new: usize,
    rounds: usize,
) -> Result<()> {
    let model = ModelConfig::preset(preset, 256, PROMPT + new).context("no such preset")?;
    let engine = Cpu::new(model.constants(), threads, None);
    let decoder = Decoder::new(&engine, &Weights::quantize(&model, &master_weights(&model, 0)));
    let request = |i: usize| Request { prompt: vec![5; PROMPT], stream: [i as u32, 0, 0] };
    let sample = Work::Sample {
        seed: 1,
        temperature_scale: Some(temperature_scale(1.0)),
        max_new_tokens: new as u32,
        // Every completion has its full length.
        end: u32::MAX,
        requests: (0..sequences).map(request).collect(),
    };
    let timed = |work: &Work| -> Result<_> {
        let started = Instant::now();
        let output = pollster::block_on(execute(&engine, &decoder, work, |_| ()))?;
        Ok((output, started.elapsed().as_secs_f64()))
    };
    let (claimed, _) = timed(&sample)?;
    let audit = sample.audit(&claimed);
    let (mut generating, mut auditing) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        generating.push(timed(&sample)?.1);
        let (output, seconds) = timed(&audit)?;
        ensure!(output.values == claimed.values, "the audit found other completions");
        auditing.push(seconds);
    }
    let (generating, auditing) = (median(generating), median(auditing));
    let tokens = (sequences * new) as f64;
    for (name, seconds) in [("generate", generating), ("audit", auditing)] {
        let is_audit = name == "audit";
        table.push(Row {
            name: name.into(),
            shape: format!("{preset} {sequences}x({PROMPT}+{new})"),
            threads,
            engine: "cpu".into(),
            adapter: engine.path().to_string(),
            median_s: seconds,
            rate: tokens / seconds,
            unit: "tokens/s",
            ratio: is_audit.then_some(generating / auditing),
            note: if is_audit { "against generating".into() } else { String::new() },
        });
    }
    Ok(())
}
