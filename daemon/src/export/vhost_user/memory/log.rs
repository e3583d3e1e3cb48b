//! The dirty log of a migration: one bit a guest page, in memory that the frontend shares with us.
//!
//! We map it ourselves: the framework would forget it with each new memory table (crates.md, 1.4). Marking comes after
//! the data, or the frontend could copy the page between the two.
#![expect(unsafe_code, reason = "maps shared memory and sets bits in it")]

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU8, Ordering};

use super::bus;

/// Bytes that one bit stands for (VHOST_LOG_PAGE).
pub(in super::super) const LOG_PAGE: u64 = 4096;

/// See the module's head.
pub(in super::super) struct DirtyLog {
    guard: Option<bus::Guard>,
    base: usize,
    /// Bytes of the mapping, which begins at a page; the log begins `skip` bytes later.
    mapped: usize,
    skip: usize,
    len: usize,
}

impl DirtyLog {
    /// Maps `len` bytes (at least 1) of `file` from `offset` on. The caller has checked them against the file's size.
    pub(in super::super) fn map(file: impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let skip = usize::try_from(offset % page as u64).map_err(io::Error::other)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let mapped = len.checked_add(skip).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let flags = rustix::mm::MapFlags::SHARED;
        // SAFETY: a new mapping at an address of the kernel's choice, owned by the value made below.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), mapped, protection, flags, file, offset - skip as u64) }?;
        let mut log = Self { guard: None, base: base as usize, mapped, skip, len };
        log.guard = Some(bus::Guard::new(log.base, mapped, page)?);
        Ok(log)
    }

    /// One past the last guest address that the log has a bit for.
    pub(in super::super) fn covers(&self) -> u64 {
        (self.len as u64).saturating_mul(8 * LOG_PAGE)
    }

    /// The frontend has taken pages of the log away.
    pub(in super::super) fn is_poisoned(&self) -> bool {
        self.guard.as_ref().is_some_and(bus::Guard::is_poisoned)
    }

    /// `len` bytes at `gpa` were written. What the log does not cover is not marked.
    pub(in super::super) fn mark(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = gpa.saturating_add(len - 1).min(self.covers().saturating_sub(1)) / LOG_PAGE;
        for page in gpa / LOG_PAGE..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.len {
                return;
            }
            self.byte(byte).fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }

    fn byte(&self, index: usize) -> &AtomicU8 {
        assert!(index < self.len, "checked by the caller");
        let at = (self.base + self.skip + index) as *mut u8;
        // SAFETY: inside the mapping that `self` owns; bytes are always aligned, and all sharers use atomics on them.
        unsafe { AtomicU8::from_ptr(at) }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        drop(self.guard.take());
        // SAFETY: our own mapping, which nobody can reach any more. It fails only for arguments that are not one.
        let _ = unsafe { rustix::mm::munmap(self.base as *mut std::ffi::c_void, self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

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
        let log = DirtyLog::map(&file, 100, 4).unwrap();
        assert_eq!(log.covers(), 32 * LOG_PAGE);
        log.mark(0, 1);
        log.mark(9 * LOG_PAGE - 1, 2);
        log.mark(5 * LOG_PAGE, 0);
        assert_eq!(bytes(&file, 99), [0, 1, 0b11, 0, 0, 0]);
    }

    #[test]
    fn what_is_past_the_log_is_left_out() {
        let file = file(4096);
        let log = DirtyLog::map(&file, 0, 1).unwrap();
        log.mark(7 * LOG_PAGE, 1 << 40);
        log.mark(8 * LOG_PAGE, 1);
        log.mark(u64::MAX, u64::MAX);
        assert_eq!(bytes(&file, 0), [0x80, 0]);
    }
}
