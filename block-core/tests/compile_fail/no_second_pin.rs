//! E0499: One task holds one pin.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::JobCx;

async fn work(job: &mut JobCx) {
    let first = job.enter().await;
    let second = job.enter().await;
    drop((first, second));
}

fn main() {}
