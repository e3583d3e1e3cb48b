//! Entries of L1 and L2 tables, in all layouts: what is parsed is written as it was.
#![no_main]

use block_core::drivers::format::qcow2::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::entries(bytes));
