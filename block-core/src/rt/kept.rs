//! Memory for what is secret, and what is done so that secrets are nowhere else.
//!
//! - [`Kept`] and [`KeptBytes`] are pages of their own: not swapped out as far as the process may lock memory
//!   (`RLIMIT_MEMLOCK`), never in a core dump, wiped before they are given back.
//! - [`WipingHeap`] is an allocator for whole programs: what is freed is wiped, so that texts which passed through parsers
//!   are gone with their last owner. I/O threads do not pay for it: no secret as text passes there.
//! - [`burn_stack`] wipes what functions left on the stack, [`leave_no_dumps`] lets the kernel guard the whole process.
#![expect(unsafe_code, reason = "pages, and an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::base::{IoError, Result, ResultExt};

/// A value in pages of its own.
pub struct Kept<T> {
    pages: Pages,
    _value: PhantomData<T>,
}

impl<T> Kept<T> {
    /// What `make` makes; the stack that it was made on is wiped.
    pub fn new(make: impl FnOnce() -> Result<T>) -> Result<Self> {
        const { assert!(align_of::<T>() <= SMALLEST_PAGE) };
        let pages = Pages::take(size_of::<T>()).doing(|| "There is no memory for a key")?;
        fill(&pages, make)?;
        burn_stack();
        Ok(Self { pages, _value: PhantomData })
    }
}

#[inline(never)]
fn fill<T>(pages: &Pages, make: impl FnOnce() -> Result<T>) -> Result<()> {
    let value = make()?;
    // SAFETY: the pages are ours, large enough, and aligned to more than a value is (see `Kept::new`).
    unsafe { pages.start.cast::<T>().write(value) };
    Ok(())
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: `new` has put a value there, which is dropped with us.
        unsafe { self.pages.start.cast().as_ref() }
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        // SAFETY: the value is there, and nobody sees it after us.
        unsafe { self.pages.start.cast::<T>().drop_in_place() };
    }
}

// SAFETY: it is a box: whoever has it has the value, which may go to another thread.
unsafe impl<T: Send> Send for Kept<T> {}
// SAFETY: it gives shared references to the value, which threads may share.
unsafe impl<T: Sync> Sync for Kept<T> {}

impl<T> std::fmt::Debug for Kept<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept(…)")
    }
}

/// Bytes in pages of their own.
pub struct KeptBytes {
    pages: Pages,
    len: usize,
}

impl KeptBytes {
    /// A copy of these.
    pub fn copied(bytes: &[u8]) -> Result<Self, IoError> {
        let (pages, len) = (Pages::take(bytes.len())?, bytes.len());
        // SAFETY: the pages are ours, new, and have room for as many.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), pages.start.as_ptr(), len) };
        Ok(Self { pages, len })
    }
}

impl DerefMut for KeptBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the pages are ours alone and were filled with zeroes, then with the bytes.
        unsafe { std::slice::from_raw_parts_mut(self.pages.start.as_ptr(), self.len) }
    }
}

impl Deref for KeptBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as in `deref_mut`; shared as we are.
        unsafe { std::slice::from_raw_parts(self.pages.start.as_ptr(), self.len) }
    }
}

// SAFETY: the pages are owned as a vector owns its memory.
unsafe impl Send for KeptBytes {}
// SAFETY: as above.
unsafe impl Sync for KeptBytes {}

/// Whole pages.
struct Pages {
    start: NonNull<u8>,
    len: usize,
}

impl Pages {
    fn take(len: usize) -> Result<Self, IoError> {
        let len = len.max(1).next_multiple_of(rustix::param::page_size());
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: new pages, at a place that the kernel chooses.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, access, flags) };
        let start = start.ok().and_then(|start| NonNull::new(start.cast::<u8>())).ok_or(IoError::NoMemory)?;
        let pages = Self { start, len };
        // What cannot be had is done without: limits are the operator's.
        // SAFETY: the pages are ours.
        let _ = unsafe { mlock(start.as_ptr().cast(), len) };
        // SAFETY: as above; it changes no contents.
        let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxDontDump) };
        Ok(pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the pages are ours, and nobody looks at them any more.
        unsafe { wipe(self.start.as_ptr(), self.len) };
        // SAFETY: as above. They are unlocked with that.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// An allocator that wipes what is freed, up to 1 MiB each. A program that handles secrets declares it.
#[derive(Debug)]
pub struct WipingHeap;

// SAFETY: memory comes from the system's allocator and goes back to it, as `System` demands it.
unsafe impl GlobalAlloc for WipingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps to our contract, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if is_wiped(layout.size()) {
            // SAFETY: the memory has as many bytes, and nobody uses it any more.
            unsafe { wipe(start, layout.size()) };
        }
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !is_wiped(layout.size()) {
            // SAFETY: as above.
            return unsafe { System.realloc(start, layout, size) };
        }
        // Moved by ourselves, so that nothing stays where it was.
        // SAFETY: the caller has seen to it that the size is a valid one.
        let layout_after = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: the size is not zero, by our contract.
        let moved = unsafe { System.alloc(layout_after) };
        if !moved.is_null() {
            // SAFETY: both have as many bytes, and are different memory.
            unsafe { ptr::copy_nonoverlapping(start, moved, layout.size().min(size)) };
            // SAFETY: what was there is not used any more.
            unsafe { self.dealloc(start, layout) };
        }
        moved
    }
}

thread_local! {
    static IS_EXEMPT: Cell<bool> = const { Cell::new(false) };
}

/// What this thread frees is not wiped.
pub(super) fn exempt_thread() {
    IS_EXEMPT.set(true);
}

fn is_wiped(len: usize) -> bool {
    len <= WIPED_AT_MOST && !IS_EXEMPT.try_with(Cell::get).unwrap_or(false)
}

/// # Safety
/// There are as many bytes, and nobody else uses them.
unsafe fn wipe(start: *mut u8, len: usize) {
    // SAFETY: the caller's.
    unsafe { ptr::write_bytes(start, 0, len) };
    // Otherwise the compiler knows that nobody reads it.
    black_box(start);
}

/// Wipes the part of the stack that functions which have returned may have used.
#[inline(never)]
pub fn burn_stack() {
    black_box([0u8; BURNT]);
}

/// No core dump of the process is made from now on, and only root reads its memory (`PR_SET_DUMPABLE`).
pub fn leave_no_dumps() {
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "core dumps of this process cannot be turned off");
    }
}

/// What is larger is hardly a text, and goes back to the kernel sooner or later; wiping it would only fetch pages that
/// were never touched.
const WIPED_AT_MOST: usize = 1 << 20;
/// More than a derivation uses.
const BURNT: usize = 64 << 10;
const SMALLEST_PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_values_are_dropped_and_their_pages_locked() {
        let held = std::rc::Rc::new(7);
        let kept = Kept::new(|| Ok((held.clone(), [9u8; 5000]))).unwrap();
        assert_eq!((*kept.0, kept.1[4999]), (7, 9));
        let address = ptr::from_ref(&*kept) as usize;
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of_page = smaps.split_once(&format!("{address:x}-")).expect("pages of their own begin with the value").1;
        let flags = of_page.lines().find(|line| line.starts_with("VmFlags")).unwrap();
        assert!(flags.contains(" dd") && flags.contains(" lo"), "{flags}");
        drop(kept);
        assert_eq!(std::rc::Rc::strong_count(&held), 1);
        let mut bytes = KeptBytes::copied(b"abc").unwrap();
        bytes[1] = b'x';
        assert_eq!(&*bytes, b"axc");
        assert!(Kept::new(|| Err::<u8, _>(crate::base::Error::new("no"))).is_err());
    }

    #[test]
    fn no_dump_is_made() {
        leave_no_dumps();
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    }

    #[test]
    fn a_heap_that_wipes_moves_what_grows() {
        let layout = Layout::from_size_align(64, 8).unwrap();
        // SAFETY: used as an allocator is used.
        let start = unsafe { WipingHeap.alloc(layout) };
        // SAFETY: there are 64 bytes.
        unsafe { ptr::write_bytes(start, 5, 64) };
        // SAFETY: it was allocated so.
        let moved = unsafe { WipingHeap.realloc(start, layout, 4096) };
        // SAFETY: the first 64 bytes were moved along.
        let bytes = unsafe { std::slice::from_raw_parts(moved, 64) };
        assert!(bytes.iter().all(|byte| *byte == 5));
        // SAFETY: it has that size now.
        unsafe { WipingHeap.dealloc(moved, Layout::from_size_align(4096, 8).unwrap()) };
    }
}
