//! The few device controls of files and block devices that have no safe form elsewhere. They may wait: call them on a
//! helper thread.
#![expect(unsafe_code, reason = "ioctl is untyped; each call here fixes its number and its argument together")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Tells a block device that `len` bytes from `start` on are no longer needed. Both are multiples of its logical block.
pub fn discard(device: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let range = [start, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers, which live until the call returns.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) })
}

/// Asks the file system (XFS) to allocate in pieces of `bytes`.
pub fn set_extent_size_hint(file: &OwnedFd, bytes: u32) -> io::Result<()> {
    let mut attributes = FileAttributes::default();
    // SAFETY: FS_IOC_FSGETXATTR fills a structure of this layout, which is ours alone.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) })?;
    attributes.flags |= FS_XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    // SAFETY: FS_IOC_FSSETXATTR reads a structure of this layout, which lives until the call returns.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) })
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct FileAttributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    reserved: [u8; 8],
}

/// linux/fs.h: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// linux/fs.h: `_IOR('X', 31, struct fsxattr)`.
const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f;
/// linux/fs.h: `_IOW('X', 32, struct fsxattr)`.
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
/// The extent size is a hint in force.
const FS_XFLAG_EXTSIZE: u32 = 0x800;
