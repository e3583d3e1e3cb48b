//! What a frontend sends: framing, and the judgement of each message.
#![no_main]

use daemon::export::vhost_user::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::messages(bytes));
