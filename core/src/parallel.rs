//! Independent work on all cores, where there are threads. Results never depend on how many.

/// Applies `f` to every item; results in the order of the items.
#[cfg(feature = "threads")]
pub(crate) fn map<T: Send, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    use rayon::prelude::*;
    items.into_par_iter().map(f).collect()
}

/// Applies `f` to every item; results in the order of the items.
#[cfg(not(feature = "threads"))]
pub(crate) fn map<T: Send, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    items.into_iter().map(f).collect()
}

/// What threads may share, where there are threads.
#[cfg(feature = "threads")]
pub trait Share: Send + Sync {}
#[cfg(feature = "threads")]
impl<T: Send + Sync> Share for T {}

/// What threads may share, where there are threads.
#[cfg(not(feature = "threads"))]
pub trait Share {}
#[cfg(not(feature = "threads"))]
impl<T> Share for T {}
