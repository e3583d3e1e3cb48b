//! The twin of `removed_nodes_are_closed.rs` that compiles.
#![deny(unused_must_use)]
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::Result;
use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) -> Result<()> {
    let drained = permit.drain(&[node]).await?;
    drained.write(|edit, _| edit.remove(node))?.close(permit).await;
    Ok(())
}

fn main() {}
