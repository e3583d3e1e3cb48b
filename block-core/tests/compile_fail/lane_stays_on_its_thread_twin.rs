//! The twin of `lane_stays_on_its_thread.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use std::rc::Rc;

use block_core::graph::{Lane, Root};

fn send(lane: Rc<Lane>, root: Root) {
    std::thread::scope(|scope| { scope.spawn(move || drop(root)); });
}

fn main() {}
