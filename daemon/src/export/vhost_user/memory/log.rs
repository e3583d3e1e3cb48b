//! The dirty log of a migration: one bit a guest page, in memory that the frontend shares with us.
//!
//! We map it ourselves: the framework would forget it with each new memory table (crates.md, 1.4). Marking comes after
//! the data, or the frontend could copy the page between the two.
#![expect(unsafe_code, reason = "sets bits in shared memory")]

use std::sync::atomic::AtomicU8;

use super::{SharedMap, mark};

/// Bytes that one bit stands for (VHOST_LOG_PAGE).
pub(in super::super) const LOG_PAGE: u64 = 4096;

/// See the module's head.
pub(in super::super) struct DirtyLog(SharedMap);

impl DirtyLog {
    /// A log that is all of `map`.
    pub(in super::super) fn new(map: SharedMap) -> Self {
        Self(map)
    }

    /// One past the last guest address that the log has a bit for.
    pub(in super::super) fn covers(&self) -> u64 {
        (self.0.len() as u64).saturating_mul(8 * LOG_PAGE)
    }

    /// The frontend has taken pages of the log away.
    pub(in super::super) fn is_poisoned(&self) -> bool {
        self.0.is_poisoned()
    }

    /// `len` bytes at `gpa` were written. What the log does not cover is not marked.
    pub(in super::super) fn mark(&self, gpa: u64, len: u64) {
        if len == 0 || gpa >= self.covers() {
            return;
        }
        let (first, last) = (gpa / LOG_PAGE, gpa.saturating_add(len - 1).min(self.covers() - 1) / LOG_PAGE);
        // Eight pages at a time: a request may have a million.
        for byte in first / 8..=last / 8 {
            let from = if byte == first / 8 { u8::MAX << (first % 8) } else { u8::MAX };
            let to = if byte == last / 8 { u8::MAX >> (7 - last % 8) } else { u8::MAX };
            let index = usize::try_from(byte).expect("no page is past the end of the log");
            mark::set(self.byte(index), from & to);
        }
    }

    fn byte(&self, index: usize) -> &AtomicU8 {
        assert!(index < self.0.len(), "checked by the caller");
        let at = (self.0.host() + index) as *mut u8;
        // SAFETY: inside the mapping that `self` owns; bytes are always aligned, and all sharers use atomics on them.
        unsafe { AtomicU8::from_ptr(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    use crate::export::vhost_user::memory::{Quota, SharedFile};
    use std::os::fd::OwnedFd;

    fn log(file: &OwnedFd, offset: u64, len: u64) -> DirtyLog {
        let file = SharedFile::new(file, offset, len).unwrap();
        DirtyLog::new(SharedMap::new(&file, &Quota::default()).unwrap())
    }

    fn file(len: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        file
    }

    fn bytes<const N: usize>(file: &OwnedFd, at: u64) -> [u8; N] {
        let mut out = [0; N];
        rustix::io::pread(file, &mut out, at).unwrap();
        out
    }

    #[test]
    fn a_bit_for_each_page_touched_and_none_beside() {
        let file = file(8192);
        let log = log(&file, 100, 4);
        assert_eq!(log.covers(), 32 * LOG_PAGE);
        log.mark(0, 1);
        log.mark(9 * LOG_PAGE - 1, 2);
        log.mark(5 * LOG_PAGE, 0);
        assert_eq!(bytes(&file, 99), [0, 1, 0b11, 0, 0, 0]);
    }

    #[test]
    fn eight_at_a_time_are_the_same_pages() {
        for (first, count) in (0..24).flat_map(|first| (1..=24 - first).map(move |count| (first, count))) {
            let file = file(4096);
            log(&file, 0, 3).mark(first * LOG_PAGE + 7, (count - 1) * LOG_PAGE + 1);
            let marked = (first..first + count).fold(0_u32, |bits, page| bits | 1 << page);
            assert_eq!(bytes(&file, 0), marked.to_le_bytes(), "{count} from {first} on");
        }
    }

    #[test]
    fn what_is_past_the_log_is_left_out() {
        let file = file(4096);
        let log = log(&file, 0, 1);
        log.mark(7 * LOG_PAGE, 1 << 40);
        log.mark(8 * LOG_PAGE, 1);
        log.mark(u64::MAX, u64::MAX);
        assert_eq!(bytes(&file, 0), [0x80, 0]);
    }

    /// The page that takes the place of a lost one is as large. Works with an empty pool, where the first touch loses it.
    #[test]
    fn a_log_in_huge_pages_survives_their_loss() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::HUGETLB;
        let Ok(file) = rustix::fs::memfd_create("log", flags) else { return eprintln!("SKIPPED: no huge pages") };
        rustix::fs::ftruncate(&file, 2 << 20).unwrap();
        let log = log(&file, 8192, 4096);
        rustix::fs::ftruncate(&file, 0).unwrap();
        log.mark(9 * LOG_PAGE, 1);
        assert!(log.is_poisoned());
        assert_eq!(log.byte(1).load(Ordering::Relaxed), 0b10, "it goes to memory that nobody shares");
    }
}
