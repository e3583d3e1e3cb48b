//! Locks and atomics of the files that are model-checked (`graph/gate.rs`, `graph/uses.rs`, `graph/tracked.rs`,
//! `graph/haste.rs`, `graph/grace.rs`, `rt/wake.rs`, the throttle filter's `turnstile.rs`), and of `graph/stats.rs`: std's, or under `cfg(loom)` and
//! `cfg(shuttle)` those of the checker, or under `cfg(counted)` such as say what they write.

#[cfg(counted)]
pub(crate) use super::counted::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Mutex};
#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};
#[cfg(not(any(counted, loom, shuttle)))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence},
};
#[cfg(counted)]
pub(crate) use std::sync::{
    MutexGuard,
    atomic::{Ordering, fence},
};
