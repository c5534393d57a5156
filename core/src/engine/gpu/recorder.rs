//! Records dispatches, submits them in portions, and reads results back.
//!
//! Nothing here fails at once: the first error (a lost device, a buffer over the limit) is kept,
//! later commands do nothing, and the next read returns it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use manyhands_shaders::wgsl::{self, FAMILIES, Id, UNIFORM_BYTES, Workgroup};

use super::mapped::Mapped;
use super::memory::{Buf, Memory, Pool, size_class};
use super::pace::{Clock, Load, Pace};
use super::times::SubmissionTimes;
use crate::engine::EngineError;

/// Uniform blocks of one submission; WebGPU's default alignment of offsets is 256 bytes.
const UNIFORM_STRIDE: u64 = 256;
const DISPATCHES_MAX: u64 = 1024;
/// Submissions that may wait for the device.
const IN_FLIGHT_MAX: usize = 16;
/// Largest count of workgroups along one axis.
const GROUPS_MAX: u64 = 65_535;

/// A compiled entry point.
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

#[derive(Default)]
struct State {
    // Declared before the encoder that it records into: it must be dropped first.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    uniforms: Vec<u8>,
    load: Load,
    dispatches: u64,
    uncounted: bool,
    in_flight: VecDeque<wgpu::SubmissionIndex>,
    modules: BTreeMap<usize, wgpu::ShaderModule>,
    pipelines: BTreeMap<(Id, bool), Pipeline>,
}

/// The first error of a device, shared with its callbacks.
type Failure = Arc<Mutex<Option<EngineError>>>;

/// A device with its queue, pipelines, buffers and open commands.
pub(super) struct Recorder {
    device: wgpu::Device,
    queue: wgpu::Queue,
    pool: Arc<Pool>,
    failure: Failure,
    pace: Arc<Mutex<Pace>>,
    state: Mutex<State>,
    arena: wgpu::Buffer,
    counters: wgpu::Buffer,
    /// Takes the place of `counters` where nothing is to be counted.
    unread: wgpu::Buffer,
    tables: wgpu::Buffer,
    /// Largest storage buffer in bytes.
    pub(super) bytes_max: u64,
    /// Invocations of a workgroup.
    pub(super) lanes: u32,
    /// Lanes that share a column of a product with few rows.
    pub(super) split: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keep_first(failure: &Failure, error: EngineError) {
    lock(failure).get_or_insert(error);
}

impl Recorder {
    pub(super) fn new(device: wgpu::Device, queue: wgpu::Queue, lanes: u32, split: u32) -> Self {
        let failure = Failure::default();
        let lost = failure.clone();
        device.set_device_lost_callback(move |reason, message| {
            keep_first(&lost, EngineError::DeviceLost(format!("{reason:?}: {message}")));
        });
        let uncaptured = failure.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            keep_first(&uncaptured, EngineError::DeviceLost(error.to_string()));
        }));
        let buffer = |label, size, usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: usage | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let tables: Vec<i32> =
            [&manyhands_shaders::tables::EXP2[..], &manyhands_shaders::tables::SIGMOID].concat();
        let limits = device.limits();
        let this = Self {
            pool: Arc::default(),
            pace: Arc::new(Mutex::new(Pace::new())),
            state: Mutex::default(),
            arena: buffer("uniforms", UNIFORM_STRIDE * DISPATCHES_MAX, wgpu::BufferUsages::UNIFORM),
            counters: buffer("saturations", 64, wgpu::BufferUsages::STORAGE),
            unread: buffer("uncounted", 64, wgpu::BufferUsages::STORAGE),
            tables: buffer("tables", 4 * tables.len() as u64, wgpu::BufferUsages::STORAGE),
            bytes_max: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
            lanes,
            split,
            failure,
            device,
            queue,
        };
        this.queue.write_buffer(&this.tables, 0, bytemuck::cast_slice(&tables));
        this
    }

    /// The first error, if any.
    pub(super) fn check(&self) -> Result<(), EngineError> {
        lock(&self.failure).clone().map_or(Ok(()), Err)
    }

    fn lost(&self, message: impl std::fmt::Display) -> EngineError {
        keep_first(&self.failure, EngineError::DeviceLost(message.to_string()));
        // What the device said first explains more than what followed from it.
        self.check().err().unwrap_or_else(|| EngineError::DeviceLost(message.to_string()))
    }

    pub(super) fn set_clock(&self, clock: Clock) {
        lock(&self.pace).clock = Some(clock);
    }

    /// Multiply-adds of a kernel that one submission should hold at most.
    pub(super) fn budget(&self, id: Id) -> usize {
        usize::try_from(lock(&self.pace).budget(id)).unwrap_or(usize::MAX)
    }

    /// How long submissions took, since [`Self::forget_times`].
    pub(super) fn times(&self) -> SubmissionTimes {
        lock(&self.pace).times().summary()
    }

    /// Begins a new count of times.
    pub(super) fn forget_times(&self) {
        lock(&self.pace).forget_times();
    }

    /// Dispatches so far.
    pub(super) fn dispatches(&self) -> u64 {
        lock(&self.state).dispatches
    }

    /// What buffers take.
    pub(super) fn memory(&self) -> Memory {
        self.pool.memory()
    }

    fn create(&self, bytes: u64) -> wgpu::Buffer {
        self.pool.grow(bytes);
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_DST
                | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    }

    /// The size to allocate for `words` u32; over the limit, an error is kept and the size is that
    /// of a stand-in which no command will touch.
    fn allocation(&self, words: usize) -> u64 {
        let needed = words as u64 * 4;
        if needed > self.bytes_max {
            let limit = self.bytes_max;
            keep_first(&self.failure, EngineError::BufferTooLarge { needed, limit });
            return 256;
        }
        size_class(needed, self.bytes_max)
    }

    /// A buffer of `words` u32 with any content.
    pub(super) fn alloc(&self, words: usize) -> Buf {
        let size = self.allocation(words);
        Buf::new(self.pool.take(size).unwrap_or_else(|| self.create(size)), &self.pool)
    }

    /// Copies part `from` of parts of `words` u32 over part `to`. WebGPU copies between different
    /// buffers only.
    pub(super) fn copy_part(&self, buf: &Buf, words: usize, from: usize, to: usize) {
        let between = self.alloc(words);
        let at = |part: usize| (part * words * 4) as u64;
        let bytes = at(1);
        let mut state = lock(&self.state);
        state.pass = None;
        let encoder = self.encoder(&mut state);
        encoder.copy_buffer_to_buffer(&buf.buffer, at(from), &between.buffer, 0, bytes);
        encoder.copy_buffer_to_buffer(&between.buffer, 0, &buf.buffer, at(to), bytes);
    }

    /// Copies the first `words` u32 of a buffer into another one, from word `at` on.
    pub(super) fn copy(&self, from: &Buf, to: &Buf, at: usize, words: usize) {
        let [at, bytes] = [at, words].map(|words| words as u64 * 4);
        if self.check().is_err() {
            return;
        }
        let mut state = lock(&self.state);
        state.pass = None;
        self.encoder(&mut state).copy_buffer_to_buffer(&from.buffer, 0, &to.buffer, at, bytes);
    }

    /// Whether kernels recorded from now on count saturations.
    pub(super) fn count(&self, on: bool) {
        lock(&self.state).uncounted = !on;
    }

    /// A buffer of `words` zeros.
    pub(super) fn zeros(&self, words: usize) -> Buf {
        let buf = self.alloc(words);
        let mut state = lock(&self.state);
        state.pass = None;
        self.encoder(&mut state).clear_buffer(&buf.buffer, 0, None);
        buf
    }

    /// A buffer with this content.
    pub(super) fn upload<T: bytemuck::NoUninit>(&self, data: &[T]) -> Buf {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let size = self.allocation(bytes.len().div_ceil(4));
        let buffer = self.create(size);
        if bytes.len() as u64 <= size {
            self.queue.write_buffer(&buffer, 0, bytes);
        }
        Buf::new(buffer, &self.pool)
    }

    fn encoder<'a>(&self, state: &'a mut State) -> &'a mut wgpu::CommandEncoder {
        state.encoder.get_or_insert_with(|| {
            self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        })
    }

    /// Workgroups for `count` of them, as a grid that kernels read as `y * width + x`.
    pub(super) fn grid(count: usize) -> [u32; 3] {
        let count = count as u64;
        let height = count.div_ceil(GROUPS_MAX).max(1);
        [count.div_ceil(height) as u32, height as u32, 1]
    }

    /// Workgroups for one invocation each of `count` items.
    pub(super) fn lanes_grid(&self, count: usize) -> [u32; 3] {
        Self::grid(count.div_ceil(self.lanes as usize))
    }

    /// Ranges of `rows` whose work, `row_work` each, fits a submission.
    pub(super) fn row_chunks(
        &self,
        id: Id,
        rows: usize,
        row_work: usize,
    ) -> impl Iterator<Item = std::ops::Range<usize>> {
        let chunk = (self.budget(id) / row_work.max(1)).max(1);
        (0..rows).step_by(chunk).map(move |first| first..rows.min(first + chunk))
    }

    /// Records a dispatch: `uniform` words, storage `buffers` in the order of the kernel table,
    /// and an estimate of its work in multiply-adds.
    pub(super) fn run(
        &self,
        id: Id,
        uniform: &[u32],
        buffers: &[&Buf],
        groups: [u32; 3],
        work: usize,
    ) {
        self.run_variant(id, false, uniform, buffers, groups, work);
    }

    /// [`Self::run`], with f32 inside the products of families that offer it.
    pub(super) fn run_variant(
        &self,
        id: Id,
        f32_products: bool,
        uniform: &[u32],
        buffers: &[&Buf],
        groups: [u32; 3],
        work: usize,
    ) {
        if groups.contains(&0) || self.check().is_err() {
            return;
        }
        let kernel = id.kernel();
        assert_eq!(buffers.len(), kernel.bindings.len(), "buffers of {}", kernel.name());
        let mut state = lock(&self.state);
        let state = &mut *state;
        let budget = lock(&self.pace).budget(id);
        if !state.load.has_room(work, budget) {
            self.submit(state);
        }
        let offset = state.uniforms.len() as u64;
        let block: &[u8] = bytemuck::cast_slice(uniform);
        assert!(block.len() <= UNIFORM_BYTES, "uniforms of {}", kernel.name());
        state.uniforms.extend_from_slice(block);
        state.uniforms.resize((offset + UNIFORM_STRIDE) as usize, 0);

        let size = wgpu::BufferSize::new(UNIFORM_BYTES as u64);
        let uniforms = wgpu::BufferBinding { buffer: &self.arena, offset, size };
        let mut entries = vec![wgpu::BindGroupEntry {
            binding: 0,
            resource: wgpu::BindingResource::Buffer(uniforms),
        }];
        let counters = if state.uncounted { &self.unread } else { &self.counters };
        let shared = [
            kernel.counts.then_some((wgsl::COUNTERS, counters)),
            kernel.looks_up.then_some((wgsl::TABLES, &self.tables)),
        ];
        let own = kernel.bindings.iter().copied().zip(buffers.iter().map(|b| &b.buffer));
        entries.extend(shared.into_iter().flatten().chain(own).map(|(binding, buffer)| {
            wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() }
        }));

        if !state.pipelines.contains_key(&(id, f32_products)) {
            let pipeline = self.compile(&mut state.modules, id, f32_products);
            state.pipelines.insert((id, f32_products), pipeline);
            state.load.compiled = true;
        }
        let Pipeline { pipeline, layout } = &state.pipelines[&(id, f32_products)];
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout,
            entries: &entries,
        });
        let encoder = state.encoder.get_or_insert_with(|| {
            self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        });
        let pass = state.pass.get_or_insert_with(|| {
            encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default()).forget_lifetime()
        });
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        state.dispatches += 1;
        state.load.add(id, work, budget);
        if state.uniforms.len() as u64 == UNIFORM_STRIDE * DISPATCHES_MAX {
            self.submit(state);
        }
    }

    fn compile(
        &self,
        modules: &mut BTreeMap<usize, wgpu::ShaderModule>,
        id: Id,
        f32_products: bool,
    ) -> Pipeline {
        let kernel = id.kernel();
        let module = modules.entry(kernel.family).or_insert_with(|| {
            let family = &FAMILIES[kernel.family];
            self.device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(family.name),
                source: wgpu::ShaderSource::Wgsl(family.source().into()),
            })
        });
        let mut constants = Vec::new();
        if kernel.workgroup == Workgroup::Lanes {
            constants.push(("LANES", f64::from(self.lanes)));
        }
        if f32_products {
            constants.push(("F32", 1.0));
        }
        if id == Id::MatmulProductRow {
            constants.push(("SPLIT", f64::from(self.split)));
        }
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.entry),
            layout: None,
            module,
            entry_point: Some(kernel.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                ..Default::default()
            },
            cache: None,
        });
        let layout = pipeline.get_bind_group_layout(0);
        Pipeline { pipeline, layout }
    }

    fn submit(&self, state: &mut State) {
        state.pass = None;
        let Some(encoder) = state.encoder.take() else { return };
        self.queue.write_buffer(&self.arena, 0, &state.uniforms);
        state.uniforms.clear();
        let index = self.queue.submit([encoder.finish()]);
        let load = std::mem::take(&mut state.load);
        let clock = lock(&self.pace).clock.clone();
        if let Some(clock) = clock.filter(|_| !load.is_empty()) {
            let (submitted_ms, pace) = (clock(), self.pace.clone());
            self.queue.on_submitted_work_done(move || {
                lock(&pace).done(load, submitted_ms, clock());
            });
        }
        state.in_flight.push_back(index);
        let wait = if state.in_flight.len() > IN_FLIGHT_MAX {
            wgpu::PollType::Wait { submission_index: state.in_flight.pop_front(), timeout: None }
        } else {
            wgpu::PollType::Poll
        };
        if let Err(error) = self.device.poll(wait) {
            self.lost(error);
        }
    }

    /// Submits what is recorded and waits until the device is idle.
    pub(super) async fn wait(&self) -> Result<(), EngineError> {
        self.read(&self.counters, 4).await.map(drop)
    }

    /// Reads the first `words` u32 of a buffer.
    pub(super) async fn read_words(
        &self,
        buf: &Buf,
        words: usize,
    ) -> Result<Vec<u32>, EngineError> {
        self.check()?;
        self.read(&buf.buffer, words as u64 * 4).await
    }

    /// Reads the saturation counters and clears them.
    pub(super) async fn take_counters(&self) -> Result<Vec<u32>, EngineError> {
        let counts = self.read(&self.counters, 64).await?;
        let mut state = lock(&self.state);
        state.pass = None;
        self.encoder(&mut state).clear_buffer(&self.counters, 0, None);
        Ok(counts)
    }

    async fn read(&self, buffer: &wgpu::Buffer, bytes: u64) -> Result<Vec<u32>, EngineError> {
        self.check()?;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("read"),
            size: bytes,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        {
            let mut state = lock(&self.state);
            state.pass = None;
            self.encoder(&mut state).copy_buffer_to_buffer(buffer, 0, &staging, 0, bytes);
            self.submit(&mut state);
        }
        self.check()?;
        let mapped = Arc::new(Mapped::default());
        let signal = mapped.clone();
        staging.slice(..).map_async(wgpu::MapMode::Read, move |result| signal.set(result.is_ok()));
        // Natively somebody must poll the device, and the reader has nothing else to do; in a
        // browser this returns at once and the event loop calls back.
        if let Err(error) = self.device.poll(wgpu::PollType::wait_indefinitely()) {
            return Err(self.lost(error));
        }
        lock(&self.state).in_flight.clear();
        if !mapped.wait().await {
            return Err(self.lost("a buffer could not be read"));
        }
        self.check()?;
        let view = staging.slice(..).get_mapped_range().map_err(|e| self.lost(e))?;
        Ok(bytemuck::pod_collect_to_vec(&view[..]))
    }
}
