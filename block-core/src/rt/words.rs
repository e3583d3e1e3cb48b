//! A large table of numbers whose memory comes when it is first used, and can be given back piece by piece.
#![expect(unsafe_code, reason = "a mapping is a pointer and a length, which are kept together here")]

use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicU64;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::param::page_size;

/// See the module's head. Any thread may read and write it at any time.
#[derive(Debug)]
pub struct Words {
    start: *mut AtomicU64,
    count: usize,
}

// SAFETY: it is memory of its own, of atomics, and nothing of it belongs to a thread.
unsafe impl Send for Words {}
// SAFETY: as above: all access goes through atomics.
unsafe impl Sync for Words {}

impl Words {
    /// `count` words (at least 1), all 0. They take address space, and no memory before something else than 0 is written.
    pub fn new(count: usize) -> io::Result<Self> {
        let count = count.max(1);
        let len = count.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: the kernel chooses the place, so no memory of anybody is mapped over.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, flags) }?;
        Ok(Self { start: start.cast(), count })
    }

    /// All of them.
    #[inline]
    pub fn all(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `count` words, is aligned to a page, and lives as long as `self`. Any bytes are atomics,
        // and nobody changes them but through atomics, and the kernel, which sets whole words to 0.
        unsafe { std::slice::from_raw_parts(self.start, self.count) }
    }

    /// Gives memory back: words of the range are 0 afterwards, but for those that share a page with others outside of it,
    /// which may be as they were. Whoever reads them meanwhile sees either.
    pub fn forget(&self, range: Range<usize>) {
        let in_page = page_size() / size_of::<AtomicU64>();
        let end = range.end.min(self.count);
        // The mapping goes on to the end of its last page, and nobody else is there.
        let end = if end == self.count { end.next_multiple_of(in_page) } else { end / in_page * in_page };
        let first = range.start.next_multiple_of(in_page);
        if first < end {
            // SAFETY: `first` is below `count`, so inside the mapping.
            let start = unsafe { self.start.add(first) };
            let len = (end - first) * size_of::<AtomicU64>();
            // SAFETY: the pages are the mapping's; what they hold is atomics, which may become 0 at any time.
            let told = unsafe { madvise(start.cast(), len, Advice::LinuxDontNeed) };
            debug_assert_eq!(told, Ok(()), "the kernel takes back what it gave");
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody can have a reference into it any more.
        let unmapped = unsafe { munmap(self.start.cast(), self.count * size_of::<AtomicU64>()) };
        debug_assert_eq!(unmapped, Ok(()), "what was mapped can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn whole_pages_are_given_back_and_neighbours_stay() {
        let in_page = page_size() / 8;
        let words = Words::new(3 * in_page + 5).unwrap();
        words.all().iter().for_each(|word| word.store(7, Relaxed));
        words.forget(1..2 * in_page + 1);
        let is = |number: usize| words.all()[number].load(Relaxed);
        assert_eq!([is(0), is(in_page - 1), is(in_page), is(2 * in_page - 1), is(2 * in_page)], [7, 7, 0, 0, 7]);
        words.forget(3 * in_page..words.all().len());
        assert_eq!([is(3 * in_page - 1), is(3 * in_page), is(3 * in_page + 4)], [7, 0, 0]);
        words.forget(5..6);
        assert_eq!(is(5), 7);
        assert!(Words::new(usize::MAX / 4).is_err());
    }
}
