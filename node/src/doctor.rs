//! `manyhands doctor`: does this machine compute the right bits?

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use manyhands_core::conformance::oracle::Vectors;
use manyhands_core::conformance::suite;
use manyhands_core::engine::Constants;
use manyhands_core::engine::cpu::{Cpu, Path};
use manyhands_core::engine::twin::Twin;
use manyhands_shaders::x1::FORMAT;
use serde::Serialize;

use crate::engines;
use crate::store::read_bounded;

/// Largest vector file.
const VECTORS_BYTES_MAX: u64 = 1 << 30;

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Check the engines against a vector file of the oracle instead of the suite.
    #[arg(long, value_name = "FILE")]
    vectors: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One engine's result. Field names are a stable interface.
#[derive(Debug, Serialize)]
struct EngineResult {
    /// twin, cpu or wgpu.
    engine: &'static str,
    /// CPU path, or name of the adapter.
    adapter: String,
    /// Instruction set, or graphics interface and driver.
    backend: String,
    /// The suite's digest, or empty when a vector file was checked.
    digest: String,
    /// Whether the bits are right.
    pass: bool,
    /// What was wrong, or empty.
    problem: String,
    /// Limits that matter, for people.
    limits: String,
}

#[derive(Debug, Serialize)]
struct Report {
    format: &'static str,
    results: Vec<EngineResult>,
}

/// What is checked: an engine for given constants answers with (digest, problem).
enum Check {
    Suite,
    Vectors(Box<Vectors>),
}

impl Check {
    fn constants(&self) -> Constants {
        match self {
            Self::Suite => suite::constants(),
            Self::Vectors(v) => v.config().constants(),
        }
    }

    fn run<E: manyhands_core::engine::Engine>(&self, engine: &E) -> (String, Option<String>) {
        match self {
            Self::Vectors(v) => {
                (String::new(), pollster::block_on(v.check(engine)).err().map(|e| e.to_string()))
            }
            Self::Suite => match pollster::block_on(suite::run(engine)) {
                Err(error) => (String::new(), Some(error.to_string())),
                Ok(outcome) => {
                    let wrong = outcome.first_difference();
                    (outcome.digest.clone(), wrong.map(|s| format!("section {s} differs")))
                }
            },
        }
    }
}

/// Runs `doctor`: exit code 1 if any engine fails.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let check = match &args.vectors {
        None => Check::Suite,
        Some(path) => {
            let bytes = read_bounded(path, VECTORS_BYTES_MAX)?;
            let vectors = Vectors::parse(&bytes);
            Check::Vectors(Box::new(vectors.with_context(|| format!("in {}", path.display()))?))
        }
    };
    let mut results = vec![{
        let outcome = check.run(&Twin::new(check.constants()));
        result("twin", "the definition".into(), "plain loops".into(), String::new(), outcome)
    }];
    for path in Path::available() {
        let best = if path == Path::best() { ", used" } else { "" };
        let cpu = Cpu::new(check.constants(), engines::thread_count(0), Some(path));
        let limits = format!("{} threads", cpu.threads());
        let name = std::env::consts::ARCH.to_string();
        results.push(result("cpu", name, format!("{path}{best}"), limits, check.run(&cpu)));
    }
    for adapter in engines::adapters() {
        let info = adapter.get_info();
        let l = adapter.limits();
        let limits = format!(
            "{} storage buffers, {} MiB bindings, {} KiB workgroup memory",
            l.max_storage_buffers_per_shader_stage,
            l.max_storage_buffer_binding_size >> 20,
            l.max_compute_workgroup_storage_size >> 10,
        );
        let outcome = match engines::open_gpu(&adapter, check.constants()) {
            Ok(gpu) => check.run(&gpu),
            Err(error) => (String::new(), Some(format!("{error:#}"))),
        };
        let backend = format!("{} {} {}", info.backend, info.driver, info.driver_info);
        results.push(result("wgpu", info.name, backend, limits, outcome));
    }
    let pass = results.iter().all(|r| r.pass);
    let report = Report { format: FORMAT, results };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report, matches!(check, Check::Suite));
    }
    Ok(if pass { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn result(
    engine: &'static str,
    adapter: String,
    backend: String,
    limits: String,
    (digest, problem): (String, Option<String>),
) -> EngineResult {
    let pass = problem.is_none();
    EngineResult {
        engine,
        adapter,
        backend,
        digest,
        pass,
        problem: problem.unwrap_or_default(),
        limits,
    }
}

fn print(report: &Report, is_suite: bool) {
    println!("format {}", report.format);
    if is_suite {
        println!("digest {} (expected)", suite::DIGEST);
    }
    for r in &report.results {
        let verdict = if r.pass { "PASS" } else { "FAIL" };
        println!(
            "{verdict}  {:5} {} [{}] {} {}",
            r.engine, r.adapter, r.backend, r.digest, r.problem
        );
        if !r.limits.is_empty() {
            println!("            {}", r.limits);
        }
    }
    if !report.results.iter().any(|r| r.engine == "wgpu") {
        println!("no graphics adapter found: the CPU engine is used, and gives the same bits");
    }
    if report.results.iter().any(|r| !r.pass) {
        println!(
            "an engine that fails never contributes; update its driver, or use another engine"
        );
    }
}
