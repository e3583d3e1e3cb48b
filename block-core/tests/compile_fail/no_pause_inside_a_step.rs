//! E0501: A step has no pause point in it.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::JobCx;

async fn work(job: &mut JobCx) {
    job.step(async |_| job.pause_point().await).await;
}

fn main() {}
