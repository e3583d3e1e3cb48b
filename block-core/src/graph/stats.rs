//! What went through a node: one set of counters a thread and root, summed when somebody asks.
//!
//! Only the owning thread writes a set, so counting is a load and a store; nothing is shared but the reading.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::base::shim::{AtomicU64, Mutex, Ordering::Relaxed};

/// The kinds of request that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reads.
    Read = 0,
    /// Writes, and writes of zeroes.
    Write = 1,
    /// Flushes.
    Flush = 2,
    /// Discards.
    Unmap = 3,
}

impl OpKind {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Unmap];
}

#[derive(Debug, Default)]
struct Op {
    ops: AtomicU64,
    bytes: AtomicU64,
    nanos: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

/// One thread's counters for one node under one root.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    ops: [Op; 4],
    highest_write: AtomicU64,
}

fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
}

impl Counters {
    /// `ops` requests that moved `bytes` in all and took `time` in all went well.
    #[inline]
    pub(crate) fn done(&self, kind: OpKind, ops: u64, bytes: u64, time: Duration) {
        let op = &self.ops[kind as usize];
        add(&op.ops, ops);
        add(&op.bytes, bytes);
        // 2^64 ns are 584 years.
        add(&op.nanos, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    #[inline]
    pub(crate) fn wrote_up_to(&self, end: u64) {
        if end > self.highest_write.load(Relaxed) {
            self.highest_write.store(end, Relaxed);
        }
    }

    pub(crate) fn failed(&self, kind: OpKind) {
        add(&self.ops[kind as usize].failed, 1);
    }

    pub(crate) fn invalid(&self, kind: OpKind) {
        add(&self.ops[kind as usize].invalid, 1);
    }

    fn add_to(&self, totals: &mut Totals) {
        for (op, total) in self.ops.iter().zip(&mut totals.ops) {
            total.ops += op.ops.load(Relaxed);
            total.bytes += op.bytes.load(Relaxed);
            total.nanos += op.nanos.load(Relaxed);
            total.failed += op.failed.load(Relaxed);
            total.invalid += op.invalid.load(Relaxed);
        }
        totals.highest_write = totals.highest_write.max(self.highest_write.load(Relaxed));
    }
}

/// Sums for one kind of request since the node was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpTotals {
    /// Requests that went well.
    pub ops: u64,
    /// Bytes that they moved.
    pub bytes: u64,
    /// Nanoseconds from arrival to completion, added up.
    pub nanos: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that were refused because they made no sense (range, alignment).
    pub invalid: u64,
}

/// Sums for a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// By [`OpKind`].
    pub ops: [OpTotals; 4],
    /// One past the last byte ever written.
    pub highest_write: u64,
}

/// A node's counters, wherever its requests ran.
#[derive(Debug, Default)]
pub(crate) struct NodeStats(Mutex<Shared>);

#[derive(Debug, Default)]
struct Shared {
    live: Vec<Arc<Counters>>,
    retired: Totals,
}

impl NodeStats {
    /// A new set for the calling thread.
    pub(crate) fn counters(&self) -> Arc<Counters> {
        let counters = Arc::<Counters>::default();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).live.push(counters.clone());
        counters
    }

    /// The thread will write this set no more.
    pub(crate) fn retire(&self, counters: &Arc<Counters>) {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counters.add_to(&mut shared.retired);
        shared.live.retain(|other| !Arc::ptr_eq(other, counters));
    }

    pub(crate) fn totals(&self) -> Totals {
        let shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut totals = shared.retired;
        shared.live.iter().for_each(|counters| counters.add_to(&mut totals));
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_gone_thread_counted_is_kept() {
        let stats = NodeStats::default();
        let (a, b) = (stats.counters(), stats.counters());
        a.done(OpKind::Read, 1, 512, Duration::from_nanos(5));
        b.done(OpKind::Read, 2, 1024, Duration::from_nanos(7));
        b.wrote_up_to(4096);
        stats.retire(&b);
        let read = stats.totals().ops[OpKind::Read as usize];
        assert_eq!((read.ops, read.bytes, read.nanos), (3, 1536, 12));
        assert_eq!(stats.totals().highest_write, 4096);
    }
}
