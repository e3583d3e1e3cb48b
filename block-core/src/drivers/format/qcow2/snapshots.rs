//! The table of internal snapshots, as it is in the image, and the entries in memory.

use super::header::{Fields, Header, MAX_HOST, MAX_L1};
use crate::base::{ByteRange, Error, Result, is_aligned};
use crate::graph::{SnapshotInfo, SnapshotName};

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Its L1 table, in bytes.
    pub(super) l1: ByteRange,
    /// Text, as the image has it.
    pub(super) id: Vec<u8>,
    pub(super) name: Vec<u8>,
    /// Seconds since 1970, and nanoseconds.
    pub(super) date: (u32, u32),
    pub(super) vm_clock_nsec: u64,
    /// In bytes.
    pub(super) vm_state_size: u64,
    /// Of the disk, in bytes, where the image says it.
    pub(super) disk_size: Option<u64>,
    /// [`NO_ICOUNT`] where instructions were not counted.
    pub(super) icount: u64,
    /// Extra data that is not known here, and is kept.
    pub(super) more: Vec<u8>,
    /// Of its entry in the table, in bytes.
    pub(super) len: u64,
}

/// What QEMU writes where instructions were not counted.
pub(super) const NO_ICOUNT: u64 = u64::MAX;
/// The largest table that is read or written, in bytes.
pub(super) const MAX_TABLE: u64 = 16 << 20;
/// All L1 tables of snapshots together, in bytes.
pub(super) const MAX_L1S: u64 = 64 << 20;
/// The most that an entry has besides its name and its id.
const MAX_EXTRA: u32 = 1024;
const FIXED: usize = 40;
/// Extra data that is known.
const EXTRA: usize = 24;

/// All of them, from the bytes of the table: as many as there are, from the table's beginning on.
pub(super) fn parse(header: &Header, bytes: &[u8]) -> Result<Vec<Snapshot>> {
    let (mut all, mut rest, mut total) = (Vec::new(), bytes, 0);
    for number in 0..header.snapshots {
        let entry = one(header, rest).map_err(|error| Error::new(format!("Snapshot {number}: {}", error.full())))?;
        rest = usize::try_from(entry.len).ok().and_then(|len| rest.get(len..)).unwrap_or_default();
        total += entry.l1.len();
        if total > MAX_L1S {
            return Err(Error::new(format!("The L1 tables of its snapshots have more than {MAX_L1S} bytes")));
        }
        all.push(entry);
    }
    Ok(all)
}

fn one(header: &Header, bytes: &[u8]) -> Result<Snapshot> {
    let field = Fields(bytes);
    let (offset, entries) = (field.u64(0)?, u64::from(field.u32(8)?));
    let (id, name, extra) = (field.u16(12)?, field.u16(14)?, field.u32(36)?);
    if entries * 8 > MAX_L1 {
        return Err(Error::new(format!("its L1 table has {entries} entries, which is too many")));
    }
    let l1 = ByteRange::new(offset, entries * 8).filter(|range| range.end() <= MAX_HOST);
    let l1 = l1.filter(|_| is_aligned(offset, 1 << header.cluster_bits));
    let l1 = l1.ok_or_else(|| Error::new(format!("its L1 table cannot be at {offset}")))?;
    if extra > MAX_EXTRA {
        return Err(Error::new(format!("it has {extra} bytes of extra data, which is too many")));
    }
    let mut at = FIXED;
    let mut part = |len: usize| {
        let end = at + len;
        let part = bytes.get(at..end).ok_or_else(|| Error::new("the table ends inside it"))?;
        at = end;
        Ok(part)
    };
    let extra = part(usize::try_from(extra).unwrap_or(0))?;
    let (id, name) = (part(id.into())?.to_vec(), part(name.into())?.to_vec());
    let known = |at: usize| extra.get(at..at + 8).and_then(|_| Fields(extra).u64(at).ok());
    let disk_size = known(8).map(|size| header.ends(size));
    if disk_size.is_some_and(|size| i64::try_from(size).is_err()) {
        return Err(Error::new("its disk cannot be as large as it says"));
    }
    Ok(Snapshot {
        l1,
        id,
        name,
        date: (field.u32(16)?, field.u32(20)?),
        vm_clock_nsec: field.u64(24)?,
        vm_state_size: known(0).unwrap_or(field.u32(32)?.into()),
        disk_size,
        icount: known(16).unwrap_or(NO_ICOUNT),
        more: extra.get(EXTRA..).unwrap_or_default().to_vec(),
        len: at.next_multiple_of(8) as u64,
    })
}

/// The table with these entries, whose lengths follow from it.
pub(super) fn written(all: &mut [Snapshot]) -> Result<Vec<u8>> {
    let mut table = Vec::new();
    for entry in all {
        let before = table.len();
        entry.write(&mut table)?;
        entry.len = (table.len() - before) as u64;
    }
    if table.len() as u64 > MAX_TABLE {
        return Err(Error::new(format!("The snapshot table would have more than {MAX_TABLE} bytes")));
    }
    Ok(table)
}

/// The id that QEMU would choose: one more than the highest that is a number.
pub(super) fn new_id(all: &[Snapshot]) -> String {
    let number = |entry: &Snapshot| {
        let digits = entry.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0u64, |number, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
    };
    all.iter().map(number).max().unwrap_or(0).saturating_add(1).to_string()
}

/// Where the snapshot is that is called so.
pub(super) fn position(all: &[Snapshot], which: &SnapshotName) -> Option<usize> {
    all.iter().map(Snapshot::info).position(|one| which.fits(&one.id, &one.name))
}

impl Snapshot {
    /// As queries show it.
    pub(super) fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: self.vm_state_size,
            date: self.date,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: (self.icount != NO_ICOUNT).then_some(self.icount),
            disk_size: self.disk_size,
        }
    }

    fn write(&self, table: &mut Vec<u8>) -> Result<()> {
        let entries = u32::try_from(self.l1.len() / 8).map_err(|_| Error::new("Its L1 table is too large"))?;
        let short = |text: &[u8]| u16::try_from(text.len()).map_err(|_| Error::new("Its name is too long"));
        let extra = u32::try_from(EXTRA + self.more.len()).map_err(|_| Error::new("It has too much extra data"))?;
        table.extend(self.l1.start().to_be_bytes());
        table.extend(entries.to_be_bytes());
        table.extend(short(&self.id)?.to_be_bytes());
        table.extend(short(&self.name)?.to_be_bytes());
        table.extend(self.date.0.to_be_bytes());
        table.extend(self.date.1.to_be_bytes());
        table.extend(self.vm_clock_nsec.to_be_bytes());
        // What does not fit here stands in the extra data alone.
        table.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        table.extend(extra.to_be_bytes());
        table.extend(self.vm_state_size.to_be_bytes());
        table.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        table.extend(self.icount.to_be_bytes());
        table.extend(&self.more);
        table.extend(&self.id);
        table.extend(&self.name);
        table.resize(table.len().next_multiple_of(8), 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(l1: u64, entries: u32, extra: u32, name: &str) -> Vec<u8> {
        let mut bytes = [&l1.to_be_bytes()[..], &entries.to_be_bytes()].concat();
        bytes.extend(1u16.to_be_bytes());
        bytes.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend([0; 20]);
        bytes.extend(extra.to_be_bytes());
        bytes.resize(bytes.len() + extra.min(2000) as usize, 0);
        bytes.push(b'1');
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn header(count: u32) -> Header {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&super::super::header::MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[59] = 1;
        bytes[60..64].copy_from_slice(&count.to_be_bytes());
        bytes[99] = 4;
        bytes[103] = 104;
        Header::parse(&bytes).unwrap()
    }

    /// IMG-37 to IMG-39.
    #[test]
    fn img_37_to_39_snapshots_are_read_within_limits() {
        let table = [entry(0x5_0000, 1, 16, "first"), entry(0x7_0000, 3, 24, "x")].concat();
        let all = parse(&header(2), &table).unwrap();
        assert_eq!((&all[0].name[..], &all[1].id[..], all[1].l1.len()), (&b"first"[..], &b"1"[..], 24));
        parse(&header(3), &table).unwrap_err();
        for bad in [
            entry(0x5_0000, 1 << 31, 16, "a"),
            entry(1 << 63, 1, 16, "a"),
            entry(0x5_0200, 1, 16, "a"),
            entry(0x5_0000, 1, 1025, "a"),
            entry(0x5_0000, 1, 16, "abc")[..58].to_vec(),
            Vec::new(),
        ] {
            parse(&header(1), &bad).unwrap_err();
        }
    }

    /// What is not known is kept, and what is missing is there afterwards.
    #[test]
    fn a_table_that_is_written_says_what_it_said() {
        let mut short = entry(0x5_0000, 1, 0, "short");
        short[16..36].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 0, 0, 0, 17]);
        let mut long = entry(0x7_0000, 3, 40, "long");
        long[40..80].copy_from_slice(&[vec![0x11; 8], vec![0x12; 8], vec![0x13; 8], vec![0x14; 16]].concat());
        let mut all = parse(&header(2), &[short, long].concat()).unwrap();
        assert_eq!((all[0].vm_state_size, all[0].disk_size, all[0].icount), (17, None, NO_ICOUNT));
        let many = 0x1111_1111_1111_1111;
        assert_eq!((all[1].vm_state_size, all[1].more.len()), (many, 16));
        all[0].disk_size = Some(77);
        let again = parse(&header(2), &written(&mut all).unwrap()).unwrap();
        assert_eq!(again, all);
        assert_eq!(new_id(&all), "2");
        let ids = |ids: &[&str]| {
            let with = |id: &&str| Snapshot { id: id.as_bytes().to_vec(), ..all[0].clone() };
            new_id(&ids.iter().map(with).collect::<Vec<_>>())
        };
        assert_eq!((ids(&["7", "abc", "12x"]), ids(&[]), ids(&["x"])), ("13".into(), "1".into(), "1".into()));
    }
}
