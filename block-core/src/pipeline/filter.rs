//! Filters say only what they add; [`Filtered`] forwards the rest.
//!
//! What a filter adds comes in two forms: `before` and `after` stand around every request, whatever it is (throttling,
//! copying what is about to be overwritten); `read`, `write`, … take the place of passing one kind of request on.

use std::future::Future;

use crate::base::{ByteRange, Error, IoError};
use crate::graph::{
    ChildId, DebugEvent, DirectPlan, DirectRequest, Driver, DriverInfo, End, Extent, Geometry, IoCx, NodeOptions,
    OpKind, Pause, Perms, Place, Preallocation, ReopenRequest, Role, Settled, WriteFlags,
};
use crate::rt::IoBuf;

/// A request as a filter sees it.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What is to be done.
    pub kind: OpKind,
    /// Where; empty for a flush.
    pub at: ByteRange,
    /// A write of zeroes or a discard moves no data.
    pub moves_data: bool,
    /// How, if it is a write.
    pub flags: WriteFlags,
}

impl Request {
    fn new(kind: OpKind, at: ByteRange) -> Self {
        Self { kind, at, moves_data: false, flags: WriteFlags::default() }
    }
}

type Done = Result<(), IoError>;

/// A driver that passes requests on to one child.
pub trait Filter: Send + Sync + 'static {
    /// What requests only read.
    type Conf: Send + Sync + 'static;

    /// The child that requests go to.
    fn child(&self) -> ChildId;

    /// Size and limits, from those of the child that requests go to; `all` are all children's, in edge order.
    fn geometry(&self, _conf: &Self::Conf, child: Geometry, _all: &[Geometry]) -> Result<Geometry, Error> {
        Ok(child)
    }

    /// True where reads, or writes, are passed on as they are, so that they may take the direct path.
    fn is_transparent(&self, _conf: &Self::Conf, _write: bool) -> bool {
        false
    }

    /// True where this request may take the direct path, past `before` and `after`. Asked once a request; it may not
    /// block nor allocate.
    fn passes(&self, conf: &Self::Conf, _cx: IoCx<'_>, request: DirectRequest) -> bool {
        self.is_transparent(conf, request.write)
    }

    /// Before the request goes down; an error ends it here.
    fn before(&self, _conf: &Self::Conf, _cx: IoCx<'_>, _request: Request) -> impl Future<Output = Done> {
        std::future::ready(Ok(()))
    }

    /// After it came back; what this gives is what the caller sees.
    fn after(&self, _conf: &Self::Conf, _cx: IoCx<'_>, _request: Request, result: Done) -> impl Future<Output = Done> {
        std::future::ready(result)
    }

    /// In place of passing a read on.
    fn read(&self, _conf: &Self::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> impl Future<Output = Done> {
        cx.child(self.child()).read(at, buf)
    }

    /// In place of passing a write on.
    fn write(
        &self,
        _conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> impl Future<Output = Done> {
        cx.child(self.child()).write(at, buf, flags)
    }

    /// In place of passing a write of zeroes on.
    fn write_zeroes(
        &self,
        _conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> impl Future<Output = Done> {
        cx.child(self.child()).write_zeroes(at, flags)
    }

    /// In place of passing a discard on.
    fn discard(&self, _conf: &Self::Conf, cx: IoCx<'_>, at: ByteRange) -> impl Future<Output = Done> {
        cx.child(self.child()).discard(at)
    }

    /// In place of passing a flush on.
    fn flush(&self, _conf: &Self::Conf, cx: IoCx<'_>) -> impl Future<Output = Done> {
        cx.child(self.child()).flush()
    }

    /// In place of leaving the answer to the child. Neither `before` nor `after` see this one.
    fn map(&self, _conf: &Self::Conf, _cx: IoCx<'_>, at: ByteRange) -> impl Future<Output = Result<Extent, IoError>> {
        std::future::ready(Ok(Extent { len: at.len(), place: Place::Passed(self.child()) }))
    }

    /// See [`Driver::read_snapshot`].
    fn read_snapshot(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
        _buf: IoBuf,
    ) -> impl Future<Output = Done> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// See [`Driver::map_snapshot`].
    fn map_snapshot(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
    ) -> impl Future<Output = Result<Extent, IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// See [`Driver::discard_snapshot`].
    fn discard_snapshot(&self, _conf: &Self::Conf, _cx: IoCx<'_>, _at: ByteRange) -> impl Future<Output = Done> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// See [`Driver::hear`]. What a format says to its file goes down to who listens.
    fn hear(&self, _conf: &Self::Conf, cx: IoCx<'_>, event: DebugEvent) -> Option<Pause> {
        if event.is_about_one_node() { None } else { cx.child(self.child()).hear(event) }
    }

    /// See [`Driver::end`]. A filter that copes with requests past the end that it was made with says [`End::Of`] its child.
    fn end(&self, _conf: &Self::Conf) -> End {
        End::Fixed
    }

    /// See [`Driver::set_end`].
    fn set_end(&self, conf: &Self::Conf, cx: IoCx<'_>, to: u64, how: Preallocation) -> impl Future<Output = Done> {
        let passes = self.end(conf) != End::Fixed;
        let child = cx.child(self.child());
        async move { if passes { child.set_end(to, how).await } else { Err(IoError::Unsupported) } }
    }

    /// See [`Driver::end_growth`].
    fn end_growth(&self, _conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Done> {
        std::future::ready(Ok(()))
    }

    /// See [`Driver::finish`].
    fn finish(&self, _conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Done> {
        std::future::ready(Ok(()))
    }

    /// See [`Driver::passes_size`].
    fn passes_size(&self, _conf: &Self::Conf, size: u64) -> Result<Option<(ChildId, u64)>, Error> {
        Ok(Some((self.child(), size)))
    }

    /// See [`Driver::truncate`]. Only asked of a filter whose size is not its child's.
    fn truncate(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _size: u64,
        _preallocation: Preallocation,
    ) -> impl Future<Output = Result<Self::Conf, Error>> {
        std::future::ready(Err(Error::new("The size of this node cannot be changed")))
    }

    /// See [`Driver::child_perms`].
    fn child_perms(&self, _conf: &Self::Conf, _child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        role.child_perms(above, writable)
    }

    /// Prepares a configuration for new options.
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

    /// The driver's name, and what else there is to say.
    fn info(&self, conf: &Self::Conf) -> DriverInfo;
}

/// Makes a [`Driver`] of a [`Filter`].
pub struct Filtered<F>(pub F);

impl<F: Filter> Filtered<F> {
    async fn around(&self, conf: &F::Conf, cx: IoCx<'_>, request: Request, work: impl Future<Output = Done>) -> Done {
        self.0.before(conf, cx, request).await?;
        let result = work.await;
        self.0.after(conf, cx, request, result).await
    }
}

impl<F: Filter> Driver for Filtered<F> {
    type Conf = F::Conf;

    fn geometry(&self, conf: &F::Conf, children: &[Geometry]) -> Result<Geometry, Error> {
        let child = self.0.child().of(children);
        self.0.geometry(conf, Geometry { limits: child.limits.passed_on(), ..*child }, children)
    }

    fn direct(&self, conf: &F::Conf, cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        if !self.0.passes(conf, cx, request) {
            return None;
        }
        cx.child(self.0.child()).direct(request)
    }

    fn settle(&self, _conf: &F::Conf, cx: IoCx<'_>, request: DirectRequest, result: i32) -> Settled {
        cx.child(self.0.child()).settle(request, result)
    }

    async fn read(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Done {
        let request = Request { moves_data: true, ..Request::new(OpKind::Read, at) };
        self.around(conf, cx, request, self.0.read(conf, cx, at, buf)).await
    }

    async fn write(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Done {
        let request = Request { moves_data: true, flags, ..Request::new(OpKind::Write, at) };
        self.around(conf, cx, request, self.0.write(conf, cx, at, buf, flags)).await
    }

    async fn write_zeroes(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Done {
        let request = Request { flags, ..Request::new(OpKind::Write, at) };
        self.around(conf, cx, request, self.0.write_zeroes(conf, cx, at, flags)).await
    }

    async fn discard(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Done {
        self.around(conf, cx, Request::new(OpKind::Unmap, at), self.0.discard(conf, cx, at)).await
    }

    async fn flush(&self, conf: &F::Conf, cx: IoCx<'_>) -> Done {
        let request = Request::new(OpKind::Flush, ByteRange::whole(0));
        self.around(conf, cx, request, self.0.flush(conf, cx)).await
    }

    async fn map(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        self.0.map(conf, cx, at).await
    }

    async fn read_snapshot(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Done {
        self.0.read_snapshot(conf, cx, at, buf).await
    }

    async fn map_snapshot(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        self.0.map_snapshot(conf, cx, at).await
    }

    async fn discard_snapshot(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Done {
        self.0.discard_snapshot(conf, cx, at).await
    }

    fn hear(&self, conf: &F::Conf, cx: IoCx<'_>, event: DebugEvent) -> Option<Pause> {
        self.0.hear(conf, cx, event)
    }

    async fn truncate(&self, conf: &F::Conf, cx: IoCx<'_>, size: u64, how: Preallocation) -> Result<F::Conf, Error> {
        self.0.truncate(conf, cx, size, how).await
    }

    fn end(&self, conf: &F::Conf) -> End {
        self.0.end(conf)
    }

    async fn set_end(&self, conf: &F::Conf, cx: IoCx<'_>, to: u64, how: Preallocation) -> Done {
        self.0.set_end(conf, cx, to, how).await
    }

    async fn end_growth(&self, conf: &F::Conf, cx: IoCx<'_>) -> Done {
        self.0.end_growth(conf, cx).await
    }

    async fn finish(&self, conf: &F::Conf, cx: IoCx<'_>) -> Done {
        self.0.finish(conf, cx).await
    }

    fn passes_size(&self, conf: &F::Conf, size: u64) -> Result<Option<(ChildId, u64)>, Error> {
        self.0.passes_size(conf, size)
    }

    fn filtered(&self) -> Option<ChildId> {
        Some(self.0.child())
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
        self.0.info(conf)
    }
}
