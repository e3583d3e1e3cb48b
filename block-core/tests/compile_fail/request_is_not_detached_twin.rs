//! The twin of `request_is_not_detached.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, IoCx};

fn spawn(_: impl std::future::Future + 'static) {}

fn start(cx: IoCx<'_>, file: ChildId) {
    let forked = cx.fork(); spawn(async move { forked.cx().child(file).size() });
}

fn main() {}
