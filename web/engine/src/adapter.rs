//! The browser's graphics adapter: opening it, and finding how it likes to work.
//!
//! A browser does not say whether an adapter is software. Every way of working gives the same bits,
//! so each is timed, and the fastest is taken.

use std::sync::Arc;

use manyhands_core::engine::gpu::{Gpu, MatmulVariant, Profile, TimedProduct};
use manyhands_core::engine::{Constants, EngineError};

use crate::now_ms;

/// M x N x K that is timed: about what a small model does, and quick on any adapter.
const SHAPE: [usize; 3] = [128, 256, 256];
/// Products that are timed together.
const REPEATS: usize = 2;
/// Ways in which an adapter may like to work. The one that suits software is tried first.
const PROFILES: [Profile; 2] = [Profile::Software { lanes: 4 }, Profile::Hardware];
/// An adapter that has taken so long is slow whatever is tried next.
const PICK_MS_MAX: f64 = 5_000.0;

/// Opens the adapter that the browser offers for much work, in the way that is fastest there.
pub async fn open(constants: Constants) -> Result<Gpu, EngineError> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let options = wgpu::RequestAdapterOptions {
        power_preference: wgpu::PowerPreference::HighPerformance,
        ..Default::default()
    };
    let mut best: Option<(f64, Gpu)> = None;
    let begun = now_ms();
    for profile in PROFILES {
        if best.is_some() && now_ms() - begun > PICK_MS_MAX {
            break;
        }
        // An adapter gives one device.
        let adapter = instance.request_adapter(&options).await;
        let adapter = adapter.map_err(|e| EngineError::DeviceLost(e.to_string()))?;
        let (device, queue) = Gpu::request_device(&adapter).await?;
        let gpu = Gpu::new(device, queue, profile, constants.clone())?;
        gpu.set_clock(Arc::new(now_ms));
        let ms = pick(&gpu).await?;
        if best.as_ref().is_none_or(|(least, _)| ms < *least) {
            best = Some((ms, gpu));
        }
    }
    best.map(|(_, gpu)| gpu).ok_or_else(|| EngineError::DeviceLost("no adapter".into()))
}

/// Sets the fastest kernel for products; returns its time.
async fn pick(gpu: &Gpu) -> Result<f64, EngineError> {
    let mut best = (f64::INFINITY, gpu.matmul_variant());
    let begun = now_ms();
    for variant in MatmulVariant::ALL {
        if best.0.is_finite() && now_ms() - begun > PICK_MS_MAX {
            break;
        }
        let product = TimedProduct::Exact(variant);
        // The first call compiles.
        gpu.run_product(product, SHAPE, 1).await?;
        let started = now_ms();
        gpu.run_product(product, SHAPE, REPEATS).await?;
        let ms = now_ms() - started;
        if ms < best.0 {
            best = (ms, variant);
        }
    }
    gpu.set_matmul_variant(best.1);
    Ok(best.0)
}
