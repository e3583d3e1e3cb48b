//! E0499: Removed nodes are not closed while a drain of the command lasts.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{Committed, NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId, gone: Committed<()>) {
    let drained = permit.drain(&[node]).await;
    gone.close(permit).await;
    drop(drained);
}

fn main() {}
