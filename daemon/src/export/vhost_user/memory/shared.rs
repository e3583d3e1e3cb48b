//! Memory that a frontend shares with us: looked at before it is mapped, watched for vanishing pages, unmapped by its last
//! holder.
//!
//! The only place that maps and unmaps. All that is known of a file (is it memory, how large are its pages) is found out
//! here, once.
#![expect(unsafe_code, reason = "maps and unmaps shared memory")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};

use super::super::regions::Refusal;
use super::bus;

/// Mappings of an export at the most: all regions twice, for one set of them may still have requests under way, and logs.
const MAX_MAPPINGS: usize = 1024;

/// How many mappings an export has, those of earlier sessions and replaced tables included.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Quota(Arc<()>);

impl Quota {
    /// A place that is taken until it is dropped. Only one thread at a time takes some: the session's.
    fn take(&self) -> Option<Self> {
        (Arc::strong_count(&self.0) <= MAX_MAPPINGS).then(|| self.clone())
    }
}

/// A part of a file that is memory, as a frontend announces it: not empty, and inside the file.
pub(in super::super) struct SharedFile<'f> {
    file: BorrowedFd<'f>,
    offset: u64,
    len: usize,
    /// Bytes of a page of its mapping.
    page: usize,
}

impl<'f> SharedFile<'f> {
    /// Refuses what is not a file in memory (memfd, tmpfs, hugetlbfs) that holds the range and may be written.
    pub(in super::super) fn new(file: &'f impl AsFd, offset: u64, len: u64) -> Result<Self, Refusal> {
        let file = file.as_fd();
        // First, because it asks no file system: one that lets us wait (FUSE, NFS) could do so at each page fault too.
        // Only memory has seals, even if there is none on it (fcntl(2), F_GET_SEALS).
        rustix::fs::fcntl_get_seals(file).map_err(|_| "shared memory is no file in memory")?;
        let stat = rustix::fs::fstat(file).map_err(|_| "shared memory is no file")?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("shared memory is no ordinary file");
        }
        let flags = rustix::fs::fcntl_getfl(file).map_err(|_| "shared memory is no file")?;
        if flags & OFlags::RWMODE != OFlags::RDWR {
            return Err("shared memory is not open for reading and writing");
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let end = offset.checked_add(len).ok_or("shared memory wraps around")?;
        if len == 0 || end > size {
            return Err("shared memory is empty or larger than its file");
        }
        let len = usize::try_from(len).map_err(|_| "shared memory is larger than addresses")?;
        let page = page_size(file).map_err(|_| "shared memory is no file")?;
        Ok(Self { file, offset, len, page })
    }

    /// Who maps just this, and unmaps it, has nothing left of it: it begins with a page, and ends with one if that is huge,
    /// since a part of a huge page cannot be unmapped (mmap(2), "Huge page (Huge TLB) mappings").
    pub(in super::super) fn has_whole_pages(&self) -> bool {
        let ends = self.page <= rustix::param::page_size() || self.len.is_multiple_of(self.page);
        ends && self.offset.is_multiple_of(self.page as u64)
    }

    /// True where another mapping of it would succeed just now, along with these `others`.
    pub(in super::super) fn can_be_mapped_again<'s>(mut all: impl Iterator<Item = &'s SharedFile<'f>>) -> bool
    where
        'f: 's,
    {
        let trials = all.try_fold(Vec::new(), |mut trials, one| {
            trials.push(Mapping::new(one).ok()?);
            Some(trials)
        });
        trials.is_some()
    }
}

/// Shared memory as we have it. Reached through raw pointers only: the frontend writes to it at any time.
#[derive(Debug)]
pub(in super::super) struct SharedMap {
    /// Gone before what it watches.
    guard: bus::Guard,
    mapping: Mapping,
    /// Bytes of the mapping before the first that was asked for.
    skip: usize,
    len: usize,
    _place: Quota,
}

impl SharedMap {
    /// Maps it, as one of `quota`'s.
    pub(in super::super) fn new(file: &SharedFile<'_>, quota: &Quota) -> Result<Self, Refusal> {
        let place = quota.take().ok_or("too much shared memory is held, by requests under way among others")?;
        let mapping = Mapping::new(file).map_err(|_| "shared memory cannot be mapped")?;
        let guard = bus::Guard::new(mapping.base, mapping.len, file.page)
            .map_err(|_| "too much shared memory is watched, over all exports")?;
        Ok(Self { guard, mapping, skip: file.skip(), len: file.len, _place: place })
    }

    /// Where it begins. `len` bytes are there, as long as `self` lives.
    pub(in super::super) fn host(&self) -> usize {
        self.mapping.base + self.skip
    }

    pub(in super::super) fn len(&self) -> usize {
        self.len
    }

    /// A page of it was lost; what was read from it is not what the guest wrote.
    pub(in super::super) fn is_poisoned(&self) -> bool {
        self.guard.is_poisoned()
    }
}

/// The pages that hold a part of a file.
#[derive(Debug)]
struct Mapping {
    base: usize,
    len: usize,
}

impl SharedFile<'_> {
    /// Bytes between the beginning of a page and the first that was asked for.
    fn skip(&self) -> usize {
        usize::try_from(self.offset % self.page as u64).expect("less than a page")
    }
}

impl Mapping {
    fn new(file: &SharedFile<'_>) -> io::Result<Self> {
        let skip = file.skip();
        let len = file.len.checked_add(skip).and_then(|len| len.checked_next_multiple_of(file.page));
        let len = len.ok_or(io::ErrorKind::InvalidInput)?;
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let flags = rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::NORESERVE;
        let offset = file.offset - skip as u64;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file.file, offset) }?;
        leave_out_of_dumps(base as usize, len);
        Ok(Self { base: base as usize, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, all of it, which nobody can reach any more.
        let unmapped = unsafe { rustix::mm::munmap(self.base as *mut std::ffi::c_void, self.len) };
        if let Err(error) = unmapped {
            // It stays for good. Nothing is wrong with anybody's data.
            tracing::error!("{} bytes of shared memory could not be unmapped: {error}", self.len);
        }
    }
}

/// Guest memory does not belong in a core dump.
pub(in super::super) fn leave_out_of_dumps(start: usize, len: usize) {
    // SAFETY: advice that cannot change contents, whatever is there; where it is refused a core dump is larger.
    unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTDUMP) };
}

/// Bytes of a page of the file's mapping: more than the usual only on hugetlbfs.
fn page_size(file: impl AsFd) -> io::Result<usize> {
    const HUGETLBFS: i64 = 0x9584_58f6;
    let system = rustix::param::page_size();
    let stat = rustix::fs::fstatfs(file)?;
    if stat.f_type != HUGETLBFS {
        return Ok(system);
    }
    let page = usize::try_from(stat.f_bsize).ok().filter(|size| size.is_power_of_two());
    page.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use rustix::fs::MemfdFlags;

    fn file(len: u64, flags: MemfdFlags) -> Option<OwnedFd> {
        let file = rustix::fs::memfd_create("shared", MemfdFlags::CLOEXEC | flags).ok()?;
        rustix::fs::ftruncate(&file, len).unwrap();
        Some(file)
    }

    #[test]
    fn only_writable_files_in_memory_are_shared() {
        let memory = file(4096, MemfdFlags::empty()).unwrap();
        assert!(SharedFile::new(&memory, 0, 4096).is_ok());
        assert!(SharedFile::new(&memory, 0, 0).is_err());
        assert!(SharedFile::new(&memory, 1, 4096).is_err());
        assert!(SharedFile::new(&memory, u64::MAX, 4096).is_err());
        let named = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        named.as_file().set_len(4096).unwrap();
        assert!(SharedFile::new(named.as_file(), 0, 4096).is_ok());
        let read_only = std::fs::File::open(named.path()).unwrap();
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        let others =
            [read_only.into(), open("/"), open("/dev/shm"), open("/dev/zero"), rustix::pipe::pipe().unwrap().0];
        for other in others {
            assert!(SharedFile::new(&other, 0, 1).is_err());
        }
    }

    #[test]
    fn a_file_on_a_disk_is_refused_by_that_name() {
        // The test program lies on a disk.
        let beside = std::env::current_exe().unwrap();
        let disk = tempfile::tempfile_in(beside.parent().unwrap()).unwrap();
        disk.set_len(4096).unwrap();
        let refused = SharedFile::new(&disk, 0, 4096).err();
        assert_eq!(refused, Some("shared memory is no file in memory"));
    }

    #[test]
    fn an_export_has_its_share_of_mappings_and_gets_it_back() {
        let memory = file(4096, MemfdFlags::empty()).unwrap();
        let part = SharedFile::new(&memory, 0, 4096).unwrap();
        let quota = Quota::default();
        let mut all: Vec<_> = (0..MAX_MAPPINGS).map(|_| SharedMap::new(&part, &quota).unwrap()).collect();
        assert!(SharedMap::new(&part, &quota).is_err());
        assert!(SharedMap::new(&part, &Quota::default()).is_ok(), "another export has its own");
        all.pop();
        assert!(SharedMap::new(&part, &quota).is_ok());
    }

    /// Needs no page in the pool: nothing is touched.
    #[test]
    fn a_part_of_a_huge_page_is_mapped_and_unmapped_whole() {
        const HUGE: u64 = 2 << 20;
        let Some(file) = file(2 * HUGE, MemfdFlags::HUGETLB) else { return eprintln!("SKIPPED: no huge pages") };
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let part = SharedFile::new(&file, HUGE + 4096, 4096).unwrap();
        assert!(!part.has_whole_pages() && SharedFile::new(&file, HUGE, HUGE).unwrap().has_whole_pages());
        let map = SharedMap::new(&part, &Quota::default()).unwrap();
        let base = map.mapping.base;
        assert_eq!((map.host() - base, map.mapping.len), (4096, 2 << 20));
        assert!(maps().contains(&format!("{base:x}-")));
        drop(map);
        assert!(!maps().contains(&format!("{base:x}-")), "it stays mapped");
    }
}
