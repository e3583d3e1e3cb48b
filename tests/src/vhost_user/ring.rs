//! The driver's half of a split virtqueue, with every index and descriptor at the test's mercy.
//!
//! Nothing here waits or notifies: kicks and interrupts are the client's.

use super::memory::{GuestMemory, user_address};
use super::protocol::VringAddr;
use std::sync::Arc;

/// Descriptor flag: another descriptor follows, see `next`.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes this buffer.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One descriptor, as it stands in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`], or anything else.
    pub flags: u16,
    /// Index of the next descriptor where flags say so.
    pub next: u16,
}

impl Desc {
    /// Bytes of one descriptor.
    pub const LEN: u64 = 16;

    /// The descriptor's bytes.
    pub fn bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.addr.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

/// A buffer that the device reads.
pub fn readable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: 0, next: 0 }
}

/// A buffer that the device writes.
pub fn writable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: WRITE, next: 0 }
}

/// Sets [`NEXT`] and `next` in all but the last of `bufs`, as if they stood in a table from index `first` on.
pub fn linked(first: u16, bufs: &[Desc]) -> Vec<Desc> {
    let last = bufs.len() - 1;
    let link = |(at, desc): (usize, &Desc)| {
        if at == last {
            return *desc;
        }
        Desc { flags: desc.flags | NEXT, next: first + at as u16 + 1, ..*desc }
    };
    bufs.iter().enumerate().map(link).collect()
}

/// Where the three parts of a ring are in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

impl RingPlace {
    /// The parts one after the other, each on a page of its own, from `base` on.
    pub fn packed_at(base: u64, size: u16) -> Self {
        let page = |bytes: u64| bytes.next_multiple_of(4096);
        let avail = base + page(Desc::LEN * u64::from(size));
        Self { desc: base, avail, used: avail + page(avail_bytes(size)) }
    }

    /// Bytes that [`RingPlace::packed_at`] takes.
    pub fn packed_len(size: u16) -> u64 {
        Self::packed_at(0, size).used + used_bytes(size).next_multiple_of(4096)
    }

    /// The payload that announces these places for queue `index`.
    pub fn announced(self, index: u32) -> VringAddr {
        let Self { desc, avail, used } = self;
        let [desc, avail, used] = [desc, avail, used].map(user_address);
        VringAddr { index, flags: 0, desc, used, avail, log: 0 }
    }
}

/// Bytes of an available ring with its event word.
pub fn avail_bytes(size: u16) -> u64 {
    6 + 2 * u64::from(size)
}

/// Bytes of a used ring with its event word.
pub fn used_bytes(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

/// One entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that is done.
    pub head: u32,
    /// Bytes that the device says it has written.
    pub len: u32,
}

/// A ring and what the driver remembers of it.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    place: RingPlace,
    size: u16,
    avail_idx: u16,
    used_seen: u16,
}

impl Ring {
    /// A ring of `size` descriptors at `place`, its indices at `base` (0 after a reset).
    pub fn new(memory: Arc<GuestMemory>, place: RingPlace, size: u16, base: u16) -> Self {
        let ring = Self { memory, place, size, avail_idx: base, used_seen: base };
        ring.set_avail_flags(0);
        ring.store_avail_idx(base);
        ring.memory.store_u16(place.used, 0);
        ring.memory.store_u16(place.used + 2, base);
        ring.set_used_event(base);
        ring
    }

    /// Where it is.
    pub fn place(&self) -> RingPlace {
        self.place
    }

    /// Descriptors in its table.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Writes one descriptor of the table.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        self.memory.write(self.place.desc + Desc::LEN * u64::from(index), &desc.bytes());
    }

    /// Writes `bufs` as one chain from table index `first` on, which becomes its head.
    pub fn write_chain(&self, first: u16, bufs: &[Desc]) {
        for (index, desc) in (first..).zip(linked(first, bufs)) {
            self.write_desc(index, desc);
        }
    }

    /// Makes `head` available.
    pub fn publish(&mut self, head: u16) {
        self.write_head(head);
        self.store_avail_idx(self.avail_idx);
    }

    /// Makes all of `heads` available at once.
    pub fn publish_all(&mut self, heads: &[u16]) {
        heads.iter().for_each(|&head| self.write_head(head));
        self.store_avail_idx(self.avail_idx);
    }

    /// The next index that [`Ring::publish`] gives out.
    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// Says that the available index is `index`, true or not.
    pub fn store_avail_idx(&self, index: u16) {
        self.memory.store_u16(self.place.avail + 2, index);
    }

    /// Sets the available ring's flags word (bit 0: no interrupts, please).
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory.store_u16(self.place.avail, flags);
    }

    /// Asks for an interrupt once used index `index` has been passed (with `EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        self.memory.store_u16(self.place.avail + 4 + 2 * u64::from(self.size), index);
    }

    /// The available index after which the device wants a kick (with `EVENT_IDX`).
    pub fn avail_event(&self) -> u16 {
        self.memory.load_u16(self.place.used + 4 + 8 * u64::from(self.size))
    }

    /// The used index as the device left it.
    pub fn used_idx(&self) -> u16 {
        self.memory.load_u16(self.place.used + 2)
    }

    /// The used index up to which entries have been taken.
    pub fn used_seen(&self) -> u16 {
        self.used_seen
    }

    /// The next entry of the used ring, where there is one.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.used_seen {
            return None;
        }
        let slot = self.place.used + 4 + 8 * u64::from(self.used_seen % self.size);
        self.used_seen = self.used_seen.wrapping_add(1);
        Some(Used { head: self.memory.u32(slot), len: self.memory.u32(slot + 4) })
    }

    fn write_head(&mut self, head: u16) {
        let slot = self.place.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.memory.store_u16(slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }
}
