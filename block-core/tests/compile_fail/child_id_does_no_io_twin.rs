//! The twin of `child_id_does_no_io.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::ByteRange;
use block_core::graph::{ChildId, IoCx};
use block_core::rt::IoBuf;

async fn read(file: ChildId, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) {
    let _ = cx.child(file).read(at, buf).await;
    let _ = (file, cx);
}

fn main() {}
