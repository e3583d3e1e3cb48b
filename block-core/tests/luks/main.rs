//! Encrypted disks beside those who know them best: cryptsetup and QEMU open what we made, and we open what they made.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

mod amending;
#[path = "../support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod creating;
mod hostile;
mod in_qcow2;
mod in_qcow2_keys;
mod in_qcow2_room;
mod peer;
#[path = "../support/random.rs"]
mod random;
mod reading;
mod refusing;
