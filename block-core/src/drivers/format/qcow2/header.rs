//! The header, parsed once into numbers that the rest can calculate with. What is wrong is said by the field's name in the
//! specification ("Header").

use crate::base::{ByteRange, Error, Result, SECTOR, align_down, is_aligned};

/// A header that holds what the limits of this driver ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// 2 or 3.
    pub(super) version: u8,
    /// Where the name of the backing file is.
    pub(super) backing: Option<ByteRange>,
    /// 9 to 21.
    pub(super) cluster_bits: u8,
    /// Of the disk, in bytes; at most `i64::MAX`.
    pub(super) size: u64,
    /// `crypt_method`: 0 to 2.
    pub(super) crypt: u32,
    /// The active L1 table, in bytes.
    pub(super) l1: ByteRange,
    /// The refcount table, in bytes.
    pub(super) refcount_table: ByteRange,
    /// How many there are, and where their table begins.
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    /// 0 to 6.
    pub(super) refcount_order: u8,
    /// Where the extensions begin, in bytes; not past the first cluster.
    pub(super) length: u32,
    pub(super) compression: Compression,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Zlib,
    Zstd,
}

/// Incompatible features.
pub(super) const DIRTY: u64 = 1;
pub(super) const CORRUPT_BIT: u64 = 2;
pub(super) const DATA_FILE: u64 = 4;
pub(super) const COMPRESSION_TYPE: u64 = 8;
pub(super) const EXTENDED_L2: u64 = 16;
/// Compatible features.
pub(super) const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear features.
pub(super) const BITMAPS: u64 = 1;
pub(super) const RAW_DATA_FILE: u64 = 2;

pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Where the fields that are written one by one are.
pub(super) const AT_SIZE: usize = 24;
pub(super) const AT_L1: usize = 36;
pub(super) const AT_REFCOUNT_TABLE: usize = 48;
pub(super) const AT_SNAPSHOTS: usize = 60;
pub(super) const AT_INCOMPATIBLE: usize = 72;
pub(super) const AT_COMPATIBLE: usize = 80;
pub(super) const AT_AUTOCLEAR: usize = 88;
pub(super) const AT_REFCOUNT_ORDER: usize = 96;

/// Bytes of a header of version 2, and the least that one of version 3 has.
pub(super) const V2_LENGTH: u32 = 72;
pub(super) const V3_LENGTH: u32 = 104;
/// The largest tables that are held in memory, in bytes.
pub(super) const MAX_L1: u64 = 32 << 20;
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Where clusters can be at the most: entries have 56 bits for an offset.
pub(super) const MAX_HOST: u64 = 1 << 56;
pub(super) const MAX_BACKING_NAME: u64 = 1023;

impl Header {
    /// From the first bytes of the file: all that there are, up to 512.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(Error::new("The file is not in qcow2 format: its magic is another one"));
        }
        let field = Fields(bytes);
        let version = match field.u32(4)? {
            2 => 2,
            3 => 3,
            other => return Err(Error::new(format!("The qcow2 version {other} is not supported"))),
        };
        let length = if version == 2 { V2_LENGTH } else { field.u32(100)? };
        let bits = field.u32(20)?;
        let cluster_bits = u8::try_from(bits).ok().filter(|bits| (9..=21).contains(bits));
        let cluster_bits = cluster_bits
            .ok_or_else(|| Error::new(format!("cluster_bits is {bits}; clusters have 512 bytes (9) to 2 MiB (21)")))?;
        check_length(version, length, cluster_bits)?;
        let mut header = Self {
            version,
            backing: None,
            cluster_bits,
            size: field.u64(AT_SIZE)?,
            crypt: field.u32(32)?,
            l1: field.table("l1_table_offset", 40, u64::from(field.u32(AT_L1)?) * 8, MAX_L1, cluster_bits)?,
            refcount_table: ByteRange::whole(0),
            snapshots: field.u32(AT_SNAPSHOTS)?,
            snapshots_offset: field.u64(64)?,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            length,
            compression: Compression::Zlib,
        };
        let table = u64::from(field.u32(56)?) << cluster_bits;
        let name = "refcount_table_offset";
        header.refcount_table = field.table(name, AT_REFCOUNT_TABLE, table, MAX_REFCOUNT_TABLE, cluster_bits)?;
        header.backing = header.backing_name(&field)?;
        if version == 3 {
            header.features(&field)?;
        }
        header.size = header.ends(header.size);
        header.check()?;
        Ok(header)
    }

    /// Where a disk ends that is said to have so many bytes: an encrypted one with its last whole sector, as QEMU has it.
    pub(super) fn ends(&self, size: u64) -> u64 {
        if self.crypt == 0 { size } else { align_down(size, SECTOR) }
    }

    fn backing_name(&self, field: &Fields<'_>) -> Result<Option<ByteRange>> {
        let (offset, len) = (field.u64(8)?, u64::from(field.u32(16)?));
        if offset == 0 {
            return Ok(None);
        }
        if len > MAX_BACKING_NAME {
            return Err(Error::new(format!("backing_file_size is {len}; names have at most {MAX_BACKING_NAME} bytes")));
        }
        let end = offset.checked_add(len).filter(|end| *end <= 1 << self.cluster_bits);
        if end.is_none() {
            return Err(Error::new("backing_file_offset: the name lies outside the first cluster"));
        }
        Ok(ByteRange::new(offset, len))
    }

    /// What version 3 has besides.
    fn features(&mut self, field: &Fields<'_>) -> Result<()> {
        self.incompatible = field.u64(AT_INCOMPATIBLE)?;
        self.compatible = field.u64(AT_COMPATIBLE)?;
        self.autoclear = field.u64(AT_AUTOCLEAR)?;
        let order = field.u32(AT_REFCOUNT_ORDER)?;
        let parsed = u8::try_from(order).ok().filter(|order| *order <= 6);
        self.refcount_order =
            parsed.ok_or_else(|| Error::new(format!("refcount_order is {order}; refcounts have at most 64 bits")))?;
        let kind = if self.length > V3_LENGTH { field.u8(104)? } else { 0 };
        let marked = self.incompatible & COMPRESSION_TYPE != 0;
        self.compression = match kind {
            0 if !marked => Compression::Zlib,
            1 if marked => Compression::Zstd,
            0 | 1 => {
                return Err(Error::new(
                    "compression_type and the incompatible feature bit of it contradict each other",
                ));
            }
            other => return Err(Error::new(format!("compression_type {other} is not known"))),
        };
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if i64::try_from(self.size).is_err() {
            return Err(Error::new(format!("size is {}; a disk has at most {} bytes", self.size, i64::MAX)));
        }
        if self.crypt > 2 {
            return Err(Error::new(format!("crypt_method {} is not known", self.crypt)));
        }
        if self.refcount_table.is_empty() {
            return Err(Error::new("refcount_table_clusters is 0: the image has no refcount table"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(Error::new(format!("nb_snapshots is {}; at most {MAX_SNAPSHOTS} are read", self.snapshots)));
        }
        let aligned = is_aligned(self.snapshots_offset, 1 << self.cluster_bits);
        if self.snapshots > 0 && (!aligned || self.snapshots_offset > MAX_HOST) {
            return Err(Error::new("snapshots_offset is no place for a table"));
        }
        if self.incompatible & EXTENDED_L2 != 0 && self.cluster_bits < 14 {
            return Err(Error::new("Extended L2 entries need clusters of at least 16 KiB (cluster_bits 14)"));
        }
        // One span is 2^18 bytes (2^37 with the largest clusters), so the number of entries fits.
        let span = (1u64 << self.cluster_bits) / 8 / if self.incompatible & EXTENDED_L2 == 0 { 1 } else { 2 };
        let needed = self.size.div_ceil(span << self.cluster_bits);
        if needed > self.l1.len() / 8 {
            return Err(Error::new(format!(
                "l1_size is {}; a disk of {} bytes needs {needed} entries",
                self.l1.len() / 8,
                self.size
            )));
        }
        if self.autoclear & RAW_DATA_FILE != 0 && self.incompatible & DATA_FILE == 0 {
            return Err(Error::new("The image says that its data file is raw, and that it has none"));
        }
        Ok(())
    }

    /// Feature bits of the first kind that this driver does not know.
    pub(super) fn unknown_features(&self) -> u64 {
        self.incompatible & !(DIRTY | CORRUPT_BIT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2)
    }

    pub(super) fn has(&self, incompatible: u64) -> bool {
        self.incompatible & incompatible != 0
    }
}

fn check_length(version: u8, length: u32, cluster_bits: u8) -> Result<()> {
    if version == 3 && (length < V3_LENGTH || !length.is_multiple_of(8)) {
        return Err(Error::new(format!("header_length is {length}; it is a multiple of 8 from {V3_LENGTH} on")));
    }
    if u64::from(length) > 1 << cluster_bits {
        return Err(Error::new(format!("header_length is {length}; the header has to fit into the first cluster")));
    }
    Ok(())
}

/// Big-endian numbers in bytes that may be fewer than they should be.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn u64(&self, at: usize) -> Result<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    pub(super) fn u32(&self, at: usize) -> Result<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    pub(super) fn u16(&self, at: usize) -> Result<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    fn u8(&self, at: usize) -> Result<u8> {
        self.bytes(at).map(|[byte]| byte)
    }

    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let end = at.checked_add(N);
        let bytes = end.and_then(|end| self.0.get(at..end)).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| Error::new(format!("The image ends inside the field at byte {at}")))
    }

    /// A table whose offset stands at `at`.
    fn table(&self, name: &str, at: usize, len: u64, max: u64, cluster_bits: u8) -> Result<ByteRange> {
        let offset = self.u64(at)?;
        if len > max {
            return Err(Error::new(format!("{name}: the table has {len} bytes; at most {max} are held")));
        }
        if !is_aligned(offset, 1 << cluster_bits) {
            return Err(Error::new(format!("{name} is {offset}, which is not where a cluster begins")));
        }
        let range = ByteRange::new(offset, len).filter(|range| range.end() <= MAX_HOST);
        range.ok_or_else(|| Error::new(format!("{name} is {offset}: no image is that large")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The header of a fresh image of 64 MiB.
    pub(super) fn valid() -> Vec<u8> {
        let mut bytes = vec![0; 512];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(64u64 << 20).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &0x3_0000u64.to_be_bytes());
        put(48, &0x1_0000u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        bytes
    }

    fn refused(at: usize, value: &[u8]) -> String {
        let mut bytes = valid();
        bytes[at..at + value.len()].copy_from_slice(value);
        Header::parse(&bytes).expect_err("this cannot be opened").full()
    }

    #[test]
    fn a_fresh_image_is_read() {
        let header = Header::parse(&valid()).unwrap();
        assert_eq!((header.version, header.cluster_bits, header.size, header.length), (3, 16, 64 << 20, 112));
        assert_eq!(header.l1, ByteRange::new(0x3_0000, 8).unwrap());
        assert_eq!(header.refcount_table, ByteRange::new(0x1_0000, 0x1_0000).unwrap());
        let mut old = valid();
        old[7] = 2;
        let header = Header::parse(&old[..72]).unwrap();
        assert_eq!((header.version, header.length, header.refcount_order), (2, 72, 4));
    }

    /// IMG-01 to IMG-06.
    #[test]
    fn img_01_to_06_a_broken_header_is_named() {
        assert!(refused(0, b"QFI\0").contains("magic"));
        for version in [0u32, 1, 4, u32::MAX] {
            assert!(refused(4, &version.to_be_bytes()).contains("version"));
        }
        for len in 0..104 {
            Header::parse(&valid()[..len]).unwrap_err();
        }
        for length in [0u32, 103, 108, 1 << 31, 65544] {
            assert!(refused(100, &length.to_be_bytes()).contains("header_length"));
        }
    }

    /// IMG-07 to IMG-12.
    #[test]
    fn img_07_to_12_impossible_geometry_is_named() {
        for bits in [0u32, 8, 22, 63, u32::MAX] {
            assert!(refused(20, &bits.to_be_bytes()).contains("cluster_bits"));
        }
        assert!(refused(24, &(1u64 << 62).to_be_bytes()).contains("l1_size"));
        assert!(refused(24, &(1u64 << 63).to_be_bytes()).contains("size"));
        assert!(refused(32, &3u32.to_be_bytes()).contains("crypt_method"));
        assert!(refused(104, &[9]).contains("compression_type"));
        assert!(refused(104, &[1]).contains("compression_type"));
        assert!(refused(79, &[8]).contains("compression_type"));
        for size in [0u64, 1000] {
            let mut bytes = valid();
            bytes[24..32].copy_from_slice(&size.to_be_bytes());
            assert_eq!(Header::parse(&bytes).unwrap().size, size);
            bytes[35] = 2;
            assert_eq!(Header::parse(&bytes).unwrap().size, size / 512 * 512);
        }
    }

    /// IMG-13 to IMG-20 and IMG-25 to IMG-31, as far as the header says it.
    #[test]
    fn img_13_to_31_impossible_tables_are_named() {
        assert!(refused(36, &0u32.to_be_bytes()).contains("l1_size"));
        for entries in [(1u32 << 22) + 1, 1 << 25, 1 << 31] {
            assert!(refused(36, &entries.to_be_bytes()).contains("l1_table_offset"));
        }
        for offset in [512u64, 1 << 63, u64::MAX, i64::MAX as u64 & !0xffff] {
            assert!(refused(40, &offset.to_be_bytes()).contains("l1_table_offset"));
            assert!(refused(48, &offset.to_be_bytes()).contains("refcount_table_offset"));
        }
        for clusters in [0u32, 129, 1 << 31] {
            assert!(refused(56, &clusters.to_be_bytes()).contains("refcount_table"));
        }
        for order in [7u32, 1 << 31] {
            assert!(refused(96, &order.to_be_bytes()).contains("refcount_order"));
        }
    }

    /// IMG-37 to IMG-39, IMG-45.
    #[test]
    fn img_37_to_45_impossible_references_are_named() {
        assert!(refused(60, &65537u32.to_be_bytes()).contains("nb_snapshots"));
        let table = [&1u32.to_be_bytes()[..], &(1u64 << 63).to_be_bytes()].concat();
        assert!(refused(60, &table).contains("snapshots_offset"));
        for (offset, len) in [(1u64 << 63, 4u32), (65536, 4), (65530, 7), (u64::MAX, 1023), (200, 2000)] {
            let name = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
            assert!(refused(8, &name).contains("backing_file"));
        }
    }
}
