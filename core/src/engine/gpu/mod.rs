//! The GPU engine: every operation as WGSL kernels on a `wgpu` device, with the twin's bits.
//!
//! The device comes from the caller; nothing here chooses adapters or reads clocks. Start with
//! [`Gpu`]; `engine.rs` maps the trait's operations to kernels, `product.rs` and `attention.rs` hold
//! those that take several dispatches, `recorder.rs` records, submits and reads. Operations never
//! fail at once: a lost device or an oversize buffer is reported by the next read and by every one
//! after it, because what was computed since is not to be trusted; go on with a new engine.

mod attention;
mod batch;
mod engine;
mod mapped;
mod memory;
mod pace;
mod product;
mod recorder;
mod times;

use std::sync::{Arc, Mutex, PoisonError};

use manyhands_shaders::bfp::{ACTIVATION_BITS, BLOCK, WEIGHT_BITS, padded};
use manyhands_shaders::twin::{ACTIVATION_FRACTION, GRADIENT_FRACTION};
use manyhands_shaders::wgsl::{BLOCKED_COLS, BLOCKED_ROWS, Id};

use self::batch::BatchTables;
use self::memory::Buf;
pub use self::memory::Memory;
pub use self::pace::Clock;
pub use self::product::MatmulVariant;
use self::product::Right;
use self::recorder::Recorder;
pub use self::times::SubmissionTimes;
use super::{Batch, Constants, EngineError};

/// What a device is good at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// A rasterizer on the CPU: a workgroup is one vector of this many lanes, barriers are dear.
    Software {
        /// Lanes of the CPU's vectors.
        lanes: u32,
    },
    /// A graphics processor: wide workgroups, cheap barriers.
    Hardware,
}

impl Profile {
    /// The profile that an adapter's description suggests. Browsers hide whether an adapter is
    /// software; there, only measuring tells.
    pub fn of(info: &wgpu::AdapterInfo) -> Self {
        match info.device_type {
            wgpu::DeviceType::Cpu => {
                Self::Software { lanes: info.subgroup_min_size.clamp(4, 16).next_power_of_two() }
            }
            _ => Self::Hardware,
        }
    }
}

/// Runs the kernels on a device.
pub struct Gpu {
    constants: Constants,
    recorder: Arc<Recorder>,
    rope: Buf,
    variant: Mutex<MatmulVariant>,
    tables: Mutex<Option<Arc<BatchTables>>>,
}

/// A tensor (N, C) of `i32`.
pub struct Tensor {
    rows: usize,
    cols: usize,
    data: Buf,
}

/// A tensor (N, C) in 11-bit block floating point: mantissa pairs and one exponent a block.
pub struct Blocks {
    rows: usize,
    cols: usize,
    words: Buf,
    exponents: Buf,
}

/// Normalised rows (N, C) and their scales (N, 2).
pub struct Norm {
    unit: Buf,
    scales: Buf,
}

/// A weight matrix (O, C): mantissa pairs along C, and exponents of tiles in both orientations.
pub struct Weight {
    rows: usize,
    cols: usize,
    forward: Buf,
    forward_exponents: Buf,
    backward_exponents: Buf,
}

impl Weight {
    fn forward(&self) -> Right<'_> {
        let (words, exponents) = (&self.forward, &self.forward_exponents);
        Right { words, exponents, cols: self.rows, tile: BLOCK.ilog2() }
    }

    /// The transpose, whose mantissas are `words`.
    fn backward<'a>(&'a self, words: &'a Buf) -> Right<'a> {
        let exponents = &self.backward_exponents;
        Right { words, exponents, cols: self.cols, tile: BLOCK.ilog2() }
    }
}

/// Gains (C) in Q3.12.
pub struct Gain(Buf);

/// Rotated queries (N, H, D padded) and their exponents (N, H).
pub struct Queries {
    rows: usize,
    words: Buf,
    exponents: Buf,
}

/// Keys and values of one layer: (slots, capacity, K, D padded), exponents (slots, capacity, K).
pub struct Cache {
    capacity: usize,
    keys: Buf,
    key_exponents: Buf,
    values: Buf,
    value_exponents: Buf,
}

/// A gradient (R, C) as low and high words.
pub struct Gradient {
    rows: usize,
    cols: usize,
    low: Buf,
    high: Buf,
}

/// A product to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimedProduct {
    /// The exact product by one of its kernels.
    Exact(MatmulVariant),
    /// The plain f32 product, for comparison only.
    PlainF32,
}

impl Gpu {
    /// Asks an adapter for a device with its own buffer limits and otherwise WebGPU's defaults.
    pub async fn request_device(
        adapter: &wgpu::Adapter,
    ) -> Result<(wgpu::Device, wgpu::Queue), EngineError> {
        let offered = adapter.limits();
        let required_limits = wgpu::Limits {
            max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
            max_buffer_size: offered.max_buffer_size,
            ..wgpu::Limits::default()
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("manyhands"),
            required_limits,
            ..wgpu::DeviceDescriptor::default()
        };
        let device = adapter.request_device(&descriptor).await;
        device.map_err(|e| EngineError::DeviceLost(e.to_string()))
    }

    /// An engine on a device for a model with these constants. The device's callbacks for loss
    /// and uncaptured errors become the engine's.
    pub fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        profile: Profile,
        constants: Constants,
    ) -> Result<Self, EngineError> {
        // A column's blocks are shared by 8 lanes where a workgroup is wide; elsewhere one lane
        // takes them all, and the kernel has no barrier.
        let (lanes, split, variant) = match profile {
            Profile::Software { lanes } => (lanes, 1, MatmulVariant::BlockedI32),
            Profile::Hardware => (64, 8, MatmulVariant::TiledF32),
        };
        let recorder = Arc::new(Recorder::new(device, queue, lanes, split));
        Self::build(recorder, variant, constants)
    }

    /// An engine for another model on the same device: kernels, buffers and counters are shared,
    /// the times of submissions begin anew.
    pub fn for_model(&self, constants: Constants) -> Result<Self, EngineError> {
        self.recorder.forget_times();
        Self::build(self.recorder.clone(), self.matmul_variant(), constants)
    }

    fn build(
        recorder: Arc<Recorder>,
        variant: MatmulVariant,
        constants: Constants,
    ) -> Result<Self, EngineError> {
        let rope = &constants.rope;
        // Q14 fits 16 bits: the cosine is the low half, the sine the high one.
        let pack =
            |(&c, &s): (&i32, &i32)| (c.cast_unsigned() & 0xffff) | (s.cast_unsigned() << 16);
        let rope: Vec<u32> = rope.cos.iter().zip(&rope.sin).map(pack).collect();
        let rope = recorder.upload(&rope);
        recorder.check()?;
        let (variant, tables) = (Mutex::new(variant), Mutex::default());
        Ok(Self { constants, recorder, rope, variant, tables })
    }

    /// The kernel that products use.
    pub fn matmul_variant(&self) -> MatmulVariant {
        *self.variant.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses the kernel that products use; every choice gives the same bits.
    pub fn set_matmul_variant(&self, variant: MatmulVariant) {
        *self.variant.lock().unwrap_or_else(PoisonError::into_inner) = variant;
    }

    /// Hands in a clock, by which submissions adapt to the device's speed.
    pub fn set_clock(&self, clock: Clock) {
        self.recorder.set_clock(clock);
    }

    /// How long submissions held the device, if there is a clock.
    pub fn submission_times(&self) -> SubmissionTimes {
        self.recorder.times()
    }

    /// What the buffers of the device take.
    pub fn memory(&self) -> Memory {
        self.recorder.memory()
    }

    /// Dispatches recorded so far.
    pub fn dispatch_count(&self) -> u64 {
        self.recorder.dispatches()
    }

    /// Runs `repeats` products (M, K) x (N, K) and waits for them, for the caller to time: the first
    /// call compiles. N and K are rounded up to whole blocks, and M too for the f32 kernel.
    pub async fn run_product(
        &self,
        product: TimedProduct,
        [m, n, k]: [usize; 3],
        repeats: usize,
    ) -> Result<(), EngineError> {
        // Columns of the f32 kernel come in groups; 32 holds a group of any software adapter.
        let cols_group = (BLOCKED_COLS * self.recorder.lanes).max(BLOCK as u32) as usize;
        let m = match product {
            TimedProduct::Exact(_) => m,
            TimedProduct::PlainF32 => m.next_multiple_of(BLOCKED_ROWS as usize),
        };
        let (n, k) = (n.next_multiple_of(cols_group), k.next_multiple_of(BLOCK));
        let out = self.empty(m, n);
        match product {
            TimedProduct::Exact(variant) => {
                let before = self.matmul_variant();
                self.set_matmul_variant(variant);
                let word = |i: usize| (i as u32).wrapping_mul(0x9E37_79B9) & 0x00ff_01ff;
                let words = |rows: usize| (0..rows * k / 2).map(word).collect::<Vec<u32>>();
                let a = Blocks {
                    rows: m,
                    cols: k,
                    words: self.recorder.upload(&words(m)),
                    exponents: self.recorder.upload(&vec![-12; m * k / BLOCK]),
                };
                let b = self.recorder.upload(&words(n));
                let e = self.recorder.upload(&vec![-12; n * k / BLOCK / BLOCK]);
                let right = Right { words: &b, exponents: &e, cols: n, tile: BLOCK.ilog2() };
                for _ in 0..repeats {
                    self.product(&a, &right, ACTIVATION_FRACTION, &out, false);
                }
                self.set_matmul_variant(before);
            }
            TimedProduct::PlainF32 => {
                let floats = |rows: usize| (0..rows * k).map(|i| (i % 997) as f32).collect();
                let floats: [Vec<f32>; 2] = [m, n].map(floats);
                let [a, b] = floats.map(|x| self.recorder.upload(&x));
                let columns = n / (BLOCKED_COLS * self.recorder.lanes) as usize;
                let groups = [columns as u32, 1, (m / BLOCKED_ROWS as usize) as u32];
                let uniform = [m as u32, n as u32, (k / 4) as u32];
                for _ in 0..repeats {
                    let buffers = [&a, &b, &out.data];
                    self.recorder.run(Id::BenchF32, &uniform, &buffers, groups, m * n * k);
                }
            }
        }
        self.recorder.wait().await
    }

    /// A tensor with any content.
    fn empty(&self, rows: usize, cols: usize) -> Tensor {
        Tensor { rows, cols, data: self.recorder.alloc(rows * cols) }
    }

    /// Blocks with any content.
    fn empty_blocks(&self, rows: usize, cols: usize) -> Blocks {
        let count = rows * cols.div_ceil(BLOCK);
        let words = self.recorder.alloc(count * BLOCK / 2);
        Blocks { rows, cols, words, exponents: self.recorder.alloc(count) }
    }

    /// Quantises rows in `FX(16)` to 11 bits.
    fn activation_blocks(&self, x: &Tensor) -> Blocks {
        self.quantize(&x.data, [x.rows, x.cols], ACTIVATION_BITS, ACTIVATION_FRACTION)
    }

    /// Quantises rows of gradients in `FX(20)` to 10 bits.
    fn gradient_blocks(&self, x: &Buf, shape: [usize; 2]) -> Blocks {
        self.quantize(x, shape, WEIGHT_BITS, GRADIENT_FRACTION)
    }

    fn quantize(&self, x: &Buf, [rows, cols]: [usize; 2], bits: u32, fraction: i32) -> Blocks {
        let out = self.empty_blocks(rows, cols);
        let col_blocks = cols.div_ceil(BLOCK);
        let shape = [rows as u32, cols as u32, bits, fraction.cast_unsigned(), col_blocks as u32];
        self.recorder.run(
            Id::QuantizeRows,
            &shape,
            &[x, &out.words, &out.exponents],
            self.recorder.lanes_grid(rows * col_blocks),
            rows * cols * 4,
        );
        out
    }

    /// Mantissa pairs of a matrix along its rows: little work beside a product with it, and half
    /// of the memory that both orientations would take.
    fn transpose(&self, w: &Weight) -> Buf {
        let (rows, cols) = (padded(w.rows), padded(w.cols));
        let out = self.recorder.alloc(rows * cols / 2);
        for squares in self.recorder.row_chunks(Id::QuantizeTranspose, rows / 2, 2 * cols) {
            self.recorder.run(
                Id::QuantizeTranspose,
                &[rows as u32, cols as u32, 0, 0, 0, 0, squares.start as u32],
                &[&w.forward, &out],
                self.recorder.lanes_grid(squares.len() * cols / 2),
                squares.len() * 2 * cols,
            );
        }
        out
    }

    /// The tables of a batch; those of the last one are kept.
    fn batch_tables(&self, batch: &Batch) -> Arc<BatchTables> {
        let mut kept = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(tables) if tables.describes(batch) => tables.clone(),
            _ => kept.insert(Arc::new(BatchTables::new(&self.recorder, batch))).clone(),
        }
    }
}
