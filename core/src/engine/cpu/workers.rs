//! Threads of the CPU engine: a parallel loop whose result cannot depend on who ran what.
//!
//! Every index is computed by exactly one thread and writes places of its own; sums over indices
//! are integer sums. With one thread, without the feature `threads`, or for little work, the loop
//! runs in place.
#![expect(unsafe_code, reason = "threads write disjoint parts of one slice")]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::parallel::Share;
use manyhands_shaders::twin::{SITE_COUNT, Saturations, Site};

/// Work below this many nanoseconds is not worth waking a thread.
const WAKE_NS: usize = 80_000;

/// The calling thread and its helpers.
pub(crate) struct Workers {
    threads: usize,
    #[cfg(feature = "threads")]
    pool: Option<rayon::ThreadPool>,
}

impl Workers {
    /// `threads` in all, at least one. Fewer if the system refuses to start them.
    pub(crate) fn new(threads: usize) -> Self {
        #[cfg(feature = "threads")]
        {
            let helpers = threads.max(1) - 1;
            let build = || rayon::ThreadPoolBuilder::new().num_threads(helpers).build().ok();
            let pool = if helpers == 0 { None } else { build() };
            Self { threads: if pool.is_some() { helpers + 1 } else { 1 }, pool }
        }
        #[cfg(not(feature = "threads"))]
        {
            let _ = threads;
            Self { threads: 1 }
        }
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `f` with every index below `count`, in any order. `cost_ns` estimates all of it.
    pub(crate) fn each(&self, count: usize, cost_ns: usize, f: impl Fn(usize) + Sync) {
        #[cfg(feature = "threads")]
        if let Some(pool) = &self.pool
            && count > 1
            && cost_ns > WAKE_NS
        {
            // The caller works too: if helpers wake late, less is left for them.
            let next = AtomicUsize::new(0);
            let work = || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count {
                        break;
                    }
                    f(i);
                }
            };
            pool.in_place_scope(|scope| {
                for _ in 1..self.threads.min(count) {
                    scope.spawn(|_| work());
                }
                work();
            });
            return;
        }
        let _ = (cost_ns, WAKE_NS, AtomicUsize::new(0));
        for i in 0..count {
            f(i);
        }
    }

    /// Calls `own` in this thread and `other` with every index from 1 to below `count`, at the same
    /// time where there are threads; results in that order.
    pub(crate) fn beside<R: Share>(
        &self,
        count: usize,
        own: impl FnOnce() -> R,
        other: impl Fn(usize) -> R + Share,
    ) -> Vec<R> {
        #[cfg(feature = "threads")]
        if let Some(pool) = &self.pool {
            let mut out: Vec<Option<R>> = (0..count).map(|_| None).collect();
            pool.in_place_scope(|scope| {
                let (first, others) = out.split_at_mut(1);
                for (i, to) in others.iter_mut().enumerate() {
                    let other = &other;
                    scope.spawn(move |_| *to = Some(other(i + 1)));
                }
                first[0] = Some(own());
            });
            return out.into_iter().flatten().collect();
        }
        std::iter::once(own()).chain((1..count).map(other)).collect()
    }

    /// Splits `0..total` into ranges of whole `grain`s, a few a thread, and calls `f` with each.
    pub(crate) fn ranges(
        &self,
        total: usize,
        grain: usize,
        cost_ns: usize,
        f: impl Fn(std::ops::Range<usize>) + Sync,
    ) {
        let parts = if self.threads == 1 || cost_ns <= WAKE_NS { 1 } else { self.threads * 4 };
        let step = total.div_ceil(parts).div_ceil(grain).max(1) * grain;
        self.each(total.div_ceil(step), cost_ns, |i| f(i * step..total.min((i + 1) * step)));
    }
}

/// A slice whose parts several threads write.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `part`, whose caller promises disjoint parts.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as for a `&mut [T]`.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares `slice`.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The `len` values from `at`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[expect(clippy::mut_from_ref, reason = "the parts are disjoint")]
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "a part outside its slice");
        // SAFETY: in bounds, and disjoint from every other living part by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

impl<T> Shared<'_, T> {
    /// The address of the value at `at`, which `len - 1` more follow.
    ///
    /// # Safety
    /// As [`Self::part`], for the values that are written through it.
    pub(crate) unsafe fn pointer(&self, at: usize, len: usize) -> *mut T {
        assert!(at <= self.len && len <= self.len - at, "a part outside its slice");
        // SAFETY: in bounds.
        unsafe { self.start.add(at) }
    }
}

/// Saturation counts that threads add to.
#[derive(Default)]
pub(crate) struct Tally {
    counts: [AtomicU64; SITE_COUNT],
    paused: AtomicBool,
}

impl Tally {
    /// Adds `count` events.
    pub(crate) fn add(&self, site: Site, count: u64) {
        if count != 0 && !self.paused.load(Ordering::Relaxed) {
            self.counts[site as usize].fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Whether events are counted from now on.
    pub(crate) fn count(&self, on: bool) {
        self.paused.store(!on, Ordering::Relaxed);
    }

    /// The counts so far; starts again at zero.
    pub(crate) fn take(&self) -> Saturations {
        Saturations(std::array::from_fn(|i| self.counts[i].swap(0, Ordering::Relaxed)))
    }
}
