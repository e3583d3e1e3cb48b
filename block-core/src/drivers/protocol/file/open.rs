//! From a path to a descriptor. The path is looked up once, without opening anything: what was found is checked, and
//! what was checked is opened, whatever happens to the path meanwhile. No look-up can block on a FIFO or wake a device.

use std::fs::{File as StdFile, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use rustix::fs::{
    Advice, AtFlags, SeekFrom, StatxFlags, fadvise, fdatasync, fstat, fstatfs, ioctl_blkpbszget, ioctl_blksszget, seek,
    statx,
};

use super::lock::{Claim, Locks};
use super::options::{Aio, FileOptions, Locking};
use super::{Alignment, Conf, Kind};
use crate::base::{Error, Result, ResultExt, SECTOR, align_down, align_up};
use crate::graph::{Limits, MAX_TRANSFER, NodeOptions, Perms};
use crate::rt::{Elsewhere, Engine, system_call};

/// A file that was found and is of the right kind; nothing can be read through it yet.
pub(super) struct Found {
    path: OwnedFd,
}

/// Opens what `options` name. `auto_read_only` may turn `read_only` on.
pub(super) fn open(kind: Kind, options: FileOptions, common: NodeOptions) -> Result<(Conf, Arc<Locks>, NodeOptions)> {
    options.check(common)?;
    let could_not = || format!("Could not open '{}'", options.filename);
    let found = Found::at(kind, &options.filename)?;
    let (fd, read_only) = found.open_as_allowed(common).map_err(reason).doing(could_not)?;
    let common = NodeOptions { read_only, ..common };
    let locks = Arc::new(Locks::new(found.open(false, false).map_err(reason).doing(could_not)?));
    let claim = wants_locks(&options, common).then(|| Arc::new(Claim::new(locks.clone())));
    let conf = conf(kind, options, common, fd, claim)?;
    Ok((conf, locks, common))
}

impl FileOptions {
    /// What can be said before anything is opened.
    fn check(&self, common: NodeOptions) -> Result<()> {
        if let Some(manager) = &self.pr_manager {
            return Err(Error::new(format!("Parameter 'pr-manager' is not supported yet (it is '{manager}')")));
        }
        if self.aio == Aio::Native && !common.direct {
            return Err(Error::new(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        if self.aio_max_batch < 0 {
            return Err(Error::new("Parameter 'aio-max-batch' expects a value that is not negative"));
        }
        Ok(())
    }
}

impl Found {
    /// Looks a path up and refuses what is not of this kind.
    pub(super) fn at(kind: Kind, filename: &str) -> Result<Self> {
        let could_not = || format!("Could not open '{}'", filename.escape_debug());
        if filename.contains('\0') {
            return Err(Error::new("the file name has an embedded NUL")).doing(could_not);
        }
        let look = system_call(|| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(filename));
        let path = look.map_err(reason).doing(could_not)?;
        let found = system_call(|| path.metadata()).map_err(reason).doing(could_not)?.file_type();
        match kind {
            Kind::Regular if found.is_dir() => Err(reason(io::Error::from_raw_os_error(libc::EISDIR))).doing(could_not),
            Kind::Regular if !found.is_file() || is_made_up(&path) => {
                Err(Error::new(format!("'file' driver requires '{filename}' to be a regular file")))
            }
            Kind::Device if !found.is_block_device() => {
                Err(Error::new(format!("'host_device' driver requires '{filename}' to be a block device")))
            }
            Kind::Regular | Kind::Device => Ok(Self { path: path.into() }),
        }
    }

    /// Opens for reading and writing, or what the options allow instead. True: only for reading.
    fn open_as_allowed(&self, common: NodeOptions) -> io::Result<(OwnedFd, bool)> {
        if common.read_only {
            return Ok((self.open(false, common.direct)?, true));
        }
        match self.open(true, common.direct) {
            Err(error) if common.auto_read_only && refuses_writing(&error) => {
                Ok((self.open(false, common.direct)?, true))
            }
            other => Ok((other?, false)),
        }
    }

    pub(super) fn open(&self, write: bool, direct: bool) -> io::Result<OwnedFd> {
        open_again(&self.path, write, direct)
    }
}

/// A new open file description of the same file, whatever became of its name.
pub(super) fn open_again(fd: &impl AsFd, write: bool, direct: bool) -> io::Result<OwnedFd> {
    let name = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let opened = system_call(|| OpenOptions::new().read(true).write(write).custom_flags(flags).open(&name));
    match opened {
        Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
            Err(io::Error::new(io::ErrorKind::Unsupported, "filesystem does not support O_DIRECT"))
        }
        other => other.map(OwnedFd::from),
    }
}

/// The kernel's answer without its number, as QEMU words it.
pub(super) fn reason(error: io::Error) -> Error {
    let text = error.to_string();
    let end = error.raw_os_error().and_then(|errno| text.find(&format!(" (os error {errno})")));
    Error::new(text[..end.unwrap_or(text.len())].to_owned())
}

fn refuses_writing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::EPERM))
}

fn wants_locks(options: &FileOptions, common: NodeOptions) -> bool {
    options.locking != Locking::Off && common.active && !common.force_share
}

/// Files that are windows into the kernel call themselves regular: `/proc/self/mem` is one.
fn is_made_up(file: &StdFile) -> bool {
    is_on(file, &KERNEL_FILE_SYSTEMS)
}

fn is_on(file: &impl AsFd, file_systems: &[u32]) -> bool {
    let on = system_call(|| fstatfs(file));
    on.is_ok_and(|on| file_systems.iter().any(|magic| i128::from(on.f_type) == i128::from(*magic)))
}

/// linux/magic.h.
const TMPFS: u32 = 0x0102_1994;

/// linux/magic.h: proc, sysfs, debugfs, tracefs, securityfs, configfs, cgroup, cgroup2, bpf, efivarfs, selinux, pstore,
/// mqueue.
const KERNEL_FILE_SYSTEMS: [u32; 13] = [
    0x9fa0,
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6265_6570,
    0x0027_e0eb,
    0x6367_7270,
    0xcafe_4a11,
    0xde5e_81e4,
    0xf97c_ff8c,
    0x6165_676c,
    0x1980_0202,
];

/// What becomes of a node's file when the node gets new options.
pub(super) struct Again {
    old: Arc<OwnedFd>,
    options: FileOptions,
    common: NodeOptions,
    locks: Arc<Locks>,
    claim: Option<Arc<Claim>>,
    /// What the node's users use and bear.
    perms: Perms,
    /// It was not active before.
    activated: bool,
}

impl Again {
    /// Checks what can be said without opening anything.
    pub(super) fn of(
        conf: &Conf,
        options: FileOptions,
        common: NodeOptions,
        locks: Arc<Locks>,
        perms: Perms,
    ) -> Result<Self> {
        if options.filename != conf.options.filename {
            return Err(Error::new("Cannot change the option 'filename'"));
        }
        options.check(common)?;
        let activated = common.active && !conf.active;
        Ok(Self { old: conf.fd.clone(), options, common, locks, claim: conf.claim.clone(), perms, activated })
    }

    /// Opens the same file anew. The name must still lead to it: under another file the guest would find other data.
    pub(super) fn open(self, kind: Kind) -> Result<Conf> {
        let Self { old, options, common, .. } = self;
        let could_not = || format!("Could not reopen '{}'", options.filename);
        let named = Found::at(kind, &options.filename)?;
        if !is_same(&named.path, &*old).map_err(reason).doing(could_not)? {
            return Err(Error::new("the name leads to another file now")).doing(could_not);
        }
        let fd = open_again(&*old, !common.read_only, common.direct).map_err(reason).doing(could_not)?;
        if self.activated && options.drop_cache && !common.direct {
            drop_cache(&fd);
        }
        let claim = wants_locks(&options, common).then(|| {
            // A new one is dropped with the configuration if it never comes into force.
            let claim = self.claim.unwrap_or_else(|| Arc::new(Claim::new(self.locks)));
            claim.tighten(self.perms, options.locking, &options.filename).map(|()| claim)
        });
        let claim = claim.transpose()?;
        conf(kind, options, common, fd, claim)
    }
}

fn is_same(one: &impl AsFd, other: &impl AsFd) -> io::Result<bool> {
    let (one, other) = (system_call(|| fstat(one))?, system_call(|| fstat(other))?);
    Ok((one.st_dev, one.st_ino, one.st_rdev) == (other.st_dev, other.st_ino, other.st_rdev))
}

/// Another host may have written to the file: what the page cache has of it is old.
fn drop_cache(fd: &OwnedFd) {
    let dropped = system_call(|| fdatasync(fd).and_then(|()| fadvise(fd, 0, None, Advice::DontNeed)));
    if let Err(errno) = dropped {
        tracing::warn!("the page cache of a file that was activated could not be dropped: {errno}");
    }
}

fn conf(kind: Kind, options: FileOptions, common: NodeOptions, fd: OwnedFd, claim: Option<Arc<Claim>>) -> Result<Conf> {
    let unusable = || format!("Could not use '{}'", options.filename);
    let alignment = alignment(kind, &fd, common.direct).doing(unusable)?;
    let size = size(kind, &fd).doing(unusable)?;
    let in_memory = is_on(&fd, &[TMPFS]);
    let engine = match options.aio {
        Aio::Threads => Engine::Pool,
        _ if common.direct => Engine::Ring,
        _ => Engine::Cached,
    };
    Ok(Conf {
        fd: Elsewhere::new(Arc::new(fd)),
        end: size.into(),
        engine,
        alignment,
        flusher: Arc::default(),
        turned: Arc::default(),
        direct: common.direct,
        in_memory,
        active: common.active,
        claim: Elsewhere::new(claim),
        options,
    })
}

/// In bytes, in whole sectors.
pub(super) fn size(kind: Kind, fd: &OwnedFd) -> Result<u64> {
    let bytes = match kind {
        Kind::Regular => system_call(|| fstat(fd)).map(|stat| stat.st_size.cast_unsigned()),
        Kind::Device => system_call(|| seek(fd, SeekFrom::End(0))),
    };
    let bytes = bytes.map_err(|errno| reason(errno.into())).doing(|| "Could not get its size")?;
    in_sectors(bytes)
}

/// Rounded up to whole sectors, if that still fits an `off_t`.
pub(super) fn in_sectors(bytes: u64) -> Result<u64> {
    let size = align_up(bytes, SECTOR).filter(|size| i64::try_from(*size).is_ok());
    size.ok_or_else(|| Error::new(format!("A size of {bytes} bytes is too large")))
}

fn alignment(kind: Kind, fd: &OwnedFd, direct: bool) -> Result<Alignment> {
    let os = |errno: rustix::io::Errno| reason(errno.into());
    let (logical, physical) = match kind {
        Kind::Regular => (1, 512),
        Kind::Device => {
            let (logical, physical) = (system_call(|| ioctl_blksszget(fd)), system_call(|| ioctl_blkpbszget(fd)));
            (logical.map_err(os)?, physical.map_err(os)?)
        }
    };
    if !direct {
        return Ok(Alignment { request: 1, memory: 1, discard: logical, physical: physical.max(logical).max(512) });
    }
    let (memory, request) = match told(fd) {
        Some((0, _) | (_, 0)) => return Err(Error::new("filesystem does not support O_DIRECT")),
        Some(told) => told,
        None if kind == Kind::Device => (logical, logical),
        None => probed(&StdFile::from(system_call(|| fd.try_clone()).map_err(reason)?)),
    };
    let request = request.max(logical);
    let powers_of_two = [memory, request, logical].iter().all(|one| one.is_power_of_two());
    if !powers_of_two || request > MAX_ALIGNMENT || memory > MAX_ALIGNMENT {
        return Err(Error::new(format!("its alignment makes no sense (offsets {request}, buffers {memory})")));
    }
    Ok(Alignment { request, memory, discard: request, physical: physical.max(request) })
}

/// 1 GiB, as for all nodes.
const MAX_ALIGNMENT: u32 = 1 << 30;

/// What the kernel says (since 6.1) about buffers and offsets of `O_DIRECT`.
fn told(fd: &OwnedFd) -> Option<(u32, u32)> {
    let told = system_call(|| statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)).ok()?;
    let known = told.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    known.then_some((told.stx_dio_mem_align, told.stx_dio_offset_align))
}

/// What the kernel does not say is tried out: the smallest offset and buffer with which a read works.
fn probed(file: &StdFile) -> (u32, u32) {
    let mut memory = vec![0; 3 * LARGEST];
    let start = memory.as_ptr().align_offset(LARGEST);
    let mut reads =
        |skip: usize, len: usize| system_call(|| file.read_at(&mut memory[start + skip..][..len], 0)).is_ok();
    let request = CANDIDATES.into_iter().find(|len| reads(0, *len)).unwrap_or(LARGEST);
    let buffer = CANDIDATES.into_iter().find(|skip| reads(*skip, LARGEST)).unwrap_or(LARGEST);
    // If a single byte can be read, the file is too short to tell anything.
    let sure = |found: usize| u32::try_from(if found == 1 { LARGEST } else { found }).expect("it is at most 4096");
    (sure(buffer), sure(request))
}

const LARGEST: usize = 4096;
const CANDIDATES: [usize; 5] = [1, 512, 1024, 2048, LARGEST];

impl Alignment {
    /// What the node's parents are told.
    pub(super) fn limits(self) -> Limits {
        Limits {
            request_alignment: self.request,
            memory_alignment: self.memory,
            max_transfer: align_down(MAX_TRANSFER, self.request.into()),
            write_zeroes_alignment: self.discard,
            discard_alignment: self.discard,
            physical_block: self.physical,
            fua: true,
            unmap_zeroes: true,
            discard: true,
            ..Limits::ANY
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_with_a_nul_is_no_name() {
        let error = Found::at(Kind::Regular, "a\0b").err().unwrap().full();
        assert_eq!(error, "Could not open 'a\\0b': the file name has an embedded NUL");
    }

    #[test]
    fn the_kernels_answer_loses_its_number() {
        let text = |error| reason(error).to_string();
        assert_eq!(text(io::Error::from_raw_os_error(libc::ENOENT)), "No such file or directory");
        assert_eq!(text(io::Error::other("odd (os error 2)")), "odd (os error 2)");
    }

    /// Also where requests need not be whole blocks, what is not a request to the file has to be.
    #[test]
    fn space_is_zeroed_and_given_back_in_whole_blocks() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let made =
            Command::new("losetup").args(["--find", "--show", "--sector-size", "4096"]).arg(file.path()).output();
        let made = made.expect("losetup is installed");
        assert!(made.status.success(), "this test needs a loop device: {}", String::from_utf8_lossy(&made.stderr));
        let path = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let device = Found::at(Kind::Device, &path).and_then(|found| found.open(false, false).map_err(reason));
        let limits = device.and_then(|device| alignment(Kind::Device, &device, false)).map(Alignment::limits);
        assert!(Command::new("losetup").args(["--detach", &path]).status().unwrap().success());
        let limits = limits.unwrap();
        assert_eq!(
            (limits.request_alignment, limits.discard_alignment, limits.write_zeroes_alignment),
            (1, 4096, 4096)
        );
    }

    /// Trying may find more than is needed, and never less.
    #[test]
    fn what_is_tried_out_is_at_least_what_the_kernel_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(65536).unwrap();
        let direct = Found::at(Kind::Regular, file.path().to_str().unwrap()).unwrap().open(false, true).unwrap();
        let (memory, request) = told(&direct).expect("the test machine has Linux 6.1 and ext4 or XFS in /tmp");
        let tried = probed(&direct.into());
        assert!(tried.0.is_multiple_of(memory) && tried.1.is_multiple_of(request), "{tried:?}, {memory}, {request}");
    }
}
