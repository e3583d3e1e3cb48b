//! The twin of `no_closing_beside_a_drain.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{Committed, NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId, gone: Committed<()>) {
    let drained = permit.drain(&[node]).await;
    drop(drained);
    gone.close(permit).await;
}

fn main() {}
