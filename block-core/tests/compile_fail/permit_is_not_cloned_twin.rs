//! The twin of `permit_is_not_cloned.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::Permit;

fn copy(permit: Permit) -> Permit {
    permit
}

fn main() {}
