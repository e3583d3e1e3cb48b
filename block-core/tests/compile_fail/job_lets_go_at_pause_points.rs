//! E0499: A job holds nothing of the graph at a pause point.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, JobCx};

async fn work(job: &mut JobCx, file: ChildId) {
    let entered = job.enter().await;
    let child = entered.cx().child(file);
    job.pause_point().await;
    child.size();
}

fn main() {}
