//! Which engine runs: the CPU, or a graphics adapter that has proved itself.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use manyhands_core::conformance::suite;
use manyhands_core::engine::Constants;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::gpu::{Gpu, Profile};

use crate::tuning;

/// Choice of engine on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// A real GPU that passes the conformance suite, else the CPU.
    Auto,
    /// Threads and SIMD; needs no driver.
    Cpu,
    /// The first adapter of wgpu, software adapters included.
    Wgpu,
}

impl std::fmt::Display for EngineChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Wgpu => "wgpu",
        })
    }
}

/// An engine chosen at run time.
pub enum AnyEngine {
    /// The CPU engine.
    Cpu(Box<Cpu>),
    /// The wgpu engine.
    Gpu(Box<Gpu>, String),
}

/// Runs `$body` with `$engine` bound to the concrete engine.
#[macro_export]
macro_rules! with_engine {
    ($any:expr, |$engine:ident| $body:expr) => {
        match $any {
            $crate::engines::AnyEngine::Cpu($engine) => $body,
            $crate::engines::AnyEngine::Gpu($engine, _) => $body,
        }
    };
}

impl AnyEngine {
    /// One line for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu(cpu) => format!("cpu ({}, {} threads)", cpu.path(), cpu.threads()),
            Self::Gpu(gpu, name) => format!("wgpu ({name}, {:?})", gpu.matmul_variant()),
        }
    }
}

/// Number of threads that `--threads` means.
pub fn thread_count(threads: usize) -> usize {
    match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

/// Every adapter that wgpu finds, real ones first.
pub fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    adapters.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Opens an adapter for a model.
pub fn open_gpu(adapter: &wgpu::Adapter, constants: Constants) -> Result<Gpu> {
    let info = adapter.get_info();
    let open = || -> Result<Gpu> {
        let (device, queue) = pollster::block_on(Gpu::request_device(adapter))?;
        let gpu = Gpu::new(device, queue, Profile::of(&info), constants)?;
        let started = Instant::now();
        gpu.set_clock(Arc::new(move || started.elapsed().as_secs_f64() * 1e3));
        Ok(gpu)
    };
    open().with_context(|| format!("cannot open the adapter {}", info.name))
}

/// The engine for a model with these constants. An adapter that fails the suite is never used.
pub fn choose(choice: EngineChoice, threads: usize, constants: Constants) -> Result<AnyEngine> {
    // The optimizer's threads; a pool that exists already (a second engine) stays as it is.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(thread_count(threads)).build_global();
    let cpu = |constants| {
        let cpu = Cpu::new(constants, thread_count(threads), None);
        Ok(AnyEngine::Cpu(Box::new(cpu)))
    };
    if choice == EngineChoice::Cpu {
        return cpu(constants);
    }
    for adapter in adapters() {
        let info = adapter.get_info();
        if choice == EngineChoice::Auto && info.device_type == wgpu::DeviceType::Cpu {
            continue;
        }
        let probe = open_gpu(&adapter, suite::constants())?;
        let outcome = pollster::block_on(suite::run(&probe))?;
        if outcome.passes() {
            tuning::pick(&probe, &info)?;
            return Ok(AnyEngine::Gpu(Box::new(probe.for_model(constants)?), info.name));
        }
        eprintln!(
            "warning: {} does not compute the right bits ({} differs) and is not used; `manyhands doctor` tells more",
            info.name,
            outcome.first_difference().unwrap_or("the digest"),
        );
    }
    if choice == EngineChoice::Wgpu {
        bail!(
            "no usable graphics adapter; on Debian `apt-get install mesa-vulkan-drivers` gives a software one, or use --engine cpu"
        );
    }
    cpu(constants)
}
