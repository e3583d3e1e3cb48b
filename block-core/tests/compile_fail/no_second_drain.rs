//! E0499: A command does not drain inside its drain.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let first = permit.drain(&[node]).await;
    let second = permit.drain(&[node]).await;
    drop((first, second));
}

fn main() {}
