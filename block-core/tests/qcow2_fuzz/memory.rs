//! How much memory a thread has, counted where it is taken: an allocator around the system's.
#![expect(unsafe_code, reason = "an allocator is a promise to the language")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, with counts.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// Bytes that this thread has, and the most that it had since the last [`Peak::begin`].
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize, taken: bool) {
    let bytes = isize::try_from(bytes).unwrap_or(isize::MAX);
    // A thread that ends has no counts any more.
    let _ = NOW.try_with(|now| {
        now.set(if taken { now.get().saturating_add(bytes) } else { now.get().saturating_sub(bytes) });
        MOST.try_with(|most| most.set(most.get().max(now.get())))
    });
}

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), true);
        // SAFETY: what the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(layout.size(), false);
        // SAFETY: what the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), true);
        // SAFETY: what the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, true);
        count(layout.size(), false);
        // SAFETY: what the caller promises.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

/// What this thread needs from here on.
pub(crate) struct Peak {
    before: isize,
}

impl Peak {
    pub(crate) fn begin() -> Self {
        let before = NOW.get();
        MOST.set(before);
        Self { before }
    }

    /// The most that it had at a time.
    pub(crate) fn bytes(&self) -> usize {
        usize::try_from(MOST.get() - self.before).unwrap_or(0)
    }
}
