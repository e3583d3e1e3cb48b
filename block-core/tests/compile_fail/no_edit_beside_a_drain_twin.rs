//! The twin of `no_edit_beside_a_drain.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let drained = permit.drain(&[node]).await;
    drop(drained);
    let _ = permit.apply(|_| Ok(())).await;
}

fn main() {}
