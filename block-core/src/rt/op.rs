//! What can be asked of the kernel, and what an operation keeps alive. How it is carried out is `uring` and `pool`.
#![expect(unsafe_code, reason = "the plain form of an operation carries raw pointers between threads")]

use super::{IoBuf, SharedFd};
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

/// Who carries an operation out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The thread's own ring; where io_uring is refused, the pool.
    Ring,
    /// The ring, for a file whose bytes the page cache may have: where much is moved in one submission, the kernel's own
    /// threads copy it. Where io_uring is refused, the pool.
    Cached,
    /// The thread itself, on the spot, for what waits for nothing; where io_uring is refused, the pool.
    AtOnce,
    /// A helper thread that may block.
    Pool,
}

/// An operation that owns what it works on.
pub enum Op {
    /// Fills `buf` from `offset` in bytes; `u64::MAX` reads from a pipe or at the file's own position.
    Read {
        /// What is read.
        fd: SharedFd,
        /// Where the bytes go.
        buf: IoBuf,
        /// First byte in the file.
        offset: u64,
    },
    /// Writes `buf` at `offset` in bytes; `u64::MAX` as in [`Op::Read`].
    Write {
        /// What is written.
        fd: SharedFd,
        /// Where the bytes come from.
        buf: IoBuf,
        /// First byte in the file.
        offset: u64,
        /// Complete only when the data is stable (RWF_DSYNC).
        dsync: bool,
    },
    /// fsync, or fdatasync where `data_only`.
    Sync {
        /// What is made stable.
        fd: SharedFd,
        /// Leave out what is not needed to read the data back.
        data_only: bool,
    },
    /// fallocate(2).
    Fallocate {
        /// The file whose space changes.
        fd: SharedFd,
        /// `FALLOC_FL_…` of the kernel.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// One read or write of a source, on memory and a descriptor that the source keeps valid until it is complete.
#[derive(Clone, Copy)]
pub struct DirectOp {
    /// Write; otherwise read.
    pub write: bool,
    /// A write that completes only when the data is stable.
    pub dsync: bool,
    /// The file.
    pub fd: RawFd,
    /// The scatter list.
    pub iovecs: *const libc::iovec,
    /// Entries of the scatter list, 1 to 1024.
    pub count: u32,
    /// Bytes in all of them together.
    pub len: u64,
    /// First byte in the file.
    pub offset: u64,
    /// How the ring goes about it; not [`Engine::Pool`]. Where that is [`Engine::AtOnce`] it gets a ring's completion all the same.
    pub engine: Engine,
}

/// Something that counts what is in flight, so that it can be waited for.
pub trait Counted {
    /// One more.
    fn up(&self);
    /// One less.
    fn down(&self);
}

/// One that is counted, from its making to its drop.
pub struct Hold {
    outer: Rc<dyn Counted>,
    inner: Option<Rc<dyn Counted>>,
}

impl Hold {
    /// Counts one up; the drop counts it down.
    pub fn new(counter: Rc<dyn Counted>) -> Self {
        counter.up();
        Self { outer: counter, inner: None }
    }

    /// Counts in two places. `inner` is counted down, and let go, before `outer` is.
    pub fn within(outer: Rc<dyn Counted>, inner: Rc<dyn Counted>) -> Self {
        outer.up();
        inner.up();
        Self { outer, inner: Some(inner) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            inner.down();
        }
        self.outer.down();
    }
}

/// An operation as the kernel takes it: plain numbers, valid as long as its slot (or its source) keeps its promise.
#[derive(Clone, Copy)]
pub(super) enum RawOp {
    Move(DirectOp),
    Sync { fd: RawFd, data_only: bool },
    Fallocate { fd: RawFd, mode: i32, offset: u64, len: u64 },
}

// SAFETY: the pointers are only used by system calls; whoever made the value keeps what they point to valid until the
// completion has been taken on its own thread.
unsafe impl Send for RawOp {}

impl RawOp {
    pub(super) fn fd(&self) -> RawFd {
        match self {
            Self::Move(DirectOp { fd, .. }) | Self::Sync { fd, .. } | Self::Fallocate { fd, .. } => *fd,
        }
    }
}

impl Op {
    /// The plain form. It points into `self`: valid while `self` is neither moved nor dropped.
    pub(super) fn raw(&self, engine: Engine) -> RawOp {
        match self {
            Self::Read { fd, buf, offset } => {
                RawOp::Move(DirectOp { write: false, dsync: false, engine, ..movement(fd, buf, *offset) })
            }
            Self::Write { fd, buf, offset, dsync } => {
                RawOp::Move(DirectOp { write: true, dsync: *dsync, engine, ..movement(fd, buf, *offset) })
            }
            Self::Sync { fd, data_only } => RawOp::Sync { fd: fd.as_raw_fd(), data_only: *data_only },
            Self::Fallocate { fd, mode, offset, len } => {
                RawOp::Fallocate { fd: fd.as_raw_fd(), mode: *mode, offset: *offset, len: *len }
            }
        }
    }
}

fn movement(fd: &SharedFd, buf: &IoBuf, offset: u64) -> DirectOp {
    let segments = buf.segments();
    // A longer list would be refused; the first part of it is a short count, which callers know anyway.
    let count = u32::try_from(segments.len().min(MAX_IOVECS)).unwrap_or(u32::MAX);
    // `Segment` is a transparent iovec.
    let iovecs = segments.as_ptr().cast();
    DirectOp {
        write: false,
        dsync: false,
        fd: fd.as_raw_fd(),
        iovecs,
        count,
        len: buf.len(),
        offset,
        engine: Engine::Ring,
    }
}

const MAX_IOVECS: usize = 1024;
