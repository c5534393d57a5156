//! Seconds that units take on a native engine, one thread:  `unit_seconds cpu|wgpu DIRECTORY..`
//! A directory holds a unit, its model, and the blobs of its weights; `browser/bench.mjs` makes
//! them, and compares. Prints JSON: the engine's name, seconds and times of submissions a unit.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement for people")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use manyhands_core::engine::Engine;
use manyhands_core::engine::cpu::Cpu;
use manyhands_core::engine::gpu::{Gpu, MatmulVariant, Profile, TimedProduct};
use manyhands_core::model::config::ModelConfig;
use manyhands_core::model::decoder::Decoder;
use manyhands_core::run::execute::execute;
use manyhands_core::swarm::delta;
use manyhands_core::swarm::unit::Unit;

struct Task {
    model: ModelConfig,
    unit: Unit,
    blobs: Vec<Vec<u8>>,
}

fn read(dir: &Path) -> Task {
    let model: ModelConfig =
        serde_json::from_slice(&fs::read(dir.join("model.json")).unwrap()).unwrap();
    let unit = Unit::decode(&fs::read(dir.join("unit")).unwrap(), &model).unwrap();
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let is_blob = |p: &PathBuf| p.file_name().unwrap().to_string_lossy().starts_with("blob-");
    let mut paths: Vec<PathBuf> = entries.filter(is_blob).collect();
    paths.sort();
    Task { model, unit, blobs: paths.iter().map(|p| fs::read(p).unwrap()).collect() }
}

/// Executions after the first, which compiles.
const REPEATS: usize = 2;

/// Seconds of the fastest repetition.
fn seconds<E: Engine>(engine: &E, task: &Task) -> f64 {
    let weights = delta::build(task.unit.weights, None, &task.blobs, &task.model).unwrap();
    let decoder = Decoder::new(engine, &weights);
    let run = || {
        let started = Instant::now();
        pollster::block_on(execute(engine, &decoder, &task.unit.work, |_| ())).unwrap();
        started.elapsed().as_secs_f64()
    };
    run();
    (0..REPEATS).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn gpu(model: &ModelConfig) -> (Gpu, String) {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let options = wgpu::RequestAdapterOptions::default();
    let adapter = pollster::block_on(instance.request_adapter(&options)).unwrap();
    let info = adapter.get_info();
    let (device, queue) = pollster::block_on(Gpu::request_device(&adapter)).unwrap();
    let gpu = Gpu::new(device, queue, Profile::of(&info), model.constants()).unwrap();
    let time = |variant: &MatmulVariant| {
        let run = || {
            let product = TimedProduct::Exact(*variant);
            pollster::block_on(gpu.run_product(product, [256, 768, 256], 2)).unwrap();
        };
        run();
        let started = Instant::now();
        run();
        started.elapsed()
    };
    gpu.set_matmul_variant(MatmulVariant::ALL.into_iter().min_by_key(time).unwrap());
    let started = Instant::now();
    gpu.set_clock(std::sync::Arc::new(move || started.elapsed().as_secs_f64() * 1e3));
    (gpu, info.name)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let engine = args.next().unwrap();
    let tasks: Vec<Task> = args.map(|dir| read(Path::new(&dir))).collect();
    let model = &tasks[0].model;
    let out = if engine == "cpu" {
        let cpu = Cpu::new(model.constants(), 1, None);
        let units = tasks.iter().map(|t| serde_json::json!({ "seconds": seconds(&cpu, t) }));
        serde_json::json!({ "name": format!("cpu ({})", cpu.path()), "units": units.collect::<Vec<_>>() })
    } else {
        let (gpu, name) = gpu(model);
        let units = tasks.iter().map(|t| {
            // Its own count of submissions.
            let gpu = gpu.for_model(model.constants()).unwrap();
            let seconds = seconds(&gpu, t);
            serde_json::json!({ "seconds": seconds, "submissions": gpu.submission_times() })
        });
        serde_json::json!({ "name": name, "units": units.collect::<Vec<_>>() })
    };
    println!("{out}");
}
