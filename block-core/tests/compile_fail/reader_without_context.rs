//! E0061: A reader callback cannot be called without a context.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::ByteRange;
use block_core::graph::{Driver, IoCx};
use block_core::rt::IoBuf;

async fn read<D: Driver>(driver: &D, conf: &D::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) {
    let _ = driver.read(conf, at, buf).await;
    let _ = cx;
}

fn main() {}
