//! The command line, one argument a line, and what stands in its options: keys with dots, or JSON.
#![no_main]

use std::ffi::OsString;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let arguments = std::iter::once("trellisd").chain(text.lines()).map(OsString::from);
    let _ = daemon::cli::parse(arguments);
    for line in text.lines() {
        for implied in [None, Some("driver")] {
            if let Ok(parsed) = qmp::keyval::parse_option(line, implied) {
                let _ = parsed.word("driver");
                let _ = parsed.into_typed::<block_core::catalog::BlockdevOptions>();
            }
        }
    }
});
