//! The twin of `edit_does_no_io.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, Permit};

async fn change(permit: &mut Permit, file: ChildId) {
    let _ = permit.apply(|edit| Ok(edit.find("disk"))).await;
    let _ = file;
}

fn main() {}
