//! E0050: What queries ask is asked without a context: no request has to end for an answer.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::{ByteRange, Error, IoError};
use block_core::graph::{
    ChildId, Driver, DriverInfo, Extent, Geometry, IoCx, Limits, NodeOptions, Perms, Place, Preallocation,
    ReopenRequest, Role, SnapshotInfo, WriteFlags,
};
use block_core::rt::IoBuf;

struct Mine;

impl Driver for Mine {
    type Conf = u32;
    fn geometry(&self, _: &u32, _: &[Geometry]) -> Result<Geometry, Error> {
        Ok(Geometry { size: 0, limits: Limits::ANY })
    }
    async fn read(&self, _: &u32, _: IoCx<'_>, _: ByteRange, _: IoBuf) -> Result<(), IoError> { Ok(()) }
    async fn write(&self, _: &u32, _: IoCx<'_>, _: ByteRange, _: IoBuf, _: WriteFlags) -> Result<(), IoError> { Ok(()) }
    async fn write_zeroes(&self, _: &u32, _: IoCx<'_>, _: ByteRange, _: WriteFlags) -> Result<(), IoError> { Ok(()) }
    async fn discard(&self, _: &u32, _: IoCx<'_>, _: ByteRange) -> Result<(), IoError> { Ok(()) }
    async fn flush(&self, _: &u32, _: IoCx<'_>) -> Result<(), IoError> { Ok(()) }
    async fn map(&self, _: &u32, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Here })
    }
    async fn truncate(&self, _: &u32, _: IoCx<'_>, _: u64, _: Preallocation) -> Result<u32, Error> { Ok(0) }
    async fn reopen(&self, _: &u32, _: ReopenRequest<'_>) -> Result<u32, Error> { Ok(0) }
    fn snapshots(&self, _: &u32, _: IoCx<'_>) -> Option<Vec<SnapshotInfo>> { None }
    async fn info(&self, _: &u32, _: IoCx<'_>) -> DriverInfo { DriverInfo::default() }
}

fn main() {}
