//! Device buffers: a small pool, so that a step allocates nothing after the first one.
//!
//! A buffer returns to the pool when its last user drops it, even while recorded commands still
//! use it: commands run in the order of recording, so the next user's writes come later. That is
//! not true of uploads, which run before all recorded commands; they take fresh buffers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Idle bytes that the pool keeps.
const POOL_BYTES_MAX: u64 = 512 << 20;

/// Idle buffers by size.
#[derive(Default)]
pub(super) struct Pool(Mutex<Idle>);

#[derive(Default)]
struct Idle {
    buffers: BTreeMap<u64, Vec<wgpu::Buffer>>,
    bytes: u64,
}

impl Pool {
    /// An idle buffer of exactly `size` bytes (a size of [`size_class`]).
    pub(super) fn take(&self, size: u64) -> Option<wgpu::Buffer> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = idle.buffers.get_mut(&size)?.pop()?;
        idle.bytes -= size;
        Some(buffer)
    }

    fn give(&self, buffer: wgpu::Buffer) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.bytes + buffer.size() <= POOL_BYTES_MAX {
            idle.bytes += buffer.size();
            idle.buffers.entry(buffer.size()).or_default().push(buffer);
        }
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
