//! The twin of `no_edit_while_exclusive.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::Result;
use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) -> Result<()> {
    let mut drained = permit.drain(&[node]).await?;
    let mut exclusive = drained.exclusive(node)?;
    exclusive.with(async |child| child.size()).await;
    let committed = drained.write(|_, _| Ok(()))?;
    committed.close(permit).await;
    Ok(())
}

fn main() {}
