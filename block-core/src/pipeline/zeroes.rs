//! Writing zeroes, by the cheapest way that works: the driver's own, the driver's own without freeing space, and at
//! last a buffer of zeroes.

use crate::base::{ByteRange, IoError};
use crate::graph::{Child, DebugEvent, WriteFlags};
use crate::rt::IoBuf;

use super::align;

/// The zeroes that are written where nothing better works, in bytes.
const BUFFER: u64 = 1 << 20;

pub(super) async fn write(child: Child<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
    child.placed().shared.writing_up_to(at.end());
    let flags = child.native(flags);
    let [head, whole, tail] = at.cut_at_units(unit(child));
    if flags.no_fallback && (head.is_some() || tail.is_some()) {
        return Err(IoError::Unsupported);
    }
    if let Some(head) = head {
        with_buffer(child, head, flags).await?;
    }
    if let Some(whole) = whole {
        blocks(child, whole, flags).await?;
    }
    if let Some(tail) = tail {
        with_buffer(child, tail, flags).await?;
    }
    Ok(())
}

/// Zeroes go to the driver in multiples of this.
fn unit(child: Child<'_>) -> u64 {
    let limits = child.geometry().limits;
    limits.request_alignment.max(limits.write_zeroes_alignment).into()
}

async fn blocks(child: Child<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
    let unit = unit(child);
    for piece in at.pieces((child.geometry().limits.max_write_zeroes / unit * unit).max(unit)) {
        match by_driver(child, piece, flags).await {
            Err(IoError::Unsupported) if !flags.no_fallback => with_buffer(child, piece, flags).await?,
            other => other?,
        }
    }
    Ok(())
}

async fn by_driver(child: Child<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
    let _alone = child.tracked(at, false).await;
    let body = &child.placed().body;
    child.announce(DebugEvent::PwritevZero).await;
    let result = match body.write_zeroes(child.cx(), at, flags).await {
        Err(IoError::Unsupported) if flags.may_unmap => {
            body.write_zeroes(child.cx(), at, WriteFlags { may_unmap: false, ..flags }).await
        }
        other => other,
    };
    child.announce(DebugEvent::PwritevDone).await;
    result
}

async fn with_buffer(child: Child<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
    let len = at.len().min(BUFFER);
    let memory = child.geometry().limits.memory_alignment as usize;
    let zeroes = IoBuf::alloc(usize::try_from(len).map_err(|_| IoError::NoMemory)?, memory)?;
    for piece in at.pieces(len) {
        align::write(child, piece, zeroes.slice(0, piece.len()), flags).await?;
    }
    Ok(())
}
