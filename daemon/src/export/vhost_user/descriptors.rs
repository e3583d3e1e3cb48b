//! What a descriptor is that somebody has sent us.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::FileType;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

/// An eventfd, by what the kernel calls it.
pub(super) fn is_eventfd(fd: &OwnedFd) -> bool {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new());
    link.is_ok_and(|link| link.as_bytes() == b"anon_inode:[eventfd]")
}

/// Something whose write cannot change a file: an eventfd, a pipe, a socket.
pub(super) fn is_signal(fd: &OwnedFd) -> bool {
    let kind = rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
    is_eventfd(fd) || matches!(kind, Ok(FileType::Fifo | FileType::Socket))
}

/// A connected or unconnected unix stream socket.
pub(super) fn is_unix_stream(fd: &OwnedFd) -> bool {
    socket_domain(fd) == Ok(AddressFamily::UNIX) && socket_type(fd) == Ok(SocketType::STREAM)
}
