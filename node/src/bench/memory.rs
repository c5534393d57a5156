//! Peak memory of a training step against its tensors, and growth over many steps.

use anyhow::{Context, Result};
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::model::config::ModelConfig;

use super::training::{Loop, Workload};
use super::{Row, Table};

/// Steps over which memory must not grow.
const STEPS: usize = 1000;

/// A field of `/proc/self/status` in bytes; `None` where there is no such file.
pub(super) fn status(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with(field))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

/// Measures both.
pub(super) fn run(table: &mut Table, threads: usize) -> Result<()> {
    if status("VmRSS").is_none() {
        eprintln!("memory is measured on Linux only");
        return Ok(());
    }
    let model = ModelConfig::preset("small", 256, 128).context("no such preset")?;
    let workload = Workload { name: "small".into(), model, batch: 8, length: 128 };
    let before = status("VmRSS").unwrap_or(0);
    let engine = Cpu::new(workload.model.constants(), threads, None);
    let mut training = Loop::new(&engine, &workload);
    training.step()?;
    let peak = status("VmHWM").unwrap_or(0).saturating_sub(before);
    let tensors = tensor_bytes(&workload);
    let push = |table: &mut Table, name: &str, bytes: f64, note: String| {
        table.push(Row {
            name: name.into(),
            shape: format!("small {}x{}", workload.batch, workload.length),
            threads,
            engine: "cpu".into(),
            adapter: engine.path().to_string(),
            median_s: 0.0,
            rate: bytes / (1 << 20) as f64,
            unit: "MiB",
            ratio: None,
            note,
        });
    };
    let note = format!("{:.2} of the sum of its tensors", peak as f64 / tensors as f64);
    push(table, "peak", peak as f64, note);

    let small = Workload {
        name: "nano".into(),
        model: ModelConfig::preset("nano", 128, 32).context("no such preset")?,
        batch: 4,
        length: 32,
    };
    let engine = Cpu::new(small.model.constants(), threads, None);
    let mut training = Loop::new(&engine, &small);
    for _ in 0..STEPS / 10 {
        training.step()?;
    }
    let start = status("VmRSS").unwrap_or(0);
    for _ in 0..STEPS {
        training.step()?;
    }
    let growth = status("VmRSS").unwrap_or(0) as f64 - start as f64;
    push(table, "growth", growth, format!("resident memory over {STEPS} steps of nano 4x32"));
    Ok(())
}

/// Bytes of everything a training step must hold at once, each tensor once, in its own format.
fn tensor_bytes(w: &Workload) -> u64 {
    let c = &w.model;
    let rows = w.tokens();
    // Both orientations of the weights, f32 master and two moments, i64 gradients twice (engine and
    // reader).
    let parameters = c.parameter_count() * (2 * 2 + 3 * 4 + 2 * 8);
    // A layer keeps: two norms (unscaled rows, i32), four quantised inputs (i16), queries, keys and
    // values (i16), gate and up (i32).
    let kept = 2 * c.width * 4
        + (2 * c.width + c.attention_width() + c.ffn) * 2
        + (c.attention_width() + 2 * c.kv_width()) * 2
        + 2 * c.ffn * 4;
    // Logits and their gradient.
    let logits = 2 * c.vocabulary * 4;
    (parameters + rows * (c.layers * kept + logits)) as u64
}
