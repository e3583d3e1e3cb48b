//! The first cluster of a qcow2 image: header, extensions, the backing file's name.
#![no_main]

use block_core::drivers::format::qcow2::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::header(bytes));
