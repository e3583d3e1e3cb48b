//! The directory of persistent bitmaps and their tables, as they are in the image ("Bitmaps extension" and "Bitmaps" of
//! the specification). Bytes only.

use super::entry::OFFSET;
use super::extensions::{Bitmaps, MAX_BITMAPS, MAX_DIRECTORY};
use super::header::{Fields, MAX_HOST};
use super::layout::Layout;
use crate::base::{ByteRange, Error, Result, is_aligned};

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its table, in bytes.
    pub(super) table: ByteRange,
    pub(super) flags: u32,
    /// 1: a dirty bitmap. Nothing else is known.
    pub(super) kind: u8,
    /// 9 to 31: a bit stands for so many bytes, as a power of two.
    pub(super) granularity_bits: u8,
    pub(super) name: String,
    /// What somebody else has put there. It is kept.
    pub(super) extra: Vec<u8>,
}

/// The image was not closed in good order since: what the bitmap says may be too little.
pub(super) const IN_USE: u32 = 1;
/// It records from the beginning.
pub(super) const AUTO: u32 = 2;
/// Who does not know the extra data may use the bitmap all the same.
pub(super) const EXTRA_COMPATIBLE: u32 = 4;
const DIRTY_TRACKING: u8 = 1;

/// Bytes of an entry before the extra data.
const FIXED: usize = 24;
const GRANULARITIES: std::ops::RangeInclusive<u8> = 9..=31;
const MAX_NAME: usize = 1023;
/// The largest table of a bitmap, in entries, and the most that its clusters have together, in bytes.
const MAX_TABLE: u64 = 128 << 20;
const MAX_DATA: u64 = 512 << 20;

impl Entry {
    /// A new dirty bitmap. Its granularity is a power of two.
    pub(super) fn new(name: &str, granularity: u32, auto: bool) -> Self {
        Self {
            table: ByteRange::whole(0),
            flags: if auto { AUTO } else { 0 },
            kind: DIRTY_TRACKING,
            granularity_bits: u8::try_from(granularity.trailing_zeros()).unwrap_or(u8::MAX),
            name: name.to_owned(),
            extra: Vec::new(),
        }
    }

    /// What it says can be used.
    pub(super) fn is_valid(&self) -> bool {
        let compatible = self.extra.is_empty() || self.flags & EXTRA_COMPATIBLE != 0;
        self.flags & IN_USE == 0 && self.kind == DIRTY_TRACKING && compatible
    }

    pub(super) fn granularity(&self) -> u32 {
        1 << self.granularity_bits
    }

    /// Bytes in the directory.
    pub(super) fn len(&self) -> u64 {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8) as u64
    }

    fn parse(bytes: &[u8], layout: Layout, size: u64) -> Result<Self> {
        let field = Fields(bytes);
        let (offset, entries, flags) = (field.u64(0)?, u64::from(field.u32(8)?), field.u32(12)?);
        let [kind, granularity_bits] = field.u16(16)?.to_be_bytes();
        let (name_len, extra_len) = (usize::from(field.u16(18)?), field.u32(20)?);
        let refuse = |what: &str| Err(Error::new(what.to_owned()));
        if entries == 0 || entries > MAX_TABLE || entries > MAX_DATA >> layout.cluster_bits {
            return Err(Error::new(format!("its table has {entries} entries")));
        }
        let table = ByteRange::new(offset, entries * 8).filter(|table| table.end() <= MAX_HOST);
        let table = table.filter(|_| offset != 0 && is_aligned(offset, layout.cluster()));
        let Some(table) = table else { return Err(Error::new(format!("its table cannot be at {offset}"))) };
        if flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
            return Err(Error::new(format!("its flags are {flags:#x}, which are not known")));
        }
        if !GRANULARITIES.contains(&granularity_bits) {
            return Err(Error::new(format!("its granularity is 2^{granularity_bits} bytes")));
        }
        if name_len == 0 || name_len > MAX_NAME {
            return Err(Error::new(format!("its name has {name_len} bytes")));
        }
        let extra_len = usize::try_from(extra_len).unwrap_or(usize::MAX);
        let rest = bytes.get(FIXED..).and_then(|rest| rest.split_at_checked(extra_len));
        let Some((extra, rest)) = rest else { return refuse("the directory ends inside its extra data") };
        let Some(name) = rest.get(..name_len) else { return refuse("the directory ends inside its name") };
        let Ok(name) = String::from_utf8(name.to_vec()) else { return refuse("its name is no text") };
        let entry = Self { table, flags, kind, granularity_bits, name, extra: extra.to_vec() };
        if entry.is_valid() && entries != entry.table_entries(layout, size) {
            return Err(Error::new(format!("'{}' is the bitmap of a disk of another size", entry.name)));
        }
        Ok(entry)
    }

    /// Entries that the table has for a disk of `size` bytes.
    pub(super) fn table_entries(&self, layout: Layout, size: u64) -> u64 {
        let bytes = size.div_ceil(1 << self.granularity_bits).div_ceil(8);
        bytes.div_ceil(layout.cluster()).max(1)
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.table.start().to_be_bytes());
        bytes.extend(u32::try_from(self.table.len() / 8).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend([self.kind, self.granularity_bits]);
        bytes.extend(u16::try_from(self.name.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(u32::try_from(self.extra.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(&self.extra);
        bytes.extend(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

/// All entries of a directory, for a disk of `size` bytes.
pub(super) fn parse(bytes: &[u8], extension: Bitmaps, layout: Layout, size: u64) -> Result<Vec<Entry>> {
    let (mut all, mut rest) = (Vec::<Entry>::new(), bytes);
    let mut names = std::collections::HashSet::new();
    for number in 0..extension.count {
        let entry = Entry::parse(rest, layout, size);
        let entry = entry.map_err(|error| Error::new(format!("Bitmap {number}: {}", error.full())))?;
        if !names.insert(entry.name.clone()) {
            return Err(Error::new(format!("There are two bitmaps called '{}'", entry.name)));
        }
        let len = usize::try_from(entry.len()).unwrap_or(usize::MAX);
        rest = rest.get(len..).unwrap_or_default();
        all.push(entry);
    }
    if rest.is_empty() {
        return Ok(all);
    }
    Err(Error::new(format!("The bitmap directory has {} bytes more than its entries", rest.len())))
}

/// The bytes of a directory.
pub(super) fn bytes(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.iter().for_each(|entry| entry.write(&mut bytes));
    bytes
}

/// Why these cannot be kept together in an image, for a disk of `size` bytes: in QEMU's words.
pub(super) fn check(entries: &[Entry], layout: Layout, size: u64) -> Result<()> {
    if entries.len() > MAX_BITMAPS as usize {
        return Err(Error::new("Maximum number of persistent bitmaps is already reached"));
    }
    if entries.iter().map(Entry::len).sum::<u64>() > MAX_DIRECTORY {
        return Err(Error::new("Not enough space in the bitmap directory"));
    }
    for entry in entries.iter().filter(|entry| entry.is_valid()) {
        let bits = entry.granularity_bits;
        if bits > *GRANULARITIES.end() {
            return Err(Error::new(format!("Granularity exceeds maximum ({} bytes)", 1u64 << GRANULARITIES.end())));
        }
        if bits < *GRANULARITIES.start() {
            return Err(Error::new(format!("Granularity is under minimum ({} bytes)", 1u64 << GRANULARITIES.start())));
        }
        if entry.name.len() > MAX_NAME {
            return Err(Error::new(format!("Name length exceeds maximum ({MAX_NAME} characters)")));
        }
        if entry.table_entries(layout, size) > (MAX_DATA >> layout.cluster_bits).min(MAX_TABLE) {
            return Err(Error::new("Too much space will be occupied by the bitmap. Use larger granularity"));
        }
    }
    Ok(())
}

/// What an entry of a bitmap's table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Clean,
    /// All of it.
    Dirty,
    /// In this cluster.
    At(u64),
}

impl Part {
    /// `None`: it makes no sense.
    pub(super) fn parse(word: u64, layout: Layout) -> Option<Self> {
        let offset = word & OFFSET;
        match word {
            0 => Some(Self::Clean),
            1 => Some(Self::Dirty),
            _ => (word == offset && is_aligned(offset, layout.cluster())).then_some(Self::At(offset)),
        }
    }

    pub(super) fn word(self) -> u64 {
        match self {
            Self::Clean => 0,
            Self::Dirty => 1,
            Self::At(offset) => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        version: 3,
        external: false,
        slice_entries: 512,
    };
    const SIZE: u64 = 1 << 30;

    fn entry(name: &str) -> Entry {
        Entry { table: ByteRange::new(0x5_0000, 8).unwrap(), ..Entry::new(name, 65536, true) }
    }

    fn parsed(bytes: &[u8], count: u32) -> Result<Vec<Entry>> {
        let directory = ByteRange::new(0x9_0000, bytes.len() as u64).unwrap();
        parse(bytes, Bitmaps { count, directory }, LAYOUT, SIZE)
    }

    #[test]
    fn entries_go_there_and_back() {
        let extra = Entry { extra: vec![1, 2, 3], flags: EXTRA_COMPATIBLE, ..entry("b") };
        let all = [entry("a"), extra.clone(), Entry { flags: IN_USE | AUTO, ..entry("ä longer name") }];
        let bytes = bytes(&all);
        assert_eq!(bytes.len() as u64, all.iter().map(Entry::len).sum::<u64>());
        assert_eq!(parsed(&bytes, 3).unwrap(), all);
        assert_eq!(all.each_ref().map(Entry::is_valid), [true, true, false]);
        assert!(!Entry { flags: 0, ..extra }.is_valid());
        for word in [0, 1, 0x7_0000] {
            assert_eq!(Part::parse(word, LAYOUT).unwrap().word(), word);
        }
        assert!([2, 0x7_0001, 0x7_0200, 1 << 63, 1 << 56].iter().all(|word| Part::parse(*word, LAYOUT).is_none()));
    }

    /// IMG-40: every field of an entry.
    #[test]
    fn img_40_impossible_entries_of_the_directory_are_named() {
        let good = bytes(&[entry("a")]);
        let refused = |at: usize, value: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            parsed(&bytes, 1).expect_err("this cannot be used").full()
        };
        for offset in [0u64, 0x5_0200, 1 << 63, u64::MAX, 1 << 56] {
            assert!(refused(0, &offset.to_be_bytes()).contains("table"), "{offset:#x}");
        }
        for entries in [0u32, 2, 8193, 1 << 27, u32::MAX] {
            let said = refused(8, &entries.to_be_bytes());
            assert!(said.contains("entries") || said.contains("another size"), "{entries}: {said}");
        }
        for flags in [8u32, 1 << 31, u32::MAX] {
            assert!(refused(12, &flags.to_be_bytes()).contains("flags"));
        }
        for granularity in [0u8, 8, 32, 255] {
            assert!(refused(17, &[granularity]).contains("granularity"));
        }
        for name in [0u16, 1024, 200, u16::MAX] {
            assert!(refused(18, &name.to_be_bytes()).contains("name"));
        }
        for extra in [8u32, 1 << 31, u32::MAX] {
            assert!(refused(20, &extra.to_be_bytes()).contains("ends inside its"));
        }
        assert!(refused(24, &[0xff]).contains("text"));
        assert!(parsed(&bytes(&[entry("a"), entry("a")]), 2).unwrap_err().full().contains("two bitmaps"));
        assert!(parsed(&bytes(&[entry("a"), entry("b")]), 1).unwrap_err().full().contains("more than its entries"));
        assert!(parsed(&good, 2).unwrap_err().full().contains("Bitmap 1"));
        (0..25).for_each(|len| drop(parsed(&good[..len], 1).unwrap_err()));
        // A kind that is not known is left alone.
        let mut strange = good.clone();
        strange[16] = 2;
        assert!(!parsed(&strange, 1).unwrap()[0].is_valid());
    }

    #[test]
    fn what_cannot_be_kept_is_said_as_qemu_says_it() {
        let said = |all: &[Entry], size| check(all, LAYOUT, size).map_err(|error| error.full()).unwrap_err();
        check(&[entry("a")], LAYOUT, SIZE).unwrap();
        assert!(said(&[Entry { granularity_bits: 32, ..entry("a") }], SIZE).contains("exceeds maximum (2147483648"));
        assert!(said(&[Entry { granularity_bits: 8, ..entry("a") }], SIZE).contains("under minimum (512"));
        assert!(said(&[entry(&"a".repeat(1024))], SIZE).contains("Name length"));
        assert!(said(&[Entry { granularity_bits: 9, ..entry("a") }], 1 << 52).contains("Too much space"));
        assert!(said(&vec![entry("a"); 65536], SIZE).contains("Maximum number"));
        assert!(said(&vec![entry(&"a".repeat(1023)); 65535], SIZE).contains("Not enough space"));
    }
}
