//! The twin of `no_waiting_in_an_edit.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::Permit;

async fn change(permit: &mut Permit) {
    let _ = permit.apply(|_| { std::future::ready(()); Ok(()) }).await;
}

fn main() {}
