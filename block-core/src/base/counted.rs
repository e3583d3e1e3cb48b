//! Atomics and locks that say what they write, for the proof that requests write nothing that threads share
//! (`block-core/tests/shared_lines.rs`). In no build but that one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{LockResult, MutexGuard};

thread_local! {
    static WRITTEN: RefCell<Option<BTreeMap<usize, u64>>> = const { RefCell::new(None) };
}

/// Processors fetch cache lines of 64 bytes in pairs.
const LINES: usize = 128;

/// From here on it is noted what this thread writes.
pub fn begin() {
    WRITTEN.set(Some(BTreeMap::new()));
}

/// How often this thread has written to each pair of cache lines since [`begin`].
pub fn end() -> BTreeMap<usize, u64> {
    WRITTEN.take().unwrap_or_default()
}

fn wrote<T>(place: &T) {
    let line = std::ptr::from_ref(place).addr() / LINES;
    WRITTEN.with_borrow_mut(|written| written.iter_mut().for_each(|written| *written.entry(line).or_default() += 1));
}

macro_rules! counted {
    ($($name:ident($plain:ty)),*) => { $(
        #[derive(Debug, Default)]
        pub struct $name(std::sync::atomic::$name);

        impl $name {
            pub const fn new(value: $plain) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }
            pub fn load(&self, order: Ordering) -> $plain {
                self.0.load(order)
            }
            pub fn store(&self, value: $plain, order: Ordering) {
                wrote(self);
                self.0.store(value, order);
            }
            pub fn fetch_add(&self, value: $plain, order: Ordering) -> $plain {
                wrote(self);
                self.0.fetch_add(value, order)
            }
            pub fn fetch_sub(&self, value: $plain, order: Ordering) -> $plain {
                wrote(self);
                self.0.fetch_sub(value, order)
            }
            pub fn fetch_or(&self, value: $plain, order: Ordering) -> $plain {
                wrote(self);
                self.0.fetch_or(value, order)
            }
            pub fn fetch_and(&self, value: $plain, order: Ordering) -> $plain {
                wrote(self);
                self.0.fetch_and(value, order)
            }
            pub fn compare_exchange(
                &self,
                current: $plain,
                new: $plain,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$plain, $plain> {
                wrote(self);
                self.0.compare_exchange(current, new, success, failure)
            }
        }
    )* };
}

counted!(AtomicU8(u8), AtomicU32(u32), AtomicU64(u64), AtomicUsize(usize));

#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        wrote(self);
        self.0.lock()
    }
}
