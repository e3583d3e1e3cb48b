//! Where in the log the next entry goes, and which entries are there: numbers only, no I/O.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::base::{ByteRange, IoError};

/// The log of a node that is in use. Requests of all threads come here for their places, one after another.
pub(super) struct Journal {
    /// Bytes in a log sector.
    pub(super) sector: u32,
    places: Mutex<Places>,
}

struct Places {
    /// The log sector of the next entry.
    next: u64,
    /// Entries that have a place.
    entries: u64,
    /// Entries that have a place and are not there yet.
    pending: BTreeSet<u64>,
    /// Entries that the superblock counts.
    counted: u64,
    /// The superblock has to count this many.
    due: u64,
    /// The size of the disk that the last entry was made under.
    size: Option<u64>,
    /// An entry is missing: the log ends before it.
    broken: Option<IoError>,
}

/// An entry's place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    number: u64,
    /// Its bytes, data included.
    pub(super) at: ByteRange,
}

/// The places of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// The disk has another size than it had under the entry before: a remark that says so goes first.
    pub(super) resized: Option<Place>,
    pub(super) entry: Place,
}

impl Journal {
    /// A log that has `entries` entries, the last of which ends before sector `next`.
    pub(super) fn new(sector: u32, next: u64, entries: u64) -> Self {
        let pending = BTreeSet::new();
        let places = Places { next, entries, pending, counted: entries, due: 0, size: None, broken: None };
        Self { sector, places: Mutex::new(places) }
    }

    /// The next place for an entry with `data` sectors, made under a disk of `size` bytes. `room`: bytes of the log.
    pub(super) fn place(&self, data: u64, size: u64, room: u64) -> Result<Placed, IoError> {
        let mut places = self.lock();
        if let Some(error) = places.broken {
            return Err(error);
        }
        let other_size = places.size.replace(size).is_some_and(|before| before != size);
        let resized = if other_size { Some(places.take(self.sector, 0, room)?) } else { None };
        let entry = places.take(self.sector, data, room)?;
        Ok(Placed { resized, entry })
    }

    /// The entry is there, or it failed. `due`: the superblock has to count it. Gives true where the superblock has to
    /// be written.
    pub(super) fn settle(&self, place: Place, result: Result<(), IoError>, due: bool) -> bool {
        let mut places = self.lock();
        match result {
            Ok(()) => _ = places.pending.remove(&place.number),
            Err(error) => _ = places.broken.get_or_insert(error),
        }
        if due {
            places.due = places.due.max(place.number + 1);
        }
        places.due > places.counted && places.complete() > places.counted
    }

    /// Fails once an entry is missing.
    pub(super) fn goes_on(&self) -> Result<(), IoError> {
        self.lock().broken.map_or(Ok(()), Err)
    }

    /// Something was written that the log will not have.
    pub(super) fn end(&self, error: IoError) -> IoError {
        *self.lock().broken.get_or_insert(error)
    }

    /// How many entries are there with all before them, if the superblock does not say so.
    pub(super) fn uncounted(&self) -> Option<u64> {
        let places = self.lock();
        Some(places.complete()).filter(|complete| *complete > places.counted)
    }

    /// The superblock counts `entries`.
    pub(super) fn counted(&self, entries: u64) {
        self.lock().counted = entries;
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The entry is the last of `interval` since a multiple of that.
    pub(super) fn ends(self, interval: u64) -> bool {
        (self.number + 1).is_multiple_of(interval)
    }
}

impl Places {
    fn complete(&self) -> u64 {
        self.pending.first().copied().unwrap_or(self.entries)
    }

    /// Who finds no room has written what the log will not have: the log ends here.
    fn take(&mut self, sector: u32, data: u64, room: u64) -> Result<Place, IoError> {
        let bytes = |sectors: u64| sectors.checked_mul(sector.into());
        let end = data.checked_add(1).and_then(|len| self.next.checked_add(len));
        let at = end.and_then(|end| ByteRange::between(bytes(self.next)?, bytes(end)?)).filter(|at| at.end() <= room);
        let (Some(end), Some(at)) = (end, at) else {
            self.broken = Some(IoError::NoSpace);
            return Err(IoError::NoSpace);
        };
        let number = self.entries;
        self.entries += 1;
        self.next = end;
        self.pending.insert(number);
        Ok(Place { number, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 1 << 20;

    fn place(journal: &Journal, data: u64) -> Place {
        journal.place(data, 4096, ROOM).unwrap().entry
    }

    #[test]
    fn the_superblock_counts_what_has_no_gap_before_it() {
        let journal = Journal::new(512, 1, 0);
        let (first, second) = (place(&journal, 1), place(&journal, 2));
        assert_eq!((first.at, second.at), (ByteRange::new(512, 1024).unwrap(), ByteRange::new(1536, 1536).unwrap()));
        assert!(!journal.settle(second, Ok(()), true), "the first is not there yet");
        assert_eq!(journal.uncounted(), None);
        assert!(journal.settle(first, Ok(()), false), "the second is still owed");
        assert_eq!(journal.uncounted(), Some(2));
        journal.counted(2);
        assert!(!journal.settle(place(&journal, 0), Ok(()), false));
    }

    #[test]
    fn a_log_ends_before_a_missing_entry() {
        let journal = Journal::new(512, 1, 0);
        let (first, second) = (place(&journal, 1), place(&journal, 1));
        journal.settle(first, Err(IoError::Os(5)), true);
        journal.settle(second, Ok(()), true);
        assert_eq!(journal.uncounted(), None);
        assert_eq!(journal.place(0, 4096, ROOM), Err(IoError::Os(5)));
        let full = Journal::new(512, 1, 0);
        assert_eq!(full.place(1, 4096, 1024), Err(IoError::NoSpace));
        assert_eq!(full.place(0, 4096, 1024), Err(IoError::NoSpace), "it would fit, but one is missing before it");
    }

    #[test]
    fn another_size_is_remarked_once_and_first() {
        let journal = Journal::new(512, 1, 0);
        assert_eq!(journal.place(1, 4096, ROOM).unwrap().resized, None);
        let placed = journal.place(1, 8192, ROOM).unwrap();
        assert!(placed.resized.unwrap().number < placed.entry.number);
        assert_eq!(journal.place(1, 8192, ROOM).unwrap().resized, None);
    }

    #[test]
    fn an_interval_ends_with_its_last_entry() {
        let journal = Journal::new(512, 1, 6);
        assert!(!place(&journal, 0).ends(4) && place(&journal, 0).ends(4) && place(&journal, 0).ends(1));
    }
}
