//! What the loop needs of the kernel, in one of two ways: a ring, or epoll with helper threads. Both speak in
//! completions.

use super::epoll::Epoll;
use super::op::{DirectOp, RawOp};
use super::thread::Shared;
use super::token::Token;
use super::uring::Uring;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// Something that was asked for has happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    /// The packed [`Token`] of who asked.
    pub(super) token: u64,
    /// As the kernel gives it.
    pub(super) result: i32,
    /// A watch that stays armed.
    pub(super) more: bool,
}

/// What a descriptor is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    Readable,
    Writable,
    /// Every edge of an eventfd, until it is cancelled.
    Edges,
}

/// The kernel's side of one thread.
pub(super) enum Driver {
    Ring(Uring),
    Epoll(Epoll),
}

impl Driver {
    /// The ring, or epoll where io_uring is refused (or TRELLIS_NO_IO_URING is set). Fails where neither can be had.
    pub(super) fn for_io(shared: &Arc<Shared>) -> std::io::Result<Self> {
        let refused = match Uring::new(shared) {
            Ok(ring) => return Ok(Self::Ring(ring)),
            Err(refused) => refused,
        };
        static WARNED: std::sync::Once = std::sync::Once::new();
        WARNED.call_once(|| tracing::warn!(error = %refused, "io_uring is refused: using epoll and helper threads"));
        Self::for_control(shared)
    }

    /// Epoll: for a thread that moves little.
    pub(super) fn for_control(shared: &Arc<Shared>) -> std::io::Result<Self> {
        Ok(Self::Epoll(Epoll::new(shared)?))
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Ring(_) => "io_uring",
            Self::Epoll(_) => "epoll",
        }
    }

    /// Starts a source's operation.
    #[inline]
    pub(super) fn direct(&mut self, op: &DirectOp, token: Token) {
        match self {
            Self::Ring(ring) => ring.transfer(op, token),
            Self::Epoll(epoll) => epoll.run(RawOp::Move(*op), token),
        }
    }

    /// Starts an operation whose slot keeps everything valid.
    pub(super) fn run(&mut self, op: RawOp, token: Token) {
        match self {
            Self::Ring(ring) => ring.run(&op, token),
            Self::Epoll(epoll) => epoll.run(op, token),
        }
    }

    /// Watches a descriptor that stays open until the last completion (without `more`) has been taken.
    pub(super) fn watch(&mut self, fd: RawFd, interest: Interest, token: Token) {
        match self {
            Self::Ring(ring) => ring.watch(fd, interest, token),
            Self::Epoll(epoll) => epoll.watch(fd, interest, token),
        }
    }

    /// Ends a watch; its last completion follows, if it has not come already.
    pub(super) fn unwatch(&mut self, token: Token) {
        match self {
            Self::Ring(ring) => ring.unwatch(token),
            Self::Epoll(epoll) => epoll.unwatch(token),
        }
    }

    /// What was started and the kernel has not been given.
    #[inline]
    pub(super) fn pending(&mut self) -> usize {
        match self {
            Self::Ring(ring) => ring.pending(),
            Self::Epoll(_) => 0,
        }
    }

    /// Gives what was started to the kernel.
    #[inline]
    pub(super) fn flush(&mut self) {
        match self {
            Self::Ring(ring) => ring.flush(),
            Self::Epoll(_) => {}
        }
    }

    /// True where `reap` would find something: a look at memory, for busy polling. Epoll cannot know.
    #[inline]
    pub(super) fn has_completions(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_completions(),
            Self::Epoll(epoll) => epoll.has_completions(),
        }
    }

    /// Adds what has completed, without waiting.
    #[inline]
    pub(super) fn reap(&mut self, out: &mut Vec<Completion>) {
        match self {
            Self::Ring(ring) => ring.reap(out),
            Self::Epoll(epoll) => epoll.reap(out),
        }
    }

    /// Sleeps until something completes or `timeout` is over (`None`: for ever); may return early.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) {
        match self {
            Self::Ring(ring) => ring.wait(timeout),
            Self::Epoll(epoll) => epoll.wait(timeout),
        }
    }

    /// Ring entries after which a batch is submitted early; 0: only when the ring is full.
    pub(super) fn set_max_batch(&mut self, entries: u64) {
        match self {
            Self::Ring(ring) => ring.set_max_batch(entries),
            Self::Epoll(_) => {}
        }
    }
}
