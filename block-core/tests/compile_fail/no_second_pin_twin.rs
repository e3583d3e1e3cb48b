//! The twin of `no_second_pin.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::JobCx;

async fn work(job: &mut JobCx) {
    let first = job.enter().await;
    drop(first);
    let second = job.enter().await;
    drop(second);
}

fn main() {}
