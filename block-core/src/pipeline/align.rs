//! Reads and writes as the node wants them: aligned, in buffers that it can take, and not too large.
//!
//! A write that covers only part of a block reads the block first (read-modify-write). It is *serialising*: nothing
//! that overlaps the block runs beside it. If the padding cannot be read, the write fails: it must not destroy its
//! neighbours.

use crate::base::{ByteRange, IoError};
use crate::graph::{Child, DebugEvent, WriteFlags};
use crate::rt::IoBuf;

/// At most this much is bounced at once, in bytes.
const MAX_BOUNCE: u64 = 1 << 20;

pub(super) async fn read(child: Child<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    if is_one_request(child, at, &buf) {
        return child.placed().body.read(child.cx(), at, buf).await;
    }
    Box::pin(read_in_pieces(child, at, buf)).await
}

/// The node takes it as it is, as most of what comes through filters.
fn is_one_request(child: Child<'_>, at: ByteRange, buf: &IoBuf) -> bool {
    let limits = child.geometry().limits;
    at.is_aligned(u64::from(limits.request_alignment)) && at.len() <= limits.max_transfer && fits(child, buf)
}

async fn read_in_pieces(child: Child<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    let mut done = 0;
    let unit = child.geometry().limits.request_alignment;
    for piece in pieces(child, at, &buf, unit)? {
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
    if is_one_request(child, at, &buf) && !child.placed().tracks() {
        return send(child, at, buf, flags).await;
    }
    Box::pin(write_in_pieces(child, at, buf, flags)).await
}

async fn write_in_pieces(child: Child<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
    let mut done = 0;
    let limits = child.geometry().limits;
    // A cluster is compressed as a whole.
    let unit = if flags.compressed { limits.compressed_cluster } else { limits.request_alignment };
    for piece in pieces(child, at, &buf, unit)? {
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
        return send(child, at, buf, flags).await;
    }
    let bounce = bounce_for(child, wide)?;
    Box::pin(read_padding(child, at, wide, &bounce)).await?;
    bounce.slice(at.start() - wide.start(), at.len()).copy_from(&buf);
    send(child, wide, bounce, flags).await
}

async fn send(child: Child<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
    child.announce(DebugEvent::Pwritev).await;
    let result = child.placed().body.write(child.cx(), at, buf, flags).await;
    child.announce(DebugEvent::PwritevDone).await;
    result
}

/// The blocks at both ends of which the write covers only a part. Two neighbours are read at once.
async fn read_padding(child: Child<'_>, at: ByteRange, wide: ByteRange, bounce: &IoBuf) -> Result<(), IoError> {
    let unit = u64::from(child.geometry().limits.request_alignment);
    let ends = Ends { head: at.start() != wide.start(), tail: at.end() != wide.end() };
    let (first, last) = (wide.split(unit).0, wide.split(wide.len() - unit).1.unwrap_or(wide));
    match ends {
        Ends { head: false, tail: false } => Ok(()),
        Ends { head: true, tail: false } => read_ends(child, wide, first, ends, bounce).await,
        Ends { head: false, tail: true } => read_ends(child, wide, last, ends, bounce).await,
        Ends { head: true, tail: true } if wide.len() <= 2 * unit => read_ends(child, wide, wide, ends, bounce).await,
        Ends { head: true, tail: true } => {
            read_ends(child, wide, first, Ends { tail: false, ..ends }, bounce).await?;
            read_ends(child, wide, last, Ends { head: false, ..ends }, bounce).await
        }
    }
}

/// Which ends of a write cover only a part of their block.
#[derive(Clone, Copy)]
struct Ends {
    head: bool,
    tail: bool,
}

/// Reads a part of `wide` to its place in `bounce`, and says what for.
async fn read_ends(
    child: Child<'_>,
    wide: ByteRange,
    part: ByteRange,
    Ends { head, tail }: Ends,
    bounce: &IoBuf,
) -> Result<(), IoError> {
    if head {
        child.announce(DebugEvent::PwritevRmwHead).await;
    }
    if tail {
        child.announce(DebugEvent::PwritevRmwTail).await;
    }
    let place = bounce.slice(part.start() - wide.start(), part.len());
    child.placed().body.read(child.cx(), part, place).await?;
    if head {
        child.announce(DebugEvent::PwritevRmwAfterHead).await;
    }
    if tail {
        child.announce(DebugEvent::PwritevRmwAfterTail).await;
    }
    Ok(())
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
/// multiples of `unit`, so that only the ends of the range can cover a part of one.
fn pieces(child: Child<'_>, at: ByteRange, buf: &IoBuf, unit: u32) -> Result<impl Iterator<Item = ByteRange>, IoError> {
    let (limits, unit) = (child.geometry().limits, u64::from(unit));
    let as_it_is = at.is_aligned(limits.request_alignment.into()) && fits(child, buf);
    let most = if as_it_is { limits.max_transfer } else { limits.max_transfer.min(MAX_BOUNCE) };
    let pieces = at.widened(unit).ok_or(IoError::OutOfRange)?.pieces(crate::base::align_down(most, unit).max(unit));
    Ok(pieces.filter_map(move |piece| piece.intersection(at)))
}
