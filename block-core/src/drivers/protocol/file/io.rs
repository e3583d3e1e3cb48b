//! Moving bytes between a buffer and the file. The kernel may move less than it was asked to; the rest follows here.

use std::time::Duration;

use super::Conf;
use crate::base::{ByteRange, IoError, SECTOR};
use crate::graph::{DirectRequest, IoCx, Settled};
use crate::rt::{Engine, IoBuf, Op, TRIES, blocking_on, system_call};

/// Fills `buf`; what is missing of the file's last sector is zeroes.
pub(super) async fn read(conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    // Where the file ended before the kernel looked: others may be moving the end.
    let end = conf.end();
    let (mut done, mut cut) = (0, 0);
    while done < at.len() {
        let rest = buf.slice(done, at.len() - done);
        let op = || Op::Read { fd: conf.fd.clone(), buf: rest.clone(), offset: at.start() + done };
        match submit(conf.reader(rest.len()), cx, op).await.map_err(IoError::from_errno)? {
            0 => break,
            bytes => done += bytes,
        }
        // With O_DIRECT only the end of the file cuts a block, and nothing can be read from within one.
        if !conf.is_aligned(done) {
            if !goes_on(conf, at.start() + done).await? {
                break;
            }
            // It was the end, and somebody has moved it; or zeroes in place of what follows would be a lie.
            if done <= cut {
                return Err(IoError::Os(libc::EIO));
            }
            cut = done;
            done = conf.aligned_down(done);
        }
    }
    if done < at.len() {
        // Only in its last sector: a file that ends before has become shorter behind our back.
        if end.saturating_sub(at.start() + done) >= SECTOR {
            return Err(IoError::Os(libc::EIO));
        }
        buf.slice(done, at.len() - done).fill(0);
    }
    Ok(())
}

/// The file does not end at `at`.
async fn goes_on(conf: &Conf, at: u64) -> Result<bool, IoError> {
    let stat = blocking_on(&conf.fd, |fd| system_call(|| rustix::fs::fstat(fd))).await;
    let stat = stat.map_err(|errno| IoError::from_errno(errno.raw_os_error()))?;
    Ok(stat.st_size.cast_unsigned() > at)
}

/// Writes `buf`; `stable`: it is on the medium at the end.
pub(super) async fn write(conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf, stable: bool) -> Result<(), IoError> {
    let mut done = 0;
    while done < at.len() {
        let rest = buf.slice(done, at.len() - done);
        let offset = at.start() + done;
        let op = || Op::Write { fd: conf.fd.clone(), buf: rest.clone(), offset, dsync: stable };
        let written = submit(conf.writer(cx, rest.len()), cx, op).await.inspect_err(|errno| {
            if stable {
                latch_lost(conf, *errno);
            }
        });
        match written.map_err(IoError::from_errno)? {
            // The kernel says so only where no byte fits any more.
            0 => return Err(IoError::NoSpace),
            bytes => done = conf.aligned_down(done + bytes).max(done),
        }
    }
    Ok(())
}

/// fdatasync.
pub(super) async fn sync(conf: &Conf, cx: IoCx<'_>) -> Result<(), IoError> {
    let op = || Op::Sync { fd: conf.fd.clone(), data_only: true };
    submit(conf.engine, cx, op).await.map(drop).map_err(IoError::from_errno)
}

/// Has an operation carried out: again where the kernel could not just now, but not for ever. The answer is a count, or
/// a positive errno.
pub(super) async fn submit(engine: Engine, cx: IoCx<'_>, op: impl Fn() -> Op) -> Result<u64, i32> {
    // A thread with one purpose is not kept from others by a long copy.
    let mut engine = if engine == Engine::Cached && cx.local().may_wait() { Engine::Ring } else { engine };
    for _ in 1..TRIES {
        match counted(cx.submit(engine, op()).await) {
            Err(errno @ (libc::EAGAIN | libc::ECANCELED)) => {
                // The kernel has no thread for it. Without one it takes longer, and does not fail.
                if errno == libc::ECANCELED && engine == Engine::Cached {
                    engine = Engine::Ring;
                }
                cx.local().sleep(PAUSE).await;
            }
            Err(errno) if passes(errno) => {}
            answer => return answer,
        }
    }
    counted(cx.submit(engine, op()).await)
}

/// For a kernel that is short of something.
const PAUSE: Duration = Duration::from_millis(1);

/// A signal, a queue without room, a ring whose worker went away: nothing that the file has to do with.
fn passes(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED)
}

/// A ring entry of the direct path moved `result` bytes, or failed with that negative errno.
pub(super) fn settle(conf: &Conf, request: DirectRequest, result: i32) -> Settled {
    match counted(result) {
        // The async path has the time to try again.
        Ok(_) => Settled::Again,
        Err(errno) if passes(errno) => Settled::Again,
        Err(errno) => {
            if request.write && request.fua {
                latch_lost(conf, errno);
            }
            Settled::Failed(IoError::from_errno(errno))
        }
    }
}

/// The bytes, or the positive errno.
fn counted(result: i32) -> Result<u64, i32> {
    u64::try_from(result).map_err(|_| -result)
}

/// A stable write that failed may have taken with it the kernel's only report that earlier data is lost. Errors that
/// say no more than that the call made no sense, or that a direct write found no room, are about this write alone.
fn latch_lost(conf: &Conf, errno: i32) {
    let about_this_write = match errno {
        libc::ENOSPC | libc::EDQUOT => conf.direct,
        errno => matches!(
            errno,
            libc::EINTR
                | libc::EAGAIN
                | libc::ECANCELED
                | libc::EINVAL
                | libc::EFBIG
                | libc::EFAULT
                | libc::ENOMEM
                | libc::EBADF
                | libc::EPERM
                | libc::EROFS
                | libc::EOPNOTSUPP
        ),
    };
    if !about_this_write {
        conf.flusher.latch();
    }
}

impl Conf {
    fn is_aligned(&self, bytes: u64) -> bool {
        crate::base::is_aligned(bytes, self.alignment.request.into())
    }

    fn aligned_down(&self, bytes: u64) -> u64 {
        crate::base::align_down(bytes, self.alignment.request.into())
    }
}
