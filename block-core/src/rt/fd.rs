//! Descriptors that more than one owner keeps open, and the eventfd through which threads and guests wake us.
#![expect(unsafe_code, reason = "eventfd and its write are system calls without a safe form in std")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// A descriptor that stays open as long as anybody, the kernel included, works on it.
pub type SharedFd = Arc<OwnedFd>;

/// A new eventfd: non-blocking, closed on exec, counter 0. Fails where the process is out of descriptors.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds 1 to an eventfd. Its readers see an edge; a counter at its end (2^64 - 2) is an edge that is still to be seen.
pub(super) fn signal(fd: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: `one` is eight readable bytes for the length of the call.
    let written = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    debug_assert!(written == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock);
}
