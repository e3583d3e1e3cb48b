//! E0728: Nothing waits inside an edit.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::Permit;

async fn change(permit: &mut Permit) {
    let _ = permit.apply(|_| { std::future::ready(()).await; Ok(()) }).await;
}

fn main() {}
