//! Reads and writes as the node wants them: aligned, in buffers that it can take, and not too large.
//!
//! A write that covers only part of a block reads the block first (read-modify-write). It is *serialising*: nothing
//! that overlaps the block runs beside it. If the padding cannot be read, the write fails: it must not destroy its
//! neighbours.

use crate::base::{ByteRange, IoError};
use crate::graph::{Child, WriteFlags};
use crate::rt::IoBuf;

/// At most this much is bounced at once, in bytes.
const MAX_BOUNCE: u64 = 1 << 20;

pub(super) async fn read(child: Child<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    let mut done = 0;
    for piece in pieces(child, at, &buf)? {
        let part = buf.slice(done, piece.len());
        read_piece(child, piece, part).await?;
        done += piece.len();
    }
    Ok(())
}

async fn read_piece(child: Child<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    let wide = aligned(child, at)?;
    if wide == at && fits(child, &buf) {
        return child.placed().body.read(child.cx(), at, buf).await;
    }
    let bounce = bounce_for(child, wide)?;
    child.placed().body.read(child.cx(), wide, bounce.clone()).await?;
    buf.copy_from(&bounce.slice(at.start() - wide.start(), at.len()));
    Ok(())
}

pub(super) async fn write(child: Child<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
    child.placed().shared.writing_up_to(at.end());
    let mut done = 0;
    for piece in pieces(child, at, &buf)? {
        let part = buf.slice(done, piece.len());
        write_piece(child, piece, part, flags).await?;
        done += piece.len();
    }
    Ok(())
}

async fn write_piece(child: Child<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
    let wide = aligned(child, at)?;
    let _alone = child.tracked(wide, wide != at).await;
    if wide == at && fits(child, &buf) {
        return child.placed().body.write(child.cx(), at, buf, flags).await;
    }
    let bounce = bounce_for(child, wide)?;
    read_padding(child, at, wide, &bounce).await?;
    bounce.slice(at.start() - wide.start(), at.len()).copy_from(&buf);
    child.placed().body.write(child.cx(), wide, bounce, flags).await
}

/// The blocks at both ends of which the write covers only a part.
async fn read_padding(child: Child<'_>, at: ByteRange, wide: ByteRange, bounce: &IoBuf) -> Result<(), IoError> {
    let unit = u64::from(child.geometry().limits.request_alignment);
    let head = at.start() != wide.start();
    let tail = at.end() != wide.end() && (wide.len() > unit || !head);
    if head {
        read_block(child, wide, 0, unit, bounce).await?;
    }
    if tail {
        read_block(child, wide, wide.len() - unit, unit, bounce).await?;
    }
    Ok(())
}

async fn read_block(child: Child<'_>, wide: ByteRange, skip: u64, unit: u64, bounce: &IoBuf) -> Result<(), IoError> {
    let block = ByteRange::new(wide.start() + skip, unit).ok_or(IoError::OutOfRange)?;
    child.placed().body.read(child.cx(), block, bounce.slice(skip, unit)).await
}

/// The range in whole blocks. The last block may reach past the node's size: its driver reads zeroes there.
fn aligned(child: Child<'_>, at: ByteRange) -> Result<ByteRange, IoError> {
    at.widened(u64::from(child.geometry().limits.request_alignment)).ok_or(IoError::OutOfRange)
}

fn fits(child: Child<'_>, buf: &IoBuf) -> bool {
    let limits = child.geometry().limits;
    buf.is_aligned(limits.memory_alignment as usize, 1) && buf.segments().len() <= limits.max_segments
}

fn bounce_for(child: Child<'_>, wide: ByteRange) -> Result<IoBuf, IoError> {
    let len = usize::try_from(wide.len()).map_err(|_| IoError::NoMemory)?;
    IoBuf::alloc(len, child.geometry().limits.memory_alignment as usize)
}

/// What goes into one request each: as much as the node takes, or less where it has to be bounced. The seams are at
/// whole blocks, so that only the ends of the range can cover a part of one.
fn pieces(child: Child<'_>, at: ByteRange, buf: &IoBuf) -> Result<impl Iterator<Item = ByteRange>, IoError> {
    let limits = child.geometry().limits;
    let unit = u64::from(limits.request_alignment);
    let as_it_is = at.is_aligned(unit) && fits(child, buf);
    let most = if as_it_is { limits.max_transfer } else { limits.max_transfer.min(MAX_BOUNCE) };
    let pieces = aligned(child, at)?.pieces(crate::base::align_down(most, unit).max(unit));
    Ok(pieces.filter_map(move |piece| piece.intersection(at)))
}
