//! How many views (and plans of commands) name a node, and the wake-up when none does any more: what closing a removed node waits for.
//! Model-checked with `gate.rs`.

use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::base::canary;
use crate::base::shim::{AtomicUsize, Mutex, Ordering};

/// The count, shared by a node and the views that name it.
#[derive(Debug)]
pub struct Uses {
    count: AtomicUsize,
    closer: Mutex<Option<Waker>>,
}

/// One use of a node: a view's, or that of a command which looks at it. It is declared *after* what it guards, so that
/// it is dropped after it.
#[derive(Debug)]
pub struct UseGuard(Arc<Uses>);

impl Clone for UseGuard {
    fn clone(&self) -> Self {
        self.0.guard()
    }
}

impl Uses {
    /// Nobody uses it yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { count: AtomicUsize::new(0), closer: Mutex::new(None) })
    }

    /// One more view names the node.
    pub fn guard(self: &Arc<Self>) -> UseGuard {
        self.count.fetch_add(1, Ordering::Relaxed);
        UseGuard(self.clone())
    }

    /// Ready when nobody names the node. It has left the graph, so the count cannot rise again.
    pub fn poll_unused(&self, cx: &Context<'_>) -> Poll<()> {
        let register = || *self.closer.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        if !canary("late_register") {
            register();
        }
        if self.count.load(Ordering::Acquire) == 0 {
            return Poll::Ready(());
        }
        if canary("late_register") {
            register();
        }
        Poll::Pending
    }
}

impl Drop for UseGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            let closer = self.0.closer.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waker) = closer {
                waker.wake();
            }
        }
    }
}
