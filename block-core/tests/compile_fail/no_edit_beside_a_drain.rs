//! E0499: A command that drains does not edit beside its drain.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let drained = permit.drain(&[node]).await;
    let _ = permit.apply(|_| Ok(())).await;
    drop(drained);
}

fn main() {}
