//! What a queue is told: plain data, made by the control side, kept by the queue while it serves.

use std::sync::Arc;

use block_core::rt::SharedFd;

use super::call::Call;
use super::limit::Limit;
use super::memory::{DirtyLog, MemoryMap, Piece};
use super::request::ID_LEN;
use super::ring::{Addresses, Ring, RingFeatures};

/// What the control side knows about a queue. Plain data: a queue is started from it, and its base is written back.
#[derive(Clone)]
pub(super) struct Settings {
    /// Entries of the ring; 0: not set yet.
    pub(super) size: u16,
    pub(super) at: Addresses,
    /// Where writes to the used ring are logged, if they are.
    pub(super) log_used: Option<u64>,
    /// Where in the available ring to begin.
    pub(super) base: u16,
    pub(super) features: RingFeatures,
    pub(super) kick: Option<SharedFd>,
    pub(super) call: Option<Arc<Call>>,
    pub(super) err: Option<Arc<Call>>,
    pub(super) memory: Arc<MemoryMap>,
    /// `Some` while writes to guest memory are logged.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// A write is stable before it completes.
    pub(super) fua: bool,
}

impl Settings {
    /// Guest memory was written here.
    pub(super) fn log(&self, pieces: &[Piece]) {
        if let Some(log) = &self.log {
            pieces.iter().for_each(|piece| log.mark(piece.gpa, piece.len));
        }
    }

    /// The used ring was written here: offset and length in bytes.
    pub(super) fn log_ring(&self, written: impl IntoIterator<Item = (u64, u64)>) {
        if let (Some(log), Some(used)) = (&self.log, self.log_used) {
            written.into_iter().for_each(|(at, len)| log.mark(used.saturating_add(at), len));
        }
    }

    /// Shows the driver everything that was given back so far, and logs that.
    #[inline]
    pub(super) fn publish(&self, ring: &mut Ring) {
        self.log_ring(ring.publish());
    }
}

/// What does not change while the export lives.
#[derive(Clone)]
pub(super) struct Traits {
    /// For messages: export and queue.
    pub(super) name: String,
    /// Logical block size in bytes.
    pub(super) block: u32,
    pub(super) writable: bool,
    pub(super) serial: [u8; ID_LEN],
    /// Of the export: a guest broke its queue.
    pub(super) lines: Arc<Limit>,
    /// Ends the session: guest memory cannot be relied on any more.
    pub(super) hang_up: Arc<dyn Fn() + Send + Sync>,
}
