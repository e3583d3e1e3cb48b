//! What a queue counts. Only its thread writes, so counting is a load and a store; anybody may read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One queue's counters, over all sessions of its export.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct QueueStats {
    kicks: AtomicU64,
    interrupts: AtomicU64,
    requests: AtomicU64,
    refused: AtomicU64,
    slow: AtomicU64,
    broken: AtomicU64,
}

/// A snapshot of one queue's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueReport {
    /// Times that the guest woke us.
    pub kicks: u64,
    /// Times that we woke the guest.
    pub interrupts: u64,
    /// Requests answered, with whatever status.
    pub requests: u64,
    /// Requests answered with an error status.
    pub refused: u64,
    /// Reads and writes that took the async path.
    pub slow: u64,
    /// Times that the guest broke the queue.
    pub broken: u64,
}

fn add(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
}

impl QueueStats {
    pub(super) fn kicked(&self) {
        add(&self.kicks);
    }

    pub(super) fn interrupted(&self) {
        add(&self.interrupts);
    }

    #[inline]
    pub(super) fn completed(&self, ok: bool) {
        add(&self.requests);
        if !ok {
            add(&self.refused);
        }
    }

    pub(super) fn slow(&self) {
        add(&self.slow);
    }

    pub(super) fn broke(&self) {
        add(&self.broken);
    }

    pub(super) fn report(&self) -> QueueReport {
        QueueReport {
            kicks: self.kicks.load(Relaxed),
            interrupts: self.interrupts.load(Relaxed),
            requests: self.requests.load(Relaxed),
            refused: self.refused.load(Relaxed),
            slow: self.slow.load(Relaxed),
            broken: self.broken.load(Relaxed),
        }
    }
}
