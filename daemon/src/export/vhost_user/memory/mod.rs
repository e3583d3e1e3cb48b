//! Guest memory as the data plane sees it: an immutable map from guest addresses to host addresses.
//!
//! The message filter maps the regions (`shared.rs`); all maps that have a region share its mapping. Guest memory is never
//! a Rust slice: the guest writes to it at any time, so everything is a copy through raw pointers. Ring access is
//! `ring.rs`, memory that the kernel works on is `transfer.rs`, vanished memory is `bus.rs`, dirty pages are `log.rs`.
#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

mod bus;
mod log;
mod mark;
mod shared;
mod transfer;

use std::cell::Cell;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicUsize, Ordering};

use block_core::rt::{Local, blocking};

pub(super) use log::DirtyLog;
pub(super) use shared::{Quota, SharedFile, SharedMap, leave_out_of_dumps};
pub(super) use transfer::{Target, Transfers};

/// A part of one region. Only the map that made it can make anything of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Guest physical address of the first byte.
    pub(super) gpa: u64,
    /// Bytes; never past the end of its region.
    pub(super) len: u64,
    region: usize,
}

impl Piece {
    /// The piece without its first `by` bytes.
    pub(super) fn after(self, by: u64) -> Self {
        assert!(by <= self.len, "a piece is cut inside");
        Self { gpa: self.gpa + by, len: self.len - by, ..self }
    }

    /// The first `len` bytes of the piece.
    pub(super) fn first(self, len: u64) -> Self {
        assert!(len <= self.len, "a piece is cut inside");
        Self { len, ..self }
    }
}

struct Region {
    gpa: u64,
    len: u64,
    host: usize,
    shared: Arc<SharedMap>,
}

/// See the module's head.
pub(super) struct MemoryMap {
    /// Sorted by guest address, without overlap.
    regions: Box<[Region]>,
    /// What `bus::patched` said when all regions were last found whole.
    seen: AtomicUsize,
}

/// A map, as a thread's requests hold it: counted without atomics.
pub(super) struct Mapped(Arc<MemoryMap>);

impl Mapped {
    pub(super) fn new(map: Arc<MemoryMap>) -> Self {
        Self(map)
    }
}

/// To unmap the memory of a large guest takes long, and an IOThread has other guests to serve.
impl Drop for Mapped {
    fn drop(&mut self) {
        let map = std::mem::replace(&mut self.0, Arc::new(MemoryMap::empty()));
        if let (Some(last), Some(local)) = (Arc::into_inner(map), Local::try_current()) {
            local.spawn(blocking(move || drop(last)));
        }
    }
}

impl Deref for Mapped {
    type Target = MemoryMap;
    fn deref(&self) -> &MemoryMap {
        &self.0
    }
}

impl MemoryMap {
    /// Regions that do not overlap, with their guest addresses.
    pub(super) fn new(regions: impl Iterator<Item = (u64, Arc<SharedMap>)>) -> Self {
        let region = |(gpa, shared): (u64, Arc<SharedMap>)| Region {
            gpa,
            len: shared.len() as u64,
            host: shared.host(),
            shared,
        };
        let mut regions: Box<[_]> = regions.map(region).collect();
        regions.sort_unstable_by_key(|region| region.gpa);
        Self { regions, seen: AtomicUsize::new(NEVER) }
    }

    /// No memory at all.
    pub(super) fn empty() -> Self {
        Self::new(std::iter::empty())
    }

    /// The longest piece from `gpa` on that one region holds, at most `len` bytes (not 0). `hint` is the region that
    /// was hit last.
    #[inline]
    pub(super) fn translate(&self, gpa: u64, len: u64, hint: &Cell<usize>) -> Option<Piece> {
        let last = hint.get();
        if let Some(region) = self.regions.get(last)
            && gpa.wrapping_sub(region.gpa) < region.len
        {
            return Some(piece(region, last, gpa, len));
        }
        self.translate_elsewhere(gpa, len, hint)
    }

    #[cold]
    fn translate_elsewhere(&self, gpa: u64, len: u64, hint: &Cell<usize>) -> Option<Piece> {
        let index = self.regions.partition_point(|region| region.gpa <= gpa).checked_sub(1)?;
        let region = &self.regions[index];
        if gpa - region.gpa >= region.len {
            return None;
        }
        hint.set(index);
        Some(piece(region, index, gpa, len))
    }

    /// Copies from guest memory, across adjacent regions. `false` where a byte is not mapped.
    pub(super) fn read(&self, gpa: u64, out: &mut [u8], hint: &Cell<usize>) -> bool {
        let mut done = 0;
        while done < out.len() {
            let Some(at) = gpa.checked_add(done as u64) else { return false };
            let Some(piece) = self.translate(at, (out.len() - done) as u64, hint) else { return false };
            let end = done + usize::try_from(piece.len).expect("no longer than `out`");
            self.copy_out(piece, &mut out[done..end]);
            done = end;
        }
        true
    }

    /// The host address of `len` bytes that lie in one region; `None` where they do not.
    pub(super) fn contiguous(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let piece = self.translate(gpa, len, &Cell::new(0))?;
        (piece.len == len).then(|| self.host(piece))
    }

    /// The host address of a piece of this map. Valid as long as the map lives.
    #[inline]
    pub(super) fn host(&self, piece: Piece) -> *mut u8 {
        let region = &self.regions[piece.region];
        let offset = piece.gpa.wrapping_sub(region.gpa);
        assert!(offset < region.len && piece.len <= region.len - offset, "a piece belongs to the map that made it");
        (region.host + usize::try_from(offset).expect("the region is mapped")) as *mut u8
    }

    /// Copies a piece's first bytes; `out` is no longer than the piece.
    #[inline]
    pub(super) fn copy_out(&self, piece: Piece, out: &mut [u8]) {
        let from = self.host(piece.first(out.len() as u64));
        for (index, byte) in out.iter_mut().enumerate() {
            // SAFETY: `host` has checked that the piece is mapped, for as long as `self` lives.
            *byte = unsafe { read_byte(from, index) };
        }
    }

    /// Copies to a piece's first bytes; `bytes` are no more than the piece has.
    #[inline]
    pub(super) fn copy_in(&self, piece: Piece, bytes: &[u8]) {
        let to = self.host(piece.first(bytes.len() as u64));
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `copy_out`; the mapping is writable.
            unsafe { write_byte(to, index, *byte) };
        }
    }

    /// Fills a piece with zeroes.
    pub(super) fn clear(&self, piece: Piece) {
        let to = self.host(piece);
        // SAFETY: as in `copy_in`; other writers may race, and get a mix of bytes in their own memory.
        unsafe { std::ptr::write_bytes(to, 0, usize::try_from(piece.len).expect("the piece is mapped")) };
    }

    /// True once a page of this map has vanished: what was read may not be what the guest wrote.
    #[inline]
    pub(super) fn is_poisoned(&self) -> bool {
        let patched = bus::patched();
        patched != self.seen.load(Ordering::Relaxed) && self.look_again(patched)
    }

    #[cold]
    fn look_again(&self, patched: usize) -> bool {
        if self.regions.iter().any(|region| region.shared.is_poisoned()) {
            return true;
        }
        self.seen.store(patched, Ordering::Relaxed);
        false
    }
}

#[inline]
fn piece(region: &Region, index: usize, gpa: u64, len: u64) -> Piece {
    Piece { gpa, len: len.min(region.len - (gpa - region.gpa)), region: index }
}

/// # Safety
/// `from + index` must be mapped.
#[inline]
unsafe fn read_byte(from: *mut u8, index: usize) -> u8 {
    // SAFETY: the caller's promise.
    let at = unsafe { from.add(index) };
    // SAFETY: the caller's promise; volatile, because a guest may be writing.
    unsafe { at.read_volatile() }
}

/// # Safety
/// `to + index` must be mapped and writable.
#[inline]
unsafe fn write_byte(to: *mut u8, index: usize, byte: u8) {
    // SAFETY: the caller's promise.
    let at = unsafe { to.add(index) };
    // SAFETY: the caller's promise; volatile, because a guest may be looking.
    unsafe { at.write_volatile(byte) };
}

/// A count of patched pages that cannot be.
const NEVER: usize = usize::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use block_core::rt::{IoThread, PollParams};

    fn map(regions: &[(u64, usize)]) -> MemoryMap {
        super::super::tests::driver::shared(regions).1
    }

    #[test]
    fn a_piece_ends_where_its_region_does() {
        let map = map(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
        let hint = Cell::new(0);
        let ask = |gpa, len| map.translate(gpa, len, &hint).map(|piece| (piece.gpa, piece.len));
        assert_eq!(ask(0x1000, 16), Some((0x1000, 16)));
        assert_eq!(ask(0x1ff8, 16), Some((0x1ff8, 8)));
        assert_eq!(ask(0x2ff8, 16), Some((0x2ff8, 8)));
        assert_eq!(ask(0x8fff, u64::MAX), Some((0x8fff, 1)));
        for hole in [0, 0xfff, 0x3000, 0x7fff, 0x9000, u64::MAX] {
            assert_eq!(ask(hole, 1), None, "{hole:#x}");
        }
    }

    #[test]
    fn copies_cross_neighbours_but_no_gap() {
        let map = map(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
        let hint = Cell::new(0);
        let left = map.translate(0x1ffe, 2, &hint).unwrap();
        map.copy_in(left, &[1, 2]);
        let right = map.translate(0x2000, 2, &hint).unwrap();
        map.copy_in(right, &[3, 4]);
        let mut out = [0; 4];
        assert!(map.read(0x1ffe, &mut out, &hint));
        assert_eq!(out, [1, 2, 3, 4]);
        assert!(!map.read(0x2ffe, &mut out, &hint));
        assert!(!map.read(u64::MAX - 1, &mut out, &hint));
        assert!(map.contiguous(0x1ffe, 4).is_none() && map.contiguous(0x1ffc, 4).is_some());
        map.clear(left);
        assert!(map.read(0x1ffe, &mut out, &hint) && out == [0, 0, 3, 4]);
    }

    #[test]
    fn what_one_map_lost_the_next_one_with_it_has_lost_too() {
        let file = rustix::fs::memfd_create("lost", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let shared =
            SharedMap::new(&SharedFile::new(&file, 0, 4096).unwrap(), &Quota::default()).map(Arc::new).unwrap();
        let map = || MemoryMap::new(std::iter::once((0, shared.clone())));
        assert!(!map().is_poisoned());
        rustix::fs::ftruncate(&file, 0).unwrap();
        assert!(map().read(0, &mut [0], &Cell::new(0)));
        assert!(map().is_poisoned(), "its page is still another one");
    }

    #[test]
    fn the_last_holder_on_an_iothread_leaves_the_unmapping_to_others() {
        let thread = IoThread::spawn("test", PollParams::default()).unwrap();
        let map = map(&[(0, 1 << 20)]);
        let start = format!("{:x}-", map.contiguous(0, 1).unwrap() as usize);
        let mapped = move || std::fs::read_to_string("/proc/self/maps").unwrap().contains(&start);
        assert!(mapped());
        let (send, dropped) = std::sync::mpsc::channel();
        let still = mapped.clone();
        thread.remote().send(move |_| {
            let mapped = std::rc::Rc::new(Mapped::new(Arc::new(map)));
            drop(mapped);
            send.send(still()).unwrap();
        });
        assert!(dropped.recv().unwrap(), "the IOThread has unmapped it");
        while mapped() {
            std::thread::yield_now();
        }
    }
}
