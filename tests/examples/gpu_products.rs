//! Times every product kernel on the first adapter, against the plain f32 product:
//! `cargo run --release -p manyhands-tests --example gpu_products -- [M N K]`.
//!
//! Kernels are interleaved and the medians of their rounds compared, because a shared machine's
//! speed drifts.

use std::io::Write;
use std::time::Instant;

use manyhands_core::engine::gpu::{Gpu, MatmulVariant, Profile, TimedProduct};
use manyhands_core::model::config::ModelConfig;
use pollster::block_on;

const ROUNDS: usize = 7;

fn median(mut x: Vec<f64>) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let shapes = match args[..] {
        [m, n, k] => vec![[m, n, k]],
        _ => vec![[256, 768, 256], [512, 512, 512], [8, 1536, 576], [1, 1536, 576]],
    };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = block_on(Gpu::request_device(&adapter))?;
    let constants =
        ModelConfig::preset("nano", 41, 64).ok_or("the preset nano is missing")?.constants();
    let gpu = Gpu::new(device, queue, Profile::of(&adapter.get_info()), constants)?;
    let mut out = std::io::stdout();
    writeln!(out, "{}", adapter.get_info().name)?;
    let products = std::iter::once(TimedProduct::PlainF32)
        .chain(MatmulVariant::ALL.into_iter().map(TimedProduct::Exact));
    let products: Vec<TimedProduct> = products.collect();
    for shape in shapes {
        let repeats = (200_000_000 / shape.iter().product::<usize>()).clamp(1, 50);
        let mut seconds = vec![Vec::new(); products.len()];
        for _ in 0..ROUNDS {
            for (product, seconds) in products.iter().zip(&mut seconds) {
                let time = |n| -> Result<f64, Box<dyn std::error::Error>> {
                    let start = Instant::now();
                    block_on(gpu.run_product(*product, shape, n))?;
                    Ok(start.elapsed().as_secs_f64())
                };
                // The difference leaves out the uploads and the read that ends a run.
                let (few, many) = (time(1)?, time(1 + repeats)?);
                seconds.push((many - few) / repeats as f64);
            }
        }
        let plain = median(seconds[0].clone());
        writeln!(out, "{shape:?}")?;
        for (product, seconds) in products.iter().zip(seconds) {
            let t = median(seconds);
            let rate = 2e-9 * shape.iter().product::<usize>() as f64 / t;
            writeln!(
                out,
                "  {product:?}: {:.2} ms, {rate:.2} GFLOP/s, {:.2} x the speed of plain f32",
                t * 1e3,
                plain / t
            )?;
        }
    }
    Ok(())
}
