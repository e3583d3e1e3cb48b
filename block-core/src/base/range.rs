//! Byte ranges and alignment. A pair of integers is not a range: a [`ByteRange`] has been checked once.

/// The unit in which virtio-blk and the write threshold count, in bytes.
pub const SECTOR: u64 = 512;

/// A half-open range of bytes that fits an `off_t`: `start + len <= i64::MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// `None` where the end does not fit an `off_t`, so that nothing below has to ask again.
    #[inline]
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= i64::MAX as u64).then_some(Self { start, len })
    }

    /// From `start` up to `end`. `None` where `end` is before `start` or does not fit an `off_t`.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        Self::new(start, end.checked_sub(start)?)
    }

    /// Everything from 0 up to `size` bytes; a size past `i64::MAX` is cut there.
    pub fn whole(size: u64) -> Self {
        Self { start: 0, len: size.min(i64::MAX as u64) }
    }

    /// First byte.
    #[inline]
    pub fn start(self) -> u64 {
        self.start
    }

    /// Length in bytes.
    #[inline]
    pub fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    #[inline]
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// True where the range covers no byte.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// True where both cover a byte in common.
    #[inline]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// True where every byte of `other` is in `self`.
    #[inline]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// What both cover; `None` where that is nothing.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let range = Self::between(self.start.max(other.start), self.end().min(other.end()))?;
        (!range.is_empty()).then_some(range)
    }

    /// The same bytes, seen from an origin `by` bytes earlier. `None` where the end does not fit an `off_t`.
    #[inline]
    pub fn shifted(self, by: u64) -> Option<Self> {
        Self::new(self.start.checked_add(by)?, self.len)
    }

    /// The smallest range around this one whose ends are multiples of `align` (a power of two).
    /// `None` where the rounded end does not fit an `off_t`.
    pub fn widened(self, align: u64) -> Option<Self> {
        Self::between(align_down(self.start, align), align_up(self.end(), align)?)
    }

    /// The whole units of `unit` bytes (at least 1, any number) inside; `None` where there are none.
    pub fn whole_units(self, unit: u64) -> Option<Self> {
        let start = self.start.checked_next_multiple_of(unit)?;
        Self::between(start, self.end() / unit * unit).filter(|units| !units.is_empty())
    }

    /// Part of a unit, whole units (see [`ByteRange::whole_units`]), part of a unit. Where no unit is whole, all of it is
    /// the first.
    pub fn cut_at_units(self, unit: u64) -> [Option<Self>; 3] {
        let Some(inner) = self.whole_units(unit) else { return [Some(self), None, None] };
        let head = Self::between(self.start, inner.start).filter(|head| !head.is_empty());
        let tail = Self::between(inner.end(), self.end()).filter(|tail| !tail.is_empty());
        [head, Some(inner), tail]
    }

    /// True where both ends are multiples of `align` (a power of two).
    #[inline]
    pub fn is_aligned(self, align: u64) -> bool {
        is_aligned(self.start | self.len, align)
    }

    /// Cuts into `(first, rest)` after `len` bytes; `rest` is `None` where nothing is left.
    pub fn split(self, len: u64) -> (Self, Option<Self>) {
        let first = len.min(self.len);
        let rest = Self { start: self.start + first, len: self.len - first };
        (Self { start: self.start, len: first }, (!rest.is_empty()).then_some(rest))
    }

    /// The range in pieces of at most `max` bytes (at least 1), in order.
    pub fn pieces(self, max: u64) -> impl Iterator<Item = Self> {
        let mut left = (!self.is_empty()).then_some(self);
        std::iter::from_fn(move || {
            let (piece, rest) = left?.split(max.max(1));
            left = rest;
            Some(piece)
        })
    }
}

impl std::fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

/// The largest multiple of `align` (a power of two) that is not above `value`.
#[inline]
pub fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// The smallest multiple of `align` (a power of two) that is not below `value`; `None` past `u64::MAX`.
#[inline]
pub fn align_up(value: u64, align: u64) -> Option<u64> {
    debug_assert!(align.is_power_of_two());
    Some(value.checked_add(align - 1)? & !(align - 1))
}

/// True where `value` is a multiple of `align` (a power of two).
#[inline]
pub fn is_aligned(value: u64, align: u64) -> bool {
    debug_assert!(align.is_power_of_two());
    value & (align - 1) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end).unwrap()
    }

    #[test]
    fn an_end_past_off_t_is_no_range() {
        assert!(ByteRange::new(i64::MAX as u64, 0).is_some());
        assert!(ByteRange::new(i64::MAX as u64, 1).is_none());
        assert!(ByteRange::new(u64::MAX, 1).is_none());
        assert!(ByteRange::between(2, 1).is_none());
    }

    #[test]
    fn neighbours_do_not_overlap() {
        assert!(!range(0, 4).overlaps(range(4, 8)));
        assert!(range(0, 5).overlaps(range(4, 8)));
        assert_eq!(range(0, 4).intersection(range(4, 8)), None);
        assert_eq!(range(0, 5).intersection(range(4, 8)), Some(range(4, 5)));
    }

    #[test]
    fn widening_covers_and_aligns() {
        let wide = range(511, 1025).widened(512).unwrap();
        assert_eq!(wide, range(0, 1536));
        assert!(wide.is_aligned(512) && !range(511, 1025).is_aligned(512));
        assert!(range(i64::MAX as u64 - 1, i64::MAX as u64).widened(512).is_none());
    }

    #[test]
    fn whole_units_are_inside() {
        assert_eq!(range(100, 4700).whole_units(1536), Some(range(1536, 4608)));
        assert_eq!(range(1536, 3072).whole_units(1536), Some(range(1536, 3072)));
        assert_eq!(range(1, 3071).whole_units(1536), None);
        assert_eq!(range(0, 0).whole_units(512), None);
        let end = i64::MAX as u64;
        assert_eq!(range(end - 100, end).whole_units(1 << 62), None);
    }

    #[test]
    fn ragged_ends_are_cut_off() {
        let cut = |start, end| range(start, end).cut_at_units(512);
        assert_eq!(cut(100, 1600), [Some(range(100, 512)), Some(range(512, 1536)), Some(range(1536, 1600))]);
        assert_eq!(cut(512, 1024), [None, Some(range(512, 1024)), None]);
        assert_eq!(cut(100, 200), [Some(range(100, 200)), None, None]);
        assert_eq!(cut(500, 600), [Some(range(500, 600)), None, None]);
    }

    #[test]
    fn pieces_cover_the_range_once() {
        let pieces: Vec<_> = range(10, 35).pieces(10).collect();
        assert_eq!(pieces, [range(10, 20), range(20, 30), range(30, 35)]);
        assert_eq!(range(7, 7).pieces(10).count(), 0);
    }
}
