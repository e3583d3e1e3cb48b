//! The twin of `edge_needs_proof.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId, file: ChildId, to: NodeId) {
    let drained = permit.drain(&[node]).await.unwrap();
    let committed = drained.write(|edit, set| { let _ = set; edit.set_edge(set.owner(node)?, file, to) }).unwrap();
    committed.close(permit).await;
}

fn main() {}
