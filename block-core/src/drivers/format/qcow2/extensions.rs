//! Header extensions, and the name of the backing file behind them. What is not known is kept as it is.

use super::header::{Fields, Header};
use crate::base::{ByteRange, Error, Result, is_aligned};

/// One extension as it is in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

/// What the first cluster says besides the header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extensions {
    /// All of them, in order, also those that are read below.
    pub(super) all: Vec<Extension>,
    /// The backing file's name. It never opens anything.
    pub(super) backing_file: Option<String>,
    pub(super) backing_format: Option<String>,
    /// The external data file's name. It never opens anything.
    pub(super) data_file: Option<String>,
    /// Where the bitmaps' directory is, and how many there are.
    pub(super) bitmaps: Option<Bitmaps>,
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bitmaps {
    pub(super) count: u32,
    pub(super) directory: ByteRange,
}

pub(super) const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const BITMAPS: u32 = 0x2385_2875;
pub(super) const DATA_FILE: u32 = 0x4441_5441;

/// Bytes of an entry of the feature name table.
const FEATURE: usize = 48;
/// The largest bitmap directory that is believed, in bytes.
pub(super) const MAX_DIRECTORY: u64 = 64 << 20;
pub(super) const MAX_BITMAPS: u32 = 65535;

impl Extensions {
    /// From the first cluster, or as much of it as the file has.
    pub(super) fn parse(header: &Header, cluster: &[u8]) -> Result<Self> {
        let mut found = Self::default();
        let mut at = usize::try_from(header.length).unwrap_or(usize::MAX);
        let name = header.backing.map(|name| name.start()..name.end());
        let end = name.as_ref().map_or(cluster.len(), |name| cluster.len().min(place(name.start)));
        while let Some(head) = cluster.get(at..).and_then(|rest| rest.get(..8)) {
            let field = Fields(head);
            let (kind, len) = (field.u32(0)?, place(field.u32(4)?.into()));
            if kind == END || at >= end {
                break;
            }
            let data = at.checked_add(8).and_then(|from| Some(from..from.checked_add(len)?));
            let data = data.and_then(|range| cluster.get(..end)?.get(range));
            let data = data.ok_or_else(|| {
                Error::new(format!("The header extension {kind:#010x} has {len} bytes and ends outside its place"))
            })?;
            found.read(kind, data, header.cluster_bits)?;
            found.all.push(Extension { kind, data: data.to_vec() });
            at = at.saturating_add(8).saturating_add(len.saturating_add(7) & !7);
        }
        if let Some(range) = name {
            let bytes = cluster.get(place(range.start)..place(range.end));
            let bytes = bytes.ok_or_else(|| Error::new("backing_file_offset: the image ends inside the name"))?;
            found.backing_file = Some(text(bytes));
        }
        Ok(found)
    }

    fn read(&mut self, kind: u32, data: &[u8], cluster_bits: u8) -> Result<()> {
        match kind {
            BACKING_FORMAT => self.backing_format = Some(text(data)),
            DATA_FILE => self.data_file = Some(text(data)),
            BITMAPS if self.bitmaps.is_some() => {
                return Err(Error::new("There are two bitmaps extensions in the header"));
            }
            BITMAPS => self.bitmaps = Some(bitmaps(data, cluster_bits)?),
            _ => {}
        }
        Ok(())
    }

    /// What the image calls the lowest feature in `bits`, if it has a name for it.
    pub(super) fn name_of(&self, bits: u64) -> String {
        let bit = bits.trailing_zeros();
        let table = self.all.iter().find(|extension| extension.kind == FEATURE_NAMES);
        let entries = table.map_or(&[][..], |table| &table.data).chunks_exact(FEATURE);
        let is_it = |entry: &&[u8]| entry.first() == Some(&0) && entry.get(1).copied().map(u32::from) == Some(bit);
        match entries.into_iter().find(is_it).and_then(|entry| entry.get(2..)) {
            Some(name) => format!("'{}'", text(name)),
            None => format!("bit {bit}"),
        }
    }
}

fn bitmaps(data: &[u8], cluster_bits: u8) -> Result<Bitmaps> {
    if data.len() != 24 {
        return Err(Error::new(format!("The bitmaps extension has {} bytes; it has 24", data.len())));
    }
    let field = Fields(data);
    let (count, size, offset) = (field.u32(0)?, field.u64(8)?, field.u64(16)?);
    if count == 0 || count > MAX_BITMAPS {
        return Err(Error::new(format!("The bitmaps extension says that there are {count} bitmaps")));
    }
    let directory = ByteRange::new(offset, size)
        .filter(|range| range.len() <= MAX_DIRECTORY && is_aligned(offset, 1 << cluster_bits));
    let directory = directory.ok_or_else(|| Error::new("The bitmap directory has an impossible place or size"))?;
    Ok(Bitmaps { count, directory })
}

/// Text of others, safe to show: up to a zero byte, without control characters.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn place(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(backing: Option<(u64, u64)>) -> Header {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(&super::super::header::MAGIC);
        bytes[7] = 3;
        bytes[23] = 9;
        bytes[59] = 1;
        bytes[99] = 4;
        bytes[103] = 104;
        let mut header = Header::parse(&bytes).unwrap();
        header.backing = backing.map(|(start, len)| ByteRange::new(start, len).unwrap());
        header
    }

    fn cluster(extensions: &[(u32, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; 104];
        for (kind, data) in extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(*data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.resize(512, 0);
        bytes
    }

    #[test]
    fn extensions_are_read_and_kept() {
        let mut bytes = cluster(&[(BACKING_FORMAT, b"raw"), (0x1234, b"who knows"), (DATA_FILE, b"a\nb")]);
        bytes[500..508].copy_from_slice(b"base.img");
        let found = Extensions::parse(&header(Some((500, 8))), &bytes).unwrap();
        assert_eq!(found.backing_file.as_deref(), Some("base.img"));
        assert_eq!(found.backing_format.as_deref(), Some("raw"));
        assert_eq!(found.data_file.as_deref(), Some("a\u{fffd}b"));
        assert_eq!(found.all[1], Extension { kind: 0x1234, data: b"who knows".to_vec() });
    }

    /// IMG-41 to IMG-44.
    #[test]
    fn img_41_to_44_extensions_end_where_they_have_to() {
        let none = header(None);
        for len in [u32::MAX, 401, 1 << 31] {
            let mut bytes = cluster(&[(7, b"")]);
            bytes[108..112].copy_from_slice(&len.to_be_bytes());
            Extensions::parse(&none, &bytes).unwrap_err();
        }
        let fits = cluster(&[(7, &[1; 400])]);
        assert_eq!(Extensions::parse(&none, &fits).unwrap().all.len(), 1);
        Extensions::parse(&header(Some((300, 8))), &fits).unwrap_err();
        let names = [0u8; 100];
        let found = Extensions::parse(&none, &cluster(&[(FEATURE_NAMES, &names[..])])).unwrap();
        assert_eq!((found.name_of(1), found.name_of(1 << 63)), ("''".into(), "bit 63".into()));
        for len in 0..512 {
            let _ = Extensions::parse(&none, &fits[..len]);
        }
    }

    /// IMG-40.
    #[test]
    fn img_40_a_bitmap_directory_has_limits() {
        let extension = |count: u32, size: u64, offset: u64| {
            let data = [&count.to_be_bytes()[..], &[0; 4], &size.to_be_bytes(), &offset.to_be_bytes()].concat();
            Extensions::parse(&header(None), &cluster(&[(BITMAPS, &data)]))
        };
        assert_eq!(extension(1, 32, 1024).unwrap().bitmaps.unwrap().count, 1);
        for (count, size, offset) in
            [(0, 32, 1024), (65536, 32, 1024), (1, 1 << 40, 1024), (1, 32, 1 << 63), (1, 32, 7)]
        {
            extension(count, size, offset).unwrap_err();
        }
        Extensions::parse(&header(None), &cluster(&[(BITMAPS, &[0; 8])])).unwrap_err();
    }
}
