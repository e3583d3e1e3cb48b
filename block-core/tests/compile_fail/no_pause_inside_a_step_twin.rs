//! The twin of `no_pause_inside_a_step.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::JobCx;

async fn work(job: &mut JobCx) {
    job.step(async |_| ()).await; job.pause_point().await;
}

fn main() {}
