//! Making image files.

use std::fs::{OpenOptions, remove_file};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{IFlags, ftruncate, ioctl_getflags, ioctl_setflags};

use super::Kind;
use super::lock::{Claim, Locks};
use super::open::{Found, open_again, reason};
use super::options::Locking;
use super::resize::resize;
use crate::base::{Error, Result, ResultExt};
use crate::graph::{PermSet, Perms, Preallocation};
use crate::rt::{blocking_long, ioctl, system_call};

/// What a new file is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The path. A file that is there already loses its contents, unless somebody uses it.
    pub filename: String,
    /// In bytes.
    pub size: u64,
    /// Whether space is reserved or written; `Metadata` is refused.
    pub preallocation: Preallocation,
    /// No copy-on-write (btrfs); where the file system does not know that, nothing.
    pub nocow: bool,
    /// Allocate in pieces of this many bytes (XFS); 0: as the file system likes. Elsewhere nothing.
    pub extent_size_hint: u32,
}

/// QEMU's default for `extent-size-hint`, in bytes.
pub const EXTENT_SIZE_HINT: u32 = 1 << 20;

/// Makes a file. If that fails, a file that was not there before is gone again.
pub async fn create(options: CreateOptions) -> Result<()> {
    blocking_long(move || create_now(&options)).await
}

fn create_now(options: &CreateOptions) -> Result<()> {
    let (fd, is_new) = open(&options.filename)?;
    let result = fill(fd, options);
    if result.is_err() && is_new {
        // Nothing of it was promised to anybody; should it stay, it is an empty file.
        let _ = remove_file(&options.filename);
    }
    result
}

/// True: it was not there before.
fn open(filename: &str) -> Result<(OwnedFd, bool)> {
    let could_not = || format!("Could not create '{}'", filename.escape_debug());
    if filename.contains('\0') {
        return Err(Error::new("the file name has an embedded NUL")).doing(could_not);
    }
    match system_call(|| OpenOptions::new().read(true).write(true).create_new(true).open(filename)) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            let old = Found::at(Kind::Regular, filename)?;
            Ok((old.open(true, false).map_err(reason).doing(could_not)?, false))
        }
        other => Ok((other.map_err(reason).doing(could_not)?.into(), true)),
    }
}

fn fill(fd: OwnedFd, options: &CreateOptions) -> Result<()> {
    let claim = Claim::new(Arc::new(Locks::new(open_again(&fd, false, false).map_err(reason)?)));
    // Stricter than QEMU, which empties a file that somebody writes to if that somebody bears other writers.
    let shares = PermSet::ALL.without(PermSet::WRITE | PermSet::RESIZE);
    claim.tighten(Perms { uses: PermSet::WRITE | PermSet::RESIZE, shares }, Locking::Auto, &options.filename)?;
    system_call(|| ftruncate(&fd, 0)).map_err(|errno| reason(errno.into()))?;
    if options.nocow {
        // Known to btrfs only, and a wish there too.
        let _ = system_call(|| ioctl_getflags(&fd).and_then(|flags| ioctl_setflags(&fd, flags | IFlags::NOCOW)));
    }
    if options.extent_size_hint > 0 {
        // Known to XFS only, and a wish there too.
        let _ = ioctl::set_extent_size_hint(&fd, options.extent_size_hint);
    }
    resize(Kind::Regular, &fd, options.size, options.preallocation)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(path: &std::path::Path) -> CreateOptions {
        CreateOptions {
            filename: path.to_str().unwrap().to_owned(),
            size: 1 << 20,
            preallocation: Preallocation::Off,
            nocow: true,
            extent_size_hint: EXTENT_SIZE_HINT,
        }
    }

    #[test]
    fn a_file_that_cannot_be_made_is_not_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.img");
        create_now(&options(&path)).unwrap();
        assert_eq!(path.metadata().unwrap().len(), 1 << 20);
        let new = dir.path().join("y.img");
        create_now(&CreateOptions { preallocation: Preallocation::Metadata, ..options(&new) }).unwrap_err();
        assert!(!new.exists());
        create_now(&CreateOptions { preallocation: Preallocation::Metadata, ..options(&path) }).unwrap_err();
        assert!(path.exists(), "what was there before is not ours to remove");
    }

    #[test]
    fn a_file_in_use_keeps_its_contents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.img");
        create_now(&options(&path)).unwrap();
        let user = Locks::new(std::fs::File::open(&path).unwrap().into());
        user.tighten(Perms { uses: PermSet::NONE, shares: PermSet::NONE }, Locking::On, "x").unwrap();
        let refused = create_now(&CreateOptions { size: 0, ..options(&path) }).unwrap_err().full();
        assert!(refused.contains("Failed to get \"write\" lock"), "{refused}");
        assert_eq!(path.metadata().unwrap().len(), 1 << 20);
    }
}
