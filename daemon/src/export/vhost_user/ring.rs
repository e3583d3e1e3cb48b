//! A split virtqueue, owned by the thread that serves it (virtio 1.3, 2.7).
//!
//! The three parts are host pointers, validated when they are resolved. Each descriptor is read once, into local
//! memory, and the copy is validated: the guest may change the original at any time. Whatever cannot be true ends in
//! [`Broken`]; what a chain asks for is `request.rs`.
#![expect(unsafe_code, reason = "the ring is shared with the guest, through raw pointers")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::{Broken, Chain};
use super::memory::MemoryMap;

/// Descriptors in an indirect table at the most.
pub(super) const MAX_INDIRECT: u32 = 1024;
/// Largest queue that the specification allows.
pub(super) const MAX_SIZE: u16 = 32768;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `VIRTQ_USED_F_NO_NOTIFY`: the device looks by itself, no kick is needed.
const NO_NOTIFY: u16 = 1;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver looks by itself, no call is needed.
const NO_INTERRUPT: u16 = 1;

/// Where the ring is, in guest physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Descriptor table.
    pub(super) desc: u64,
    /// What the driver offers.
    pub(super) avail: u64,
    /// What the device is done with.
    pub(super) used: u64,
}

/// Bytes of the three parts of a ring of `size` entries.
pub(super) fn part_sizes(size: u16) -> [u64; 3] {
    let size = u64::from(size);
    [16 * size, 6 + 2 * size, 6 + 8 * size]
}

/// What was negotiated about the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RingFeatures {
    /// `VIRTIO_RING_F_EVENT_IDX`.
    pub(super) event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC`.
    pub(super) indirect: bool,
}

#[derive(Clone, Copy)]
struct Parts {
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
}

/// See the module's head.
pub(super) struct Ring {
    size: u16,
    features: RingFeatures,
    parts: Parts,
    next_avail: u16,
    next_used: u16,
    /// Nothing was taken yet.
    fresh: bool,
    /// `used.idx` as the driver sees it.
    published: u16,
    /// Up to where it has been decided whether the driver is called.
    announced: u16,
    /// Heads that were taken and not given back yet.
    taken: Vec<bool>,
    hint: Cell<usize>,
}

impl Ring {
    /// Starts at `base`; the used index is where the ring in memory says.
    ///
    /// # Errors
    /// Where a part is not inside one region, or not aligned.
    pub(super) fn start(
        map: &MemoryMap,
        size: u16,
        at: Addresses,
        base: u16,
        features: RingFeatures,
    ) -> Result<Self, Broken> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(Broken::Size(size));
        }
        let parts = resolve(map, size, at)?;
        // SAFETY: inside the used ring, and `resolve` has checked its alignment.
        let used = unsafe { word(parts.used, 2) }.load(Ordering::Acquire);
        Ok(Self {
            size,
            features,
            parts,
            next_avail: base,
            next_used: used,
            fresh: true,
            published: used,
            announced: used,
            taken: vec![false; usize::from(size)],
            hint: Cell::new(0),
        })
    }

    /// The same ring after the memory or the addresses have changed.
    pub(super) fn move_to(&mut self, map: &MemoryMap, at: Addresses) -> Result<(), Broken> {
        self.parts = resolve(map, self.size, at)?;
        self.hint.set(0);
        Ok(())
    }

    /// Nothing was taken yet: it may as well be started anew.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// What was negotiated has changed.
    pub(super) fn set_features(&mut self, features: RingFeatures) {
        self.features = features;
    }

    /// Where to go on: the index of the next entry of the available ring that was not taken.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// How many chains wait.
    #[inline]
    pub(super) fn waiting(&self) -> Result<u16, Broken> {
        let index = self.avail(2).load(Ordering::Acquire);
        let waiting = index.wrapping_sub(self.next_avail);
        if waiting > self.size { Err(Broken::AvailJump(waiting)) } else { Ok(waiting) }
    }

    /// Takes the next chain, of which [`Ring::waiting`] has told.
    #[inline]
    pub(super) fn take(&mut self, map: &MemoryMap, chain: &mut Chain) -> Result<(), Broken> {
        self.fresh = false;
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = self.avail(4 + 2 * slot).load(Ordering::Relaxed);
        let taken = self.taken.get_mut(usize::from(head)).ok_or(Broken::Index(head))?;
        if std::mem::replace(taken, true) {
            return Err(Broken::HeadTwice(head));
        }
        chain.start(head);
        self.walk(map, head, chain)?;
        chain.finish()?;
        // What cannot be answered stays where it is: the base points to it.
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    fn walk(&self, map: &MemoryMap, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                return Err(Broken::Index(index));
            }
            let descriptor = self.descriptor(index);
            if descriptor.flags & INDIRECT != 0 {
                return self.walk_indirect(map, descriptor, chain);
            }
            chain.push(map, descriptor.addr, descriptor.len, descriptor.flags & WRITE != 0, &self.hint)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Broken::Endless)
    }

    fn walk_indirect(&self, map: &MemoryMap, table: Descriptor, chain: &mut Chain) -> Result<(), Broken> {
        if !self.features.indirect {
            return Err(Broken::IndirectNotNegotiated);
        }
        if table.flags & NEXT != 0 {
            return Err(Broken::IndirectNext);
        }
        let count = table.len / 16;
        if count == 0 || !table.len.is_multiple_of(16) || count > MAX_INDIRECT {
            return Err(Broken::IndirectLength(table.len));
        }
        let mut index = 0;
        for _ in 0..count {
            let mut bytes = [0; 16];
            let at = table.addr.checked_add(16 * u64::from(index)).ok_or(Broken::Address(table.addr))?;
            if !map.read(at, &mut bytes, &self.hint) {
                return Err(Broken::Address(at));
            }
            let descriptor = Descriptor::parse(u128::from_le_bytes(bytes));
            if descriptor.flags & INDIRECT != 0 {
                return Err(Broken::IndirectNested);
            }
            chain.push(map, descriptor.addr, descriptor.len, descriptor.flags & WRITE != 0, &self.hint)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next);
            if index >= count {
                return Err(Broken::Index(descriptor.next));
            }
        }
        Err(Broken::Endless)
    }

    #[inline]
    fn descriptor(&self, index: u16) -> Descriptor {
        assert!(index < self.size, "checked by the caller");
        // SAFETY: inside the table, which has `size` entries.
        let at = unsafe { self.parts.desc.add(16 * usize::from(index)) };
        // SAFETY: mapped and aligned to 16 (`resolve`); volatile, and once, because the guest may be writing.
        Descriptor::parse(u128::from_le(unsafe { at.cast::<u128>().read_volatile() }))
    }

    /// Gives a chain back: `written` bytes were written. The driver sees it after [`Ring::publish`].
    #[inline]
    pub(super) fn give_back(&mut self, head: u16, written: u32) {
        let taken = std::mem::replace(&mut self.taken[usize::from(head)], false);
        assert!(taken, "a chain is given back once");
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: inside the used ring, which has `size` elements after its 4 leading bytes.
        let at = unsafe { self.parts.used.add(4 + 8 * slot) };
        // SAFETY: mapped and writable; aligned to 4 only, hence in two halves.
        unsafe { at.cast::<[u32; 2]>().write_volatile([u32::from(head), written].map(u32::to_le)) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver everything given back so far. Whether it is called for it is [`Ring::announce`].
    /// Gives what was written to the used ring, for the dirty log: offset and length in bytes.
    #[inline]
    pub(super) fn publish(&mut self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (from, size) = (self.published, self.size);
        let count = self.next_used.wrapping_sub(from);
        if count > 0 {
            self.published = self.next_used;
            self.used(2).store(self.published.to_le(), Ordering::Release);
        }
        let elements = (0..count).map(move |i| (4 + 8 * u64::from(from.wrapping_add(i) & (size - 1)), 8));
        elements.chain((count > 0).then_some((2, 2)))
    }

    /// How many published answers the driver has not been called for, nor found not to want it.
    #[inline]
    pub(super) fn unannounced(&self) -> u16 {
        self.published.wrapping_sub(self.announced)
    }

    /// True where the driver wants to be called for what was published since this was asked last.
    #[inline]
    pub(super) fn announce(&mut self) -> bool {
        let (old, new) = (self.announced, self.published);
        if old == new {
            return false;
        }
        self.announced = new;
        // The driver sets its event before it looks at the index a last time; we do it the other way round.
        fence(Ordering::SeqCst);
        if self.features.event_idx {
            let event = u16::from_le(self.avail(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed));
            crossed(event, old, new)
        } else {
            u16::from_le(self.avail(0).load(Ordering::Relaxed)) & NO_INTERRUPT == 0
        }
    }

    /// Asks the driver for kicks, or tells it that none are needed. After asking, look at [`Ring::waiting`] again.
    /// What was written to the used ring, if anything was: offset and length in bytes.
    pub(super) fn want_kicks(&self, wanted: bool) -> Option<(u64, u64)> {
        let event = 4 + 8 * usize::from(self.size);
        let (at, value) = match (self.features.event_idx, wanted) {
            // The driver has crossed the event, and without an update does not cross it again.
            (true, false) if self.waiting() != Ok(0) => return None,
            (true, false) => (event, self.next_avail.wrapping_sub(1)),
            (true, true) => (event, self.next_avail),
            (false, true) => (0, 0),
            (false, false) => (0, NO_NOTIFY),
        };
        self.used(at).store(value.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Some((at as u64, 2))
    }

    #[inline]
    fn avail(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset as u64 + 2 <= part_sizes(self.size)[1]);
        // SAFETY: inside the available ring, at an even offset from an even address (`resolve`).
        unsafe { word(self.parts.avail, offset) }
    }

    #[inline]
    fn used(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset as u64 + 2 <= part_sizes(self.size)[2]);
        // SAFETY: inside the used ring, at an even offset from an even address (`resolve`).
        unsafe { word(self.parts.used, offset) }
    }
}

#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "each field is its own part of the 16 bytes")]
    fn parse(bytes: u128) -> Self {
        Self { addr: bytes as u64, len: (bytes >> 64) as u32, flags: (bytes >> 96) as u16, next: (bytes >> 112) as u16 }
    }
}

/// True where an index that went from `old` to `new` has passed `event`, in 16-bit arithmetic (virtio 1.3, 2.7.7.2).
#[inline]
fn crossed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn resolve(map: &MemoryMap, size: u16, at: Addresses) -> Result<Parts, Broken> {
    let part = |gpa: u64, len: u64, align: usize| {
        let host = map.contiguous(gpa, len).ok_or(Broken::Ring(gpa))?;
        // Regions begin at pages, so guest alignment is host alignment; a frontend that lies about it is caught here.
        if (host as usize).is_multiple_of(align) { Ok(host) } else { Err(Broken::Ring(gpa)) }
    };
    let [desc, avail, used] = part_sizes(size);
    Ok(Parts { desc: part(at.desc, desc, 16)?, avail: part(at.avail, avail, 2)?, used: part(at.used, used, 4)? })
}

/// # Safety
/// `base + offset` must be mapped for two bytes, and even; it must stay so while the reference lives.
#[inline]
unsafe fn word<'a>(base: *mut u8, offset: usize) -> &'a AtomicU16 {
    // SAFETY: the caller's promise.
    let at = unsafe { base.add(offset) };
    // SAFETY: the caller's promise; all sharers use atomic, or at least untorn, accesses on these words.
    unsafe { AtomicU16::from_ptr(at.cast()) }
}

#[cfg(test)]
mod tests;
