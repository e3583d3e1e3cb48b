//! `compress`: every write is stored compressed, by a format below that can.
//!
//! Only whole clusters can be, so writes come in whole clusters: the pipeline reads what they do not cover. Only the
//! last one may be cut off by the end of the node.

use qmp::Qapi;

use crate::base::{ByteRange, Error, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{ChildId, DriverInfo, Geometry, IoCx, Limits, ReopenRequest, WriteFlags};
use crate::pipeline::{Filter, Filtered};
use crate::rt::IoBuf;

/// Every write is stored compressed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsCompress")]
pub struct CompressOptions {}

impl Open for CompressOptions {
    type Driver = Filtered<Compress>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let driver = Filtered(Compress { file: site.child("file") });
        Ok(Opened { driver, conf: (), options: site.common })
    }
}

/// The filter.
pub struct Compress {
    file: ChildId,
}

impl Compress {
    /// What of whole clusters the node below has.
    fn inside(&self, cx: IoCx<'_>, at: ByteRange) -> Result<ByteRange, IoError> {
        ByteRange::whole(cx.child(self.file).size()).intersection(at).ok_or(IoError::OutOfRange)
    }
}

impl Filter for Compress {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    fn geometry(&self, _: &(), child: Geometry, _: &[Geometry]) -> Result<Geometry> {
        let cluster = child.limits.compressed_cluster;
        if cluster == 0 {
            return Err(Error::new("Compression is not supported for underlying format"));
        }
        let max_transfer = child.limits.max_transfer / u64::from(cluster) * u64::from(cluster);
        let limits = Limits { request_alignment: cluster, max_transfer, ..child.limits };
        Ok(Geometry { limits, ..child })
    }

    fn is_transparent(&self, _: &(), write: bool) -> bool {
        !write
    }

    async fn read(&self, _: &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let inside = self.inside(cx, at)?;
        buf.slice(inside.len(), at.len() - inside.len()).fill(0);
        cx.child(self.file).read(inside, buf.slice(0, inside.len())).await
    }

    async fn write(&self, _: &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        let inside = self.inside(cx, at)?;
        let flags = WriteFlags { compressed: true, ..flags };
        cx.child(self.file).write(inside, buf.slice(0, inside.len()), flags).await
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<()> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "compress", ..DriverInfo::default() }
    }
}
