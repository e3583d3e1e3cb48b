//! The arithmetic of an image: which table and which entry in it describe a byte. Nothing here can overflow, because
//! everything that goes in has been limited when the header was read.

use crate::base::{ByteRange, align_down};

/// What decides where things are; constant as long as the image is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// 9 to 21.
    pub(super) cluster_bits: u8,
    /// 0 to 6: a refcount has `1 << refcount_order` bits.
    pub(super) refcount_order: u8,
    /// Two words an L2 entry, and 32 subclusters a cluster.
    pub(super) extended: bool,
    /// 2 or 3.
    pub(super) version: u8,
    /// Guest data lies in another file, at the offset that the guest sees.
    pub(super) external: bool,
    /// Entries of an L2 table that are cached together.
    pub(super) slice_entries: u64,
}

/// Subclusters in a cluster of an image that has them.
pub(super) const SUBCLUSTERS: u64 = 32;

impl Layout {
    /// Bytes in a cluster.
    pub(super) fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes that are allocated together: a subcluster, or a cluster where there are none.
    pub(super) fn granule(self) -> u64 {
        self.cluster() / self.granules()
    }

    /// Granules in a cluster.
    pub(super) fn granules(self) -> u64 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }

    /// Words (of 8 bytes) in an L2 entry.
    pub(super) fn words(self) -> u64 {
        if self.extended { 2 } else { 1 }
    }

    /// Entries in an L2 table.
    pub(super) fn l2_entries(self) -> u64 {
        self.cluster() / (8 * self.words())
    }

    /// Bytes of the guest's that an L2 table describes.
    pub(super) fn l2_span(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Bytes of a slice in the file.
    pub(super) fn slice_bytes(self) -> u64 {
        self.slice_entries * self.words() * 8
    }

    /// Bytes of the guest's that a slice describes.
    pub(super) fn slice_span(self) -> u64 {
        self.slice_entries << self.cluster_bits
    }

    /// Slices in an L2 table.
    pub(super) fn slices(self) -> u64 {
        self.l2_entries() / self.slice_entries
    }

    /// The slice that describes a byte, counted over all tables.
    pub(super) fn slice_of(self, byte: u64) -> u64 {
        byte / self.slice_span()
    }

    /// The entry of a byte in its slice.
    pub(super) fn entry_of(self, byte: u64) -> u64 {
        (byte >> self.cluster_bits) % self.slice_entries
    }

    /// The entry of the L1 table that leads to a slice.
    pub(super) fn l1_index(self, slice: u64) -> usize {
        usize::try_from(slice / self.slices()).unwrap_or(usize::MAX)
    }

    /// Where in its table a slice begins, in bytes.
    pub(super) fn slice_offset(self, slice: u64) -> u64 {
        slice % self.slices() * self.slice_bytes()
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(super) fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Refcounts in a block.
    pub(super) fn block_entries(self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    pub(super) fn max_refcount(self) -> u64 {
        match self.refcount_order {
            6.. => u64::MAX,
            order => (1 << (1u32 << order)) - 1,
        }
    }

    /// The cluster that a byte is in, whole.
    pub(super) fn around(self, byte: u64) -> ByteRange {
        ByteRange::new(align_down(byte, self.cluster()), self.cluster()).unwrap_or(ByteRange::whole(0))
    }

    /// The range up to the end of the slice in which it begins.
    pub(super) fn within_slice(self, at: ByteRange) -> ByteRange {
        let span = self.slice_span();
        at.split(span - at.start() % span).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_has_its_entry() {
        let layout = Layout {
            cluster_bits: 16,
            refcount_order: 4,
            extended: false,
            version: 3,
            external: false,
            slice_entries: 512,
        };
        assert_eq!((layout.l2_entries(), layout.slices(), layout.l2_span()), (8192, 16, 512 << 20));
        let byte = (512 << 20) + (33 << 20) + (5 << 16) + 7;
        let slice = layout.slice_of(byte);
        assert_eq!((layout.l1_index(slice), layout.slice_offset(slice), layout.entry_of(byte)), (1, 4096, 21));
        assert_eq!(layout.l1_entries((512 << 20) + 1), 2);
        assert_eq!((layout.block_entries(), layout.max_refcount()), (32768, 65535));
        let extended = Layout { extended: true, slice_entries: 256, ..layout };
        assert_eq!((extended.l2_entries(), extended.granule(), extended.slice_bytes()), (4096, 2048, 4096));
        assert_eq!(Layout { refcount_order: 6, ..layout }.max_refcount(), u64::MAX);
        assert_eq!(Layout { refcount_order: 0, ..layout }.max_refcount(), 1);
    }
}
