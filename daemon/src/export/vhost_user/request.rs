//! What one virtio-blk request asks for, and what it gets where that makes no sense. Pure: no ring, no memory, no I/O.
//!
//! The caller has taken the 16 header bytes and the status byte off the chain and counted the data bytes on each
//! side; how they were cut into descriptors is nobody's business here (virtio 1.3, 2.7.4 "Message Framing").

use block_core::base::{ByteRange, SECTOR};
use block_core::graph::OpKind;

/// Bytes of `struct virtio_blk_req` before the data.
pub(super) const HEADER: usize = 16;
/// Bytes of one discard or write-zeroes segment.
pub(super) const SEGMENT: usize = 16;
/// Bytes of the answer to GET_ID.
pub(super) const ID_LEN: usize = 20;
/// Sectors in one discard or write-zeroes at the most (1 GiB); announced in the config space.
pub(super) const MAX_EXTENT_SECTORS: u32 = 1 << 21;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
/// Legacy "barrier" bit. Never offered, and masked: the request is what its other bits say.
const T_BARRIER: u32 = 1 << 31;
const UNMAP: u32 = 1;

/// The status byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or made no sense.
    IoErr = 1,
    /// This device does not do that.
    Unsupp = 2,
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    /// Bytes; a tail shorter than a sector is invisible.
    pub(super) size: u64,
    /// Logical block size in bytes, a power of two, at least 512.
    pub(super) block: u32,
    /// Writes are let through.
    pub(super) writable: bool,
}

/// A request that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the writable data with this range.
    Read(ByteRange),
    /// Store the readable data in this range.
    Write(ByteRange),
    /// Make completed writes stable.
    Flush,
    /// Put the serial number into the writable data.
    GetId,
    /// The range's contents are no longer needed.
    Discard(ByteRange),
    /// The range is to read as zeroes.
    WriteZeroes {
        /// Where.
        at: ByteRange,
        /// Its space may be freed.
        unmap: bool,
    },
    /// Well-formed, of no length: done.
    Nothing,
}

/// Data bytes of a request, without header and status.
#[derive(Clone, Copy, Debug)]
pub(super) struct Data {
    /// Device-readable bytes after the header.
    pub(super) readable: u64,
    /// Device-writable bytes before the status.
    pub(super) writable: u64,
}

/// Parses a request. `segment` gives the first 16 readable data bytes; called once at most, for the types that have
/// them.
pub(super) fn parse(
    header: &[u8; HEADER],
    data: Data,
    disk: &Disk,
    segment: impl FnOnce() -> [u8; SEGMENT],
) -> Result<Request, Status> {
    let kind = le32(header, 0) & !T_BARRIER;
    let sector = le64(header, 8);
    match kind {
        T_IN if data.readable != 0 => Err(Status::IoErr),
        T_IN => transfer(sector, data.writable, disk, Request::Read),
        T_OUT if !disk.writable || data.writable != 0 => Err(Status::IoErr),
        T_OUT => transfer(sector, data.readable, disk, Request::Write),
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD | T_WRITE_ZEROES if !disk.writable => Err(Status::IoErr),
        T_DISCARD | T_WRITE_ZEROES => extent(kind, data.readable, disk, segment),
        _ => Err(Status::Unsupp),
    }
}

/// What a refused request would have been, where such are counted.
pub(super) fn kind(header: &[u8; HEADER]) -> Option<OpKind> {
    match le32(header, 0) & !T_BARRIER {
        T_IN => Some(OpKind::Read),
        T_OUT | T_WRITE_ZEROES => Some(OpKind::Write),
        T_DISCARD => Some(OpKind::Unmap),
        _ => None,
    }
}

fn transfer(sector: u64, len: u64, disk: &Disk, make: fn(ByteRange) -> Request) -> Result<Request, Status> {
    let at = range(sector, len, disk).ok_or(Status::IoErr)?;
    Ok(if at.is_empty() { Request::Nothing } else { make(at) })
}

fn extent(kind: u32, len: u64, disk: &Disk, segment: impl FnOnce() -> [u8; SEGMENT]) -> Result<Request, Status> {
    if len == 0 || !len.is_multiple_of(SEGMENT as u64) {
        return Err(Status::IoErr);
    }
    // One segment is what max_discard_seg and max_write_zeroes_seg announce.
    if len != SEGMENT as u64 {
        return Err(Status::Unsupp);
    }
    let segment = segment();
    let (sector, sectors, flags) = (le64(&segment, 0), le32(&segment, 8), le32(&segment, 12));
    let allowed = if kind == T_DISCARD { 0 } else { UNMAP };
    if flags & !allowed != 0 {
        return Err(Status::Unsupp);
    }
    if sectors > MAX_EXTENT_SECTORS {
        return Err(Status::IoErr);
    }
    let at = range(sector, u64::from(sectors) * SECTOR, disk).ok_or(Status::IoErr)?;
    Ok(match kind {
        _ if at.is_empty() => Request::Nothing,
        T_DISCARD => Request::Discard(at),
        _ => Request::WriteZeroes { at, unmap: flags & UNMAP != 0 },
    })
}

/// `None` where the range leaves the disk, has no whole sectors, or does not begin at a logical block. It may end inside
/// one: the protocol's unit is the sector, whatever the block size (virtio 1.3, 5.2.4), and QEMU takes it too.
fn range(sector: u64, len: u64, disk: &Disk) -> Option<ByteRange> {
    let at = ByteRange::new(sector.checked_mul(SECTOR)?, len)?;
    let visible = ByteRange::whole(disk.size - disk.size % SECTOR);
    let aligned = at.start().is_multiple_of(u64::from(disk.block)) && at.len().is_multiple_of(SECTOR);
    (aligned && visible.contains(at)).then_some(at)
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const DISK: Disk = Disk { size: 64 * MIB, block: 512, writable: true };
    const SECTORS: u64 = 64 * MIB / SECTOR;

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut bytes = [0xAA; 16]; // the reserved word (ioprio) is ignored
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    fn ask(disk: &Disk, kind: u32, sector: u64, readable: u64, writable: u64) -> Result<Request, Status> {
        parse(&header(kind, sector), Data { readable, writable }, disk, || panic!("no segment expected"))
    }

    fn ask_extent(kind: u32, len: u64, sector: u64, sectors: u32, flags: u32) -> Result<Request, Status> {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        parse(&header(kind, u64::MAX), Data { readable: len, writable: 0 }, &DISK, || segment)
    }

    fn at(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, len).unwrap()
    }

    #[test]
    fn reads_end_at_the_capacity() {
        assert_eq!(ask(&DISK, T_IN, SECTORS - 1, 0, 512), Ok(Request::Read(at(64 * MIB - 512, 512))));
        for (sector, len) in [(SECTORS, 512), (SECTORS - 1, 1024), (1 << 55, 512), (u64::MAX, 512), (0, 64 * MIB + 512)]
        {
            assert_eq!(ask(&DISK, T_IN, sector, 0, len), Err(Status::IoErr), "{sector} {len}");
            assert_eq!(ask(&DISK, T_OUT, sector, len, 0), Err(Status::IoErr), "{sector} {len}");
        }
    }

    #[test]
    fn lengths_are_whole_sectors_and_starts_whole_blocks() {
        for len in [1, 500, 511, 513] {
            assert_eq!(ask(&DISK, T_IN, 0, 0, len), Err(Status::IoErr));
            assert_eq!(ask(&DISK, T_OUT, 0, len, 0), Err(Status::IoErr));
        }
        let wide = Disk { block: 4096, ..DISK };
        assert_eq!(ask(&wide, T_IN, 1, 0, 4096), Err(Status::IoErr));
        assert_eq!(ask(&wide, T_IN, 8, 0, 512), Ok(Request::Read(at(4096, 512))));
        assert_eq!(ask(&wide, T_IN, 8, 0, 4096), Ok(Request::Read(at(4096, 4096))));
    }

    #[test]
    fn nothing_to_move_is_no_error_but_data_on_the_wrong_side_is() {
        assert_eq!(ask(&DISK, T_IN, 0, 0, 0), Ok(Request::Nothing));
        assert_eq!(ask(&DISK, T_OUT, 0, 0, 0), Ok(Request::Nothing));
        assert_eq!(ask(&DISK, T_IN, 0, 512, 0), Err(Status::IoErr));
        assert_eq!(ask(&DISK, T_OUT, 0, 0, 512), Err(Status::IoErr));
    }

    #[test]
    fn a_read_only_disk_refuses_every_change_and_takes_flushes() {
        let fixed = Disk { writable: false, ..DISK };
        for kind in [T_OUT, T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(ask(&fixed, kind, 0, 512, 0), Err(Status::IoErr));
        }
        assert_eq!(ask(&fixed, T_FLUSH, 7, 512, 512), Ok(Request::Flush));
        assert_eq!(ask(&fixed, T_IN, 0, 0, 512), Ok(Request::Read(at(0, 512))));
    }

    #[test]
    fn foreign_types_are_unsupported() {
        let foreign = [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 20, 26, 0x7777, 0x7FFF_FFFF, 0xFFFF_FFFF];
        for kind in foreign {
            assert_eq!(ask(&DISK, kind, 0, 0, 512), Err(Status::Unsupp), "{kind}");
        }
        assert_eq!(ask(&DISK, T_BARRIER, 0, 0, 512), Ok(Request::Read(at(0, 512))));
        assert_eq!(ask(&DISK, T_GET_ID, 9, 0, 4), Ok(Request::GetId));
    }

    #[test]
    fn discard_takes_no_flag_and_write_zeroes_one() {
        assert_eq!(ask_extent(T_DISCARD, 16, 8, 8, 0), Ok(Request::Discard(at(4096, 4096))));
        for flags in [1, 2, u32::MAX] {
            assert_eq!(ask_extent(T_DISCARD, 16, 8, 8, flags), Err(Status::Unsupp));
        }
        for unmap in [false, true] {
            let expected = Request::WriteZeroes { at: at(4096, 4096), unmap };
            assert_eq!(ask_extent(T_WRITE_ZEROES, 16, 8, 8, unmap.into()), Ok(expected));
        }
        assert_eq!(ask_extent(T_WRITE_ZEROES, 16, 8, 8, 2), Err(Status::Unsupp));
    }

    #[test]
    fn extents_are_checked_like_data() {
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(ask_extent(kind, 0, 0, 8, 0), Err(Status::IoErr));
            assert_eq!(ask_extent(kind, 15, 0, 8, 0), Err(Status::IoErr));
            assert_eq!(ask_extent(kind, 32, 0, 8, 0), Err(Status::Unsupp));
            assert_eq!(ask_extent(kind, 16, 0, 0, 0), Ok(Request::Nothing));
            for (sector, sectors) in [(SECTORS - 7, 8), (0, u32::MAX), (u64::MAX, 8), (1 << 55, 8), (1 << 63, 8)] {
                assert_eq!(ask_extent(kind, 16, sector, sectors, 0), Err(Status::IoErr), "{sector} {sectors}");
            }
        }
        let big = Disk { size: 1 << 40, ..DISK };
        let data = Data { readable: 16, writable: 0 };
        for (sectors, good) in [(MAX_EXTENT_SECTORS, true), (MAX_EXTENT_SECTORS + 1, false)] {
            let mut segment = [0; 16];
            segment[8..12].copy_from_slice(&sectors.to_le_bytes());
            assert_eq!(parse(&header(T_DISCARD, 0), data, &big, || segment).is_ok(), good);
        }
    }
}
