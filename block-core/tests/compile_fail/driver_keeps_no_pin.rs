//! E0277: A driver keeps no pin, and no way in, between requests.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::Result;
use block_core::graph::{ChildId, DriverInfo, Forked, ReopenRequest};
use block_core::pipeline::Filter;

struct Keeps { file: ChildId, _kept: Forked }

impl Filter for Keeps {
    type Conf = ();
    fn child(&self) -> ChildId { self.file }
    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<()> { Ok(()) }
    fn info(&self, _: &()) -> DriverInfo { DriverInfo::default() }
}

fn _names(_: Forked) {}

fn main() {}
