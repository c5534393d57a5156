//! Device buffers: a small pool, so that a step allocates nothing after the first one.
//!
//! A buffer returns to the pool when its last user drops it, even while recorded commands still
//! use it: commands run in the order of recording, so the next user's writes come later. That is
//! not true of uploads, which run before all recorded commands; they take fresh buffers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Idle bytes that the pool keeps.
const POOL_BYTES_MAX: u64 = 512 << 20;
/// Idle bytes that are kept even when there is none of the size that is asked for.
const POOL_BYTES_KEPT: u64 = 64 << 20;

/// Idle buffers by size, and a count of all.
#[derive(Default)]
pub(super) struct Pool(Mutex<Buffers>);

#[derive(Default)]
struct Buffers {
    idle: BTreeMap<u64, Vec<wgpu::Buffer>>,
    idle_bytes: u64,
    held: u64,
    memory: Memory,
}

/// What the buffers of a device take: weights, tensors, and what is kept for reuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Most bytes of all buffers together so far.
    pub peak: u64,
    /// Bytes of the largest one so far.
    pub largest: u64,
}

impl Buffers {
    fn take(&mut self, size: u64) -> Option<wgpu::Buffer> {
        let buffers = self.idle.get_mut(&size)?;
        let buffer = buffers.pop();
        if buffers.is_empty() {
            self.idle.remove(&size);
        }
        self.idle_bytes -= size;
        buffer
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle buffer of exactly `size` bytes (a size of [`size_class`]).
    pub(super) fn take(&self, size: u64) -> Option<wgpu::Buffer> {
        self.lock().take(size)
    }

    /// Counts a new buffer of `size` bytes. Idle ones of other sizes make room for it, so that
    /// shapes that change do not add up.
    pub(super) fn grow(&self, size: u64) {
        let mut buffers = self.lock();
        let enough = buffers.held.saturating_sub(size);
        while buffers.held > enough && buffers.idle_bytes > POOL_BYTES_KEPT {
            let Some((&largest, _)) = buffers.idle.last_key_value() else { break };
            buffers.take(largest);
            buffers.held -= largest;
        }
        buffers.held += size;
        buffers.memory.peak = buffers.memory.peak.max(buffers.held);
        buffers.memory.largest = buffers.memory.largest.max(size);
    }

    fn give(&self, buffer: wgpu::Buffer) {
        let size = buffer.size();
        let mut buffers = self.lock();
        if buffers.idle_bytes + size <= POOL_BYTES_MAX {
            buffers.idle_bytes += size;
            buffers.idle.entry(size).or_default().push(buffer);
        } else {
            buffers.held -= size;
        }
    }

    pub(super) fn memory(&self) -> Memory {
        self.lock().memory
    }
}

/// `bytes` rounded up to one of four sizes a power of two, so that similar shapes share buffers;
/// not beyond `limit`.
pub(super) fn size_class(bytes: u64, limit: u64) -> u64 {
    let bytes = bytes.max(256);
    let step = (bytes.next_power_of_two() / 8).max(64);
    let rounded = bytes.next_multiple_of(step);
    if rounded <= limit { rounded } else { bytes.next_multiple_of(4) }
}

/// A storage buffer that goes back to its pool.
pub(super) struct Buf {
    pub(super) buffer: wgpu::Buffer,
    pool: Arc<Pool>,
}

impl Buf {
    pub(super) fn new(buffer: wgpu::Buffer, pool: &Arc<Pool>) -> Self {
        Self { buffer, pool: pool.clone() }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        self.pool.give(self.buffer.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    /// Breaks if a buffer could be smaller than asked, or larger than the adapter allows.
    #[test]
    fn size_class_covers_the_request_within_the_limit() {
        for bytes in (1..5000).chain([1 << 20, (1 << 27) - 4, 1 << 27]) {
            let class = size_class(bytes, 1 << 27);
            assert!(class >= bytes && class <= 1 << 27 && class.is_multiple_of(4), "{bytes}");
            assert!(class == 256 || class <= bytes + bytes / 3 + 64, "{bytes} wastes: {class}");
        }
    }
}
