//! E0599: A bare `ChildId` does no I/O: only a request's context makes a child of it.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::ByteRange;
use block_core::graph::{ChildId, IoCx};
use block_core::rt::IoBuf;

async fn read(file: ChildId, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) {
    let _ = file.read(at, buf).await;
    let _ = (file, cx);
}

fn main() {}
