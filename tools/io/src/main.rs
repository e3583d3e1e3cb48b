//! The program `trellis-io`; everything else is in the library.

fn main() -> std::process::ExitCode {
    trellis_io::run(std::env::args_os())
}
