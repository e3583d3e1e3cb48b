//! The twin of `keep_no_child.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use std::cell::Cell;

use block_core::graph::{Child, ChildId, IoCx};

struct Sneaky { file: ChildId, kept: Cell<Option<u64>> }

impl Sneaky {
    fn stash(&self, cx: IoCx<'_>) {
        self.kept.set(Some(cx.child(self.file).size()));
    }
}

fn _uses(child: Child<'_>) -> u64 { child.size() }

fn main() {}
