//! Changing a file's size, and looking a device's up again.

use std::fs::File as StdFile;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate, fstat, ftruncate};
use rustix::io::Errno;

use super::Kind;
use super::open::{in_sectors, open_again, reason, size as size_of};
use crate::base::{ByteRange, Error, Result, ResultExt};
use crate::graph::Preallocation;
use crate::rt::system_call;

/// Gives the file `size` bytes; the result is the node's new size, in whole sectors. A failure leaves the old size.
pub(super) fn resize(kind: Kind, fd: &OwnedFd, size: u64, how: Preallocation) -> Result<u64> {
    match kind {
        Kind::Regular => resize_file(fd, size, how),
        Kind::Device => resize_device(fd, size, how),
    }
}

/// A device does not change at our wish; but it may have changed by itself, and this is how one tells us.
fn resize_device(fd: &OwnedFd, size: u64, how: Preallocation) -> Result<u64> {
    let now = size_of(Kind::Device, fd)?;
    if how != Preallocation::Off {
        return Err(unsupported(how));
    }
    match size.cmp(&now) {
        std::cmp::Ordering::Equal => Ok(now),
        std::cmp::Ordering::Greater => Err(Error::new("Cannot grow device files")),
        std::cmp::Ordering::Less => Err(Error::new("Cannot resize device files")),
    }
}

fn resize_file(fd: &OwnedFd, size: u64, how: Preallocation) -> Result<u64> {
    let rounded = in_sectors(size)?;
    let old = system_call(|| fstat(fd)).map_err(os).doing(|| "Could not get the old size")?.st_size.cast_unsigned();
    match how {
        Preallocation::Metadata => return Err(unsupported(how)),
        Preallocation::Off => set_size(fd, size)?,
        Preallocation::Falloc | Preallocation::Full if size < old => {
            return Err(Error::new("Preallocation can't be used for shrinking files"));
        }
        Preallocation::Falloc | Preallocation::Full => {
            let new = ByteRange::between(old, size).expect("a size that fits an off_t is not below the old one");
            grow(fd, new, how).inspect_err(|_| restore(fd, old))?;
        }
    }
    Ok(rounded)
}

/// The same while requests run: the new end, in whole sectors.
pub(super) fn move_end(fd: &OwnedFd, to: u64, how: Preallocation) -> std::io::Result<u64> {
    let end = in_sectors(to).map_err(|_| Errno::FBIG)?;
    let old = system_call(|| fstat(fd))?.st_size.cast_unsigned();
    match (how, ByteRange::between(old, to).filter(|new| !new.is_empty())) {
        (Preallocation::Metadata, _) => return Err(Errno::OPNOTSUPP.into()),
        // Others may be writing there already: not a byte is changed, and nothing is cut off.
        (Preallocation::Falloc, new) => new.map_or(Ok(()), |new| reserve(fd, new))?,
        (Preallocation::Full, Some(new)) => write_zeroes(fd, new)?,
        _ => system_call(|| ftruncate(fd, to))?,
    }
    Ok(end)
}

fn grow(fd: &OwnedFd, new: ByteRange, how: Preallocation) -> Result<()> {
    if new.is_empty() {
        return Ok(());
    }
    if how == Preallocation::Falloc {
        match reserve(fd, new) {
            // The file system cannot reserve. Zeroes that are written take the space as well.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            other => return other.map_err(os).doing(|| "Could not preallocate data for the new file"),
        }
    }
    write_zeroes(fd, new).map_err(reason).doing(|| "Could not write zeros for preallocation")
}

fn reserve(fd: &OwnedFd, new: ByteRange) -> Result<(), Errno> {
    system_call(|| fallocate(fd, FallocateFlags::empty(), new.start(), new.len()))
}

/// Through the page cache: with `O_DIRECT` the old end would have to be aligned.
fn write_zeroes(fd: &OwnedFd, new: ByteRange) -> std::io::Result<()> {
    let file = StdFile::from(open_again(fd, true, false)?);
    let zeroes = vec![0; ZEROES];
    for piece in new.pieces(ZEROES as u64) {
        let len = usize::try_from(piece.len()).expect("a piece is at most 1 MiB");
        system_call(|| file.write_all_at(&zeroes[..len], piece.start()))?;
    }
    system_call(|| file.sync_data())
}

/// Bytes that are written at once.
const ZEROES: usize = 1 << 20;

fn set_size(fd: &OwnedFd, size: u64) -> Result<()> {
    system_call(|| ftruncate(fd, size)).map_err(os).doing(|| "Failed to resize file")
}

fn restore(fd: &OwnedFd, old: u64) {
    if let Err(errno) = system_call(|| ftruncate(fd, old)) {
        tracing::warn!("a file could not be given its old size of {old} bytes back: {errno}");
    }
}

fn unsupported(how: Preallocation) -> Error {
    let name = match how {
        Preallocation::Off => "off",
        Preallocation::Metadata => "metadata",
        Preallocation::Falloc => "falloc",
        Preallocation::Full => "full",
    };
    Error::new(format!("Unsupported preallocation mode: {name}"))
}

fn os(errno: Errno) -> Error {
    reason(errno.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn file(size: u64) -> (StdFile, OwnedFd) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let fd = file.try_clone().unwrap().into();
        (file, fd)
    }

    #[test]
    fn every_way_of_growing_ends_at_the_size() {
        for how in [Preallocation::Off, Preallocation::Falloc, Preallocation::Full] {
            let (file, fd) = file(1000);
            file.write_all_at(&[7; 1000], 0).unwrap();
            assert_eq!(resize(Kind::Regular, &fd, 3 << 20, how).unwrap(), 3 << 20);
            let stat = file.metadata().unwrap();
            assert_eq!(stat.len(), 3 << 20);
            assert_eq!(stat.blocks() * 512 >= 3 << 20, how != Preallocation::Off, "{how:?}");
            let mut end = [1; 512];
            file.read_exact_at(&mut end, 1000).unwrap();
            assert_eq!(end, [0; 512]);
            assert_eq!(resize(Kind::Regular, &fd, 1000, Preallocation::Off).unwrap(), 1024);
            assert_eq!(file.metadata().unwrap().len(), 1000);
        }
    }

    #[test]
    fn what_cannot_be_done_changes_nothing() {
        let (file, fd) = file(4096);
        for (size, how) in [
            (0, Preallocation::Full),
            (512, Preallocation::Falloc),
            (8192, Preallocation::Metadata),
            (u64::MAX, Preallocation::Off),
            (i64::MAX as u64, Preallocation::Off),
            // More than any file system of a test machine has.
            (1 << 60, Preallocation::Falloc),
        ] {
            resize(Kind::Regular, &fd, size, how).unwrap_err();
            assert_eq!(file.metadata().unwrap().len(), 4096, "{size} {how:?}");
        }
    }
}
