//! Entries of the L1 and L2 tables: what they say, and that nonsense in them is an error and nothing worse.

use super::layout::Layout;
use crate::base::{IoError, is_aligned};

/// The cluster or table behind an entry belongs to this entry alone.
pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (images of version 3 without subclusters).
const ZERO: u64 = 1;
/// Bits 9 to 55.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry that cannot be true.
pub(super) const CORRUPT: IoError = IoError::Os(libc::EIO);

/// An L2 entry as it is in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct L2Entry {
    /// The descriptor and its flags.
    pub(super) word: u64,
    /// Subclusters: allocated ones in the low half, zeroes in the high half. 0 where the image has none.
    pub(super) bitmap: u64,
}

/// What an L2 entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// In granules, of which a standard cluster has one.
    Standard(Granules),
    /// The compressed bytes.
    Compressed(Compressed),
}

/// A cluster that is not compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Granules {
    /// Where its room is, in bytes; it may have some without having data.
    pub(super) host: Option<u64>,
    /// The room is this entry's alone.
    pub(super) own: bool,
    /// Granules with data in the room, as bits.
    pub(super) data: u32,
    /// Granules that read as zeroes, as bits.
    pub(super) zero: u32,
}

/// Where the bytes of a compressed cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Compressed {
    /// First byte in the file.
    pub(super) start: u64,
    /// Bytes at the most; the last sector may be another cluster's too.
    pub(super) len: u64,
}

/// What one granule is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing here.
    Below,
    /// Zeroes, said by this layer.
    Zero,
    /// Data in the cluster's room.
    Data,
}

impl Granules {
    /// Nothing at all.
    pub(super) const NONE: Self = Self { host: None, own: false, data: 0, zero: 0 };

    /// What granule `number` is, and how many from it on are the same.
    pub(super) fn run(self, number: u64, count: u64) -> (Kind, u64) {
        let kind = self.kind(number);
        let same = (number..count).take_while(|other| self.kind(*other) == kind).count();
        (kind, same as u64)
    }

    fn kind(self, number: u64) -> Kind {
        let bit = 1u32 << (number & 31);
        if self.zero & bit != 0 {
            Kind::Zero
        } else if self.data & bit != 0 {
            Kind::Data
        } else {
            Kind::Below
        }
    }

    /// As it is in the table.
    pub(super) fn entry(self, layout: Layout) -> L2Entry {
        let own = if self.own && self.host.is_some() { COPIED } else { 0 };
        let word = self.host.unwrap_or(0) | own;
        if layout.extended {
            return L2Entry { word, bitmap: u64::from(self.data) | u64::from(self.zero) << 32 };
        }
        L2Entry { word: word | if self.zero == 0 { 0 } else { ZERO }, bitmap: 0 }
    }
}

impl Compressed {
    /// As it is in the table. The caller has seen to it that the place can be said.
    pub(super) fn entry(self, layout: Layout) -> L2Entry {
        let sectors = (self.start % 512 + self.len - 1) / 512;
        L2Entry { word: COMPRESSED | sectors << offset_bits(layout) | self.start, bitmap: 0 }
    }

    /// The first byte behind those that an entry can name.
    pub(super) fn limit(layout: Layout) -> u64 {
        1 << offset_bits(layout).min(56)
    }
}

fn offset_bits(layout: Layout) -> u32 {
    62 - (u32::from(layout.cluster_bits) - 8)
}

impl L2Entry {
    /// A standard cluster that reads as zeroes, as only version 3 can say it.
    pub(super) fn is_zero(self) -> bool {
        self.word & COMPRESSED == 0 && self.word & ZERO != 0
    }

    /// What the entry says of the guest cluster that begins at `guest`.
    pub(super) fn parse(self, layout: Layout, guest: u64) -> Result<Cluster, IoError> {
        if self.word & COMPRESSED != 0 {
            return self.compressed(layout).map(Cluster::Compressed);
        }
        let own = self.word & COPIED != 0;
        let offset = self.word & OFFSET;
        // Only an external file has anything to offer at its first byte.
        let host = (offset != 0 || (own && layout.external)).then_some(offset);
        if !is_aligned(offset, layout.cluster()) || (layout.external && host.is_some_and(|host| host != guest)) {
            return Err(CORRUPT);
        }
        let granules = Granules { host, own, ..self.granules(layout, host.is_some()) };
        if granules.data & granules.zero != 0 || (granules.data != 0 && host.is_none()) {
            return Err(CORRUPT);
        }
        Ok(Cluster::Standard(granules))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves of a word")]
    fn granules(self, layout: Layout, has_room: bool) -> Granules {
        let (data, zero) = if layout.extended {
            (self.bitmap as u32, (self.bitmap >> 32) as u32)
        } else if layout.version >= 3 && self.word & ZERO != 0 {
            (0, 1)
        } else {
            (u32::from(has_room), 0)
        };
        Granules { data, zero, ..Granules::NONE }
    }

    fn compressed(self, layout: Layout) -> Result<Compressed, IoError> {
        let bits = offset_bits(layout);
        let descriptor = self.word & !(COPIED | COMPRESSED);
        let start = descriptor & ((1 << bits) - 1);
        let sectors = (descriptor >> bits) + 1;
        if layout.external || start >= Compressed::limit(layout) {
            return Err(CORRUPT);
        }
        Ok(Compressed { start, len: sectors * 512 - start % 512 })
    }
}

/// The table behind an L1 entry: `None` where there is none.
pub(super) fn table_of(entry: u64, layout: Layout) -> Result<Option<u64>, IoError> {
    let offset = entry & OFFSET;
    if !is_aligned(offset, layout.cluster()) {
        return Err(CORRUPT);
    }
    Ok((offset != 0).then_some(offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Layout = Layout {
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        version: 3,
        external: false,
        slice_entries: 512,
    };

    fn parse(word: u64, bitmap: u64, layout: Layout) -> Result<Cluster, IoError> {
        L2Entry { word, bitmap }.parse(layout, 0x5_0000)
    }

    #[test]
    fn entries_go_there_and_back() {
        let extended = Layout { extended: true, ..PLAIN };
        for (layout, granules) in [
            (PLAIN, Granules::NONE),
            (PLAIN, Granules { host: Some(0x7_0000), own: true, data: 1, zero: 0 }),
            (PLAIN, Granules { host: Some(0x7_0000), own: false, data: 0, zero: 1 }),
            (PLAIN, Granules { host: None, own: false, data: 0, zero: 1 }),
            (extended, Granules { host: Some(0x7_0000), own: true, data: 0xf0, zero: 0xf00 }),
            (extended, Granules { host: None, own: false, data: 0, zero: 0xffff_ffff }),
        ] {
            let entry = granules.entry(layout);
            assert_eq!(entry.parse(layout, 0x5_0000), Ok(Cluster::Standard(granules)), "{granules:?}");
        }
        for bits in [9, 16, 21] {
            let layout = Layout { cluster_bits: bits, ..PLAIN };
            let compressed = Compressed { start: 0x12_3456, len: 512 * 2 - 0x56 };
            assert_eq!(compressed.entry(layout).parse(layout, 0), Ok(Cluster::Compressed(compressed)), "{bits}");
        }
    }

    /// IMG-21.
    #[test]
    fn nonsense_is_an_error() {
        let extended = Layout { extended: true, ..PLAIN };
        assert_eq!(parse(0x7_0200, 0, PLAIN), Err(CORRUPT), "not at a cluster");
        assert_eq!(parse(0x7_0000, 1 | 1 << 32, extended), Err(CORRUPT), "data and zeroes at once");
        assert_eq!(parse(0, 1, extended), Err(CORRUPT), "data without room");
        let external = Layout { external: true, ..PLAIN };
        assert_eq!(parse(0x7_0000 | COPIED, 0, external), Err(CORRUPT), "not where the guest sees it");
        assert_eq!(parse(COMPRESSED | 0x7_0000, 0, external), Err(CORRUPT), "compressed outside the image");
        assert!(L2Entry { word: COPIED, bitmap: 0 }.parse(external, 0).is_ok());
        assert_eq!(table_of(0x7_0200, PLAIN), Err(CORRUPT));
        assert_eq!(table_of(COPIED | 0x7_0000, PLAIN), Ok(Some(0x7_0000)));
        for word in (0..64).map(|bit| 1u64 << bit) {
            for layout in [PLAIN, extended, external, Layout { cluster_bits: 9, ..PLAIN }] {
                let _ = parse(word, !word, layout);
                let _ = parse(!word, word, layout);
                let _ = table_of(word, layout);
            }
        }
    }

    /// QEMU reads an image of version 2 with the zero flag set as data.
    #[test]
    fn version_2_knows_no_zero_clusters() {
        let old = Layout { version: 2, ..PLAIN };
        let Ok(Cluster::Standard(granules)) = parse(0x7_0001, 0, old) else { panic!("it is data") };
        assert_eq!(granules.run(0, 1), (Kind::Data, 1));
    }
}
