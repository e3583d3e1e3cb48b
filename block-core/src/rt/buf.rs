//! Memory that the kernel, or a guest, may be writing to while we hold it: scatter lists over raw pointers, never slices.
//!
//! A clone or a slice is a few words; the owner is kept by all of them. What the bytes mean is not known here.
#![expect(unsafe_code, reason = "copies to and from memory that others write to have to go through raw pointers")]

use super::Local;
use super::sync::yield_now;
use crate::base::IoError;
use smallvec::SmallVec;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::rc::Rc;

/// A scatter list over memory that stays valid as long as any clone or slice of it lives. It stays on its thread.
#[derive(Clone)]
pub struct IoBuf {
    segments: SmallVec<[Segment; 4]>,
    owner: Rc<dyn Any>,
    len: u64,
}

/// One contiguous piece of memory, laid out as the kernel's iovec.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

impl Segment {
    /// `len` bytes from `ptr` on. Harmless by itself: see [`IoBuf::from_segments`].
    pub fn new(ptr: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: ptr.cast(), iov_len: len })
    }

    /// Its first byte.
    pub fn ptr(self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Its length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a piece of an IoBuf is never empty")]
    pub fn len(self) -> usize {
        self.0.iov_len
    }
}

impl IoBuf {
    /// `len` zeroed bytes at a multiple of `align` (a power of two). `NoMemory` where they cannot be had.
    pub fn alloc(len: usize, align: usize) -> Result<Self, IoError> {
        let layout = Layout::from_size_align(len, align).map_err(|_| IoError::NoMemory)?;
        if len == 0 {
            return Ok(Self::empty());
        }
        // SAFETY: the layout is not empty.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(IoError::NoMemory);
        }
        let owner = Rc::new(Allocation { ptr, layout });
        // SAFETY: the segment is the whole allocation, which its owner frees when the last clone is gone.
        Ok(unsafe { Self::from_segments([Segment::new(ptr, len)], owner) })
    }

    /// `len` zeroed bytes that begin with a page and that no guest can change: for data that goes to more than one place
    /// or is compared. `NoMemory` where they cannot be had.
    pub fn private(len: u64) -> Result<Self, IoError> {
        Self::alloc(usize::try_from(len).map_err(|_| IoError::NoMemory)?, 4096)
    }

    /// A copy of `bytes`, without a promise about its alignment. `NoMemory` where the memory cannot be had.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, IoError> {
        let buf = Self::alloc(bytes.len(), 16)?;
        buf.write_at(0, bytes);
        Ok(buf)
    }

    /// Over memory of others; empty segments are left out.
    ///
    /// # Safety
    /// Every byte of every segment must be readable and writable as long as `owner` lives, and no Rust reference may
    /// cover any of it meanwhile. Others (a guest, the kernel) may change it at any time.
    pub unsafe fn from_segments(segments: impl IntoIterator<Item = Segment>, owner: Rc<dyn Any>) -> Self {
        let segments: SmallVec<[Segment; 4]> = segments.into_iter().filter(|segment| segment.len() > 0).collect();
        let len = segments.iter().map(|segment| segment.len() as u64).sum();
        Self { segments, owner, len }
    }

    /// Bytes in all segments together.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True where there is not one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `start` on. Panics where they are not inside: ranges are checked before they come here.
    pub fn slice(&self, start: u64, len: u64) -> Self {
        Self { segments: self.pieces(start, len).collect(), owner: self.owner.clone(), len }
    }

    /// One after another, as one. Keeps the owners of all parts.
    pub fn concat(parts: &[Self]) -> Self {
        let segments = parts.iter().flat_map(|part| part.segments.iter().copied()).collect();
        let len = parts.iter().map(|part| part.len).sum();
        Self { segments, owner: Rc::new(parts.to_vec()), len }
    }

    /// Where the bytes are, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Copies out `out.len()` bytes from `at` on. Panics where they are not inside.
    pub fn read_at(&self, at: u64, out: &mut [u8]) {
        let mut done = 0;
        for piece in self.pieces(at, out.len() as u64) {
            let to = out[done..done + piece.len()].as_mut_ptr();
            // SAFETY: the piece is valid by the contract of `from_segments`, `to` by the line above; no reference
            // covers the piece, so the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(piece.ptr(), to, piece.len()) };
            done += piece.len();
        }
    }

    /// Copies `bytes` in, from `at` on. Panics where they would end outside.
    pub fn write_at(&self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        for piece in self.pieces(at, bytes.len() as u64) {
            let from = bytes[done..done + piece.len()].as_ptr();
            // SAFETY: as in `read_at`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from, piece.ptr(), piece.len()) };
            done += piece.len();
        }
    }

    /// Takes over all bytes of `src`, which must be as long. The two may share memory: a guest can name a page twice.
    pub fn copy_from(&self, src: &Self) {
        assert_eq!(self.len, src.len, "a copy needs two buffers of one length");
        let mut at = 0;
        for from in src.segments.iter() {
            let mut done = 0;
            for to in self.pieces(at, from.len() as u64) {
                // SAFETY: `done` stays below the length of `from`.
                let source = unsafe { from.ptr().add(done) };
                // SAFETY: both pieces are valid by the contract of `from_segments`; `copy` allows an overlap.
                unsafe { std::ptr::copy(source, to.ptr(), to.len()) };
                done += to.len();
            }
            at += from.len() as u64;
        }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        for segment in self.segments.iter() {
            // SAFETY: the segment is valid by the contract of `from_segments`.
            unsafe { std::ptr::write_bytes(segment.ptr(), byte, segment.len()) };
        }
    }

    /// The same for what may be long: beyond a step, which takes no time to speak of, all such work on a thread takes turns
    /// of a step each, and everything else goes on in between.
    pub async fn fill_in_steps(&self, byte: u8) {
        let first = self.len.min(STEP);
        self.slice(0, first).fill(byte);
        if first < self.len {
            Box::pin(self.fill_in_turns(byte, first)).await;
        }
    }

    async fn fill_in_turns(&self, byte: u8, mut done: u64) {
        while done < self.len {
            let local = Local::current();
            let _turn = local.long_work.lock().await;
            yield_now().await;
            let step = (self.len - done).min(STEP);
            self.slice(done, step).fill(byte);
            done += step;
        }
    }

    /// True where every byte was 0 when it was looked at.
    pub fn is_zero(&self) -> bool {
        self.segments.iter().all(|segment| segment.is_zero())
    }

    /// The same for what may be long: takes turns as [`Self::fill_in_steps`] does.
    pub async fn is_zero_in_steps(&self) -> bool {
        if self.len <= STEP {
            return self.is_zero();
        }
        self.slice(0, STEP).is_zero() && Box::pin(self.is_zero_in_turns(STEP)).await
    }

    async fn is_zero_in_turns(&self, mut done: u64) -> bool {
        while done < self.len {
            let local = Local::current();
            let _turn = local.long_work.lock().await;
            yield_now().await;
            let step = (self.len - done).min(STEP);
            if !self.slice(done, step).is_zero() {
                return false;
            }
            done += step;
        }
        true
    }

    /// True where both are as long and have the same bytes. Nobody may be writing to either.
    pub fn has_bytes_of(&self, other: &Self) -> bool {
        let (mut mine, mut theirs) = ([0u8; 4096], [0u8; 4096]);
        let mut at = 0;
        while self.len == other.len && at < self.len {
            let len = usize::try_from(self.len - at).unwrap_or(usize::MAX).min(mine.len());
            self.read_at(at, &mut mine[..len]);
            other.read_at(at, &mut theirs[..len]);
            if mine[..len] != theirs[..len] {
                return false;
            }
            at += len as u64;
        }
        self.len == other.len
    }

    /// True where each segment begins at a multiple of `memory` and is a multiple of `length` long (powers of two).
    pub fn is_aligned(&self, memory: usize, length: usize) -> bool {
        debug_assert!(memory.is_power_of_two() && length.is_power_of_two());
        self.segments.iter().all(|segment| {
            let address = segment.ptr().addr();
            address & (memory - 1) == 0 && segment.len() & (length - 1) == 0
        })
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).expect("memory has no more bytes than usize counts")];
        self.read_at(0, &mut bytes);
        bytes
    }

    fn empty() -> Self {
        Self { segments: SmallVec::new(), owner: Rc::new(()), len: 0 }
    }

    /// The segments of a part, cut where it begins and ends.
    fn pieces(&self, start: u64, len: u64) -> impl Iterator<Item = Segment> {
        let end = start.checked_add(len).filter(|end| *end <= self.len);
        let end = end.unwrap_or_else(|| panic!("{len} bytes at {start} are not inside {} bytes", self.len));
        let mut begin = 0;
        self.segments.iter().filter_map(move |segment| {
            let (first, last) = (begin, begin + segment.len() as u64);
            begin = last;
            let (from, to) = (start.max(first), end.min(last));
            (from < to).then(|| segment.part(from - first, to - from))
        })
    }
}

impl Segment {
    fn is_zero(self) -> bool {
        let mut chunk = [0u8; 4096];
        let mut at = 0;
        while at < self.len() {
            let len = (self.len() - at).min(chunk.len());
            // SAFETY: a part of the segment, which is valid by the contract of `from_segments`, and as much of `chunk`.
            unsafe { std::ptr::copy_nonoverlapping(self.ptr().wrapping_add(at), chunk.as_mut_ptr(), len) };
            if chunk[..len].iter().fold(0, |any, byte| any | byte) != 0 {
                return false;
            }
            at += len;
        }
        true
    }

    #[expect(clippy::cast_possible_truncation, reason = "both lie inside the segment, whose length is a usize")]
    fn part(self, from: u64, len: u64) -> Self {
        Self::new(self.ptr().wrapping_add(from as usize), len as usize)
    }
}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes in {} pieces)", self.len, self.segments.len())
    }
}

struct Allocation {
    ptr: *mut u8,
    layout: Layout,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `ptr` came from `alloc_zeroed` with this layout, and this is its only owner.
        unsafe { dealloc(self.ptr, self.layout) };
    }
}

/// Bytes that are set in one go.
pub const STEP: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    /// 0..12 in pieces of 5, 4 and 3 bytes.
    fn pieces() -> IoBuf {
        let part = |from: u8, to: u8| IoBuf::from_slice(&(from..to).collect::<Vec<_>>()).unwrap();
        IoBuf::concat(&[part(0, 5), part(5, 9), part(9, 12)])
    }

    #[test]
    fn every_slice_has_the_bytes_of_the_whole() {
        let (buf, all) = (pieces(), (0..12).collect::<Vec<u8>>());
        for start in 0..=12usize {
            for end in start..=12 {
                let slice = buf.slice(start as u64, (end - start) as u64);
                assert_eq!(slice.to_vec(), all[start..end], "{start}..{end}");
                assert_eq!(slice.len(), (end - start) as u64);
                assert!(slice.segments().iter().all(|segment| segment.len() > 0));
            }
        }
    }

    #[test]
    fn writes_reach_the_right_piece() {
        let buf = pieces();
        buf.write_at(4, &[100, 101, 102, 103, 104, 105]);
        assert_eq!(buf.to_vec(), [0, 1, 2, 3, 100, 101, 102, 103, 104, 105, 10, 11]);
    }

    #[test]
    fn copies_between_different_cuts() {
        let (from, to) = (pieces(), IoBuf::alloc(12, 4096).unwrap());
        to.copy_from(&from);
        assert_eq!(to.to_vec(), from.to_vec());
        let cut = IoBuf::concat(&[to.slice(0, 1), to.slice(1, 11)]);
        from.fill(7);
        from.copy_from(&cut);
        assert_eq!(from.to_vec(), (0..12).collect::<Vec<u8>>());
    }

    #[test]
    fn overlapping_copies_move_as_a_whole() {
        let buf = IoBuf::from_slice(&[1, 2, 3, 4]).unwrap();
        buf.slice(1, 3).copy_from(&buf.slice(0, 3));
        assert_eq!(buf.to_vec(), [1, 1, 2, 3]);
    }

    #[test]
    fn zeroes_are_told_in_steps_as_well() {
        crate::rt::run_control(async |_| {
            let (page, other) = (IoBuf::alloc(4096, 512).unwrap(), IoBuf::alloc(4096, 512).unwrap());
            let mut pages = vec![page; 3 * usize::try_from(STEP).unwrap() / 4096];
            assert!(IoBuf::concat(&pages).is_zero_in_steps().await);
            other.write_at(4095, &[1]);
            for place in [0, 256, pages.len() - 1] {
                let before = std::mem::replace(&mut pages[place], other.clone());
                assert!(!IoBuf::concat(&pages).is_zero_in_steps().await, "{place}");
                pages[place] = before;
            }
            assert!(IoBuf::empty().is_zero_in_steps().await);
        });
    }

    #[test]
    fn one_byte_that_is_not_zero_is_found() {
        let buf = IoBuf::alloc(3 * 4096 + 5, 512).unwrap();
        assert!(buf.is_zero());
        for at in [0, 4095, 4096, 3 * 4096 + 4] {
            buf.fill(0);
            buf.write_at(at, &[1]);
            assert!(!buf.is_zero(), "at {at}");
        }
    }

    #[test]
    fn one_byte_that_differs_is_found() {
        let (one, other) = (pieces(), IoBuf::alloc(12, 4096).unwrap());
        other.copy_from(&one);
        assert!(one.has_bytes_of(&other) && !one.has_bytes_of(&other.slice(0, 11)));
        for at in 0..12 {
            other.copy_from(&one);
            other.write_at(at, &[200]);
            assert!(!one.has_bytes_of(&other), "at {at}");
        }
        let (long, longer) = (IoBuf::alloc(9000, 1).unwrap(), IoBuf::alloc(9000, 1).unwrap());
        longer.write_at(8999, &[1]);
        assert!(!long.has_bytes_of(&longer));
    }

    #[test]
    fn alignment_is_that_of_every_segment() {
        let buf = IoBuf::alloc(8192, 4096).unwrap();
        assert!(buf.is_aligned(4096, 4096));
        assert!(!buf.slice(512, 4096).is_aligned(4096, 512));
        assert!(buf.slice(512, 4096).is_aligned(512, 512));
        assert!(!IoBuf::concat(&[buf.clone(), buf.slice(0, 100)]).is_aligned(512, 512));
    }

    #[test]
    fn memory_lives_as_long_as_its_last_slice() {
        struct Witness(Rc<std::cell::Cell<bool>>);
        impl Drop for Witness {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }
        let gone = Rc::new(std::cell::Cell::new(false));
        // SAFETY: there is no segment.
        let buf = unsafe { IoBuf::from_segments([], Rc::new(Witness(gone.clone()))) };
        let joined = IoBuf::concat(&[buf.slice(0, 0), IoBuf::alloc(1, 1).unwrap()]);
        drop(buf);
        assert!(!gone.get());
        drop(joined);
        assert!(gone.get());
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn a_slice_past_the_end_is_our_bug() {
        pieces().slice(u64::MAX, 2);
    }

    #[test]
    fn too_much_memory_is_an_error() {
        assert_eq!(IoBuf::alloc(isize::MAX as usize - 4096, 4096).unwrap_err(), IoError::NoMemory);
        assert!(IoBuf::alloc(0, 4096).unwrap().is_empty());
    }
}
