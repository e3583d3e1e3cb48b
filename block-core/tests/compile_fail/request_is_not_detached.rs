//! E0521: A request's context does not go into a task of its own; a fork does.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::graph::{ChildId, IoCx};

fn spawn(_: impl std::future::Future + 'static) {}

fn start(cx: IoCx<'_>, file: ChildId) {
    spawn(async move { cx.child(file).size() });
}

fn main() {}
