//! The twin of `job_lets_go_at_pause_points.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, JobCx};

async fn work(job: &mut JobCx, file: ChildId) {
    let entered = job.enter().await;
    let child = entered.cx().child(file);
    child.size();
}

fn main() {}
