//! Matrix products: the exact ones of each engine, against f32.

use std::path::Path;

use anyhow::Result;
use manyhands_core::engine::cpu::{self, Cpu};
use manyhands_core::engine::gpu::{MatmulVariant, TimedProduct};
use manyhands_core::engine::{Constants, Engine, Tiles};
use manyhands_core::model::config::ModelConfig;

use super::peers::{self, Kernels};
use super::{Row, Table, median, median_seconds};
use crate::{engines, tuning};

/// M x N x K: squares, and the products of transformers at several row counts.
const SHAPES: [[usize; 3]; 8] = [
    [512, 512, 512],
    [1024, 1024, 1024],
    [1024, 1536, 576],
    [2048, 576, 1536],
    [256, 768, 256],
    [64, 1536, 576],
    [8, 1536, 576],
    [1, 1536, 576],
];
/// Smaller, for software adapters.
const WGPU_SHAPES: [[usize; 3]; 3] = [[256, 768, 256], [512, 512, 512], [64, 1536, 576]];

/// Operations of a product: a multiply and an add are two.
pub(super) fn operations([m, n, k]: [usize; 3]) -> f64 {
    2.0 * (m * n * k) as f64
}

/// Constants of an engine whose norm has `width` channels.
fn constants(width: usize) -> Constants {
    let preset = ModelConfig::preset("nano", 128, 8).expect("a preset of that name");
    ModelConfig { width, ..preset }.constants()
}

/// Deterministic numbers of about unit size.
fn values(n: usize) -> impl Iterator<Item = f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
}

/// Inputs of a product on an engine.
fn operands<E: Engine>(engine: &E, [m, n, k]: [usize; 3]) -> (E::Blocks, E::Weight) {
    let h: Vec<i32> = values(m * k).map(|x| (x * 65_536.0) as i32).collect();
    let (blocks, _) = engine.rmsnorm(&engine.tensor(&h, k), &engine.gain(&vec![4096; k]));
    let w: Vec<f32> = values(n * k).map(|x| x / (k as f32).sqrt()).collect();
    (blocks, engine.weight(&Tiles::quantize(&w, n, k)))
}

/// The CPU engine's products against OpenBLAS: the best path at every number of threads, the AVX2
/// path against OpenBLAS's AVX2 kernels, and each path once.
pub(super) fn cpu(
    table: &mut Table,
    threads: &[usize],
    rounds: usize,
    peer: Option<&Path>,
) -> Result<()> {
    for &threads in threads {
        compare(table, threads, cpu::Path::best(), rounds, peer.map(|p| (p, Kernels::Best)))?;
    }
    for path in cpu::Path::available() {
        if path == cpu::Path::Avx2 && path != cpu::Path::best() {
            compare(table, 1, path, rounds, peer.map(|p| (p, Kernels::Avx2)))?;
        } else {
            let seconds = product(1, path, SHAPES[0]);
            row(table, SHAPES[0], 1, "cpu", &path.to_string(), seconds, None, "each path");
        }
    }
    Ok(())
}

/// Ours and the yardstick take turns, so that noise of the machine meets both.
fn compare(
    table: &mut Table,
    threads: usize,
    path: cpu::Path,
    rounds: usize,
    peer: Option<(&Path, Kernels)>,
) -> Result<()> {
    let mut ours = vec![Vec::new(); SHAPES.len()];
    let mut theirs = vec![Vec::new(); SHAPES.len()];
    for _ in 0..rounds.div_ceil(2) {
        for (shape, ours) in SHAPES.iter().zip(&mut ours) {
            ours.push(product(threads, path, *shape));
        }
        if let Some((peer, kernels)) = peer {
            let seconds = peers::gemm(peer, threads, &SHAPES, kernels)?;
            for (t, s) in theirs.iter_mut().zip(seconds) {
                t.push(s);
            }
        }
    }
    for ((shape, ours), theirs) in SHAPES.iter().zip(ours).zip(theirs) {
        let ours = median(ours);
        let theirs = (!theirs.is_empty()).then(|| median(theirs));
        if let (Some(seconds), Some((_, kernels))) = (theirs, peer) {
            let note = format!("numpy, {kernels:?} kernels");
            row(table, *shape, threads, "openblas", "f32", seconds, None, &note);
        }
        let ratio = theirs.map(|t| t / ours);
        row(table, *shape, threads, "cpu", &path.to_string(), ours, ratio, "against OpenBLAS f32");
    }
    Ok(())
}

fn product(threads: usize, path: cpu::Path, shape: [usize; 3]) -> f64 {
    let engine = Cpu::new(constants(shape[2]), threads, Some(path));
    let (x, w) = operands(&engine, shape);
    median_seconds(3, || drop(engine.linear(&x, [&w])))
}

fn row(
    table: &mut Table,
    shape: [usize; 3],
    threads: usize,
    engine: &str,
    adapter: &str,
    median_s: f64,
    ratio: Option<f64>,
    note: &str,
) {
    table.push(Row {
        name: "product".into(),
        shape: shape.map(|x| x.to_string()).join("x"),
        threads,
        engine: engine.into(),
        adapter: adapter.into(),
        median_s,
        rate: operations(shape) / median_s / 1e9,
        unit: "GOP/s",
        ratio,
        note: note.into(),
    });
}

/// Operations per second of the exact product at `rows` rows and a square weight matrix.
pub(super) fn ceiling(threads: usize, rows: usize, width: usize) -> f64 {
    let shape = [rows, width, width];
    operations(shape) / product(threads, cpu::Path::best(), shape)
}

/// Every adapter's product kernels, against the best plain f32 product in WGSL.
pub(super) fn wgpu(table: &mut Table, rounds: usize) -> Result<()> {
    for adapter in engines::adapters() {
        let name = adapter.get_info().name;
        let gpu = engines::open_gpu(&adapter, constants(256))?;
        for shape in WGPU_SHAPES {
            let products = MatmulVariant::ALL.map(TimedProduct::Exact);
            let products: Vec<_> = [TimedProduct::PlainF32].into_iter().chain(products).collect();
            let mut times = vec![Vec::new(); products.len()];
            for _ in 0..rounds {
                for (product, times) in products.iter().zip(&mut times) {
                    times.push(tuning::seconds(&gpu, *product, shape, 2)?);
                }
            }
            let medians: Vec<f64> = times.into_iter().map(median).collect();
            for (product, seconds) in products.iter().zip(&medians) {
                let (note, ratio) = match product {
                    TimedProduct::PlainF32 => ("not exact".to_string(), None),
                    TimedProduct::Exact(v) => (format!("{v:?}"), Some(medians[0] / seconds)),
                };
                row(table, shape, 0, "wgpu", &name, *seconds, ratio, &note);
            }
        }
    }
    Ok(())
}
