//! Compressed clusters: any bytes are unpacked or refused, and what is packed is unpacked.
#![no_main]

use block_core::drivers::format::qcow2::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::compressed(bytes));
