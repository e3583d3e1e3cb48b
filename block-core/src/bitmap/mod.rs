//! Which parts of a disk have changed: one bit for every `granularity` bytes. Data only: no node, no guest, no file.
//!
//! Any number of threads mark at once, without a lock: a mark is a load, and one atomic operation where the bit is not
//! set yet. Bits are in pages that come into being with their first mark, so that the bitmap of a large disk takes
//! next to nothing, and is walked in no time, while little has changed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::{ByteRange, Error, Result, SECTOR};

/// See the module's head.
pub struct Bitmap {
    /// Bytes of the disk.
    size: u64,
    /// Bytes for a bit, a power of two.
    granularity: u32,
    pages: Box<[OnceLock<Box<Page>>]>,
}

struct Page([AtomicU64; WORDS]);

/// Words in a page.
const WORDS: usize = 512;
/// Bits in a page.
const PAGE: u64 = 64 * WORDS as u64;

impl Bitmap {
    /// A clean one for a disk of `size` bytes.
    pub fn new(size: u64, granularity: u32) -> Result<Self> {
        if !granularity.is_power_of_two() || u64::from(granularity) < SECTOR {
            return Err(Error::new("Granularity must be power of 2 and at least 512"));
        }
        let bits = size.div_ceil(granularity.into());
        if bits > MAX_BITS {
            return Err(Error::new(format!(
                "A bitmap of {bits} bits is more than is supported ({MAX_BITS}): use a larger granularity than \
                 {granularity}"
            )));
        }
        let pages = (0..bits.div_ceil(PAGE)).map(|_| OnceLock::new()).collect();
        Ok(Self { size, granularity, pages })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes for a bit.
    pub fn granularity(&self) -> u32 {
        self.granularity
    }

    /// All that the range touches has changed. What of it is past the end is left out.
    #[inline]
    pub fn mark(&self, at: ByteRange) {
        let end = at.end().min(self.size).div_ceil(self.unit());
        for (word, mask) in words(at.start() / self.unit(), end) {
            let word = self.made(word);
            // Most writes go where others went before: those write nothing that threads share.
            if word.load(Ordering::Acquire) & mask != mask {
                word.fetch_or(mask, Ordering::AcqRel);
            }
        }
    }

    /// All that lies wholly in the range is as it was; the last part of the disk need not be whole.
    pub fn clear(&self, at: ByteRange) {
        let whole_end = if at.end() >= self.size { self.bits() } else { at.end() / self.unit() };
        for (word, mask) in words(at.start().div_ceil(self.unit()), whole_end) {
            if let Some(word) = self.word(word) {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }

    /// The first part of the range that has changed, as far as it goes.
    pub fn next_dirty(&self, at: ByteRange) -> Option<ByteRange> {
        let end = at.end().min(self.size).div_ceil(self.unit());
        let first = self.find(at.start() / self.unit(), end, true)?;
        let last = self.find(first, end, false).unwrap_or(end);
        ByteRange::between(first * self.unit(), last * self.unit())?.intersection(at).map(|run| self.inside(run))
    }

    /// The first byte of the range that has not changed.
    pub fn next_clean(&self, at: ByteRange) -> Option<u64> {
        let end = at.end().min(self.size).div_ceil(self.unit());
        let first = self.find(at.start() / self.unit(), end, false)?;
        Some((first * self.unit()).max(at.start()))
    }

    /// All that has changed, in order.
    pub fn dirty(&self) -> impl Iterator<Item = ByteRange> {
        let mut rest = Some(ByteRange::whole(self.size));
        std::iter::from_fn(move || {
            let run = self.next_dirty(rest?)?;
            rest = ByteRange::between(run.end(), self.size);
            Some(run)
        })
    }

    /// Bytes that have changed, in whole bits' worth.
    pub fn count(&self) -> u64 {
        let pages = self.pages.iter().filter_map(OnceLock::get);
        let words = pages.flat_map(|page| &page.0).map(|word| word.load(Ordering::Acquire));
        words.map(|word| u64::from(word.count_ones())).sum::<u64>() * self.unit()
    }

    /// Marks all that has changed in `other`, which may have another granularity.
    pub fn merge(&self, other: &Self) -> Result<()> {
        other.check_size(self.size)?;
        other.dirty().for_each(|run| self.mark(run));
        Ok(())
    }

    /// An error where its marks mean nothing for `size` bytes.
    pub fn check_size(&self, size: u64) -> Result<()> {
        if self.size != size {
            return Err(Error::new(format!(
                "Bitmaps are of different sizes (destination size is {size}, source size is {}) and can't be merged",
                self.size
            )));
        }
        Ok(())
    }

    /// The same for a disk of another size: what is cut off is forgotten, what is new has not changed.
    pub fn resized(&self, size: u64) -> Result<Self> {
        let other = Self::new(size, self.granularity)?;
        self.dirty().for_each(|run| other.mark(run));
        Ok(other)
    }

    /// A clean one of the same size and granularity.
    pub fn clean(&self) -> Result<Self> {
        Self::new(self.size, self.granularity)
    }

    /// The same marks, in memory of its own.
    pub fn copied(&self) -> Result<Self> {
        self.resized(self.size)
    }

    /// All bits, 64 in a word, the first one lowest; one word at least.
    pub fn all_words(&self) -> impl Iterator<Item = u64> {
        let count = self.bits().div_ceil(64).max(1);
        (0..count).map(|number| self.word(number).map_or(0, |word| word.load(Ordering::Acquire)))
    }

    /// Marks what words say, from word `first` on: 64 bits in each, the first one lowest. What is past the end is left out.
    pub fn mark_words(&self, first: u64, words: impl IntoIterator<Item = u64>) {
        let bits = self.bits();
        for (number, word) in (first..).zip(words) {
            let left = bits.saturating_sub(number.saturating_mul(64)).min(64);
            let word = if left == 64 { word } else { word & ((1 << left) - 1) };
            if word != 0 {
                self.made(number).fetch_or(word, Ordering::AcqRel);
            }
        }
    }

    /// So many words from word `first` on; those past the end are 0.
    pub fn words(&self, first: u64, count: u64) -> impl Iterator<Item = u64> {
        let end = self.bits().div_ceil(64);
        let word = move |number| self.word(number).map_or(0, |word| word.load(Ordering::Acquire));
        (first..first + count).map(move |number| if number < end { word(number) } else { 0 })
    }

    // ---- bits ----------------------------------------------------------------------------------------------------

    fn unit(&self) -> u64 {
        self.granularity.into()
    }

    fn bits(&self) -> u64 {
        self.size.div_ceil(self.unit())
    }

    /// The first bit from `first` to before `end` that is set, or is not.
    fn find(&self, first: u64, end: u64, set: bool) -> Option<u64> {
        let mut bit = first;
        while bit < end {
            let Some(word) = self.word(bit / 64) else {
                if !set {
                    return Some(bit);
                }
                bit = (bit / PAGE + 1) * PAGE;
                continue;
            };
            let word = word.load(Ordering::Acquire);
            let rest = (if set { word } else { !word }) >> (bit % 64);
            if rest != 0 {
                return Some(bit + u64::from(rest.trailing_zeros())).filter(|found| *found < end);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }

    /// `None`: nothing near it was ever marked.
    fn word(&self, number: u64) -> Option<&AtomicU64> {
        let (page, word) = place(number);
        Some(&self.pages.get(page)?.get()?.0[word])
    }

    fn made(&self, number: u64) -> &AtomicU64 {
        let (page, word) = place(number);
        let page = self.pages[page].get_or_init(|| Box::new(Page(std::array::from_fn(|_| AtomicU64::new(0)))));
        &page.0[word]
    }

    fn inside(&self, run: ByteRange) -> ByteRange {
        run.intersection(ByteRange::whole(self.size)).unwrap_or(run)
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {} bytes dirty)", self.count(), self.size)
    }
}

/// The page and the word in it.
#[inline]
fn place(word: u64) -> (usize, usize) {
    let word = usize::try_from(word).expect("MAX_BITS fits");
    (word / WORDS, word % WORDS)
}

/// The words that bits `first` to before `end` are in, with a mask for each.
#[inline]
fn words(first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut next = first;
    std::iter::from_fn(move || {
        let bit = next;
        let count = (64 - bit % 64).min(end.checked_sub(bit).filter(|left| *left > 0)?);
        next += count;
        Some((bit / 64, (u64::MAX >> (64 - count)) << (bit % 64)))
    })
}

/// Bits at the most: 512 MiB of memory, where all of the disk has changed.
const MAX_BITS: u64 = 4096 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end).unwrap()
    }

    fn bitmap(size: u64, granularity: u32, marks: &[(u64, u64)]) -> Bitmap {
        let bitmap = Bitmap::new(size, granularity).unwrap();
        marks.iter().for_each(|(start, end)| bitmap.mark(range(*start, *end)));
        bitmap
    }

    fn runs(bitmap: &Bitmap) -> Vec<(u64, u64)> {
        bitmap.dirty().map(|run| (run.start(), run.end())).collect()
    }

    #[test]
    fn what_a_mark_touches_is_dirty() {
        let marked = bitmap(1 << 20, 65536, &[(65000, 66000), (1_048_000, 1 << 30), (2 << 20, 3 << 20), (5, 5)]);
        assert_eq!(runs(&marked), [(0, 2 * 65536), (15 * 65536, 1 << 20)]);
        assert_eq!(marked.count(), 3 * 65536);
        assert_eq!(marked.next_dirty(range(100, 70000)), Some(range(100, 70000)));
        assert_eq!(marked.next_dirty(range(2 * 65536, 15 * 65536)), None);
        assert_eq!(marked.next_clean(range(100, 1 << 20)), Some(2 * 65536));
        assert_eq!(marked.next_clean(range(0, 2 * 65536)), None);
    }

    /// Every pair of ends around words and pages, against a plain list of bits.
    #[test]
    fn runs_are_found_across_words_and_pages() {
        let edges = [0, 1, 63, 64, 65, 127, 128, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 64, 2 * PAGE + 5];
        for (number, first) in edges.iter().enumerate() {
            for end in &edges[number + 1..] {
                let marked = bitmap((2 * PAGE + 5) * 512, 512, &[(first * 512, end * 512)]);
                assert_eq!(runs(&marked), [(first * 512, end * 512)]);
                assert_eq!(marked.count(), (end - first) * 512);
                marked.clear(range(first * 512, end * 512 - 1));
                assert_eq!(marked.count(), 512, "the last bit was not wholly in the range");
                marked.clear(range(0, (2 * PAGE + 5) * 512));
                assert_eq!(marked.count(), 0);
            }
        }
    }

    #[test]
    fn the_last_part_of_a_disk_need_not_be_whole() {
        let marked = bitmap(65536 + 512, 65536, &[(65536, 65537)]);
        assert_eq!(runs(&marked), [(65536, 65536 + 512)]);
        assert_eq!(marked.count(), 65536);
        marked.clear(range(65536, 65536 + 512));
        assert_eq!(marked.count(), 0);
    }

    #[test]
    fn merging_goes_across_granularities() {
        let fine = bitmap(1 << 20, 512, &[(1000, 1024), (200 * KIB, 300 * KIB)]);
        let coarse = bitmap(1 << 20, 65536, &[(1 << 19, (1 << 19) + 1)]);
        let both = coarse.copied().unwrap();
        both.merge(&fine).unwrap();
        assert_eq!(runs(&both), [(0, 65536), (3 * 65536, 5 * 65536), (1 << 19, (1 << 19) + 65536)]);
        assert_eq!(coarse.count(), 65536, "a copy is a copy");
        fine.merge(&coarse).unwrap();
        assert_eq!(fine.count(), 512 + 100 * KIB + 65536);
        let refused = fine.merge(&bitmap(2 << 20, 512, &[])).unwrap_err().full();
        assert!(refused.contains("(destination size is 1048576, source size is 2097152)"), "{refused}");
    }

    #[test]
    fn another_size_keeps_what_is_left() {
        let marked = bitmap(1 << 20, 65536, &[(0, 1), (1 << 19, 1 << 20)]);
        assert_eq!(runs(&marked.resized(2 << 20).unwrap()), [(0, 65536), (1 << 19, 1 << 20)]);
        let smaller = marked.resized((1 << 19) + 512).unwrap();
        assert_eq!(runs(&smaller), [(0, 65536), (1 << 19, (1 << 19) + 512)]);
        assert_eq!(runs(&smaller.resized(1 << 18).unwrap()), [(0, 65536)]);
        assert_eq!(marked.clean().unwrap().count(), 0);
    }

    #[test]
    fn all_bits_can_be_taken_as_words() {
        let words = |bitmap: &Bitmap| bitmap.all_words().collect::<Vec<_>>();
        assert_eq!(words(&bitmap(0, 512, &[])), [0]);
        assert_eq!(words(&bitmap(65 * 512, 512, &[(0, 512), (64 * 512, 65 * 512)])), [1, 1]);
    }

    #[test]
    fn words_go_there_and_back() {
        let marked =
            bitmap((PAGE + 70) * 512, 512, &[(512, 1024), (63 * 512, 65 * 512), (PAGE * 512, (PAGE + 70) * 512)]);
        let words: Vec<_> = marked.words(0, PAGE / 64 + 4).collect();
        assert_eq!((words[0], words[1], words[words.len() - 3], words.last()), (1 << 63 | 2, 1, 0x3f, Some(&0)));
        let other = marked.clean().unwrap();
        other.mark_words(0, words.iter().map(|word| word | 1));
        other.clear(range(0, 512));
        assert_eq!(other.next_dirty(range(2 * 64 * 512, 2 * 64 * 512 + 512)), Some(range(128 * 512, 129 * 512)));
        let same = marked.clean().unwrap();
        same.mark_words(0, words);
        same.mark_words(PAGE / 64 + 1, [u64::MAX, u64::MAX]);
        assert_eq!(runs(&same), runs(&marked));
    }

    #[test]
    fn many_threads_lose_no_mark() {
        let shared = bitmap(64 << 20, 512, &[]);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let shared = &shared;
                scope.spawn(move || {
                    for bit in (thread..131_072).step_by(4) {
                        shared.mark(range(bit * 512, bit * 512 + 1));
                    }
                });
            }
        });
        assert_eq!(runs(&shared), [(0, 64 << 20)]);
    }

    #[test]
    fn what_makes_no_bitmap_is_refused() {
        for granularity in [0, 1, 256, 513, 1000, u32::MAX] {
            Bitmap::new(1 << 20, granularity).unwrap_err();
        }
        let refused = Bitmap::new(i64::MAX as u64, 512).unwrap_err().full();
        assert!(refused.contains("larger granularity"), "{refused}");
        assert_eq!(Bitmap::new(1 << 20, 1 << 31).unwrap().count(), 0);
    }
}
