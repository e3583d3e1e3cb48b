//! A refcount block: counters of 1 to 64 bits in a cluster.

use super::layout::Layout;

/// The counters of `layout.block_entries()` clusters, as they are in the file.
#[derive(Clone, Debug)]
pub(super) struct Block(Box<[u8]>);

impl Block {
    /// All zero.
    pub(super) fn empty(layout: Layout) -> Self {
        Self(vec![0; usize::try_from(layout.cluster()).unwrap_or(0)].into_boxed_slice())
    }

    /// As it was read.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes.into_boxed_slice())
    }

    /// As it is written.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Counter `index` of the block; past its end, 0.
    pub(super) fn get(&self, layout: Layout, index: u64) -> u64 {
        let place = Place::of(layout, index);
        let Some(bytes) = self.0.get(place.byte..place.byte + place.bytes) else { return 0 };
        let value = bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        value >> place.shift & layout.max_refcount()
    }

    /// Sets counter `index`; the value has to fit.
    pub(super) fn set(&mut self, layout: Layout, index: u64, value: u64) {
        debug_assert!(value <= layout.max_refcount());
        let place = Place::of(layout, index);
        let Some(bytes) = self.0.get_mut(place.byte..place.byte + place.bytes) else { return };
        let old = bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let new = old & !(layout.max_refcount() << place.shift) | value << place.shift;
        let words = new.to_be_bytes();
        bytes.copy_from_slice(&words[words.len() - place.bytes..]);
    }
}

/// Where a counter is: less than a byte, or several.
struct Place {
    byte: usize,
    bytes: usize,
    shift: u32,
}

impl Place {
    #[expect(clippy::cast_possible_truncation, reason = "an index inside a cluster of at most 2 MiB")]
    fn of(layout: Layout, index: u64) -> Self {
        let bits = 1u64 << layout.refcount_order;
        let first = index * bits;
        Self {
            byte: (first / 8) as usize,
            bytes: bits.div_ceil(8) as usize,
            shift: if bits < 8 { (first % 8) as u32 } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_every_width_keep_to_themselves() {
        for order in 0..=6 {
            let layout = Layout {
                cluster_bits: 9,
                refcount_order: order,
                extended: false,
                version: 3,
                external: false,
                slice_entries: 64,
            };
            let mut block = Block::empty(layout);
            let count = layout.block_entries();
            let value = |index: u64| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & layout.max_refcount();
            (0..count).for_each(|index| block.set(layout, index, value(index)));
            assert!((0..count).all(|index| block.get(layout, index) == value(index)), "order {order}");
            block.set(layout, 3, layout.max_refcount());
            assert!((0..count).all(|index| index == 3 || block.get(layout, index) == value(index)), "order {order}");
            assert_eq!(block.get(layout, count), 0);
        }
    }

    #[test]
    fn bits_count_from_the_least_significant_one() {
        let layout = Layout {
            cluster_bits: 9,
            refcount_order: 0,
            extended: false,
            version: 3,
            external: false,
            slice_entries: 64,
        };
        let mut block = Block::empty(layout);
        block.set(layout, 1, 1);
        assert_eq!(block.bytes()[0], 2);
        let wide = Layout { refcount_order: 4, ..layout };
        let mut block = Block::empty(wide);
        block.set(wide, 1, 0x102);
        assert_eq!(block.bytes()[..4], [0, 0, 1, 2]);
    }
}
