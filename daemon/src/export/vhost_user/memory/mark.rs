//! How a dirty bit is set: after the data.
//!
//! Model-checked: `block-core/tests/dirty_log_loom.rs`, which has loom's atomics above this module.

use super::atomic::{AtomicU8, Ordering};

/// Whoever takes the bits away, and copies their pages then, sees what was written before.
#[inline]
pub(super) fn set(byte: &AtomicU8, bits: u8) {
    byte.fetch_or(bits, Ordering::Release);
}
