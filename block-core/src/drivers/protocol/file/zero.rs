//! Space: zeroing and giving back through the file system, and where there is data.
//!
//! What the kernel once called unsupported is not asked again. Zeroing inside the file never changes its size; past its
//! end it takes the space, which moves the end and never back, whoever else moves it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{FallocateFlags, SeekFrom, seek};
use rustix::io::{Errno, pread};

use super::found::Found;
use super::{Conf, Kind, io};
use crate::base::{ByteRange, IoError, align_down, align_up};
use crate::graph::{Extent, IoCx, Place, WriteFlags};
use crate::rt::sync::oneshot;
use crate::rt::{Op, SharedFd, blocking_on, ioctl, system_call};

/// What the kernel is not asked again, and what has been seen of it. All false at the beginning.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_allocate: AtomicBool,
    no_growth: AtomicBool,
    no_discard: AtomicBool,
    /// One has been looked into.
    holes_are_empty: AtomicBool,
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);
const ALLOCATE: FallocateFlags = FallocateFlags::KEEP_SIZE;
/// Of what lies past the end.
const GROW: FallocateFlags = FallocateFlags::empty();

/// Makes the range read as zeroes, by the first way that works.
pub(super) async fn write_zeroes(
    kind: Kind,
    remembered: &Remembered,
    conf: &Conf,
    cx: IoCx<'_>,
    at: ByteRange,
    flags: WriteFlags,
) -> Result<(), IoError> {
    let (inside, past) = at.split(conf.end().saturating_sub(at.start()));
    if !inside.is_empty() {
        zero(kind, remembered, conf, cx, inside, flags).await?;
    }
    if let Some(past) = past {
        fallocate(&remembered.no_growth, conf, cx, GROW, past).await?;
    }
    if flags.fua { conf.flusher.flush(io::sync(conf, cx)).await } else { Ok(()) }
}

async fn zero(
    kind: Kind,
    remembered: &Remembered,
    conf: &Conf,
    cx: IoCx<'_>,
    at: ByteRange,
    flags: WriteFlags,
) -> Result<(), IoError> {
    if flags.may_unmap {
        match hole(remembered, conf, cx, at).await {
            Err(IoError::Unsupported) => {}
            other => return other,
        }
    }
    // A device that cannot zero by itself is written to by the kernel: that is what was not wanted.
    if kind == Kind::Device && flags.no_fallback {
        return Err(IoError::Unsupported);
    }
    match fallocate(&remembered.no_zero_range, conf, cx, ZERO, at).await {
        Err(IoError::Unsupported) if kind == Kind::Regular => hole_with_space(remembered, conf, cx, at).await,
        other => other,
    }
}

/// A hole, and fresh space in it: what tmpfs and network file systems have instead of zeroing.
async fn hole_with_space(remembered: &Remembered, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
    if remembered.no_allocate.load(Relaxed) {
        return Err(IoError::Unsupported);
    }
    hole(remembered, conf, cx, at).await?;
    fallocate(&remembered.no_allocate, conf, cx, ALLOCATE, at).await
}

/// A hole that reads as zeroes. There have been file systems that said so while the old data could still be read, so the
/// first hole over data is looked into.
async fn hole(remembered: &Remembered, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
    let trusted = remembered.holes_are_empty.load(Relaxed) || remembered.no_punch.load(Relaxed);
    let was_data = !trusted && has_data(conf, at).await;
    fallocate(&remembered.no_punch, conf, cx, PUNCH, at).await?;
    if was_data && has_data(conf, at).await {
        tracing::warn!("'{}': holes keep their data here, so zeroes are written instead", conf.options.filename);
        remembered.no_punch.store(true, Relaxed);
        return Err(IoError::Unsupported);
    }
    remembered.holes_are_empty.fetch_or(was_data, Relaxed);
    Ok(())
}

/// There is something else than zeroes at the beginning of the range. What cannot be read says nothing.
async fn has_data(conf: &Conf, at: ByteRange) -> bool {
    blocking_on(&conf.fd, move |fd| {
        let mut memory = [0; 2 * LOOK];
        let aligned = memory.as_ptr().align_offset(LOOK);
        let len = usize::try_from(at.len()).map_or(LOOK, |len| len.min(LOOK));
        let first = &mut memory[aligned..][..len];
        system_call(|| pread(fd, &mut *first, at.start())).is_ok() && first.iter().any(|byte| *byte != 0)
    })
    .await
}

/// Bytes that are looked at; a block of most file systems.
const LOOK: usize = 4096;

/// Gives the range's space back.
pub(super) async fn discard(
    kind: Kind,
    remembered: &Remembered,
    conf: &Conf,
    cx: IoCx<'_>,
    at: ByteRange,
) -> Result<(), IoError> {
    match kind {
        Kind::Regular => fallocate(&remembered.no_punch, conf, cx, PUNCH, at).await,
        Kind::Device => discard_blocks(&remembered.no_discard, conf, cx, at).await,
    }
}

async fn discard_blocks(never: &AtomicBool, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
    if never.load(Relaxed) {
        return Err(IoError::Unsupported);
    }
    let result = inside(cx, &conf.fd, move |fd| system_call(|| ioctl::discard(fd, at.start(), at.len()))).await;
    learn(never, result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)))
}

async fn fallocate(
    never: &AtomicBool,
    conf: &Conf,
    cx: IoCx<'_>,
    mode: FallocateFlags,
    at: ByteRange,
) -> Result<(), IoError> {
    if never.load(Relaxed) {
        return Err(IoError::Unsupported);
    }
    let mode = mode.bits().cast_signed();
    let op = || Op::Fallocate { fd: conf.fd.clone(), mode, offset: at.start(), len: at.len() };
    learn(never, io::submit(conf.engine, cx, op).await.map(drop))
}

/// Remembers what will never work. `EINVAL` and `ETXTBSY` are about this range and this moment: they ask for another way,
/// this time.
fn learn(never: &AtomicBool, result: Result<(), i32>) -> Result<(), IoError> {
    match result {
        Err(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV | libc::EPERM) => {
            never.store(true, Relaxed);
            Err(IoError::Unsupported)
        }
        Err(libc::EINVAL | libc::ETXTBSY) => Err(IoError::Unsupported),
        other => other.map_err(IoError::from_errno),
    }
}

/// Work on a helper thread that changes the file: the request is not over before it is, even if its future is dropped.
pub(super) async fn inside<T: Send + 'static>(
    cx: IoCx<'_>,
    fd: &SharedFd,
    work: impl FnOnce(&OwnedFd) -> T + Send + 'static,
) -> T {
    let (done, result) = oneshot();
    let (counted, fd) = ((cx.fork(), cx.hold()), fd.clone());
    cx.local().spawn(async move {
        let value = blocking_on(&fd, work).await;
        drop(counted);
        // The request may have been given up: then nobody waits.
        let _ = done.send(value);
    });
    result.await.expect("the task sends before it ends")
}

/// Where the first bytes of the range live. What cannot be found out is data: a hole that is none loses data, data
/// that is none costs time.
pub(super) async fn map(kind: Kind, found: &Found, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Extent {
    let all = Extent { len: at.len(), place: Place::Here };
    if kind == Kind::Device {
        return all;
    }
    if let Some(len) = found.data(at) {
        return Extent { len, ..all };
    }
    let unit = u64::from(conf.alignment.request);
    let here = conf.is_waitless() || cx.local().may_wait();
    let extent =
        if here { find(&conf.fd, at, unit) } else { blocking_on(&conf.fd, move |fd| find(fd, at, unit)).await };
    let Some(extent) = extent else { return all };
    if let Some(data) = ByteRange::new(at.start(), extent.len).filter(|_| extent.place == Place::Here) {
        found.keep(data);
    }
    Extent { len: extent.len.min(at.len()), ..extent }
}

/// `None`: the file system does not say. Holes end, and data begins, at whole blocks of `unit` bytes. What is found may go
/// on behind the range.
fn find(fd: &OwnedFd, at: ByteRange, unit: u64) -> Option<Extent> {
    let hole = |end: u64| Extent { len: end - at.start(), place: Place::Zero { allocated: true } };
    let data = match system_call(|| seek(fd, SeekFrom::Data(at.start()))) {
        Ok(data) => align_down(data, unit),
        // Nothing but holes up to the end of the file, and nothing behind it.
        Err(Errno::NXIO) => return Some(hole(at.end())),
        Err(_) => return None,
    };
    if data > at.start() {
        return Some(hole(data));
    }
    let end = align_up(system_call(|| seek(fd, SeekFrom::Hole(at.start()))).ok()?, unit)?;
    (end > at.start()).then(|| Extent { len: end - at.start(), place: Place::Here })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn only_what_is_unsupported_for_ever_is_remembered() {
        let never = AtomicBool::new(false);
        assert_eq!(learn(&never, Err(libc::EINVAL)), Err(IoError::Unsupported));
        assert_eq!(learn(&never, Err(libc::ENOSPC)), Err(IoError::NoSpace));
        assert_eq!(learn(&never, Ok(())), Ok(()));
        assert!(!never.load(Relaxed));
        assert_eq!(learn(&never, Err(libc::EOPNOTSUPP)), Err(IoError::Unsupported));
        assert!(never.load(Relaxed));
    }

    #[test]
    fn holes_and_data_are_told_apart() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 8192], 65536).unwrap();
        let fd = OwnedFd::from(file);
        let find = |start, len| find(&fd, ByteRange::new(start, len).unwrap(), 4096).unwrap();
        let zero = Place::Zero { allocated: true };
        assert_eq!(find(0, 1 << 20), Extent { len: 65536, place: zero });
        assert_eq!(find(65536, 1 << 19), Extent { len: 8192, place: Place::Here });
        assert_eq!(find(65536, 4096), Extent { len: 8192, place: Place::Here }, "it goes on behind the range");
        assert_eq!(find(73728, 4096), Extent { len: 4096, place: zero });
        assert_eq!(find(73728, 1 << 20), Extent { len: 1 << 20, place: zero }, "past the end there are zeroes");
    }
}
