//! E0624: Requests do not change sizes: only a command does, on a node that it has drained.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, IoCx, Preallocation};

async fn grow(cx: IoCx<'_>, file: ChildId) {
    let _ = cx.child(file).truncate(4096, Preallocation::Off).await;
}

fn main() {}
