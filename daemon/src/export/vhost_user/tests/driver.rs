//! The guest's side of a ring, as plain as can be: descriptors are taken in order and never given back.
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

use std::sync::Arc;

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::export::vhost_user::memory::{MemoryMap, Quota, SharedFile, SharedMap};
use crate::export::vhost_user::ring::Addresses;

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// One descriptor: address, length, flags, next.
pub(crate) type Desc = (u64, u32, u16, u16);

/// Regions (guest address, length) as a guest has them, and as we do.
pub(crate) fn shared(regions: &[(u64, usize)]) -> (GuestMemoryMmap<()>, MemoryMap) {
    let quota = Quota::default();
    let (guests, ours): (Vec<_>, Vec<_>) = regions
        .iter()
        .map(|(gpa, len)| {
            let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&file, *len as u64).unwrap();
            let map = SharedMap::new(&SharedFile::new(&file, 0, *len as u64).unwrap(), &quota).unwrap();
            let guest = (GuestAddress(*gpa), *len, Some(FileOffset::new(std::fs::File::from(file), 0)));
            (guest, (*gpa, Arc::new(map)))
        })
        .unzip();
    (GuestMemoryMmap::from_ranges_with_files(&guests).unwrap(), MemoryMap::new(ours.into_iter()))
}

/// A driver over memory that it shares with the device.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap<()>,
    pub(crate) size: u16,
    pub(crate) at: Addresses,
    pub(crate) offered: u16,
    pub(crate) seen: u16,
    next: u16,
}

impl Driver {
    /// A ring of `size` entries at `base`, its parts a page or more apart.
    pub(crate) fn new(memory: &GuestMemoryMmap<()>, size: u16, base: u64) -> Self {
        let part = (u64::from(size) * 16 + 4096) & !4095;
        let at = Addresses { desc: base, avail: base + part, used: base + 2 * part };
        Self { memory: memory.clone(), size, at, offered: 0, seen: 0, next: 0 }
    }

    pub(crate) fn put<const N: usize>(&self, gpa: u64, bytes: [u8; N]) {
        self.memory.write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn get<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    pub(crate) fn put_desc(&self, table: u64, index: u16, (addr, len, flags, next): Desc) {
        let word = u128::from(addr) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.put(table + 16 * u64::from(index), word.to_le_bytes());
    }

    /// Links the buffers (address, length, writable) into a chain and offers it. Gives its head.
    pub(crate) fn offer(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next;
        for (n, (addr, len, writable)) in buffers.iter().enumerate() {
            let index = (head + n as u16) % self.size;
            let last = n + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 };
            self.put_desc(self.at.desc, index, (*addr, *len, flags, (index + 1) % self.size));
        }
        self.next = (head + buffers.len() as u16) % self.size;
        self.offer_head(head);
        head
    }

    /// Offers what begins at `head`.
    pub(crate) fn offer_head(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        self.put(self.at.avail + 4 + 2 * slot, head.to_le_bytes());
        self.set_avail(self.offered.wrapping_add(1));
    }

    pub(crate) fn set_avail(&mut self, index: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.offered = index;
        self.put(self.at.avail + 2, index.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        self.put(self.at.avail + 4 + 2 * u64::from(self.size), index.to_le_bytes());
    }

    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le_bytes(self.get(self.at.used + 2))
    }

    /// The next chain that came back: head and bytes written.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let slot = self.at.used + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((u32::from_le_bytes(self.get(slot)), u32::from_le_bytes(self.get(slot + 4))))
    }
}
