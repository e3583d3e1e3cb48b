//! The directory of a qcow2 image's bitmaps.
#![no_main]

use block_core::drivers::format::qcow2::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::bitmaps(bytes));
