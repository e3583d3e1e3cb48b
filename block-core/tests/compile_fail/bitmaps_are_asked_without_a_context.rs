//! E0050: What an image is asked when its node is added is asked without a context: it has been read already.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::{ByteRange, Error, IoError};
use block_core::graph::{
    Driver, DriverInfo, Extent, Geometry, IoCx, Limits, NodeBitmap, Place, Preallocation, ReopenRequest, WriteFlags,
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
    fn bitmaps(&self, _: IoCx<'_>) -> Vec<NodeBitmap> { Vec::new() }
    fn is_unclean(&self, _: IoCx<'_>) -> bool { false }
    async fn info(&self, _: &u32) -> DriverInfo { DriverInfo::default() }
}

fn main() {}
