//! qcow2 against QEMU's programs: what they write is read, what is written they read and find in order; and images that
//! are nonsense.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "../support/amending.rs"]
mod amending;
#[path = "../support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "../support/random.rs"]
mod random;

mod amend;
mod bitmaps;
mod check;
mod churning;
mod creating;
mod data_file;
mod differential;
mod hostile;
mod peer;
mod reading;
mod snapshots;
mod writing;
