//! unused_must_use: What an edit removed is closed, not forgotten.
#![deny(unused_must_use)]
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::Result;
use block_core::graph::{NodeId, Permit};

async fn change(permit: &mut Permit, node: NodeId) -> Result<()> {
    let drained = permit.drain(&[node]).await?;
    drained.write(|edit, _| edit.remove(node))?;
    Ok(())
}

fn main() {}
