//! The program `trellis-img`.

use std::process::ExitCode;

fn main() -> ExitCode {
    trellis_img::run(std::env::args_os())
}
