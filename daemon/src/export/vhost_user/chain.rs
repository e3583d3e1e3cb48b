//! A descriptor chain after it was read and validated: what the device may read, then what it may write.
//!
//! Framing is the driver's choice (virtio 1.3, 2.7.4): the header is the first 16 readable bytes and the status the
//! last writable one, however they are cut into descriptors.

use std::cell::Cell;

use super::memory::{MemoryMap, Piece};
use super::request::HEADER;

/// Bytes of a chain at the most (virtio 1.3, 2.7.4.1).
const MAX_BYTES: u64 = 1 << 32;

/// Pieces of a chain at the most: twice the descriptors that a ring can have, for those that cross regions.
const MAX_PIECES: usize = 1 << 16;

/// Why a queue cannot go on: the driver did what no driver may do, so there is nothing to answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// A queue of this size cannot be.
    Size(u16),
    /// A part of the ring at this guest address is not inside one memory region, or not aligned.
    Ring(u64),
    /// The available index ran ahead by more than the queue has entries.
    AvailJump(u16),
    /// A descriptor index is outside its table.
    Index(u16),
    /// A head was offered again before it was given back.
    HeadTwice(u16),
    /// A chain has more descriptors than its table.
    Endless,
    /// Guest memory at this address is not mapped.
    Address(u64),
    /// An indirect table was used although it was not negotiated.
    IndirectNotNegotiated,
    /// An indirect table inside another.
    IndirectNested,
    /// A descriptor of an indirect table that says there is a next one.
    IndirectNext,
    /// An indirect table of this many bytes.
    IndirectLength(u32),
    /// A readable descriptor after a writable one.
    Order,
    /// More than 2^32 bytes.
    TooLong,
    /// More pieces than a chain of the largest ring can need.
    TooManyPieces,
    /// Fewer than 16 readable bytes, or an empty descriptor at the front.
    NoHeader,
    /// No writable byte for the status, or an empty descriptor at the end.
    NoStatus,
    /// Guest memory has vanished (its file was shrunk).
    MemoryLost,
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Size(size) => write!(f, "a ring of {size} entries is impossible"),
            Self::Ring(gpa) => {
                write!(f, "a part of the ring, at {gpa:#x}, is not inside one memory region, or misaligned")
            }
            Self::AvailJump(by) => write!(f, "the available index jumped ahead by {by}"),
            Self::Index(index) => write!(f, "descriptor index {index} is outside its table"),
            Self::HeadTwice(head) => write!(f, "descriptor {head} was offered twice"),
            Self::Endless => f.write_str("a descriptor chain has no end"),
            Self::Address(gpa) => write!(f, "guest address {gpa:#x} is not mapped"),
            Self::IndirectNotNegotiated => f.write_str("indirect descriptors were not negotiated"),
            Self::IndirectNested => f.write_str("an indirect table is inside another"),
            Self::IndirectNext => f.write_str("a descriptor of an indirect table has a successor"),
            Self::IndirectLength(len) => write!(f, "an indirect table has {len} bytes"),
            Self::Order => f.write_str("a readable descriptor comes after a writable one"),
            Self::TooLong => f.write_str("a descriptor chain is longer than 4 GiB"),
            Self::TooManyPieces => f.write_str("a descriptor chain is cut into too many pieces by the memory table"),
            Self::NoHeader => f.write_str("a request has no complete header"),
            Self::NoStatus => f.write_str("a request has no room for its status"),
            Self::MemoryLost => f.write_str("guest memory has vanished"),
        }
    }
}

/// See the module's head. One is used again and again, so that its lists need no allocation.
#[derive(Debug, Default)]
pub(super) struct Chain {
    head: u16,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    readable_len: u64,
    writable_len: u64,
    first_is_empty: bool,
    last_is_empty: bool,
    descriptors: u32,
}

impl Chain {
    /// Forgets what was there and begins at `head`.
    pub(super) fn start(&mut self, head: u16) {
        self.readable.clear();
        self.writable.clear();
        let (readable, writable) = (std::mem::take(&mut self.readable), std::mem::take(&mut self.writable));
        *self = Self { head, readable, writable, ..Self::default() };
    }

    /// Adds a descriptor.
    #[inline]
    pub(super) fn push(
        &mut self,
        map: &MemoryMap,
        addr: u64,
        len: u32,
        writable: bool,
        hint: &Cell<usize>,
    ) -> Result<(), Broken> {
        self.first_is_empty |= self.descriptors == 0 && len == 0;
        self.last_is_empty = len == 0;
        self.descriptors += 1;
        let (pieces, total) = match writable {
            true => (&mut self.writable, &mut self.writable_len),
            false if self.writable_len != 0 => return Err(Broken::Order),
            false => (&mut self.readable, &mut self.readable_len),
        };
        *total += u64::from(len);
        let (mut at, mut left) = (addr, u64::from(len));
        while left != 0 {
            let piece = map.translate(at, left, hint).ok_or(Broken::Address(at))?;
            if pieces.len() == MAX_PIECES {
                return Err(Broken::TooManyPieces);
            }
            pieces.push(piece);
            left -= piece.len;
            if left != 0 {
                at = at.checked_add(piece.len).ok_or(Broken::Address(addr))?;
            }
        }
        if self.readable_len + self.writable_len > MAX_BYTES { Err(Broken::TooLong) } else { Ok(()) }
    }

    /// All descriptors are there: the chain can carry a header and a status, or the queue is broken.
    pub(super) fn finish(&self) -> Result<(), Broken> {
        if self.readable_len < HEADER as u64 || self.first_is_empty {
            return Err(Broken::NoHeader);
        }
        if self.writable_len == 0 || self.last_is_empty {
            return Err(Broken::NoStatus);
        }
        Ok(())
    }

    /// How many descriptors were read, empty ones among them.
    pub(super) fn descriptors(&self) -> u32 {
        self.descriptors
    }

    /// Its first descriptor's index, by which it is given back.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Copies the header out and takes it off the readable bytes. Once, after [`Chain::finish`].
    #[inline]
    pub(super) fn take_header(&mut self, map: &MemoryMap) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        take_front(&mut self.readable, map, &mut header);
        self.readable_len -= HEADER as u64;
        header
    }

    /// Takes the status byte off the writable ones. Once, after [`Chain::finish`].
    #[inline]
    pub(super) fn take_status(&mut self) -> Piece {
        let last = self.writable.last_mut().expect("there is a writable byte");
        let status = last.after(last.len - 1);
        *last = last.first(last.len - 1);
        if last.len == 0 {
            self.writable.pop();
        }
        self.writable_len -= 1;
        status
    }

    /// Copies the first readable bytes that are left; there are at least `N`.
    pub(super) fn peek<const N: usize>(&self, map: &MemoryMap) -> [u8; N] {
        let mut bytes = [0; N];
        take_front(&mut self.readable.clone(), map, &mut bytes);
        bytes
    }

    /// What the device may read, without the parts taken.
    pub(super) fn readable(&self) -> (&[Piece], u64) {
        (&self.readable, self.readable_len)
    }

    /// What the device may write, without the parts taken.
    pub(super) fn writable(&self) -> (&[Piece], u64) {
        (&self.writable, self.writable_len)
    }
}

fn take_front(pieces: &mut Vec<Piece>, map: &MemoryMap, out: &mut [u8]) {
    let (mut done, mut whole) = (0, 0);
    while done < out.len() {
        let piece = pieces[whole];
        let part = piece.first(piece.len.min((out.len() - done) as u64));
        let end = done + usize::try_from(part.len).expect("no longer than `out`");
        map.copy_out(part, &mut out[done..end]);
        done = end;
        if part.len == piece.len {
            whole += 1;
        } else {
            pieces[whole] = piece.after(part.len);
        }
    }
    pieces.drain(..whole);
}
