//! The twin of `no_proof_without_a_drain.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let _ = permit.apply(|edit| edit.remove(node)).await;
    let _ = node;
}

fn main() {}
