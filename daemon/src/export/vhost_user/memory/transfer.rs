//! Guest memory that the kernel is working on: scatter lists that live until their completion has been taken.
//!
//! A direct entry points into its list and from there into guest memory, and nobody can take the entry back. So the
//! lists belong to [`Transfers`], which gives a list up only when it is told that the entry is over, and which leaks
//! what is still under way rather than freeing it.
#![expect(unsafe_code, reason = "hands addresses of guest memory to the kernel")]

use std::rc::Rc;

use block_core::rt::{DirectOp, Engine, IoBuf, Local, Segment, SourceId};

use super::super::slots::KEPT_PIECES;
use super::{Mapped, Piece};

#[derive(Default)]
struct Transfer {
    iovecs: Vec<libc::iovec>,
    /// `Some` while an entry is under way.
    map: Option<Rc<Mapped>>,
}

/// The scatter lists of a queue's direct requests, one a slot.
#[derive(Default)]
pub(in super::super) struct Transfers(Vec<Transfer>);

/// Where a direct entry goes.
#[derive(Clone, Copy)]
pub(in super::super) struct Target {
    /// A write, else a read.
    pub(in super::super) write: bool,
    /// With `RWF_DSYNC`.
    pub(in super::super) dsync: bool,
    /// Stays open as long as the request's view is pinned.
    pub(in super::super) fd: std::os::fd::RawFd,
    /// Where in the file, in bytes.
    pub(in super::super) offset: u64,
    /// How the ring goes about it.
    pub(in super::super) engine: Engine,
}

impl Transfers {
    /// Pushes a ring entry over `pieces` of `map` for `slot`, which has none under way. Its completion must be told to
    /// [`Transfers::over`].
    pub(in super::super) fn push(
        &mut self,
        slot: u32,
        target: Target,
        map: &Rc<Mapped>,
        pieces: &[Piece],
        to: (&Local, SourceId),
    ) {
        let index = slot as usize;
        if self.0.len() <= index {
            self.0.resize_with(index + 1, Transfer::default);
        }
        let transfer = &mut self.0[index];
        assert!(transfer.map.is_none(), "a slot has one entry at a time");
        transfer.iovecs.clear();
        transfer.iovecs.extend(pieces.iter().map(|piece| iovec(map, *piece)));
        transfer.map = Some(map.clone());
        let op = DirectOp {
            write: target.write,
            dsync: target.dsync,
            fd: target.fd,
            iovecs: transfer.iovecs.as_ptr(),
            count: u32::try_from(transfer.iovecs.len()).expect("a chain has few pieces"),
            len: pieces.iter().map(|piece| piece.len).sum(),
            offset: target.offset,
            engine: target.engine,
        };
        let (local, source) = to;
        // SAFETY: list and memory stay until `over` (or for ever, see Drop); the caller's pinned view keeps the fd.
        unsafe { local.push_direct(source, slot, op) };
    }

    /// The completion of the slot's entry has been taken.
    pub(in super::super) fn over(&mut self, slot: u32) {
        let transfer = &mut self.0[slot as usize];
        assert!(transfer.map.take().is_some(), "only an entry that was pushed completes");
        if transfer.iovecs.capacity() > KEPT_PIECES {
            transfer.iovecs = Vec::new();
        }
    }
}

impl Drop for Transfers {
    fn drop(&mut self) {
        for transfer in self.0.iter_mut().filter(|transfer| transfer.map.is_some()) {
            std::mem::forget(std::mem::take(transfer));
        }
    }
}

impl Mapped {
    /// The pieces as a buffer for the async path, which keeps the map as long as it needs.
    pub(in super::super) fn buffer(self: &Rc<Self>, pieces: &[Piece]) -> IoBuf {
        let segments = pieces
            .iter()
            .map(|piece| Segment::new(self.host(*piece), usize::try_from(piece.len).expect("the piece is mapped")));
        // SAFETY: the pieces are mapped as long as `self` lives, which the buffer keeps; nothing refers to them.
        unsafe { IoBuf::from_segments(segments, self.clone()) }
    }
}

fn iovec(map: &Mapped, piece: Piece) -> libc::iovec {
    libc::iovec { iov_base: map.host(piece).cast(), iov_len: usize::try_from(piece.len).expect("the piece is mapped") }
}
