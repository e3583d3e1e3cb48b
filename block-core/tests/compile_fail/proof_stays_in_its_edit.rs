//! E0521: The proof does not leave its edit.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let mut kept = None;
    let drained = permit.drain(&[node]).await.unwrap();
    let committed = drained.write(|_, set| { kept = Some(set.owner(node)?); Ok(()) }).unwrap();
    committed.close(permit).await;
    let _ = kept.is_some();
}

fn main() {}
