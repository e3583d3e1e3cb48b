//! E0593: An edit without a drain has no proof to ask for.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let _ = permit.apply(|_, set| set.owner(node).map(|_| ())).await;
    let _ = node;
}

fn main() {}
