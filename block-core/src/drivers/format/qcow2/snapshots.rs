//! The table of internal snapshots, as it is in the image.

use super::header::{Fields, Header, MAX_HOST, MAX_L1};
use crate::base::{ByteRange, Error, Result, is_aligned};

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Its L1 table, in bytes.
    pub(super) l1: ByteRange,
    pub(super) id: String,
    pub(super) name: String,
    /// Of its entry in the table, in bytes.
    pub(super) len: u64,
}

/// The largest table that is read, in bytes.
pub(super) const MAX_TABLE: u64 = 16 << 20;
/// The most that an entry has besides its name and its id.
const MAX_EXTRA: u32 = 1024;
const FIXED: usize = 40;

/// All of them, from the bytes of the table: as many as there are, from the table's beginning on.
pub(super) fn parse(header: &Header, bytes: &[u8]) -> Result<Vec<Snapshot>> {
    let (mut all, mut rest, mut total) = (Vec::new(), bytes, 0);
    for number in 0..header.snapshots {
        let entry = one(header, rest).map_err(|error| Error::new(format!("Snapshot {number}: {}", error.full())))?;
        rest = usize::try_from(entry.len).ok().and_then(|len| rest.get(len..)).unwrap_or_default();
        total += entry.l1.len();
        if total > MAX_L1 * 2 {
            return Err(Error::new(format!("The L1 tables of its snapshots have more than {} bytes", MAX_L1 * 2)));
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
    let mut at = FIXED + usize::try_from(extra).unwrap_or(0);
    let mut text = |len: u16| {
        let end = at + usize::from(len);
        let bytes = bytes.get(at..end).ok_or_else(|| Error::new("the table ends inside it"))?;
        at = end;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    };
    let (id, name) = (text(id)?, text(name)?);
    Ok(Snapshot { l1, id, name, len: at.next_multiple_of(8) as u64 })
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
        assert_eq!((all[0].name.as_str(), all[1].id.as_str(), all[1].l1.len()), ("first", "1", 24));
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
}
