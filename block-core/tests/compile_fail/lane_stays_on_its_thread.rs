//! E0277: A root's lane stays on its thread.
#![allow(dead_code, unused_imports, clippy::all)]

use std::rc::Rc;

use block_core::graph::{Lane, Root};

fn send(lane: Rc<Lane>, root: Root) {
    std::thread::scope(|scope| { scope.spawn(move || drop(lane)); });
}

fn main() {}
