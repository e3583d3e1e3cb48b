//! Image formats say where guest data is; [`Mapped`] moves it.

use std::convert::Infallible;
use std::future::Future;

use super::sealed::Seal;
use crate::base::{ByteRange, Error, IoError};
use crate::graph::{
    AmendRequest, Amending, BackingName, CheckReport, Child, ChildChange, ChildId, DebugEvent, Direct, DirectPlan,
    DirectRequest, Driver, DriverInfo, End, Extent, Findings, Geometry, Here, IoCx, NodeBitmap, NodeOptions, Perms,
    Place, Preallocation, ReopenRequest, Repair, Role, Settled, SnapshotChange, SnapshotInfo, WriteFlags,
};
use crate::rt::IoBuf;

/// What somebody wants to know a place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// What is there.
    Read,
    /// Where data may be written in place. [`Place::Data`] says so; any other place needs [`Format::allocate`] first.
    Write,
}

/// A driver that knows the bytes of an image and moves none of its guest's.
pub trait Format: Send + Sync + 'static {
    /// What requests only read.
    type Conf: Send + Sync + 'static;
    /// Room for guest data that is not linked in yet.
    type Ticket<'t>: Ticket
    where
        Self: 't;
    /// Data may get another place while requests run. Then a request that did not go well is looked up again.
    const MOVES: bool = false;

    /// Size and limits, from the configuration and the children (in edge order).
    fn geometry(&self, conf: &Self::Conf, children: &[Geometry]) -> Result<Geometry, Error>;

    /// Where the first bytes of the range live, if that can be said from memory. It may not block nor allocate.
    fn map_now(&self, conf: &Self::Conf, at: ByteRange, access: Access) -> Option<Extent>;

    /// Where the first bytes of the range live.
    fn map(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        access: Access,
    ) -> impl Future<Output = Result<Extent, IoError>>;

    /// In bytes: the last such unit of a child need not be there in full. What is missing of it reads as zeroes, and is
    /// there when it is written. Data behind it is none. `None`: a child may be as short as it likes.
    fn unit(&self) -> Option<u64> {
        None
    }

    /// What stands between guest data and their places, if they are encrypted. Then requests are whole sectors.
    fn seal(&self) -> Option<&Seal> {
        None
    }

    /// Fills `buf` from a range that [`Format::map`] gave as [`Place::Encoded`]. `false`: it is not that any more.
    fn read_encoded(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
        _buf: IoBuf,
    ) -> impl Future<Output = Result<bool, IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// What a guest may not write is refused here, before any of it is.
    fn check_write(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
        _buf: &IoBuf,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// Room for the first bytes of a range that [`Format::map`] gave no place to write at. A ticket that is dropped
    /// leaks its room until nothing can still write there; it is never handed out before.
    fn allocate<'t>(
        &'t self,
        conf: &'t Self::Conf,
        cx: IoCx<'t>,
        at: ByteRange,
    ) -> impl Future<Output = Result<Self::Ticket<'t>, IoError>>;

    /// Stores the range compressed. Only asked of a format whose limits say that it can.
    fn write_compressed(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
        _buf: IoBuf,
        _flags: WriteFlags,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// Makes whole clusters of the range read as zeroes without writing them.
    fn write_zeroes(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<(), IoError>>;

    /// The range is no longer needed.
    fn discard(&self, conf: &Self::Conf, cx: IoCx<'_>, at: ByteRange) -> impl Future<Output = Result<(), IoError>>;

    /// Writes the format's own caches down, announces [`DebugEvent::FlushToDisk`] to the file, and flushes the children
    /// that it wrote to.
    fn flush(&self, conf: &Self::Conf, cx: IoCx<'_>) -> impl Future<Output = Result<(), IoError>>;

    /// See [`Driver::truncate`].
    fn truncate(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        size: u64,
        preallocation: Preallocation,
    ) -> impl Future<Output = Result<Self::Conf, Error>>;

    /// See [`Driver::check`].
    fn check(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _repair: Repair,
        _findings: &mut Findings,
    ) -> impl Future<Output = Result<CheckReport, Error>> {
        std::future::ready(Err(Error::new("This image format does not support checks")))
    }

    /// See [`Driver::is_unclean`].
    fn is_unclean(&self) -> bool {
        false
    }

    /// See [`Driver::bitmaps`].
    fn bitmaps(&self) -> Vec<NodeBitmap> {
        Vec::new()
    }

    /// See [`Driver::keep_bitmaps`].
    fn keep_bitmaps(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _bitmaps: &[NodeBitmap],
    ) -> impl Future<Output = Result<bool, Error>> {
        std::future::ready(Ok(false))
    }

    /// See [`Driver::store_bitmaps`].
    fn store_bitmaps(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _bitmaps: &[NodeBitmap],
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// See [`Driver::end`]; [`End::Of`] passes [`Driver::set_end`] on as well.
    fn end(&self, _conf: &Self::Conf) -> End {
        End::Fixed
    }

    /// See [`Driver::finish`].
    fn finish(&self, _conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// See [`Driver::snapshots`].
    fn snapshots(&self, _conf: &Self::Conf) -> Option<Vec<SnapshotInfo>> {
        None
    }

    /// See [`Driver::change_snapshots`]. Only asked of a format that has [`Format::snapshots`].
    fn change_snapshots(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _change: &SnapshotChange,
    ) -> impl Future<Output = Result<(SnapshotInfo, Option<Self::Conf>), Error>> {
        std::future::ready(Err(Error::new("The format has no internal snapshots")))
    }

    /// See [`Driver::change_backing_file`].
    fn change_backing_file(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _backing: Option<BackingName<'_>>,
    ) -> impl Future<Output = Result<(), Error>> {
        std::future::ready(Err(Error::new("The format names no backing file")))
    }

    /// See [`Driver::amend`].
    fn amend(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _request: AmendRequest<'_>,
    ) -> impl Future<Output = Result<Amending, Error>> {
        std::future::ready(Err(Error::new("The format has nothing that can be amended")))
    }

    /// See [`Driver::make_empty`].
    fn make_empty(&self, _conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Result<(), Error>> {
        std::future::ready(Err(Error::new("The format has no layers")))
    }

    /// See [`Driver::passes_size`].
    fn passes_size(&self, _conf: &Self::Conf, _size: u64) -> Result<Option<(ChildId, u64)>, Error> {
        Ok(None)
    }

    /// See [`Driver::with_children`].
    fn with_children(&self, _conf: &Self::Conf, _change: ChildChange<'_>) -> Result<Option<Self::Conf>, Error> {
        Ok(None)
    }

    /// See [`Driver::child_perms`].
    fn child_perms(&self, _conf: &Self::Conf, _child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        role.child_perms(above, writable)
    }

    /// See [`Driver::reopen`].
    fn reopen(&self, conf: &Self::Conf, request: ReopenRequest<'_>) -> impl Future<Output = Result<Self::Conf, Error>>;

    /// See [`Driver::set_active`].
    fn set_active(
        &self,
        _conf: &Self::Conf,
        _common: NodeOptions,
        _perms: Perms,
    ) -> impl Future<Output = Result<Option<Self::Conf>, Error>> {
        std::future::ready(Ok(None))
    }

    /// See [`Driver::info`].
    fn info(&self, conf: &Self::Conf) -> impl Future<Output = DriverInfo>;
}

/// Room that has been set aside for a write.
pub trait Ticket {
    /// Where the data goes; at most the range that was asked for.
    fn extent(&self) -> Extent;

    /// The data is there: links it in, so that reads find it.
    fn commit(self) -> impl Future<Output = Result<(), IoError>>;
}

/// The ticket of a format that never allocates.
pub type NoTicket = Infallible;

impl Ticket for Infallible {
    fn extent(&self) -> Extent {
        match *self {}
    }

    async fn commit(self) -> Result<(), IoError> {
        match self {}
    }
}

/// The image's file is a format's first child: it is told what the format does.
const FILE: ChildId = ChildId::FIRST;

/// Makes a [`Driver`] of a [`Format`].
pub struct Mapped<F>(pub F);

/// Who works on a format whose data moves knows places that may be somebody else's soon.
#[inline]
fn here<F: Format>(cx: IoCx<'_>) -> Option<Here<'_>> {
    F::MOVES.then(|| cx.here())
}

/// Fills `buf` with what a guest of the format sees.
pub async fn read_mapped<F: Format>(
    format: &F,
    conf: &F::Conf,
    cx: IoCx<'_>,
    at: ByteRange,
    buf: IoBuf,
) -> Result<(), IoError> {
    let mut left = Some(at);
    while let Some(now) = left {
        let extent = format.map(conf, cx, now, Access::Read).await?;
        let (piece, rest) = now.split(extent.len);
        let part = buf.slice(piece.start() - at.start(), piece.len());
        if read_extent(format, conf, cx, extent, piece, part).await? {
            left = rest;
        }
    }
    Ok(())
}

/// `false`: the bytes have moved since they were looked up.
async fn read_extent<F: Format>(
    format: &F,
    conf: &F::Conf,
    cx: IoCx<'_>,
    extent: Extent,
    at: ByteRange,
    buf: IoBuf,
) -> Result<bool, IoError> {
    match extent.place {
        Place::Data { child, offset } => {
            cx.child(FILE).announce(DebugEvent::ReadAio).await;
            let (child, place) = (cx.child(child), range(offset, at.len())?);
            if let Some(seal) = format.seal() {
                Box::pin(read_sealed(child, seal, at, place, format.unit(), buf)).await?;
            } else if place.end() <= child.size() {
                child.read(place, buf).await?;
            } else {
                within_unit(child, place, format.unit())?;
                Box::pin(read_or_zeroes(child, place, buf)).await?;
            }
        }
        Place::Zero { .. } => buf.fill_in_steps(0).await,
        Place::Below(child) => {
            cx.child(FILE).announce(DebugEvent::ReadBackingAio).await;
            read_or_zeroes(cx.child(child), at, buf).await?;
        }
        Place::Passed(child) => cx.child(child).read(at, buf).await?,
        Place::Encoded => return format.read_encoded(conf, cx, at, buf).await,
        Place::Here => return Err(IoError::Unsupported),
    }
    Ok(true)
}

/// Writes `buf` as a guest of the format: in place where the image has the data already, else into fresh room.
pub async fn write_mapped<F: Format>(
    format: &F,
    conf: &F::Conf,
    cx: IoCx<'_>,
    at: ByteRange,
    buf: &IoBuf,
    flags: WriteFlags,
) -> Result<(), IoError> {
    let mut left = Some(at);
    while let Some(now) = left {
        let part = buf.slice(now.start() - at.start(), now.len());
        let done = write_some(format, conf, cx, now, &part, flags).await?;
        left = now.split(done).1;
    }
    Ok(())
}

async fn write_some<F: Format>(
    format: &F,
    conf: &F::Conf,
    cx: IoCx<'_>,
    at: ByteRange,
    buf: &IoBuf,
    flags: WriteFlags,
) -> Result<u64, IoError> {
    let extent = format.map(conf, cx, at, Access::Write).await?;
    if let Place::Data { child, offset } = extent.place {
        let (child, place) = (cx.child(child), range(offset, extent.len)?);
        within_unit(child, place, format.unit())?;
        cx.child(FILE).announce(DebugEvent::WriteAio).await;
        let buf = as_stored(format, at.start(), offset, buf.slice(0, extent.len))?;
        child.write(place, buf, flags).await?;
        return Ok(extent.len);
    }
    let whole = ByteRange::new(at.start(), extent.len).ok_or(IoError::OutOfRange)?;
    let ticket = format.allocate(conf, cx, whole).await?;
    let room = ticket.extent();
    let Place::Data { child, offset } = room.place else { return Err(IoError::Unsupported) };
    cx.child(FILE).announce(DebugEvent::WriteAio).await;
    let buf = as_stored(format, at.start(), offset, buf.slice(0, room.len))?;
    cx.child(child).write(range(offset, room.len)?, buf, flags).await?;
    ticket.commit().await?;
    Ok(room.len)
}

/// The guest's bytes from `guest` on, as they stand at `place`.
fn as_stored<F: Format>(format: &F, guest: u64, place: u64, buf: IoBuf) -> Result<IoBuf, IoError> {
    format.seal().map_or(Ok(buf.clone()), |seal| seal.sealed(guest, place, &buf))
}

async fn read_sealed(
    child: Child<'_>,
    seal: &Seal,
    guest: ByteRange,
    place: ByteRange,
    unit: Option<u64>,
    buf: IoBuf,
) -> Result<(), IoError> {
    let sealed = IoBuf::private(place.len())?;
    within_unit(child, place, unit)?;
    read_or_zeroes(child, place, sealed.clone()).await?;
    seal.open(guest.start(), place.start(), &sealed, &buf)
}

/// Where data is supposed to be, there has to be a part of it.
fn within_unit(child: Child<'_>, at: ByteRange, unit: Option<u64>) -> Result<(), IoError> {
    let Some(unit) = unit else { return Ok(()) };
    match child.size().checked_next_multiple_of(unit) {
        Some(end) if at.end() <= end => Ok(()),
        _ => Err(IoError::OutOfRange),
    }
}

/// A child may be shorter than what is read of it: past its end there are zeroes.
async fn read_or_zeroes(child: Child<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    let inside = ByteRange::whole(child.size()).intersection(at).map_or(0, ByteRange::len);
    if inside > 0 {
        child.read(range(at.start(), inside)?, buf.slice(0, inside)).await?;
    }
    buf.slice(inside, at.len() - inside).fill_in_steps(0).await;
    Ok(())
}

fn range(start: u64, len: u64) -> Result<ByteRange, IoError> {
    ByteRange::new(start, len).ok_or(IoError::OutOfRange)
}

impl<F: Format> Driver for Mapped<F> {
    type Conf = F::Conf;

    fn geometry(&self, conf: &F::Conf, children: &[Geometry]) -> Result<Geometry, Error> {
        self.0.geometry(conf, children)
    }

    #[inline]
    fn direct(&self, conf: &F::Conf, cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        if self.0.seal().is_some() {
            return None;
        }
        let access = if request.write { Access::Write } else { Access::Read };
        let extent = self.0.map_now(conf, request.at, access)?;
        if extent.len != request.at.len() {
            return None;
        }
        match extent.place {
            Place::Data { child, offset } => {
                let at = ByteRange::new(offset, extent.len)?;
                cx.child(child).direct(DirectRequest { at, ..request })
            }
            Place::Zero { .. } if !request.write => Some(DirectPlan::new(Direct::Zeroed)),
            _ => None,
        }
    }

    fn settle(&self, conf: &F::Conf, cx: IoCx<'_>, request: DirectRequest, result: i32) -> Settled {
        let access = if request.write { Access::Write } else { Access::Read };
        match self.0.map_now(conf, request.at, access) {
            Some(Extent { len, place: Place::Data { child, offset } }) if !F::MOVES && len == request.at.len() => {
                let at = ByteRange::new(offset, len);
                at.map_or(Settled::Again, |at| cx.child(child).settle(DirectRequest { at, ..request }, result))
            }
            _ => Settled::Again,
        }
    }

    async fn read(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let _here = here::<F>(cx);
        read_mapped(&self.0, conf, cx, at, buf).await
    }

    async fn write(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let _here = here::<F>(cx);
        if flags.compressed {
            return self.0.write_compressed(conf, cx, at, buf, flags).await;
        }
        self.0.check_write(conf, cx, at, &buf).await?;
        write_mapped(&self.0, conf, cx, at, &buf, flags).await
    }

    async fn write_zeroes(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let _here = here::<F>(cx);
        self.0.write_zeroes(conf, cx, at, flags).await
    }

    async fn discard(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let _here = here::<F>(cx);
        self.0.discard(conf, cx, at).await
    }

    async fn flush(&self, conf: &F::Conf, cx: IoCx<'_>) -> Result<(), IoError> {
        let _here = here::<F>(cx);
        cx.child(FILE).announce(DebugEvent::FlushToOs).await;
        self.0.flush(conf, cx).await
    }

    async fn map(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        let _here = here::<F>(cx);
        let extent = self.0.map(conf, cx, at, Access::Read).await?;
        let is_sealed = matches!(extent.place, Place::Data { .. }) && self.0.seal().is_some();
        Ok(if is_sealed { Extent { place: Place::Encoded, ..extent } } else { extent })
    }

    async fn truncate(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<F::Conf, Error> {
        let _here = here::<F>(cx);
        self.0.truncate(conf, cx, size, preallocation).await
    }

    async fn check(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        repair: Repair,
        findings: &mut Findings,
    ) -> Result<CheckReport, Error> {
        self.0.check(conf, cx, repair, findings).await
    }

    fn is_unclean(&self) -> bool {
        self.0.is_unclean()
    }

    fn bitmaps(&self) -> Vec<NodeBitmap> {
        self.0.bitmaps()
    }

    async fn keep_bitmaps(&self, conf: &F::Conf, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<bool, Error> {
        self.0.keep_bitmaps(conf, cx, bitmaps).await
    }

    async fn store_bitmaps(&self, conf: &F::Conf, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<(), IoError> {
        self.0.store_bitmaps(conf, cx, bitmaps).await
    }

    fn end(&self, conf: &F::Conf) -> End {
        self.0.end(conf)
    }

    async fn set_end(&self, conf: &F::Conf, cx: IoCx<'_>, to: u64, how: Preallocation) -> Result<(), IoError> {
        match self.0.end(conf) {
            End::Of(child) => cx.child(child).set_end(to, how).await,
            End::Fixed | End::At(_) => Err(IoError::Unsupported),
        }
    }

    async fn finish(&self, conf: &F::Conf, cx: IoCx<'_>) -> Result<(), IoError> {
        let _here = here::<F>(cx);
        self.0.finish(conf, cx).await
    }

    fn snapshots(&self, conf: &F::Conf) -> Option<Vec<SnapshotInfo>> {
        self.0.snapshots(conf)
    }

    async fn change_snapshots(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        change: &SnapshotChange,
    ) -> Result<(SnapshotInfo, Option<F::Conf>), Error> {
        self.0.change_snapshots(conf, cx, change).await
    }

    async fn change_backing_file(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        backing: Option<BackingName<'_>>,
    ) -> Result<(), Error> {
        self.0.change_backing_file(conf, cx, backing).await
    }

    async fn amend(&self, conf: &F::Conf, cx: IoCx<'_>, request: AmendRequest<'_>) -> Result<Amending, Error> {
        self.0.amend(conf, cx, request).await
    }

    async fn make_empty(&self, conf: &F::Conf, cx: IoCx<'_>) -> Result<(), Error> {
        self.0.make_empty(conf, cx).await
    }

    fn passes_size(&self, conf: &F::Conf, size: u64) -> Result<Option<(ChildId, u64)>, Error> {
        self.0.passes_size(conf, size)
    }

    fn with_children(&self, conf: &F::Conf, change: ChildChange<'_>) -> Result<Option<F::Conf>, Error> {
        self.0.with_children(conf, change)
    }

    fn child_perms(&self, conf: &F::Conf, child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        self.0.child_perms(conf, child, role, above, writable)
    }

    async fn reopen(&self, conf: &F::Conf, request: ReopenRequest<'_>) -> Result<F::Conf, Error> {
        self.0.reopen(conf, request).await
    }

    async fn set_active(&self, conf: &F::Conf, common: NodeOptions, perms: Perms) -> Result<Option<F::Conf>, Error> {
        self.0.set_active(conf, common, perms).await
    }

    async fn info(&self, conf: &F::Conf) -> DriverInfo {
        self.0.info(conf).await
    }
}
