//! The bytes of a log as the kernel's dm-log-writes lays them out, and nothing about writing them.
//!
//! Sector 0 is the superblock. Each entry takes a sector, followed by its data unless it is a discard or a mark. All
//! numbers are little-endian and count in log sectors.

/// "hsfwgsj" read as a number.
const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

/// Everything written before is stable.
pub(super) const FLUSH: u64 = 1;
/// This write is stable.
pub(super) const FUA: u64 = 2;
/// The range is no longer needed; no data follows.
pub(super) const DISCARD: u64 = 4;
/// A remark: `data_len` bytes of text in the entry's own sector. Tools that replay pass over it.
pub(super) const MARK: u64 = 8;

/// The first bytes of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Entries that are there, with all before them.
    pub(super) entries: u64,
    /// Bytes in a log sector.
    pub(super) sector: u32,
}

/// What one entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) sector: u64,
    pub(super) sectors: u64,
    pub(super) flags: u64,
    /// Bytes of text in a mark; 0 in other entries.
    pub(super) text: u64,
}

/// Why bytes are no superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoLog {
    Magic,
    Version(u64),
    Sector(u32),
}

impl std::fmt::Display for NoLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Magic => f.write_str("Invalid log superblock magic"),
            Self::Version(version) => write!(f, "Unsupported log version {version}"),
            Self::Sector(bytes) => write!(f, "Invalid log sector size {bytes}"),
        }
    }
}

/// A power of two that an entry with its text fits into, below 16 MiB.
pub(super) fn is_sector_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && (64..1 << 24).contains(&bytes)
}

impl Superblock {
    pub(super) const BYTES: usize = 28;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..24].copy_from_slice(&words::<3, 24>([MAGIC, VERSION, self.entries]));
        bytes[24..].copy_from_slice(&self.sector.to_le_bytes());
        bytes
    }

    pub(super) fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, NoLog> {
        let [magic, version, entries] = numbers(&bytes[..24]);
        let sector = u32::from_le_bytes(std::array::from_fn(|at| bytes[24 + at]));
        match () {
            () if magic != MAGIC => Err(NoLog::Magic),
            () if version != VERSION => Err(NoLog::Version(version)),
            () if !is_sector_size(sector) => Err(NoLog::Sector(sector)),
            () => Ok(Self { entries, sector }),
        }
    }
}

impl Entry {
    pub(super) const BYTES: usize = 32;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        words([self.sector, self.sectors, self.flags, self.text])
    }

    pub(super) fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let [sector, sectors, flags, text] = numbers(bytes);
        Self { sector, sectors, flags, text }
    }

    /// Log sectors that the entry takes; `None` where that is no number, or its flags are unknown.
    pub(super) fn len(self) -> Option<u64> {
        if self.flags & !(FLUSH | FUA | DISCARD | MARK) != 0 {
            return None;
        }
        if self.flags & DISCARD != 0 { Some(1) } else { self.sectors.checked_add(1) }
    }
}

fn words<const N: usize, const BYTES: usize>(numbers: [u64; N]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (to, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        to.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

fn numbers<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let (chunks, _) = bytes.as_chunks();
    std::array::from_fn(|at| chunks.get(at).copied().map_or(0, u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_goes_there_and_back() {
        let superblock = Superblock { entries: 7, sector: 4096 };
        let bytes = superblock.to_bytes();
        assert_eq!(bytes[..9], *b"rhswfsj\0\x01");
        assert_eq!(Superblock::parse(&bytes), Ok(superblock));
        for (at, byte, why) in [(0, 0, NoLog::Magic), (8, 2, NoLog::Version(2)), (24, 1, NoLog::Sector(4097))] {
            let mut wrong = bytes;
            wrong[at] = byte;
            assert_eq!(Superblock::parse(&wrong), Err(why));
        }
    }

    #[test]
    fn only_what_is_no_discard_has_data() {
        let entry = Entry { sector: 8, sectors: 2, flags: FUA, text: 0 };
        assert_eq!(Entry::parse(&entry.to_bytes()), entry);
        assert_eq!(entry.len(), Some(3));
        assert_eq!(Entry { flags: DISCARD, ..entry }.len(), Some(1));
        assert_eq!(Entry { sectors: u64::MAX, ..entry }.len(), None);
        assert_eq!(Entry { flags: 16, ..entry }.len(), None);
    }
}
