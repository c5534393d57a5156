//! Yardsticks in Python, run as processes of their own between our own rounds.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::model::Llama;

const GEMM: &str = include_str!("../../peers/gemm.py");
const LLAMA: &str = include_str!("../../peers/llama.py");
const TORCH_LORA: &str = include_str!("../../peers/torch_lora.py");
const TORCH_STEP: &str = include_str!("../../peers/torch_step.py");

/// Which kernels OpenBLAS uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernels {
    /// The best of this machine.
    Best,
    /// Those for AVX2.
    Avx2,
}

fn python(interpreter: &Path, script: &str, args: &[String], kernels: Kernels) -> Result<String> {
    let mut command = Command::new(interpreter);
    command.arg("-c").arg(script).args(args).env_remove("OPENBLAS_L2_SIZE");
    match kernels {
        Kernels::Best => command.env_remove("OPENBLAS_CORETYPE"),
        Kernels::Avx2 => command.env("OPENBLAS_CORETYPE", "Haswell"),
    };
    let output =
        command.output().with_context(|| format!("cannot run {}", interpreter.display()))?;
    if !output.status.success() {
        bail!("{}: {}", interpreter.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Median seconds of OpenBLAS's f32 product, by shape.
pub(super) fn gemm(
    peer: &Path,
    threads: usize,
    shapes: &[[usize; 3]],
    kernels: Kernels,
) -> Result<Vec<f64>> {
    let name = |s: &[usize; 3]| s.map(|x| x.to_string()).join("x");
    let mut args = vec![threads.to_string()];
    args.extend(shapes.iter().map(name));
    let text = python(peer, GEMM, &args, kernels)?;
    let seconds = text.lines().filter_map(|l| l.split_whitespace().nth(1)?.parse().ok());
    let seconds: Vec<f64> = seconds.collect();
    if seconds.len() != shapes.len() {
        bail!("the numpy yardstick printed {text:?}");
    }
    Ok(seconds)
}

/// Tokens per second of a PyTorch training step, f32.
pub(super) fn torch_step(peer: &Path, threads: usize, preset: &str) -> Result<f64> {
    let args = [threads.to_string(), "12".into(), preset.into()];
    let text = python(peer, TORCH_STEP, &args, Kernels::Best)?;
    rates(&text).first().copied().with_context(|| format!("the torch yardstick printed {text:?}"))
}

/// Tokens per second of the gradient of LoRA factors in PyTorch, f32: (steps, batch, tokens, rank).
pub(super) fn torch_lora(peer: &Path, threads: usize, sizes: [usize; 4]) -> Result<f64> {
    let mut args = vec![threads.to_string()];
    args.extend(sizes.iter().map(usize::to_string));
    let text = python(peer, TORCH_LORA, &args, Kernels::Best)?;
    rates(&text).first().copied().with_context(|| format!("the torch yardstick printed {text:?}"))
}

/// Tokens per second of llama.cpp: a prompt of so many tokens, then decoding so many of each of
/// so many sequences at once.
pub(super) fn llama(
    peer: &Path,
    llama: &Llama<'_>,
    threads: usize,
    [prompt, new]: [usize; 2],
    batches: &[usize],
) -> Result<Vec<f64>> {
    let mut args: Vec<String> =
        [llama.directory, llama.model].map(|p| p.display().to_string()).into();
    args.extend([threads, prompt, new].iter().chain(batches).map(usize::to_string));
    let text = python(peer, LLAMA, &args, Kernels::Best)?;
    let rates = rates(&text);
    if rates.len() != batches.len() + 1 {
        bail!("the llama.cpp yardstick printed {text:?}");
    }
    Ok(rates)
}

/// The numbers after `tokens/s`.
fn rates(text: &str) -> Vec<f64> {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.windows(2).filter(|w| w[0] == "tokens/s").filter_map(|w| w[1].parse().ok()).collect()
}
