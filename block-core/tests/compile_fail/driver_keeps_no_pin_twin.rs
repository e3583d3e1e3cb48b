//! The twin of `driver_keeps_no_pin.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::Result;
use block_core::graph::{ChildId, DriverInfo, Forked, ReopenRequest};
use block_core::pipeline::Filter;

struct Keeps { file: ChildId, _kept: u64 }

impl Filter for Keeps {
    type Conf = ();
    fn child(&self) -> ChildId { self.file }
    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<()> { Ok(()) }
    fn info(&self, _: &()) -> DriverInfo { DriverInfo::default() }
}

fn _names(_: Forked) {}

fn main() {}
