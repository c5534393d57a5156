//! Yardsticks in Python, run as processes of their own between our own rounds.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

const GEMM: &str = include_str!("../../peers/gemm.py");
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
    let words: Vec<&str> = text.split_whitespace().collect();
    let rate =
        words.iter().position(|w| *w == "tokens/s").and_then(|i| words.get(i + 1)?.parse().ok());
    rate.with_context(|| format!("the torch yardstick printed {text:?}"))
}
