//! `copy-on-read`: what a read finds in a layer below is written into the upper layer on the way, so that it is found
//! there the next time.
//!
//! Between the read and the write-back nobody may write to the clusters, or the copy would undo his write. The node
//! below keeps nobody apart, so that is done here; and who does not come through here may not write at all.

use qmp::Qapi;

use crate::base::{ByteRange, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::tracked::{Ticket, Tracked};
use crate::graph::{Child, ChildId, DirectRequest, DriverInfo, IoCx, PermSet, Perms, ReopenRequest, Role, WriteFlags};
use crate::pipeline::{Filter, Filtered};
use crate::rt::IoBuf;

/// What is read from below the upper layer is copied into it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsCor")]
pub struct CopyOnReadOptions {}

impl Open for CopyOnReadOptions {
    type Driver = Filtered<CopyOnRead>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let (file, bottom) = (site.child("file"), site.optional("bottom"));
        let driver = CopyOnRead { file, bottom, changes: Tracked::default() };
        Ok(Opened { driver: Filtered(driver), conf: (), options: site.common })
    }
}

/// The filter.
pub struct CopyOnRead {
    file: ChildId,
    /// What lies below this layer is not copied.
    bottom: Option<ChildId>,
    /// Copies, and what must not come between.
    changes: Tracked,
}

impl CopyOnRead {
    /// There may be something to copy. Where not, this node does nothing, and touches nothing that threads share. What is
    /// inactive writes nothing: another process may be the writer.
    #[inline]
    fn copies(&self, cx: IoCx<'_>) -> bool {
        cx.child(self.file).geometry().limits.backed && cx.options().active
    }

    /// Whether the first bytes of the range are to be copied, and for how many bytes that holds.
    async fn is_missing(&self, cx: IoCx<'_>, at: ByteRange) -> Result<(bool, u64), IoError> {
        let file = cx.child(self.file);
        let (own, len) = file.allocated(at).await?;
        match self.bottom {
            Some(bottom) if !own => file.allocated_down_to(cx.child(bottom), at.split(len).0).await,
            _ => Ok((!own, len)),
        }
    }

    /// Reads the first bytes of the range; gives how many.
    async fn read_some(&self, cx: IoCx<'_>, at: ByteRange, buf: &IoBuf) -> Result<u64, IoError> {
        let (missing, len) = self.is_missing(cx, at).await?;
        let at = at.split(if missing { len.min(MAX_COPIED) } else { len }).0;
        let buf = buf.slice(0, at.len());
        if missing {
            self.read_and_copy(cx, at, buf).await?;
        } else {
            cx.child(self.file).read(at, buf).await?;
        }
        Ok(at.len())
    }

    async fn read_and_copy(&self, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let file = cx.child(self.file);
        let clusters = clusters_around(file, at)?;
        let _alone = self.alone(cx, clusters, true).await;
        let len = usize::try_from(clusters.len()).map_err(|_| IoError::NoMemory)?;
        let copy = IoBuf::alloc(len, file.geometry().limits.memory_alignment as usize)?;
        file.read(clusters, copy.clone()).await?;
        self.write_back(cx, clusters, &copy).await?;
        buf.copy_from(&copy.slice(at.start() - clusters.start(), at.len()));
        Ok(())
    }

    /// Writes what is still missing: somebody may have copied or written a part before it was our turn.
    async fn write_back(&self, cx: IoCx<'_>, at: ByteRange, copy: &IoBuf) -> Result<(), IoError> {
        let file = cx.child(self.file);
        let mut left = Some(at);
        while let Some(now) = left {
            let (missing, len) = self.is_missing(cx, now).await?;
            let (piece, rest) = now.split(len);
            let part = copy.slice(piece.start() - at.start(), piece.len());
            match (missing, part.is_zero()) {
                (false, _) => {}
                (true, true) => file.write_zeroes(piece, UNCHANGED).await?,
                (true, false) => file.write(piece, part, UNCHANGED).await?,
            }
            left = rest;
        }
        Ok(())
    }

    /// Waits for those in the way. Copies exclude everything, changes only copies.
    async fn alone(&self, cx: IoCx<'_>, at: ByteRange, copies: bool) -> Ticket<'_> {
        cx.alone(&self.changes, at, copies).await
    }

    /// The same for a change, where there are copies at all.
    async fn between_copies(&self, cx: IoCx<'_>, at: ByteRange) -> Option<Ticket<'_>> {
        if self.copies(cx) { Some(self.alone(cx, at, false).await) } else { None }
    }
}

/// Whole clusters, where the layer says how large they are: it would have to fill them up by itself.
fn clusters_around(file: Child<'_>, at: ByteRange) -> Result<ByteRange, IoError> {
    let cluster = u64::from(file.geometry().limits.compressed_cluster.max(1));
    let wide = at.widened(cluster).and_then(|wide| wide.intersection(ByteRange::whole(file.size())));
    wide.ok_or(IoError::OutOfRange)
}

impl Filter for CopyOnRead {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    #[inline]
    fn passes(&self, _: &(), cx: IoCx<'_>, _: DirectRequest) -> bool {
        !self.copies(cx)
    }

    async fn read(&self, _: &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        if !self.copies(cx) {
            return cx.child(self.file).read(at, buf).await;
        }
        let mut left = Some(at);
        while let Some(now) = left {
            let part = buf.slice(now.start() - at.start(), now.len());
            left = now.split(self.read_some(cx, now, &part).await?).1;
        }
        Ok(())
    }

    async fn write(&self, _: &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        let _apart = self.between_copies(cx, at).await;
        cx.child(self.file).write(at, buf, flags).await
    }

    async fn write_zeroes(&self, _: &(), cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        let _apart = self.between_copies(cx, at).await;
        cx.child(self.file).write_zeroes(at, flags).await
    }

    async fn discard(&self, _: &(), cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let _apart = self.between_copies(cx, at).await;
        cx.child(self.file).discard(at).await
    }

    /// Copies are written whoever reads, and whether or not anybody may write. Others may not: they would not wait.
    fn child_perms(&self, _: &(), child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        if child != self.file {
            return role.child_perms(above, writable);
        }
        let uses = above.uses | PermSet::WRITE_UNCHANGED;
        // Where nobody reads or writes nothing is copied: it can be put above a node that is being written.
        let is_used = !(above.uses & (PermSet::CONSISTENT_READ | PermSet::WRITE)).is_empty();
        let refused = if is_used { PermSet::WRITE } else { PermSet::NONE };
        Perms { uses, shares: above.shares.without(refused) | PermSet::WRITE_UNCHANGED }
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<()> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "copy-on-read", ..DriverInfo::default() }
    }
}

const UNCHANGED: WriteFlags =
    WriteFlags { unchanged: true, fua: false, may_unmap: false, no_fallback: false, compressed: false };

/// At most this much is copied at once, in bytes, and what its clusters have besides.
const MAX_COPIED: u64 = 1 << 20;
