//! What stays of a node through all its configurations.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::grace::Visitors;
use super::stats::{NodeStats, Totals};
use super::tracked::Tracked;
use super::uses::Uses;
use crate::base::{ByteRange, IoError};

/// Something that happened to a node and that operators are told of. Sent from any thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEvent {
    /// A write went past the threshold, which is disarmed now (QMP: `BLOCK_WRITE_THRESHOLD`).
    WriteThreshold {
        /// The node's name.
        node: String,
        /// Bytes by which the write went past it.
        exceeded: u64,
        /// The threshold, a byte offset.
        threshold: u64,
    },
    /// A request of a user of the node failed (QMP: `BLOCK_IO_ERROR`). Told once a second at the most.
    IoError {
        /// The node's name.
        node: String,
        /// Anything but a read.
        write: bool,
        /// Why.
        error: IoError,
    },
    /// A copy in a quorum failed, or said something else than most (QMP: `QUORUM_REPORT_BAD`).
    QuorumReportBad {
        /// The copy's name.
        node: String,
        /// What it was asked.
        op: QuorumOp,
        /// How it failed; `None`: it gave other data.
        error: Option<IoError>,
        /// Where; empty for a flush.
        at: ByteRange,
    },
    /// The tables of an image contradict each other; nothing is written to it any more (QMP: `BLOCK_IMAGE_CORRUPTED`).
    ImageCorrupted {
        /// The node's name.
        node: String,
        /// What is wrong.
        what: String,
        /// Where in the file.
        at: ByteRange,
    },
    /// Too few copies in a quorum agreed (QMP: `QUORUM_FAILURE`).
    QuorumFailure {
        /// The quorum's name.
        node: String,
        /// Where.
        at: ByteRange,
    },
}

impl NodeEvent {
    /// The name of the node that it happened to.
    pub fn node(&self) -> &str {
        match self {
            Self::WriteThreshold { node, .. }
            | Self::IoError { node, .. }
            | Self::QuorumReportBad { node, .. }
            | Self::ImageCorrupted { node, .. }
            | Self::QuorumFailure { node, .. } => node,
        }
    }
}

/// What the copies in a quorum were asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuorumOp {
    /// To read.
    Read,
    /// To write data or zeroes, or to discard.
    Write,
    /// To make stable.
    Flush,
}

/// Where node events go. Called on I/O threads: it may not block.
pub type EventSink = Arc<dyn Fn(NodeEvent) + Send + Sync>;

/// The part of a node that all its configurations and views share.
pub(crate) struct NodeShared {
    pub(crate) name: String,
    pub(crate) stats: NodeStats,
    pub(crate) tracked: Tracked,
    pub(crate) visitors: Visitors,
    pub(crate) uses: Arc<Uses>,
    /// `u64::MAX`: not armed. Else a byte offset.
    threshold: AtomicU64,
    loss_told: AtomicBool,
    inherits_loss: AtomicBool,
    failures: Mutex<Option<Instant>>,
    events: EventSink,
}

impl NodeShared {
    pub(crate) fn new(name: String, events: EventSink) -> Self {
        Self {
            name,
            stats: NodeStats::default(),
            tracked: Tracked::default(),
            visitors: Visitors::default(),
            uses: Uses::new(),
            threshold: AtomicU64::new(u64::MAX),
            loss_told: AtomicBool::new(false),
            inherits_loss: AtomicBool::new(false),
            failures: Mutex::default(),
            events,
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        self.stats.totals()
    }

    /// An operator is told that the last flush failed. True: that was said before.
    pub(crate) fn tell_loss(&self) -> bool {
        self.loss_told.swap(true, Relaxed)
    }

    /// What was written to the node that this one stands on may be lost, and this one's flushes do not go there.
    #[inline]
    pub(crate) fn inherits_loss(&self) -> bool {
        self.inherits_loss.load(Relaxed)
    }

    pub(crate) fn inherit_loss(&self) {
        self.inherits_loss.store(true, Relaxed);
    }

    /// What fails from now on is another loss.
    pub(crate) fn forget_loss(&self) {
        self.inherits_loss.store(false, Relaxed);
        self.loss_told.store(false, Relaxed);
    }

    /// A request of one of the node's users failed. A guest can have this said as often as it likes.
    #[cold]
    pub(crate) fn tell_failure(&self, write: bool, error: IoError) {
        let now = Instant::now();
        {
            let mut last = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_some_and(|last| now < last + BETWEEN_FAILURES) {
                return;
            }
            *last = Some(now);
        }
        tracing::warn!("a {} on node '{}' failed: {error}", if write { "write" } else { "read" }, self.name);
        (self.events)(NodeEvent::IoError { node: self.name.clone(), write, error });
    }

    /// `None`: not armed.
    pub(crate) fn threshold(&self) -> Option<u64> {
        let threshold = self.threshold.load(Relaxed);
        (threshold != u64::MAX).then_some(threshold)
    }

    pub(crate) fn set_threshold(&self, threshold: Option<u64>) {
        self.threshold.store(threshold.unwrap_or(u64::MAX), Relaxed);
    }

    /// A write is going to end at `end`. The threshold fires once.
    #[inline]
    pub(crate) fn writing_up_to(&self, end: u64) {
        let threshold = self.threshold.load(Relaxed);
        if end > threshold {
            self.cross_threshold(threshold, end);
        }
    }

    #[cold]
    fn cross_threshold(&self, threshold: u64, end: u64) {
        if self.threshold.compare_exchange(threshold, u64::MAX, Relaxed, Relaxed).is_ok() {
            (self.events)(NodeEvent::WriteThreshold { node: self.name.clone(), exceeded: end - threshold, threshold });
        }
    }
}

const BETWEEN_FAILURES: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_write_threshold_fires_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = {
            let seen = seen.clone();
            Arc::new(move |event| seen.lock().unwrap().push(event))
        };
        let node = NodeShared::new("n".into(), sink);
        node.writing_up_to(u64::MAX - 1);
        node.set_threshold(Some(4096));
        node.writing_up_to(4096);
        assert!(seen.lock().unwrap().is_empty());
        node.writing_up_to(4608);
        node.writing_up_to(8192);
        let expected = NodeEvent::WriteThreshold { node: "n".into(), exceeded: 512, threshold: 4096 };
        assert_eq!(*seen.lock().unwrap(), [expected]);
        assert_eq!(node.threshold(), None);
    }
}
