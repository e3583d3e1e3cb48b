//! `trellisd`: see the library of this package.

use std::process::ExitCode;

use block_core::rt::WipingHeap;

/// What commands and their parsers had of a secret is wiped when it is freed.
#[global_allocator]
static HEAP: WipingHeap = WipingHeap;

fn main() -> ExitCode {
    daemon::main()
}
