//! Buffers aligned to cache lines and recycled by the engine.
//!
//! A training step makes and drops hundreds of megabytes of tensors. Fresh memory costs a page
//! fault every 4 KiB, more than many operations on it, so dropped buffers return to a pool. A
//! recycled buffer holds stale values: whoever takes one writes all of it.
#![expect(unsafe_code, reason = "views cache lines as slices of plain integers")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// One cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// Buffers that wait for reuse; beyond this many the oldest is freed.
const WAITING_MAX: usize = 2048;

/// Dropped buffers of one engine.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Vec<Vec<Line>>>);

/// Integers whose every bit pattern is a value.
pub trait Plain: Copy + 'static {}
impl Plain for i8 {}
impl Plain for i16 {}
impl Plain for i32 {}
impl Plain for u16 {}
impl Plain for u32 {}

/// A slice on cache lines that returns to its pool when dropped.
pub struct Buffer<T> {
    lines: Vec<Line>,
    len: usize,
    pool: Option<Arc<Pool>>,
    plain: PhantomData<T>,
}

impl Pool {
    /// A buffer of `len` values of any content.
    pub(crate) fn take<T: Plain>(self: &Arc<Self>, len: usize) -> Buffer<T> {
        let need = (len * size_of::<T>()).div_ceil(64);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |n: usize| n >= need && n <= need + need / 2 + 64;
        // The last one dropped of its length: it may still be in the cache.
        let best = (0..waiting.len())
            .rev()
            .filter(|&i| fits(waiting[i].len()))
            .min_by_key(|&i| waiting[i].len());
        let found = best.map(|i| waiting.remove(i));
        drop(waiting);
        let lines = found.unwrap_or_else(|| vec![Line([0; 64]); need]);
        Buffer { lines, len, pool: Some(self.clone()), plain: PhantomData }
    }
}

impl<T: Plain> Buffer<T> {
    /// A buffer of zeros that belongs to no pool.
    pub(crate) fn zeros(len: usize) -> Self {
        let lines = vec![Line([0; 64]); (len * size_of::<T>()).div_ceil(64)];
        Self { lines, len, pool: None, plain: PhantomData }
    }

    /// Makes room for `len` values of any content: scratch that only grows.
    pub(crate) fn at_least(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = Self::zeros(len);
        }
        &mut self[..len]
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the lines are initialised, aligned to 64 and hold at least `len` values of `T`,
        // for which every bit pattern is valid.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let mut waiting = pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() >= WAITING_MAX {
                waiting.remove(0);
            }
            waiting.push(std::mem::take(&mut self.lines));
        }
    }
}
