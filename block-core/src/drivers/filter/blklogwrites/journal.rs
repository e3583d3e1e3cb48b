//! Where in the log the next entry goes, and which entries are there: numbers only, no I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::base::{ByteRange, IoError};
use crate::graph::haste::Haste;

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
    /// Entries that have a place and are not there yet, with how to hurry those who write them.
    pending: BTreeMap<u64, Arc<Haste>>,
    /// Those who wait for entries of others.
    waiting: Vec<Waker>,
    /// Entries that the superblock counts.
    counted: u64,
    /// The superblock has to count this many.
    due: u64,
    /// The size of the disk that the last entry was made under.
    size: Option<u64>,
    /// An entry is missing: the log ends before it.
    broken: Option<IoError>,
}

/// An entry's place in the log. Dropped before it is settled, the entry is missing.
pub(super) struct Place<'j> {
    journal: &'j Journal,
    pub(super) number: u64,
    /// Its bytes, data included.
    pub(super) at: ByteRange,
    is_settled: bool,
}

/// The places of a request.
pub(super) struct Placed<'j> {
    /// The disk has another size than it had under the entry before: a remark that says so goes first.
    pub(super) resized: Option<Place<'j>>,
    pub(super) entry: Place<'j>,
}

/// A change of the disk that has no place yet. Dropped before it is told that there is one, the log lacks it.
pub(super) struct Owed<'j>(Option<&'j Journal>);

impl Journal {
    /// A log that has `entries` entries, the last of which ends before sector `next`.
    pub(super) fn new(sector: u32, next: u64, entries: u64) -> Self {
        let (pending, waiting) = (BTreeMap::new(), Vec::new());
        let places = Places { next, entries, pending, waiting, counted: entries, due: 0, size: None, broken: None };
        Self { sector, places: Mutex::new(places) }
    }

    /// The disk is about to be changed.
    pub(super) fn owes(&self) -> Owed<'_> {
        Owed(Some(self))
    }

    /// The next place for an entry with `data` sectors, made under a disk of `size` bytes. `room`: bytes of the log;
    /// `haste`: that of who writes the entry.
    pub(super) fn place(&self, data: u64, size: u64, room: u64, haste: &Arc<Haste>) -> Result<Placed<'_>, IoError> {
        let mut places = self.lock();
        if let Some(error) = places.broken {
            return Err(error);
        }
        let other_size = places.size.replace(size).is_some_and(|before| before != size);
        let mut take = |data| places.take(self.sector, data, room, haste);
        let resized = if other_size { Some(take(0)?) } else { None };
        let entry = take(data)?;
        let place = |(number, at)| Place { journal: self, number, at, is_settled: false };
        Ok(Placed { resized: resized.map(place), entry: place(entry) })
    }

    fn settle(&self, number: u64, result: Result<(), IoError>, due: bool) -> bool {
        let (is_due, waiting) = {
            let mut places = self.lock();
            match result {
                Ok(()) => _ = places.pending.remove(&number),
                Err(error) => _ = places.broken.get_or_insert(error),
            }
            if due {
                places.due = places.due.max(number + 1);
            }
            let is_due = places.due > places.counted && places.complete() > places.counted;
            (is_due, std::mem::take(&mut places.waiting))
        };
        waiting.into_iter().for_each(Waker::wake);
        is_due
    }

    /// Ready when the entry is there with all before it; an error where one of them is missing.
    pub(super) fn poll_complete(&self, number: u64, cx: &Context<'_>) -> Poll<Result<(), IoError>> {
        let mut places = self.lock();
        if places.complete() > number {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = places.broken {
            return Poll::Ready(Err(error));
        }
        if !places.waiting.iter().any(|known| known.will_wake(cx.waker())) {
            places.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Hurries those who write the entries before this one.
    pub(super) fn hurry_before(&self, number: u64) {
        let before: Vec<_> = self.lock().pending.range(..number).map(|(_, haste)| haste.clone()).collect();
        before.iter().for_each(|haste| haste.hurry());
    }

    /// Fails once an entry is missing.
    pub(super) fn goes_on(&self) -> Result<(), IoError> {
        self.lock().broken.map_or(Ok(()), Err)
    }

    /// Something was written that the log will not have.
    pub(super) fn end(&self, error: IoError) -> IoError {
        let (error, waiting) = {
            let mut places = self.lock();
            (*places.broken.get_or_insert(error), std::mem::take(&mut places.waiting))
        };
        waiting.into_iter().for_each(Waker::wake);
        error
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

impl Place<'_> {
    /// The entry is the last of `interval` since a multiple of that.
    pub(super) fn ends(&self, interval: u64) -> bool {
        (self.number + 1).is_multiple_of(interval)
    }

    /// The entry is there, or it failed. `due`: the superblock has to count it. Gives true where the superblock has to
    /// be written.
    pub(super) fn settle(mut self, result: Result<(), IoError>, due: bool) -> bool {
        self.is_settled = true;
        self.journal.settle(self.number, result, due)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.is_settled {
            self.journal.settle(self.number, Err(GIVEN_UP), false);
        }
    }
}

impl Owed<'_> {
    /// The change has its place, or there was none.
    pub(super) fn paid(mut self) {
        self.0 = None;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if let Some(journal) = self.0 {
            journal.end(GIVEN_UP);
        }
    }
}

/// Why a log ends where a request was dropped halfway.
const GIVEN_UP: IoError = IoError::Os(libc::ECANCELED);

impl Places {
    fn complete(&self) -> u64 {
        self.pending.first_key_value().map_or(self.entries, |(number, _)| *number)
    }

    /// Who finds no room has written what the log will not have: the log ends here.
    fn take(&mut self, sector: u32, data: u64, room: u64, haste: &Arc<Haste>) -> Result<(u64, ByteRange), IoError> {
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
        self.pending.insert(number, haste.clone());
        Ok((number, at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 1 << 20;

    fn placed(journal: &Journal, data: u64, size: u64) -> Result<Placed<'_>, IoError> {
        journal.place(data, size, ROOM, &Arc::default())
    }

    fn place(journal: &Journal, data: u64) -> Place<'_> {
        placed(journal, data, 4096).unwrap().entry
    }

    fn is_complete(journal: &Journal, number: u64) -> Poll<Result<(), IoError>> {
        journal.poll_complete(number, &Context::from_waker(Waker::noop()))
    }

    #[test]
    fn the_superblock_counts_what_has_no_gap_before_it() {
        let journal = Journal::new(512, 1, 0);
        let (first, second) = (place(&journal, 1), place(&journal, 2));
        assert_eq!((first.at, second.at), (ByteRange::new(512, 1024).unwrap(), ByteRange::new(1536, 1536).unwrap()));
        let number = second.number;
        assert!(!second.settle(Ok(()), true), "the first is not there yet");
        assert_eq!(is_complete(&journal, number), Poll::Pending);
        assert_eq!(journal.uncounted(), None);
        assert!(first.settle(Ok(()), false), "the second is still owed");
        assert_eq!(is_complete(&journal, number), Poll::Ready(Ok(())));
        assert_eq!(journal.uncounted(), Some(2));
        journal.counted(2);
        assert!(!place(&journal, 0).settle(Ok(()), false));
    }

    #[test]
    fn a_log_ends_before_a_missing_entry() {
        let journal = Journal::new(512, 1, 0);
        let (first, second) = (place(&journal, 1), place(&journal, 1));
        first.settle(Err(IoError::Os(5)), true);
        second.settle(Ok(()), true);
        assert_eq!(journal.uncounted(), None);
        assert_eq!(placed(&journal, 0, 4096).err(), Some(IoError::Os(5)));
        let full = Journal::new(512, 1, 0);
        let place = |data| full.place(data, 4096, 1024, &Arc::default()).err();
        assert_eq!(place(1), Some(IoError::NoSpace));
        assert_eq!(place(0), Some(IoError::NoSpace), "it would fit, but one is missing before it");
    }

    #[test]
    fn another_size_is_remarked_once_and_first() {
        let journal = Journal::new(512, 1, 0);
        let first = placed(&journal, 1, 4096).unwrap();
        assert!(first.resized.is_none());
        let second = placed(&journal, 1, 8192).unwrap();
        assert!(second.resized.as_ref().unwrap().number < second.entry.number);
        assert!(placed(&journal, 1, 8192).unwrap().resized.is_none());
    }

    #[test]
    fn an_interval_ends_with_its_last_entry() {
        let journal = Journal::new(512, 1, 6);
        let places = [place(&journal, 0), place(&journal, 0), place(&journal, 0)];
        assert_eq!(places.each_ref().map(|place| place.ends(4)), [false, true, false]);
        assert!(places[2].ends(1));
    }

    #[test]
    fn what_is_dropped_halfway_ends_the_log() {
        let journal = Journal::new(512, 1, 0);
        let (first, second) = (place(&journal, 0), place(&journal, 0));
        let number = second.number;
        second.settle(Ok(()), true);
        drop(first);
        assert_eq!(is_complete(&journal, number), Poll::Ready(Err(GIVEN_UP)));
        let journal = Journal::new(512, 1, 0);
        journal.owes().paid();
        journal.goes_on().unwrap();
        drop(journal.owes());
        assert_eq!(journal.goes_on(), Err(GIVEN_UP));
    }
}
