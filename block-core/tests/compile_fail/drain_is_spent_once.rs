//! E0382: A drain is spent by its edit.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) {
    let drained = permit.drain(&[node]).await.unwrap();
    let first = drained.write(|_, _| Ok(()));
    let _ = drained.write(|_, _| Ok(()));
    drop(first);
}

fn main() {}
