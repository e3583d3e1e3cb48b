//! `snapshot-access`: the snapshot of the node below, as a disk of its own that is read, and discarded once read.
//!
//! Over a node that keeps no snapshot all its requests fail, as with QEMU.

use qmp::Qapi;

use crate::base::{ByteRange, Error, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    ChildId, Driver, DriverInfo, Extent, Geometry, IoCx, Limits, PermSet, Perms, Preallocation, ReopenRequest, Role,
    WriteFlags,
};
use crate::rt::IoBuf;

/// A view of the snapshot that the node below keeps.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsSnapshotAccess")]
pub struct SnapshotAccessOptions {}

impl Open for SnapshotAccessOptions {
    type Driver = SnapshotAccess;

    async fn open(&self, site: Site<'_>) -> Result<Opened<SnapshotAccess>> {
        Ok(Opened { driver: SnapshotAccess { file: site.child("file") }, conf: (), options: site.common })
    }
}

/// The driver: it knows only whom to ask.
pub struct SnapshotAccess {
    file: ChildId,
}

impl Driver for SnapshotAccess {
    type Conf = ();

    fn geometry(&self, (): &(), children: &[Geometry]) -> Result<Geometry> {
        let file = self.file.of(children);
        let limits = Limits { discard: true, compressed_cluster: 0, unmap_zeroes: false, ..file.limits.passed_on() };
        Ok(Geometry { size: file.size, limits })
    }

    async fn read(&self, (): &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        cx.child(self.file).read_snapshot(at, buf).await
    }

    async fn write(&self, (): &(), _: IoCx<'_>, _: ByteRange, _: IoBuf, _: WriteFlags) -> Result<(), IoError> {
        Err(IoError::Unsupported)
    }

    async fn write_zeroes(&self, (): &(), _: IoCx<'_>, _: ByteRange, _: WriteFlags) -> Result<(), IoError> {
        Err(IoError::Unsupported)
    }

    async fn discard(&self, (): &(), cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        cx.child(self.file).discard_snapshot(at).await
    }

    async fn flush(&self, (): &(), _: IoCx<'_>) -> Result<(), IoError> {
        Ok(())
    }

    async fn map(&self, (): &(), cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        cx.child(self.file).map_snapshot(at).await
    }

    async fn truncate(&self, (): &(), _: IoCx<'_>, _: u64, _: Preallocation) -> Result<()> {
        Err(Error::new("Image format driver does not support resize"))
    }

    async fn reopen(&self, (): &(), _: ReopenRequest<'_>) -> Result<()> {
        Ok(())
    }

    /// Nothing is done to the node itself; that it has a reader lets it keep others from its source.
    fn child_perms(&self, (): &(), _: ChildId, _: Role, _: Perms, _: bool) -> Perms {
        Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL }
    }

    async fn info(&self, (): &()) -> DriverInfo {
        DriverInfo { driver: "snapshot-access", ..DriverInfo::default() }
    }
}
