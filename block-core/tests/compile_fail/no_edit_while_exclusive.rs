//! E0505: The graph does not change while the command does I/O on a drained node.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::Result;
use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) -> Result<()> {
    let mut drained = permit.drain(&[node]).await?;
    let mut exclusive = drained.exclusive(node)?;
    let committed = drained.write(|_, _| Ok(()))?;
    exclusive.with(async |child| child.size()).await;
    committed.close(permit).await;
    Ok(())
}

fn main() {}
