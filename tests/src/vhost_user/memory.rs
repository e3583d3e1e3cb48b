//! What the guest shares: memory files, mapped here and offered to the back-end, with the gaps that tests want.
//!
//! Every access is by guest physical address, byte by byte and volatile, since the back-end writes at the same time. A
//! file that a test has shrunk must not be touched in its hole: this process would die of it too.
#![expect(unsafe_code, reason = "memory shared with another process is reached through raw pointers")]

use super::protocol::MemoryRegion;
use super::wire;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

/// Where a region shall be and how long.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    /// Guest physical address, a multiple of 4096.
    pub gpa: u64,
    /// Bytes, a multiple of 4096.
    pub size: u64,
    /// Bytes of the file that lie before the region, a multiple of 4096.
    pub mmap_offset: u64,
}

/// A memory file and our mapping of it.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    file: OwnedFd,
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to the region until it is dropped, and every access through it is volatile or atomic.
unsafe impl Send for Region {}
// SAFETY: as above; racing accesses are what these tests are about, and bytes have no invalid value.
unsafe impl Sync for Region {}

impl Region {
    /// A new memory file of its own, mapped.
    pub fn new(spec: RegionSpec) -> Self {
        let file = wire::memfd(spec.mmap_offset + spec.size);
        let base = map(file.as_fd(), spec);
        Self { spec, file, base }
    }

    /// The file behind the region.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Cuts the file so that only the first `bytes` of the region are backed.
    pub fn shrink_to(&self, bytes: u64) {
        wire::set_len(self.file(), self.spec.mmap_offset + bytes);
    }

    /// The region's entry in a memory table.
    pub fn entry(&self) -> MemoryRegion {
        let RegionSpec { gpa, size, mmap_offset } = self.spec;
        MemoryRegion { gpa, size, uva: user_address(gpa), mmap_offset }
    }

    fn pointer(&self, gpa: u64) -> Option<*mut u8> {
        let offset = gpa.checked_sub(self.spec.gpa).filter(|&offset| offset < self.spec.size)?;
        // SAFETY: `offset` is inside the mapping, which is `spec.size` bytes long.
        Some(unsafe { self.base.as_ptr().add(offset as usize) })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and nothing points into it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.spec.size as usize) };
    }
}

/// All regions of one guest.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// One memory file for each of `specs`.
    pub fn new(specs: &[RegionSpec]) -> Self {
        Self { regions: specs.iter().copied().map(Region::new).collect() }
    }

    /// Its regions, in the order they were given.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The entries of a memory table that offers everything.
    pub fn entries(&self) -> Vec<MemoryRegion> {
        self.regions.iter().map(Region::entry).collect()
    }

    /// The descriptors that go with [`GuestMemory::entries`].
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.regions.iter().map(Region::file).collect()
    }

    /// Writes `bytes` at `gpa`, across adjacent regions where it must.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        for (address, &byte) in (gpa..).zip(bytes) {
            // SAFETY: `pointer` is inside a live mapping.
            unsafe { self.pointer(address).write_volatile(byte) };
        }
    }

    /// Fills `len` bytes at `gpa` with `byte`.
    pub fn fill(&self, gpa: u64, len: usize, byte: u8) {
        self.write(gpa, &vec![byte; len]);
    }

    /// Reads `len` bytes at `gpa`.
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        // SAFETY: `pointer` is inside a live mapping.
        (gpa..).take(len).map(|address| unsafe { self.pointer(address).read_volatile() }).collect()
    }

    /// One byte at `gpa`.
    pub fn byte(&self, gpa: u64) -> u8 {
        self.read(gpa, 1)[0]
    }

    /// A little-endian word of 32 bits at `gpa`.
    pub fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().expect("four bytes were read"))
    }

    /// An index that the other side publishes: what was written before it is seen after this.
    pub fn load_u16(&self, gpa: u64) -> u16 {
        u16::from_le(self.atomic_u16(gpa).load(Ordering::SeqCst))
    }

    /// Publishes an index: the other side sees what was written before.
    pub fn store_u16(&self, gpa: u64, value: u16) {
        self.atomic_u16(gpa).store(value.to_le(), Ordering::SeqCst);
    }

    fn atomic_u16(&self, gpa: u64) -> &AtomicU16 {
        assert!(gpa.is_multiple_of(2), "a ring index at an odd address");
        // SAFETY: aligned, inside a mapping that lives as long as `self`; regions are whole pages, so both bytes are there.
        unsafe { AtomicU16::from_ptr(self.pointer(gpa).cast()) }
    }

    fn pointer(&self, gpa: u64) -> *mut u8 {
        let found = self.regions.iter().find_map(|region| region.pointer(gpa));
        found.unwrap_or_else(|| panic!("the test itself reaches {gpa:#x}, where its guest has no memory"))
    }
}

/// The front-end address under which our client announces guest address `gpa`. Far from the guest's addresses, so that a
/// back-end that mixes the two up finds nothing.
pub fn user_address(gpa: u64) -> u64 {
    gpa + 0x7000_0000_0000
}

fn map(file: BorrowedFd<'_>, spec: RegionSpec) -> NonNull<u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let offset = spec.mmap_offset.cast_signed();
    let length = spec.size as usize;
    let shared = libc::MAP_SHARED | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping where the kernel likes; nothing that exists is replaced.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, shared, file.as_raw_fd(), offset) };
    assert!(base != libc::MAP_FAILED, "mmap of guest memory: {}", std::io::Error::last_os_error());
    NonNull::new(base.cast()).expect("mmap never gives address 0 unasked")
}
