//! The operations on a child: every request passes here, once for each node.

use std::sync::Arc;
use std::time::Instant;

use crate::base::{ByteRange, Error, IoError, align_down};
use crate::bitmap::Bitmap;
use crate::graph::{
    AmendRequest, Amending, BackingName, CheckReport, Child, DetectZeroes, DiscardMode, Extent, Findings, NodeBitmap,
    OpKind, PermSet, Place, Preallocation, Repair, SnapshotChange, Snapshotted, Ticket, WriteFlags,
};
use crate::rt::IoBuf;

use super::{align, zeroes};

impl<'g> Child<'g> {
    // Every node that a request passes has such a future in a box, so they are kept small: each of the public ones
    // awaits one other, which does the work, and what is rare has a box of its own.

    /// Fills `buf`, which has the range's length.
    pub async fn read(self, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let begun = Instant::now();
        let result = self.read_uncounted(at, buf).await;
        self.counted(OpKind::Read, at, begun, result)
    }

    async fn read_uncounted(self, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        self.check(at, PermSet::NONE)?;
        if at.is_empty() {
            return Ok(());
        }
        align::read(self, at, buf).await
    }

    /// Writes `buf`, which has the range's length.
    pub async fn write(self, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        let begun = Instant::now();
        let result = self.write_uncounted(at, buf, flags).await;
        self.counted(OpKind::Write, at, begun, result)
    }

    async fn write_uncounted(self, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        self.check(at, wanted(flags))?;
        let _recorded = self.recorded(at);
        if flags.compressed {
            self.check_compressed(at)?;
        }
        if at.is_empty() {
            return self.made_stable(flags).await;
        }
        if let Some(may_unmap) = self.detects_zeroes().filter(|_| !flags.compressed)
            && buf.is_zero_in_steps().await
        {
            let flags = WriteFlags { may_unmap, ..flags };
            Box::pin(zeroes::write(self, at, flags)).await?;
        } else {
            align::write(self, at, buf, self.native(flags)).await?;
        }
        self.stable_after(flags).await
    }

    /// Makes the range read as zeroes.
    pub async fn write_zeroes(self, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        let begun = Instant::now();
        let result = self.write_zeroes_uncounted(at, flags).await;
        self.counted(OpKind::Write, at, begun, result)
    }

    async fn write_zeroes_uncounted(self, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        self.check(at, wanted(flags))?;
        let _recorded = self.recorded(at);
        if at.is_empty() {
            return self.made_stable(flags).await;
        }
        let may_unmap = flags.may_unmap && self.options().discard == DiscardMode::Unmap;
        zeroes::write(self, at, WriteFlags { may_unmap, ..flags }).await?;
        self.stable_after(flags).await
    }

    /// The bytes are no longer needed: afterwards they read as before or as zeroes.
    pub async fn discard(self, at: ByteRange) -> Result<(), IoError> {
        let begun = Instant::now();
        let result = self.discard_uncounted(at).await;
        self.counted(OpKind::Unmap, at, begun, result)
    }

    async fn discard_uncounted(self, at: ByteRange) -> Result<(), IoError> {
        self.check(at, PermSet::WRITE)?;
        if self.options().discard == DiscardMode::Ignore {
            return Ok(());
        }
        let _recorded = self.recorded(at);
        self.discard_aligned(at).await
    }

    /// Whatever was completed on this node before is stable when this completes, whichever queue it came from. A node that
    /// nobody writes to has nothing to flush.
    pub async fn flush(self) -> Result<(), IoError> {
        let begun = Instant::now();
        let ignored = self.options().no_flush || self.options().read_only;
        let result = match () {
            () if ignored => Ok(()),
            () if self.placed().shared.inherits_loss() => Err(IoError::FlushLatched),
            () => self.placed().body.flush(self.cx()).await,
        };
        self.counted(OpKind::Flush, ByteRange::whole(0), begun, result)
    }

    /// Moves the end of a node whose end can move to `to` bytes, while other requests run. The caller sees to it that nobody
    /// uses what is cut off. With [`Preallocation::Falloc`] the end never moves back, and no byte is changed, whoever else
    /// moves it. Fails with [`IoError::Unsupported`] where the end is fixed.
    pub async fn set_end(self, to: u64, how: Preallocation) -> Result<(), IoError> {
        self.check_writable(PermSet::RESIZE)?;
        self.placed().body.set_end(self.cx(), to, how).await
    }

    /// Leaves what the node stands on as somebody else may find it, if the node writes at all. A flush makes it stable.
    pub(crate) async fn finish(self) -> Result<(), IoError> {
        if self.options().read_only || !self.options().active {
            return Ok(());
        }
        let placed = self.placed();
        // Bitmaps that cannot be stored are no reason to lose data.
        let stored = placed.body.store_bitmaps(self.cx(), &placed.kept).await;
        let finished = placed.body.finish(self.cx()).await;
        stored.and(finished)
    }

    /// See [`Driver::end_growth`](crate::graph::Driver::end_growth).
    pub(crate) async fn end_growth(self) -> Result<(), IoError> {
        self.placed().body.end_growth(self.cx()).await
    }

    /// What [`Child::finish`] does, for a node that is going to be flushed by nobody else.
    pub(crate) async fn finish_and_flush(self) -> Result<(), IoError> {
        self.finish().await?;
        self.flush().await
    }

    /// Where the first bytes of the range live.
    pub async fn map(self, at: ByteRange) -> Result<Extent, IoError> {
        self.check(at, PermSet::NONE)?;
        if at.is_empty() {
            return Err(IoError::OutOfRange);
        }
        let wide = at.widened(u64::from(self.geometry().limits.request_alignment)).ok_or(IoError::OutOfRange)?;
        let wide = wide.intersection(ByteRange::whole(self.size())).ok_or(IoError::OutOfRange)?;
        let extent = self.placed().body.map(self.cx(), wide).await?;
        Ok(within(extent, at.start() - wide.start(), at.len()))
    }

    /// Fills `buf`, which has the range's length, with what the node's snapshot has there.
    pub async fn read_snapshot(self, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        self.check(at, PermSet::NONE)?;
        self.placed().body.read_snapshot(self.cx(), at, buf).await
    }

    /// Where the first bytes of the range live in the node's snapshot.
    pub async fn map_snapshot(self, at: ByteRange) -> Result<Extent, IoError> {
        self.check(at, PermSet::NONE)?;
        let extent = self.placed().body.map_snapshot(self.cx(), at).await?;
        Ok(within(extent, 0, at.len()))
    }

    /// Nobody will read this part of the node's snapshot any more.
    pub async fn discard_snapshot(self, at: ByteRange) -> Result<(), IoError> {
        self.check(at, PermSet::NONE)?;
        self.placed().body.discard_snapshot(self.cx(), at).await
    }

    /// Prepares another size; the caller publishes what this gives.
    pub(crate) async fn truncate(
        self,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<Arc<dyn crate::graph::DynDriver>, Error> {
        self.placed().body.truncate(self.cx(), size, preallocation).await
    }

    /// Takes, deletes or applies an internal snapshot; the caller publishes what this gives besides.
    pub(crate) async fn change_snapshots(self, change: &SnapshotChange) -> Result<Snapshotted, Error> {
        self.placed().body.change_snapshots(self.cx(), change).await
    }

    /// Lets the node's image name another backing file; nobody else is inside.
    pub(crate) async fn change_backing_file(self, backing: Option<BackingName<'_>>) -> Result<(), Error> {
        self.placed().body.change_backing_file(self.cx(), backing).await
    }

    /// Changes what the node's image is like, beside other requests.
    pub(crate) async fn amend(self, request: AmendRequest<'_>) -> Result<Amending, Error> {
        if self.options().read_only || !self.options().active {
            return Err(Error::new("The node is read-only"));
        }
        self.placed().body.amend(self.cx(), request).await
    }

    /// Empties the node's layer; nobody else is inside.
    pub(crate) async fn make_empty(self) -> Result<(), Error> {
        self.placed().body.make_empty(self.cx()).await
    }

    /// Checks the node's image; nobody else is inside.
    pub(crate) async fn check_image(self, repair: Repair, findings: &mut Findings) -> Result<CheckReport, Error> {
        let options = self.options();
        if repair != Repair::Nothing && (options.read_only || !options.active) {
            return Err(Error::new(format!("Node '{}' is read-only: nothing can be repaired", self.name())));
        }
        self.placed().body.check(self.cx(), repair, findings).await
    }

    /// The node's image shall store these bitmaps; nobody else is inside.
    pub(crate) async fn keep_bitmaps(self, bitmaps: &[NodeBitmap]) -> Result<(), Error> {
        // In QEMU's words.
        let refused = |why| Error::new(format!("Can't store persistent bitmaps to {}: {why}", self.name()));
        if self.options().read_only || !self.options().active {
            return Err(refused("Read-only file system"));
        }
        match self.placed().body.keep_bitmaps(self.cx(), bitmaps).await? {
            true => Ok(()),
            false => Err(refused("Operation not supported")),
        }
    }

    // ---- what all of them need ---------------------------------------------------------------------------------

    /// Range, read-only and permission: the checks that no driver has to make.
    pub(super) fn check(self, at: ByteRange, wanted: PermSet) -> Result<(), IoError> {
        if at.end() > self.geometry().size {
            self.check_end(at, wanted)?;
        }
        self.check_writable(wanted)
    }

    /// The end may have moved since the graph was last changed, and who may resize writes past it.
    #[cold]
    fn check_end(self, at: ByteRange, wanted: PermSet) -> Result<(), IoError> {
        match self.moving_end() {
            Some(end) if at.end() <= end => Ok(()),
            Some(_) if !wanted.is_empty() && self.may(PermSet::RESIZE) => Ok(()),
            _ => Err(IoError::OutOfRange),
        }
    }

    fn check_writable(self, wanted: PermSet) -> Result<(), IoError> {
        let options = self.options();
        if !wanted.is_empty() && (options.read_only || !options.active || !self.may(wanted)) {
            return Err(IoError::ReadOnly);
        }
        Ok(())
    }

    /// Only whole clusters are compressed; the last one may be cut off by the end of the node.
    fn check_compressed(self, at: ByteRange) -> Result<(), IoError> {
        let limits = self.geometry().limits;
        let cluster = u64::from(limits.compressed_cluster);
        if cluster == 0 || limits.max_transfer < cluster {
            return Err(IoError::Unsupported);
        }
        let ends_well = at.end().is_multiple_of(cluster) || at.end() == self.size();
        if at.start().is_multiple_of(cluster) && ends_well { Ok(()) } else { Err(IoError::Misaligned) }
    }

    /// Marks the range in the node's bitmaps when the value is dropped: after the change, however that ended.
    fn recorded(self, at: ByteRange) -> Recorded<'g> {
        Recorded { bitmaps: &self.placed().bitmaps, at }
    }

    /// Counts one that did not begin.
    pub(crate) fn count_invalid(self, kind: OpKind) {
        self.counters().invalid(kind);
    }

    /// Counts a request by how it ended.
    fn counted(self, kind: OpKind, at: ByteRange, begun: Instant, result: Result<(), IoError>) -> Result<(), IoError> {
        let counters = self.counters();
        match result {
            Ok(()) => counters.done(kind, 1, at.len(), begun.elapsed()),
            Err(IoError::OutOfRange | IoError::Misaligned | IoError::ReadOnly) => counters.invalid(kind),
            Err(error) => {
                counters.failed(kind);
                self.tell_failure(kind != OpKind::Read, error);
            }
        }
        if kind == OpKind::Write && result.is_ok() {
            counters.wrote_up_to(at.end());
        }
        result
    }

    /// What this node's driver is told about stability: only what it can keep.
    pub(super) fn native(self, flags: WriteFlags) -> WriteFlags {
        WriteFlags { fua: flags.fua && self.geometry().limits.fua && !self.options().no_flush, ..flags }
    }

    /// A stable write over a driver that cannot do it is a write and a flush.
    async fn stable_after(self, flags: WriteFlags) -> Result<(), IoError> {
        if self.native(flags).fua { Ok(()) } else { self.made_stable(flags).await }
    }

    async fn made_stable(self, flags: WriteFlags) -> Result<(), IoError> {
        if flags.fua { self.flush().await } else { Ok(()) }
    }

    /// `Some(may_unmap)` where writes of zeroes are to be found.
    fn detects_zeroes(self) -> Option<bool> {
        match self.options().detect_zeroes {
            DetectZeroes::Off => None,
            DetectZeroes::On => Some(false),
            DetectZeroes::Unmap => Some(self.options().discard == DiscardMode::Unmap),
        }
    }

    /// Only whole blocks of the medium can be given back; the ragged ends are left alone.
    async fn discard_aligned(self, at: ByteRange) -> Result<(), IoError> {
        let limits = self.geometry().limits;
        let unit = u64::from(limits.discard_alignment.max(limits.request_alignment));
        let Some(whole) = at.whole_units(unit) else { return Ok(()) };
        let _alone = self.tracked(whole, false).await;
        for piece in whole.pieces(align_down(limits.max_discard, unit).max(unit)) {
            match self.placed().body.discard(self.cx(), piece).await {
                // A discard is a hint: who cannot take it has not failed.
                Ok(()) | Err(IoError::Unsupported) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Registers a request with its node, where overlaps can matter, and waits for those in the way.
    pub(super) async fn tracked(self, at: ByteRange, serialising: bool) -> Option<Ticket<'g>> {
        if !self.placed().tracks() {
            return None;
        }
        Some(self.cx().alone(&self.placed().shared.tracked, at, serialising).await)
    }
}

/// A change that may have happened.
struct Recorded<'g> {
    bitmaps: &'g [Arc<Bitmap>],
    at: ByteRange,
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        self.bitmaps.iter().for_each(|bitmap| bitmap.mark(self.at));
    }
}

/// What a write asks of the way to its node.
fn wanted(flags: WriteFlags) -> PermSet {
    if flags.unchanged { PermSet::WRITE_UNCHANGED } else { PermSet::WRITE }
}

/// An extent of an aligned range, seen from `skip` bytes further in.
fn within(extent: Extent, skip: u64, len: u64) -> Extent {
    let place = match extent.place {
        Place::Data { child, offset } => Place::Data { child, offset: offset + skip },
        other => other,
    };
    Extent { len: (extent.len - skip.min(extent.len - 1)).min(len), place }
}
