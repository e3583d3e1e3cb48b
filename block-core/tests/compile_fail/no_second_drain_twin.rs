//! The twin of `no_second_drain.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let first = permit.drain(&[node]).await;
    drop(first);
    let second = permit.drain(&[node]).await;
    drop(second);
}

fn main() {}
