//! Slices of L2 tables in memory. A look-up that finds its slice takes no lock, writes no memory that others read, and
//! allocates nothing; everything else happens under the lock of `meta.rs`.
//!
//! A place has a sequence number, odd while it is changed. Who looks reads it before and after; where it has moved, what
//! was read is thrown away. All of it is atomics, so a reader that loses the race has read old numbers and nothing worse.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence};

use super::entry::L2Entry;
use super::layout::Layout;
use crate::rt::Words;

/// The cache. Its memory is taken place by place, as it is needed, and given back where it was not needed for long.
pub(super) struct Slices {
    layout: Layout,
    places: Box<[Place]>,
    /// The entries, place by place.
    words: Words,
    /// Of a place.
    slice_words: usize,
    ways: usize,
    /// Where the next search for a victim begins.
    hand: AtomicU64,
}

/// A place for one slice.
#[derive(Default)]
struct Place {
    /// The slice's number and one; 0: empty.
    tag: AtomicU64,
    sequence: AtomicU64,
    used: AtomicBool,
}

/// Places that are gone through while requests wait; a whole number of pages, however small slices are.
const PIECE: usize = 1024;
/// Slices that may be in one place or another.
const WAYS: usize = 8;

impl Slices {
    /// With room for `count` slices (at least 2).
    pub(super) fn new(layout: Layout, count: usize) -> io::Result<Self> {
        let ways = count.clamp(2, WAYS);
        let count = count.max(2).next_multiple_of(ways);
        let places = (0..count).map(|_| Place::default()).collect();
        let slice_words = usize::try_from(layout.slice_bytes()).map_err(|_| io::ErrorKind::OutOfMemory)? / 8;
        let words = Words::new(count.saturating_mul(slice_words))?;
        Ok(Self { layout, places, words, slice_words, ways, hand: AtomicU64::new(0) })
    }

    /// Slices that fit.
    pub(super) fn capacity(&self) -> usize {
        self.places.len()
    }

    /// Shows `take` the entries of a slice from `first` on until it says `false`. `None`: the slice is not here, or it was
    /// changed meanwhile and what was shown is worth nothing.
    #[inline]
    pub(super) fn look(&self, slice: u64, first: u64, mut take: impl FnMut(L2Entry) -> bool) -> Option<()> {
        let (place, words) = self.find(slice)?;
        let sequence = place.sequence.load(Acquire);
        if sequence & 1 == 1 || place.tag.load(Relaxed) != slice + 1 {
            return None;
        }
        let step = if self.layout.extended { 2 } else { 1 };
        let first = usize::try_from(first).ok()? * step;
        for entry in words.get(first..)?.chunks_exact(step) {
            let word = entry[0].load(Relaxed);
            let bitmap = if step == 2 { entry[1].load(Relaxed) } else { 0 };
            if !take(L2Entry { word, bitmap }) {
                break;
            }
        }
        fence(Acquire);
        if place.sequence.load(Relaxed) != sequence {
            return None;
        }
        if !place.used.load(Relaxed) {
            place.used.store(true, Relaxed);
        }
        Some(())
    }

    #[inline]
    fn find(&self, slice: u64) -> Option<(&Place, &[AtomicU64])> {
        let set = self.set(slice);
        let number = set.clone().find(|number| self.places[*number].tag.load(Acquire) == slice + 1)?;
        Some((&self.places[number], self.words(number)))
    }

    /// The places that a slice may be in.
    #[inline]
    fn set(&self, slice: u64) -> Range<usize> {
        let sets = self.places.len() / self.ways;
        let first = usize::try_from(slice % sets as u64).unwrap_or(0) * self.ways;
        first..first + self.ways
    }

    /// The entries in a place.
    #[inline]
    fn words(&self, number: usize) -> &[AtomicU64] {
        &self.words.all()[number * self.slice_words..(number + 1) * self.slice_words]
    }

    // ---- under the lock ----------------------------------------------------------------------------------------

    /// True where the slice is here.
    pub(super) fn has(&self, slice: u64) -> bool {
        self.find(slice).is_some()
    }

    /// Puts a slice in. `false`: no place can be cleared, as `keep` says of those that are there.
    pub(super) fn insert(&self, slice: u64, bytes: &[u8], keep: impl Fn(u64) -> bool) -> bool {
        let Some(number) = self.victim(slice, keep) else { return false };
        let place = &self.places[number];
        place.change(|| {
            place.tag.store(slice + 1, Relaxed);
            place.used.store(true, Relaxed);
            fill(self.words(number), bytes);
        });
        true
    }

    /// Nothing is here any more.
    pub(super) fn clear(&self) {
        self.places.iter().for_each(|place| place.change(|| place.tag.store(0, Relaxed)));
    }

    fn victim(&self, slice: u64, keep: impl Fn(u64) -> bool) -> Option<usize> {
        let set = self.set(slice);
        let hand = usize::try_from(self.hand.fetch_add(1, Relaxed)).unwrap_or(0);
        let turn = |step: usize| set.start + hand.wrapping_add(step) % set.len();
        let loose = |number: &usize| match self.places[*number].tag.load(Relaxed) {
            0 => true,
            tag => !keep(tag - 1),
        };
        let mut rounds = (0..2 * set.len()).map(turn);
        let empty = set.clone().find(|number| self.places[*number].tag.load(Relaxed) == 0);
        let unused = || rounds.find(|number| loose(number) && !self.places[*number].used.swap(false, Relaxed));
        // Readers may use all of them faster than they can be asked.
        empty.or_else(unused).or_else(|| set.clone().find(loose))
    }

    /// The places in pieces that are gone through at once.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.places.len()).step_by(PIECE).map(|first| first..self.places.len().min(first + PIECE))
    }

    /// Gives back the memory of slices in these places that nobody has looked at since they were gone through before, but
    /// for those that are kept.
    pub(super) fn forget_unused(&self, places: Range<usize>, keep: impl Fn(u64) -> bool) {
        for place in &self.places[places.clone()] {
            let tag = place.tag.load(Relaxed);
            if tag != 0 && !keep(tag - 1) && !place.used.swap(false, Relaxed) {
                place.change(|| place.tag.store(0, Relaxed));
            }
        }
        // Small slices share pages, so neighbours go together.
        let mut number = places.start;
        for same in self.places[places].chunk_by(|one, other| one.is_empty() == other.is_empty()) {
            if same[0].is_empty() {
                self.words.forget(number * self.slice_words..(number + same.len()) * self.slice_words);
            }
            number += same.len();
        }
    }

    /// Changes an entry. `false`: the slice is not here.
    pub(super) fn set_entry(&self, slice: u64, index: u64, entry: L2Entry) -> bool {
        let Some((place, words)) = self.find(slice) else { return false };
        let step = if self.layout.extended { 2 } else { 1 };
        let first = usize::try_from(index).unwrap_or(0) * step;
        place.change(|| {
            words[first].store(entry.word, Relaxed);
            if step == 2 {
                words[first + 1].store(entry.bitmap, Relaxed);
            }
        });
        true
    }

    /// A slice that is here is like this now.
    pub(super) fn refresh(&self, slice: u64, bytes: &[u8]) {
        let Some((place, words)) = self.find(slice) else { return };
        place.change(|| fill(words, bytes));
    }

    /// A slice as it is in the file.
    pub(super) fn bytes(&self, slice: u64) -> Option<Vec<u8>> {
        let (_, words) = self.find(slice)?;
        Some(words.iter().flat_map(|word| word.load(Relaxed).to_be_bytes()).collect())
    }
}

fn fill(words: &[AtomicU64], bytes: &[u8]) {
    for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
        word.store(u64::from_be_bytes(bytes.try_into().unwrap_or_default()), Relaxed);
    }
}

impl Place {
    fn is_empty(&self) -> bool {
        self.tag.load(Relaxed) == 0
    }

    /// One at a time: the caller has the lock.
    fn change(&self, change: impl FnOnce()) {
        let sequence = self.sequence.load(Relaxed);
        self.sequence.store(sequence + 1, Relaxed);
        fence(Release);
        change();
        self.sequence.store(sequence + 2, Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicUsize;
    use std::time::{Duration, Instant};

    use super::*;

    fn layout(extended: bool) -> Layout {
        let slice_entries = if extended { 32 } else { 64 };
        Layout { cluster_bits: 16, refcount_order: 4, extended, version: 3, external: false, slice_entries }
    }

    fn filled(word: u64) -> Vec<u8> {
        (0..64).flat_map(|_| word.to_be_bytes()).collect()
    }

    fn first(slices: &Slices, slice: u64) -> Option<u64> {
        let mut found = 0;
        slices.look(slice, 0, |entry| {
            found = entry.word;
            false
        })?;
        Some(found)
    }

    #[test]
    fn what_is_kept_is_not_forgotten() {
        let slices = Slices::new(layout(false), 8).unwrap();
        for slice in 0..8 {
            assert!(slices.insert(slice, &filled(slice), |_| true));
        }
        assert!(!slices.insert(8, &filled(8), |_| true), "all are kept");
        assert!(slices.insert(8, &filled(8), |other| other != 3));
        assert_eq!((first(&slices, 3), first(&slices, 8), first(&slices, 4)), (None, Some(8), Some(4)));
        assert!(slices.set_entry(4, 0, L2Entry { word: 77, bitmap: 0 }) && !slices.set_entry(3, 0, L2Entry::default()));
        assert_eq!(first(&slices, 4), Some(77));
        assert_eq!(slices.bytes(4).unwrap()[..8], 77u64.to_be_bytes());
    }

    #[test]
    fn what_nobody_looks_at_is_forgotten_in_the_second_round() {
        let slices = Slices::new(layout(false), 64).unwrap();
        for slice in 0..64 {
            assert!(slices.insert(slice, &filled(slice + 1), |_| true));
        }
        let forget = |keep: u64| slices.pieces().for_each(|places| slices.forget_unused(places, |slice| slice == keep));
        forget(99);
        assert_eq!(first(&slices, 7), Some(8), "all were used when they came");
        forget(9);
        let left: Vec<u64> = (0..64).filter(|slice| slices.has(*slice)).collect();
        assert_eq!(left, [7, 9]);
        assert_eq!((first(&slices, 7), first(&slices, 9), first(&slices, 8)), (Some(8), Some(10), None));
        assert!(slices.insert(8, &filled(3), |_| true));
        assert_eq!(first(&slices, 8), Some(3));
    }

    /// Two words that belong together are never seen apart, and a slice is never taken for another.
    #[test]
    fn readers_beside_a_writer_see_whole_entries_of_their_slice() {
        let slices = Slices::new(layout(true), 2).unwrap();
        let (seen, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Relaxed) {
                        for slice in 0..4 {
                            let mut entry = L2Entry::default();
                            let look = slices.look(slice, 5, |found| {
                                entry = found;
                                false
                            });
                            if look.is_some() {
                                assert_eq!(entry.word, entry.bitmap);
                                assert_eq!(entry.word % 4, slice);
                                seen.fetch_add(1, Relaxed);
                            }
                        }
                    }
                });
            }
            let (begun, mut value, mut went_in) = (Instant::now(), 0, true);
            while begun.elapsed() < Duration::from_millis(300) {
                value += 4;
                let slice = value / 4 % 4;
                went_in &= slices.insert(slice, &filled(slice), |_| false);
                let word = value + slice;
                slices.set_entry(slice, 5, L2Entry { word, bitmap: word });
            }
            stop.store(true, Relaxed);
            assert!(went_in);
        });
        assert!(seen.load(Relaxed) > 1000);
    }

    /// Figures for `docs/performance.md`: `cargo test --release -p block-core --lib looking_up -- --ignored --nocapture`.
    #[test]
    #[ignore = "prints figures, which mean something on an idle machine only"]
    fn looking_up_a_cached_entry() {
        let slices = Slices::new(layout(false), 1024).unwrap();
        (0..1024).for_each(|slice| assert!(slices.insert(slice, &filled(slice), |_| false)));
        for threads in [1, 2, 1, 2] {
            let together = Barrier::new(threads);
            let each = || {
                together.wait();
                let begun = Instant::now();
                (0..50_000_000u64).for_each(|number| {
                    let slice = number.wrapping_mul(0x9e37_79b9) % 1024;
                    assert_eq!(first(&slices, slice), Some(slice));
                });
                begun.elapsed().as_secs_f64() * 1e9 / 5e7
            };
            let took: Vec<f64> = std::thread::scope(|scope| {
                let all: Vec<_> = (0..threads).map(|_| scope.spawn(each)).collect();
                all.into_iter().map(|one| one.join().unwrap()).collect()
            });
            eprintln!("{threads} threads: {took:.1?} ns a look-up");
        }
    }
}
