//! E0599: An edit has no context, and so no way to do I/O.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, Permit};

async fn change(permit: &mut Permit, file: ChildId) {
    let _ = permit.apply(|edit| Ok(edit.child(file).size())).await;
    let _ = file;
}

fn main() {}
