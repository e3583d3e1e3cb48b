//! `blkverify`: every request goes to two disks, one under test and one that is known to be right, and both have to
//! give the same answer and the same bytes.
//!
//! QEMU ends the process where they differ. A guest could end it that way, so here the request fails with EIO, an
//! error is logged (once a second at most), and the node counts it. A discard may leave other bytes on each disk, so
//! none gets through, as in QEMU. Requests that meet a write wait for each other: else each disk could have them in an
//! order of its own.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::Poll;

use qmp::Qapi;

use crate::base::{ByteRange, Error, IoError, Result, Sparingly};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    ChildId, DriverInfo, Geometry, IoCx, Limits, Preallocation, ReopenRequest, Ticket, Tracked, WriteFlags,
};
use crate::pipeline::{Filter, Filtered};
use crate::rt::IoBuf;

/// At most this much is copied and compared at once, in bytes.
const MAX_COPY: u64 = 1 << 20;

/// A filter that compares two disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsBlkverify")]
pub struct BlkVerifyOptions {}

impl Open for BlkVerifyOptions {
    type Driver = Filtered<BlkVerify>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let driver = BlkVerify {
            name: site.name.to_owned(),
            test: site.child("test"),
            raw: site.child("raw"),
            under_way: Tracked::default(),
            mismatches: AtomicU64::new(0),
            complaints: Sparingly::default(),
        };
        Ok(Opened { driver: Filtered(driver), conf: (), options: site.common })
    }
}

/// The driver.
pub struct BlkVerify {
    name: String,
    test: ChildId,
    raw: ChildId,
    /// Reads, and writes that keep all others away.
    under_way: Tracked,
    mismatches: AtomicU64,
    complaints: Sparingly,
}

/// How two disks differ.
enum Mismatch {
    Results {
        test: Result<(), IoError>,
        raw: Result<(), IoError>,
    },
    /// In this byte of the disk first.
    Contents(u64),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Results { test, raw } => write!(f, "result mismatch, test: {test:?}, raw: {raw:?}"),
            Self::Contents(at) => write!(f, "contents mismatch at offset {at}"),
        }
    }
}

impl BlkVerify {
    /// How often the disks did not agree.
    pub fn mismatches(&self) -> u64 {
        self.mismatches.load(Relaxed)
    }

    /// Waits for those who came before and must not meet this request.
    async fn in_order(&self, cx: IoCx<'_>, at: ByteRange, writes: bool) -> Ticket<'_> {
        cx.alone(&self.under_way, at, writes).await
    }

    /// Does both, and gives the result if it is the same.
    async fn both(
        &self,
        what: &'static str,
        at: ByteRange,
        test: impl Future<Output = Result<(), IoError>>,
        raw: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        let (test, raw) = side_by_side(test, raw).await;
        if test == raw { test } else { Err(self.mismatch(what, at, &Mismatch::Results { test, raw })) }
    }

    #[cold]
    fn mismatch(&self, what: &'static str, at: ByteRange, how: &Mismatch) -> IoError {
        self.mismatches.fetch_add(1, Relaxed);
        if let Some(left_out) = self.complaints.due() {
            let (name, offset, bytes) = (&self.name, at.start(), at.len());
            tracing::error!(left_out, "blkverify node '{name}': {what} offset={offset} bytes={bytes} {how}");
        }
        IoError::Os(libc::EIO)
    }
}

/// Both results, once both are there.
async fn side_by_side<T>(one: impl Future<Output = T>, other: impl Future<Output = T>) -> (T, T) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut first, mut second) = (None, None);
    poll_fn(|task| {
        if first.is_none()
            && let Poll::Ready(value) = one.as_mut().poll(task)
        {
            first = Some(value);
        }
        if second.is_none()
            && let Poll::Ready(value) = other.as_mut().poll(task)
        {
            second = Some(value);
        }
        match (first.take(), second.take()) {
            (Some(one), Some(other)) => Poll::Ready((one, other)),
            (one, other) => {
                (first, second) = (one, other);
                Poll::Pending
            }
        }
    })
    .await
}

/// The first byte that is not the same.
fn difference(one: &IoBuf, other: &IoBuf) -> Option<u64> {
    const PIECE: usize = 4096;
    let (mut left, mut right) = ([0; PIECE], [0; PIECE]);
    ByteRange::whole(one.len()).pieces(PIECE as u64).find_map(|piece| {
        // After the last piece both keep what was the same before.
        let len = usize::try_from(piece.len()).unwrap_or(PIECE);
        one.read_at(piece.start(), &mut left[..len]);
        other.read_at(piece.start(), &mut right[..len]);
        let at = left.iter().zip(&right).position(|(left, right)| left != right)?;
        Some(piece.start() + at as u64)
    })
}

impl Filter for BlkVerify {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.raw
    }

    fn geometry(&self, (): &(), child: Geometry, all: &[Geometry]) -> Result<Geometry, Error> {
        let (test, raw) = (self.test.of(all), self.raw.of(all));
        if test.size != raw.size {
            let (test, raw) = (test.size, raw.size);
            return Err(Error::new(format!("blkverify needs disks of one size: 'test' has {test} bytes, 'raw' {raw}")));
        }
        let fua = test.limits.fua && raw.limits.fua;
        let max_transfer = child.limits.max_transfer.min(MAX_COPY);
        let limits =
            Limits { fua, max_transfer, discard: false, unmap_zeroes: false, compressed_cluster: 0, ..child.limits };
        Ok(Geometry { limits, ..child })
    }

    async fn read(&self, (): &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let (test, raw) = (IoBuf::private(at.len())?, IoBuf::private(at.len())?);
        let _in_order = self.in_order(cx, at, false).await;
        let reads = (cx.child(self.test).read(at, test.clone()), cx.child(self.raw).read(at, raw.clone()));
        self.both("read", at, reads.0, reads.1).await?;
        if let Some(skip) = difference(&test, &raw) {
            return Err(self.mismatch("read", at, &Mismatch::Contents(at.start() + skip)));
        }
        buf.copy_from(&raw);
        Ok(())
    }

    async fn write(&self, (): &(), cx: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        let data = IoBuf::private(at.len())?;
        data.copy_from(&buf);
        let _in_order = self.in_order(cx, at, true).await;
        let test = cx.child(self.test).write(at, data.clone(), flags);
        let raw = cx.child(self.raw).write(at, data, flags);
        self.both("write", at, test, raw).await
    }

    /// Not every disk can do it cheaply, and that is no difference.
    async fn write_zeroes(&self, (): &(), cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        if flags.no_fallback {
            return Err(IoError::Unsupported);
        }
        let flags = WriteFlags { may_unmap: false, ..flags };
        let _in_order = self.in_order(cx, at, true).await;
        let test = cx.child(self.test).write_zeroes(at, flags);
        let raw = cx.child(self.raw).write_zeroes(at, flags);
        self.both("write", at, test, raw).await
    }

    async fn discard(&self, (): &(), _: IoCx<'_>, _: ByteRange) -> Result<(), IoError> {
        Err(IoError::Unsupported)
    }

    async fn flush(&self, (): &(), cx: IoCx<'_>) -> Result<(), IoError> {
        let (test, raw) = (cx.child(self.test).flush(), cx.child(self.raw).flush());
        self.both("flush", ByteRange::whole(0), test, raw).await
    }

    /// Only one disk at a time could be given another size.
    fn passes_size(&self, (): &(), _: u64) -> Result<Option<(ChildId, u64)>, Error> {
        Ok(None)
    }

    async fn truncate(&self, (): &(), _: IoCx<'_>, _: u64, _: Preallocation) -> Result<(), Error> {
        Err(Error::new("The disks of a blkverify node cannot be resized together"))
    }

    async fn reopen(&self, (): &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, (): &()) -> DriverInfo {
        DriverInfo { driver: "blkverify", ..DriverInfo::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_that_differs_is_found() {
        let buf = |bytes: &[u8]| IoBuf::from_slice(bytes).unwrap();
        assert_eq!(difference(&buf(&[1, 2, 3]), &buf(&[1, 2, 3])), None);
        assert_eq!(difference(&buf(&[1, 2, 3]), &buf(&[1, 9, 9])), Some(1));
        let (one, other) = (buf(&[7; 10_000]), buf(&[7; 10_000]));
        other.write_at(9_999, &[8]);
        assert_eq!(difference(&one, &other), Some(9_999));
    }
}
