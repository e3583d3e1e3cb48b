//! The frontend's memory table as the message filter keeps it: checked before the protocol engine maps anything.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags};

use super::memory::try_map;
use super::message::u64_at;

/// Regions at the most, in all (VHOST_USER_MAX_RAM_SLOTS).
pub(super) const MAX_SLOTS: usize = 509;
/// Regions of one SET_MEM_TABLE at the most.
pub(super) const MAX_TABLE: usize = 8;
/// Bytes of one region in a message.
pub(super) const REGION_LEN: usize = 32;

/// Why memory is refused.
pub(super) type Refusal = &'static str;

/// One region, as announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) gpa: u64,
    pub(super) len: u64,
    pub(super) uva: u64,
    pub(super) offset: u64,
}

impl Region {
    /// Parses [`REGION_LEN`] bytes. Refuses what is empty or wraps.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let [gpa, len, uva, offset] = [0, 8, 16, 24].map(|at| u64_at(bytes, at));
        let wraps = [gpa, uva, offset].into_iter().any(|start| start.checked_add(len).is_none());
        if len == 0 || wraps {
            return Err("a memory region is empty or wraps around");
        }
        Ok(Self { gpa, len, uva, offset })
    }

    fn overlaps(&self, other: &Self) -> bool {
        let cross = |a: u64, b: u64| a < b + other.len && b < a + self.len;
        cross(self.gpa, other.gpa) || cross(self.uva, other.uva)
    }

    /// The region's bytes as a body names them.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.gpa, self.len, self.uva, self.offset].into_iter().flat_map(u64::to_ne_bytes).collect()
    }
}

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Regions(Vec<Region>);

impl Regions {
    /// A new table in the place of the old one, with the file of each region. On refusal the old one stays.
    pub(super) fn replace(&mut self, regions: Vec<Region>, files: &[OwnedFd]) -> Result<(), Refusal> {
        let mut table = Self::default();
        for region in regions {
            table.insert(region)?;
        }
        mappable(&table.0, files)?;
        *self = table;
        Ok(())
    }

    /// One region more.
    pub(super) fn add(&mut self, region: Region, file: &OwnedFd) -> Result<(), Refusal> {
        if self.0.len() >= MAX_SLOTS {
            return Err("there are too many memory regions");
        }
        self.insert(region)?;
        let mapped = mappable(&[region], std::slice::from_ref(file));
        if mapped.is_err() {
            self.0.pop();
        }
        mapped
    }

    /// One region less; its file offset does not matter.
    pub(super) fn remove(&mut self, region: Region) -> Result<(), Refusal> {
        let same = |other: &Region| (other.gpa, other.len, other.uva) == (region.gpa, region.len, region.uva);
        let index = self.0.iter().position(same).ok_or("there is no such memory region")?;
        self.0.remove(index);
        Ok(())
    }

    /// Takes all of them out.
    pub(super) fn take(&mut self) -> Vec<Region> {
        std::mem::take(&mut self.0)
    }

    /// True where `len` bytes at the frontend's own address `uva` are inside one region.
    pub(super) fn holds_user(&self, uva: u64, len: u64) -> bool {
        self.0.iter().any(|region| inside(region.uva, region.len, uva, len))
    }

    /// True where `len` bytes at guest address `gpa` are inside one region.
    pub(super) fn holds_guest(&self, gpa: u64, len: u64) -> bool {
        self.0.iter().any(|region| inside(region.gpa, region.len, gpa, len))
    }

    /// One past the highest guest address.
    pub(super) fn end(&self) -> u64 {
        self.0.iter().map(|region| region.gpa + region.len).max().unwrap_or(0)
    }

    fn insert(&mut self, region: Region) -> Result<(), Refusal> {
        if self.0.iter().any(|other| region.overlaps(other)) {
            return Err("memory regions overlap");
        }
        self.0.push(region);
        Ok(())
    }
}

fn inside(start: u64, total: u64, at: u64, len: u64) -> bool {
    at >= start && at - start < total && len <= total - (at - start)
}

fn mappable(regions: &[Region], files: &[OwnedFd]) -> Result<(), Refusal> {
    if regions.len() != files.len() {
        return Err("memory regions and descriptors do not match");
    }
    for (region, file) in regions.iter().zip(files) {
        shared_file(file, region.offset, region.len)?;
    }
    // All at once, as the engine is going to: limits of the process count them together.
    let parts = regions.iter().zip(files).map(|(region, file)| (file, region.offset, region.len));
    try_map(parts).map_err(|_| "a memory region cannot be mapped")
}

/// Refuses what is not an ordinary file (memfd, tmpfs, hugetlbfs) that holds the range and may be written.
pub(super) fn shared_file(file: &OwnedFd, offset: u64, len: u64) -> Result<(), Refusal> {
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
    if end > size { Err("shared memory is larger than its file") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("regions", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        file
    }

    fn region(gpa: u64, len: u64) -> Region {
        Region { gpa, len, uva: 0x7000_0000_0000 + gpa, offset: 0 }
    }

    #[test]
    fn what_is_empty_or_wraps_is_no_region() {
        let parse = |gpa, len, uva, offset| Region::parse(&Region { gpa, len, uva, offset }.bytes()).is_ok();
        assert!(parse(0, 4096, 0, 0));
        assert!(!parse(0, 0, 0, 0));
        assert!(!parse(u64::MAX - 4095, 8192, 0, 0));
        assert!(!parse(0, 8192, u64::MAX - 4095, 0));
        assert!(!parse(0, 8192, 0, u64::MAX - 4095));
    }

    #[test]
    fn a_refused_table_leaves_the_old_one() {
        let mut regions = Regions::default();
        regions.replace(vec![region(0, 4096)], &[file(4096)]).unwrap();
        let twice = vec![region(0, 8192), region(4096, 4096)];
        assert!(regions.replace(twice, &[file(8192), file(8192)]).is_err());
        assert!(regions.replace(vec![region(0, 8192)], &[file(4096)]).is_err(), "larger than its file");
        assert!(regions.replace(vec![region(0, 4096)], &[]).is_err());
        assert!(regions.holds_guest(0, 4096) && !regions.holds_guest(0, 4097) && regions.end() == 4096);
    }

    #[test]
    fn regions_come_and_go_one_by_one() {
        let mut regions = Regions::default();
        let file = file(4096);
        regions.add(region(0, 4096), &file).unwrap();
        assert!(regions.add(region(0, 4096), &file).is_err(), "the same twice");
        assert!(regions.add(region(2048, 4096), &file).is_err());
        assert!(regions.add(region(4096, 8192), &file).is_err(), "larger than its file");
        regions.add(region(4096, 4096), &file).unwrap();
        assert!(!regions.holds_guest(0, 8192), "across two regions");
        assert!(regions.holds_user(0x7000_0000_0000, 16) && !regions.holds_user(0x7000_0000_2000, 1));
        regions.remove(Region { offset: 512, ..region(0, 4096) }).unwrap();
        assert!(regions.remove(region(0, 4096)).is_err());
    }

    #[test]
    fn only_ordinary_writable_files_are_memory() {
        assert!(shared_file(&file(4096), 0, 4096).is_ok());
        assert!(shared_file(&file(4096), u64::MAX, 4096).is_err());
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        for other in [open("/"), open("/dev/zero"), open("/proc/self/exe"), rustix::pipe::pipe().unwrap().0] {
            assert!(shared_file(&other, 0, 1).is_err());
        }
    }

    #[test]
    fn slots_end_at_the_limit() {
        let mut regions = Regions::default();
        let file = file(4096);
        for n in 0..MAX_SLOTS as u64 {
            regions.add(region(n * 4096, 4096), &file).unwrap();
        }
        assert!(regions.add(region(1 << 40, 4096), &file).is_err());
    }
}
