//! The twin of `only_the_control_task_truncates.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit, Preallocation};

async fn grow(permit: &mut Permit, node: NodeId) {
    let _ = permit.resize(node, 4096, Preallocation::Off).await;
}

fn main() {}
