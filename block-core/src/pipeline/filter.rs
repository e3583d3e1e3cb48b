//! Filters say only what they add; [`Filtered`] forwards the rest.

use std::future::Future;

use crate::base::{ByteRange, Error, IoError};
use crate::graph::{
    ChildId, DirectPlan, DirectRequest, Driver, DriverInfo, Extent, Geometry, IoCx, OpKind, Place, Preallocation,
    ReopenRequest, Settled, WriteFlags,
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
}

/// A driver that passes requests on to one child.
pub trait Filter: Send + Sync + 'static {
    /// What requests only read.
    type Conf: Send + Sync + 'static;

    /// The child that requests go to.
    fn child(&self) -> ChildId;

    /// Size and limits, from the child's.
    fn geometry(&self, _conf: &Self::Conf, child: Geometry) -> Result<Geometry, Error> {
        Ok(child)
    }

    /// True where requests of this kind need neither `before` nor `after`, so that they may take the direct path.
    fn is_transparent(&self, _conf: &Self::Conf, _write: bool) -> bool {
        false
    }

    /// Before the request goes down; an error ends it here.
    fn before(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _request: Request,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// After it came back; what this gives is what the caller sees.
    fn after(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _request: Request,
        result: Result<(), IoError>,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(result)
    }

    /// Prepares a configuration for new options.
    fn reopen(&self, conf: &Self::Conf, request: ReopenRequest<'_>) -> impl Future<Output = Result<Self::Conf, Error>>;

    /// The driver's name, and what else there is to say.
    fn info(&self, conf: &Self::Conf) -> DriverInfo;
}

/// Makes a [`Driver`] of a [`Filter`].
pub struct Filtered<F>(pub F);

impl<F: Filter> Filtered<F> {
    async fn around(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        request: Request,
        work: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        self.0.before(conf, cx, request).await?;
        let result = work.await;
        self.0.after(conf, cx, request, result).await
    }
}

impl<F: Filter> Driver for Filtered<F> {
    type Conf = F::Conf;

    fn geometry(&self, conf: &F::Conf, children: &[Geometry]) -> Result<Geometry, Error> {
        let child = children.first().ok_or_else(|| Error::new("A filter needs a child"))?;
        self.0.geometry(conf, Geometry { limits: child.limits.passed_on(), ..*child })
    }

    fn direct(&self, conf: &F::Conf, cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        if !self.0.is_transparent(conf, request.write) {
            return None;
        }
        cx.child(self.0.child()).direct(request)
    }

    fn settle(&self, _conf: &F::Conf, cx: IoCx<'_>, request: DirectRequest, result: i32) -> Settled {
        cx.child(self.0.child()).settle(request, result)
    }

    async fn read(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let request = Request { kind: OpKind::Read, at, moves_data: true };
        self.around(conf, cx, request, cx.child(self.0.child()).read(at, buf)).await
    }

    async fn write(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let request = Request { kind: OpKind::Write, at, moves_data: true };
        self.around(conf, cx, request, cx.child(self.0.child()).write(at, buf, flags)).await
    }

    async fn write_zeroes(
        &self,
        conf: &F::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let request = Request { kind: OpKind::Write, at, moves_data: false };
        self.around(conf, cx, request, cx.child(self.0.child()).write_zeroes(at, flags)).await
    }

    async fn discard(&self, conf: &F::Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let request = Request { kind: OpKind::Unmap, at, moves_data: false };
        self.around(conf, cx, request, cx.child(self.0.child()).discard(at)).await
    }

    async fn flush(&self, conf: &F::Conf, cx: IoCx<'_>) -> Result<(), IoError> {
        let request = Request { kind: OpKind::Flush, at: ByteRange::whole(0), moves_data: false };
        self.around(conf, cx, request, cx.child(self.0.child()).flush()).await
    }

    async fn map(&self, _conf: &F::Conf, _cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Data { child: self.0.child(), offset: at.start() } })
    }

    async fn truncate(&self, _: &F::Conf, _: IoCx<'_>, _: u64, _: Preallocation) -> Result<F::Conf, Error> {
        Err(Error::new("A filter has no size of its own"))
    }

    fn passes_size(&self, _conf: &F::Conf, size: u64) -> Result<Option<(ChildId, u64)>, Error> {
        Ok(Some((self.0.child(), size)))
    }

    async fn reopen(&self, conf: &F::Conf, request: ReopenRequest<'_>) -> Result<F::Conf, Error> {
        self.0.reopen(conf, request).await
    }

    async fn info(&self, conf: &F::Conf) -> DriverInfo {
        self.0.info(conf)
    }
}
