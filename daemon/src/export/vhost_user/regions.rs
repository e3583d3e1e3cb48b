//! The frontend's memory table as the message filter keeps it: checked and mapped before the protocol engine hears of it.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::memory::{MemoryMap, Quota, SharedFile, SharedMap};
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

    /// One past its last guest address.
    pub(super) fn end(&self) -> u64 {
        self.gpa + self.len
    }

    /// The region's bytes as a body names them.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.gpa, self.len, self.uva, self.offset].into_iter().flat_map(u64::to_ne_bytes).collect()
    }
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Regions {
    table: Vec<(Region, Arc<SharedMap>)>,
    quota: Quota,
}

impl Regions {
    /// None yet. What is mapped counts for `quota`.
    pub(super) fn new(quota: Quota) -> Self {
        Self { table: Vec::new(), quota }
    }

    /// A new table in the place of the old one, with the file of each region. On refusal the old one stays.
    pub(super) fn replace(&mut self, regions: &[Region], files: &[impl AsFd]) -> Result<(), Refusal> {
        for (index, region) in regions.iter().enumerate() {
            no_overlap(region, regions[..index].iter())?;
        }
        self.table = self.mapped(regions, files)?;
        Ok(())
    }

    /// One region more.
    pub(super) fn add(&mut self, region: Region, file: impl AsFd) -> Result<(), Refusal> {
        if self.table.len() >= MAX_SLOTS {
            return Err("there are too many memory regions");
        }
        no_overlap(&region, self.announced())?;
        self.table.extend(self.mapped(&[region], &[file])?);
        Ok(())
    }

    /// One region less; its file offset does not matter.
    pub(super) fn remove(&mut self, region: Region) -> Result<(), Refusal> {
        let same = |other: &Region| (other.gpa, other.len, other.uva) == (region.gpa, region.len, region.uva);
        let index = self.announced().position(same).ok_or("there is no such memory region")?;
        self.table.remove(index);
        Ok(())
    }

    /// Takes all of them out.
    pub(super) fn take(&mut self) -> Vec<Region> {
        self.table.drain(..).map(|(region, _)| region).collect()
    }

    /// The table as the data plane sees it.
    pub(super) fn map(&self) -> MemoryMap {
        MemoryMap::new(self.table.iter().map(|(region, map)| (region.gpa, map.clone())))
    }

    /// True where `len` bytes at the frontend's own address `uva` are inside one region.
    pub(super) fn holds_user(&self, uva: u64, len: u64) -> bool {
        self.announced().any(|region| inside(region.uva, region.len, uva, len))
    }

    /// True where `len` bytes at guest address `gpa` are inside one region.
    pub(super) fn holds_guest(&self, gpa: u64, len: u64) -> bool {
        self.announced().any(|region| inside(region.gpa, region.len, gpa, len))
    }

    /// One past the highest guest address.
    pub(super) fn end(&self) -> u64 {
        self.announced().map(Region::end).max().unwrap_or(0)
    }

    fn announced(&self) -> impl Iterator<Item = &Region> {
        self.table.iter().map(|(region, _)| region)
    }

    fn mapped(&self, regions: &[Region], files: &[impl AsFd]) -> Result<Vec<(Region, Arc<SharedMap>)>, Refusal> {
        if regions.len() != files.len() {
            return Err("memory regions and descriptors do not match");
        }
        let shared = regions.iter().zip(files).map(|(region, file)| shared_file(region, file));
        let shared = shared.collect::<Result<Vec<_>, _>>()?;
        let map = |(region, file): (&Region, &SharedFile<'_>)| Ok((*region, SharedMap::new(file, &self.quota)?.into()));
        let mapped = regions.iter().zip(&shared).map(map).collect::<Result<_, Refusal>>()?;
        // The engine is going to map them too, though it never looks: if that failed, the session would end.
        if !SharedFile::can_be_mapped_again(shared.iter()) {
            return Err("memory regions cannot be mapped");
        }
        Ok(mapped)
    }
}

fn no_overlap<'r>(region: &Region, mut others: impl Iterator<Item = &'r Region>) -> Result<(), Refusal> {
    if others.any(|other| region.overlaps(other)) { Err("memory regions overlap") } else { Ok(()) }
}

fn shared_file<'f>(region: &Region, file: &'f impl AsFd) -> Result<SharedFile<'f>, Refusal> {
    let file = SharedFile::new(file, region.offset, region.len)?;
    // The engine unmaps what it was told, and not the rest of a page.
    if file.has_whole_pages() { Ok(file) } else { Err("a memory region has a part of a page of its file") }
}

fn inside(start: u64, total: u64, at: u64, len: u64) -> bool {
    at >= start && at - start < total && len <= total - (at - start)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

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
        let mut regions = Regions::new(Quota::default());
        regions.replace(&[region(0, 4096)], &[file(4096)]).unwrap();
        let twice = [region(0, 8192), region(4096, 4096)];
        assert!(regions.replace(&twice, &[file(8192), file(8192)]).is_err());
        assert!(regions.replace(&[region(0, 8192)], &[file(4096)]).is_err(), "larger than its file");
        assert!(regions.replace(&[region(0, 4096)], &[] as &[OwnedFd]).is_err());
        assert!(regions.holds_guest(0, 4096) && !regions.holds_guest(0, 4097) && regions.end() == 4096);
    }

    #[test]
    fn regions_come_and_go_one_by_one() {
        let mut regions = Regions::new(Quota::default());
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
    fn a_region_begins_with_a_page() {
        let mut regions = Regions::new(Quota::default());
        let file = file(8192);
        assert!(regions.add(Region { offset: 512, ..region(0, 4096) }, &file).is_err());
        assert!(regions.add(region(1 << 20, 4095), &file).is_ok(), "an ordinary page may be a part of one");
        assert!(regions.add(Region { offset: 4096, ..region(0, 4096) }, &file).is_ok());
    }

    #[test]
    fn slots_end_at_the_limit() {
        let mut regions = Regions::new(Quota::default());
        let file = file(4096);
        for n in 0..MAX_SLOTS as u64 {
            regions.add(region(n * 4096, 4096), &file).unwrap();
        }
        assert!(regions.add(region(1 << 40, 4096), &file).is_err());
    }
}
