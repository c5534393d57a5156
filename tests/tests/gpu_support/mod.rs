//! One device for a test binary, random inputs that reach the extremes, and traces to compare.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use manyhands_core::engine::gpu::{Gpu, Profile};
use manyhands_core::engine::{Engine, RowStats, Tiles};
use manyhands_core::model::config::ModelConfig;
use manyhands_shaders::bfp::padded;
use manyhands_shaders::twin::SITE_COUNT;
use manyhands_shaders::x1::LIM;
use pollster::block_on;

/// The device of this test binary.
pub(crate) struct Device {
    /// For tests that make their own pipelines.
    pub(crate) device: wgpu::Device,
    /// Its queue.
    pub(crate) queue: wgpu::Queue,
    /// An engine on it.
    pub(crate) gpu: Gpu,
}

/// A new device on the first adapter.
pub(crate) fn open() -> Option<Device> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter =
        block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).ok()?;
    let (device, queue) = block_on(Gpu::request_device(&adapter)).expect("a device");
    let profile = Profile::of(&adapter.get_info());
    eprintln!("adapter {} ({profile:?})", adapter.get_info().name);
    let constants = ModelConfig::preset("nano", 41, 64).expect("a preset").constants();
    let gpu = Gpu::new(device.clone(), queue.clone(), profile, constants).expect("buffers fit");
    let start = Instant::now();
    gpu.set_clock(Arc::new(move || start.elapsed().as_secs_f64() * 1000.0));
    Some(Device { device, queue, gpu })
}

/// Runs a test on the device, alone.
pub(crate) fn with_device(test: impl FnOnce(&Device)) {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match DEVICE.get_or_init(open) {
        Some(device) => test(device),
        None if std::env::var("GPU_REQUIRED").is_ok_and(|v| v == "1") => {
            panic!("GPU_REQUIRED=1, and no adapter was found")
        }
        None => eprintln!("\n*** SKIPPED: no graphics adapter was found, nothing was tested ***\n"),
    }
}

/// Runs a test on an engine of the device, alone.
pub(crate) fn with_gpu(test: impl FnOnce(&Gpu)) {
    with_device(|d| test(&d.gpu));
}

/// `SplitMix64`.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// 64 random bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Fixed-point values of up to `bits` bits, of mixed magnitudes, with zeros; with 30 bits also
    /// the extremes.
    pub(crate) fn values(&mut self, count: usize, bits: u32) -> Vec<i32> {
        let mut one = || {
            let u = self.next();
            let spread = bits.saturating_sub((u >> 40) as u32 % 6);
            let m = (u as i64 & ((1_i64 << spread) - 1)) as i32;
            let m = if bits >= 30 && u >> 60 == 0 { LIM } else { m.min(LIM) };
            if (u >> 36) & 15 == 0 {
                0
            } else if (u >> 50) & 1 == 0 {
                m
            } else {
                -m
            }
        };
        (0..count).map(|_| one()).collect()
    }

    /// A weight matrix; `extreme` tiles have exponents over the whole range.
    pub(crate) fn tiles(&mut self, rows: usize, cols: usize, extreme: bool) -> Tiles {
        let weight = |u: u64| (u as i32 >> 8) as f32 * 2_f32.powi(-25 - ((u >> 40) % 8) as i32);
        let weights: Vec<f32> = (0..rows * cols).map(|_| weight(self.next())).collect();
        let mut tiles = Tiles::quantize(&weights, rows, cols);
        if extreme {
            assert_eq!(tiles.mantissas.len(), padded(rows) * padded(cols));
            for e in &mut tiles.exponents {
                *e = (self.below(52) as i32 - 40).max(self.below(24) as i32 - 12) as i8;
            }
        }
        tiles
    }
}

/// Random blocks (N, C), the only way to any shape: SwiGLU with gates at which the sigmoid is 1.
pub(crate) fn blocks<E: Engine>(e: &E, r: &mut Random, n: usize, c: usize, bits: u32) -> E::Blocks {
    let gate = e.tensor(&vec![1 << 20; n * c], c);
    let up = e.tensor(&r.values(n * c, bits.saturating_sub(4)), c);
    e.swiglu(&[gate, up])
}

/// A computation over any engine.
pub(crate) trait Scenario {
    /// Runs it; `out` keeps what it computed.
    fn run<E: Engine>(&self, engine: &E, out: &mut Trace) -> impl Future<Output = ()>;
}

/// Everything that a scenario computed, in order.
#[derive(Default)]
pub(crate) struct Trace(Vec<(String, Vec<i64>)>);

impl Trace {
    /// Keeps a tensor.
    pub(crate) async fn tensor<E: Engine>(&mut self, e: &E, name: &str, x: &E::Tensor) {
        let x = e.read(x).await.expect("read");
        self.0.push((name.into(), x.into_iter().map(i64::from).collect()));
    }

    /// Keeps a gradient.
    pub(crate) async fn gradient<E: Engine>(&mut self, e: &E, name: &str, x: &E::Gradient) {
        self.0.push((name.into(), e.read_gradient(x).await.expect("read")));
    }

    /// Keeps and clears the saturation counts.
    pub(crate) async fn saturations<E: Engine>(&mut self, e: &E, name: &str) {
        let counts = e.take_saturations().await.expect("read").0;
        let counts = counts.into_iter().map(u64::cast_signed).collect();
        self.0.push((format!("saturations of {name}"), counts));
    }

    /// Keeps integers.
    pub(crate) fn integers(&mut self, name: &str, x: Vec<i64>) {
        self.0.push((name.into(), x));
    }

    /// Keeps statistics and the tokens that they belong to.
    pub(crate) fn stats(&mut self, name: &str, rows: impl Iterator<Item = (u32, RowStats)>) {
        let row = |(token, s): (u32, RowStats)| {
            let (total, moment) = (s.total.cast_signed(), s.moment.cast_signed());
            [i64::from(token), i64::from(s.t), total, moment, i64::from(s.greedy)]
        };
        self.0.push((name.into(), rows.flat_map(row).collect()));
    }
}

impl Trace {
    /// The saturation counts of the whole trace, added up by site.
    pub(crate) fn total_saturations(&self) -> Vec<i64> {
        let mut out = vec![0; SITE_COUNT];
        for (_, counts) in self.0.iter().filter(|(name, _)| name.starts_with("saturations of")) {
            out.iter_mut().zip(counts).for_each(|(a, b)| *a += b);
        }
        out
    }
}

/// Runs a scenario with a fresh tally.
pub(crate) async fn whole<E: Engine>(engine: &E, scenario: &impl Scenario) -> Trace {
    engine.take_saturations().await.expect("read");
    let mut out = Trace::default();
    scenario.run(engine, &mut out).await;
    out
}

/// Compares two traces; prints the first bad index, both values and how many differ.
pub(crate) fn same(name: &str, expected: &Trace, got: &Trace) {
    assert_eq!(expected.0.len(), got.0.len(), "{name}: traces of different lengths");
    for ((what, x), (_, y)) in expected.0.iter().zip(&got.0) {
        assert_eq!(x.len(), y.len(), "{name}, {what}: lengths");
        let bad: Vec<usize> = (0..x.len()).filter(|&i| x[i] != y[i]).collect();
        if let Some(&i) = bad.first() {
            let count = bad.len();
            panic!(
                "{name}, {what}: index {i}: twin {}, gpu {} ({count} of {} differ)",
                x[i],
                y[i],
                x.len()
            );
        }
    }
}
