//! The twin of `proof_is_not_forged.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{DrainedSet, NodeId, Owner};

fn forge<'d>(id: NodeId, set: DrainedSet<'d>) -> Owner<'d> {
    set.owner(id).unwrap()
}

fn main() {}
