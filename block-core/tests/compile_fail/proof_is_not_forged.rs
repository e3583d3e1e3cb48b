//! E0451: The proof cannot be made.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{DrainedSet, NodeId, Owner};

fn forge<'d>(id: NodeId, set: DrainedSet<'d>) -> Owner<'d> {
    let _ = set; Owner { id, brand: std::marker::PhantomData }
}

fn main() {}
