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
    let [head, whole, tail] = cut(at, unit(child));
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

/// Part of a block, whole blocks, part of a block.
fn cut(at: ByteRange, unit: u64) -> [Option<ByteRange>; 3] {
    let Some(inner) = at.whole_units(unit) else { return [Some(at), None, None] };
    let head = ByteRange::between(at.start(), inner.start()).filter(|head| !head.is_empty());
    let tail = ByteRange::between(inner.end(), at.end()).filter(|tail| !tail.is_empty());
    [head, Some(inner), tail]
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

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end).unwrap()
    }

    #[test]
    fn ragged_ends_are_cut_off() {
        assert_eq!(
            cut(range(100, 1600), 512),
            [Some(range(100, 512)), Some(range(512, 1536)), Some(range(1536, 1600))]
        );
        assert_eq!(cut(range(512, 1024), 512), [None, Some(range(512, 1024)), None]);
        assert_eq!(cut(range(100, 200), 512), [Some(range(100, 200)), None, None]);
        assert_eq!(cut(range(500, 600), 512), [Some(range(500, 600)), None, None]);
    }
}
