//! E0599: A command has one permit.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::Permit;

fn copy(permit: Permit) -> Permit {
    permit.clone()
}

fn main() {}
