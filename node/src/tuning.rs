//! Which product kernel an adapter runs fastest, measured once and remembered.
//!
//! Every kernel gives the same bits, so the pick changes nothing but speed. It is kept in the
//! user's cache directory under the adapter's name and driver and the hash of the kernels.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use manyhands_core::engine::gpu::{Gpu, MatmulVariant, TimedProduct};
use manyhands_shaders::wgsl;

use crate::store::{read_bounded, write_atomic};

/// M x N x K that is timed: about what a small model does, and quick on any adapter.
const SHAPE: [usize; 3] = [256, 768, 256];
/// Largest cache file.
const CACHE_BYTES_MAX: u64 = 1 << 20;

/// Seconds of one product on the device, after one to compile.
pub fn seconds(gpu: &Gpu, product: TimedProduct, shape: [usize; 3], repeats: usize) -> Result<f64> {
    pollster::block_on(gpu.run_product(product, shape, 1))?;
    let started = Instant::now();
    pollster::block_on(gpu.run_product(product, shape, repeats))?;
    Ok(started.elapsed().as_secs_f64() / repeats as f64)
}

/// Sets the fastest variant, from the cache or by timing all of them.
pub fn pick(gpu: &Gpu, info: &wgpu::AdapterInfo) -> Result<MatmulVariant> {
    let key = key(info);
    let mut cache = read_cache();
    let known = cache
        .get(&key)
        .and_then(|name| MatmulVariant::ALL.into_iter().find(|v| format!("{v:?}") == *name));
    let variant = match known {
        Some(variant) => variant,
        None => {
            let mut best = (f64::INFINITY, MatmulVariant::default());
            for variant in MatmulVariant::ALL {
                let s = seconds(gpu, TimedProduct::Exact(variant), SHAPE, 2)?;
                if s < best.0 {
                    best = (s, variant);
                }
            }
            cache.insert(key, format!("{:?}", best.1));
            write_cache(&cache);
            best.1
        }
    };
    gpu.set_matmul_variant(variant);
    Ok(variant)
}

fn key(info: &wgpu::AdapterInfo) -> String {
    let mut kernels = blake3::Hasher::new();
    for family in &wgsl::FAMILIES {
        kernels.update(family.source().as_bytes());
    }
    let kernels = &kernels.finalize().to_hex()[..16];
    format!("{} {} {} {kernels}", info.backend, info.name, info.driver_info)
}

fn cache_path() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
    Some(base.join("manyhands").join("kernels.json"))
}

/// An unreadable cache is an empty one: it only saves time.
fn read_cache() -> BTreeMap<String, String> {
    let bytes = cache_path().and_then(|p| read_bounded(&p, CACHE_BYTES_MAX).ok());
    bytes.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
}

fn write_cache(cache: &BTreeMap<String, String>) {
    let Some(path) = cache_path() else { return };
    let write = || -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        write_atomic(&path, &serde_json::to_vec_pretty(cache)?)
    };
    if let Err(error) = write() {
        eprintln!("warning: the kernel timings are not remembered: {error:#}");
    }
}
