//! The answer to a buffer mapping, as a future that works with a polled device and in a browser.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Whether a buffer has been mapped yet, and how it went.
#[derive(Default)]
pub(super) struct Mapped(Mutex<(Option<bool>, Option<Waker>)>);

impl Mapped {
    fn state(&self) -> MutexGuard<'_, (Option<bool>, Option<Waker>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's answer; wakes the reader.
    pub(super) fn set(&self, ok: bool) {
        let waker = {
            let mut state = self.state();
            state.0 = Some(ok);
            state.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for [`Self::set`].
    pub(super) async fn wait(&self) -> bool {
        std::future::poll_fn(|context| {
            let mut state = self.state();
            match state.0 {
                Some(ok) => Poll::Ready(ok),
                // On a native device the wait above has ended: no callback will come any more.
                None if cfg!(not(target_arch = "wasm32")) => Poll::Ready(false),
                None => {
                    state.1 = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
