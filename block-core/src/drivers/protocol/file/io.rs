//! Moving bytes between a buffer and the file. The kernel may move less than it was asked to; the rest follows here.

use super::Conf;
use crate::base::{ByteRange, IoError};
use crate::graph::{DirectRequest, IoCx, Settled};
use crate::rt::{IoBuf, Op};

/// Fills `buf`; past the end of the file are zeroes.
pub(super) async fn read(conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
    let mut done = 0;
    while done < at.len() {
        let rest = buf.slice(done, at.len() - done);
        let op = Op::Read { fd: conf.fd.clone(), buf: rest.clone(), offset: at.start() + done };
        match moved(cx.submit(conf.engine, op).await)? {
            Moved::Nothing => break,
            Moved::Interrupted => continue,
            Moved::Some(bytes) => done += bytes,
        }
        // With O_DIRECT only the end of the file cuts a sector, and nothing can be read from within one.
        if !conf.is_aligned(done) {
            break;
        }
    }
    if done < at.len() {
        buf.slice(done, at.len() - done).fill(0);
    }
    Ok(())
}

/// Writes `buf`; `stable`: it is on the medium at the end.
pub(super) async fn write(conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf, stable: bool) -> Result<(), IoError> {
    let mut done = 0;
    while done < at.len() {
        let rest = buf.slice(done, at.len() - done);
        let op = Op::Write { fd: conf.fd.clone(), buf: rest, offset: at.start() + done, dsync: stable };
        let result = cx.submit(conf.engine, op).await;
        if stable {
            latch_lost(conf, result);
        }
        match moved(result)? {
            // The kernel says so only where no byte fits any more.
            Moved::Nothing => return Err(IoError::NoSpace),
            Moved::Interrupted => {}
            Moved::Some(bytes) => done = conf.aligned_down(done + bytes).max(done),
        }
    }
    Ok(())
}

/// fdatasync.
pub(super) async fn sync(conf: &Conf, cx: IoCx<'_>) -> Result<(), IoError> {
    loop {
        let op = Op::Sync { fd: conf.fd.clone(), data_only: true };
        if !matches!(moved(cx.submit(conf.engine, op).await)?, Moved::Interrupted) {
            return Ok(());
        }
    }
}

/// A ring entry of the direct path moved `result` bytes, or failed with that negative errno.
pub(super) fn settle(conf: &Conf, request: DirectRequest, result: i32) -> Settled {
    if request.write && request.fua {
        latch_lost(conf, result);
    }
    match moved(result) {
        Ok(_) => Settled::Again,
        Err(error) => Settled::Failed(error),
    }
}

enum Moved {
    Nothing,
    Some(u64),
    Interrupted,
}

fn moved(result: i32) -> Result<Moved, IoError> {
    match u64::try_from(result) {
        Ok(0) => Ok(Moved::Nothing),
        Ok(bytes) => Ok(Moved::Some(bytes)),
        Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => Ok(Moved::Interrupted),
        Err(_) => Err(IoError::from_errno(-result)),
    }
}

/// A stable write that failed may have taken with it the kernel's only report that earlier data is lost. Errors that
/// say no more than that the call made no sense, or that a direct write found no room, are about this write alone.
fn latch_lost(conf: &Conf, result: i32) {
    let about_this_write = match -result {
        libc::ENOSPC | libc::EDQUOT => conf.direct,
        errno => matches!(
            errno,
            libc::EINTR
                | libc::EAGAIN
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
    if result < 0 && !about_this_write {
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
