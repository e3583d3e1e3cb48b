//! The twin of `drain_is_spent_once.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let drained = permit.drain(&[node]).await.unwrap();
    let first = drained.write(|_, _| Ok(()));
    drop(first);
}

fn main() {}
