//! `file` and `host_device`: a regular file or a block device of the host.
//!
//! * `options` is what operators say; `open` turns it into a [`Conf`]: what was opened is what is checked.
//! * `io` moves bytes, `zero` makes and finds holes (`found` remembers where there was none), `flush` makes stable and remembers when that failed;
//!   `turned` remembers that the file system became read-only.
//! * `lock` keeps other programs (QEMU's too) off the image; `resize` and `create` change files; `status` reports.
//!
//! Every system call that may wait runs on the ring or on a helper thread. A small read from tmpfs does not, unless its
//! memory was swapped out, as a guest's may be at any access: io_uring would give it to a worker, because tmpfs cannot say
//! "not now", and waking that takes longer than the read.

mod create;
mod flush;
mod found;
mod io;
mod lock;
mod open;
mod options;
mod resize;
mod status;
mod turned;
mod zero;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::flush::Flusher;
use self::found::Found;
use self::lock::{Claim, Locks};
use self::status::Counts;
use self::turned::Turned;
use self::zero::Remembered;
use crate::base::{ByteRange, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    Direct, DirectPlan, DirectRequest, Driver, DriverInfo, End, Extent, Geometry, IoCx, NodeOptions, Perms,
    Preallocation, ReopenRequest, RingEntry, Settled, WriteFlags,
};
use crate::rt::{Elsewhere, Engine, IoBuf, SharedFd, blocking, blocking_on};

pub use self::create::{CreateOptions, EXTENT_SIZE_HINT, create};
pub use self::options::{Aio, FileOptions, HostDeviceOptions, Locking};

/// Which of the two drivers this is: each refuses what the other takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `file`: regular files.
    Regular,
    /// `host_device`: block devices.
    Device,
}

/// The part that all configurations share.
pub struct File {
    kind: Kind,
    locks: Arc<Locks>,
    counts: Counts,
    remembered: Remembered,
    found: Found,
}

/// One way of having the file open. A reopen makes a new one, with a descriptor and latches of its own.
pub struct Conf {
    options: FileOptions,
    fd: Elsewhere<SharedFd>,
    /// In bytes, in whole sectors: a file's last sector may be incomplete, and reads as zeroes then. Moves with those who
    /// write past it; the file is never shorter.
    end: AtomicU64,
    engine: Engine,
    alignment: Alignment,
    flusher: Arc<Flusher>,
    turned: Arc<Turned>,
    /// `O_DIRECT`.
    direct: bool,
    /// On tmpfs.
    in_memory: bool,
    active: bool,
    /// `None`: other programs are told nothing.
    claim: Elsewhere<Option<Arc<Claim>>>,
}

/// What the file system or the device asks for, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    /// Of offsets and lengths.
    request: u32,
    /// Of buffers.
    memory: u32,
    /// Of discards and zeroing.
    discard: u32,
    /// What the medium writes at once.
    physical: u32,
}

impl Open for FileOptions {
    type Driver = File;

    async fn open(&self, site: Site<'_>) -> Result<Opened<File>> {
        open_as(Kind::Regular, self.clone(), site.common).await
    }
}

impl Open for HostDeviceOptions {
    type Driver = File;

    async fn open(&self, site: Site<'_>) -> Result<Opened<File>> {
        open_as(Kind::Device, self.file.clone(), site.common).await
    }
}

async fn open_as(kind: Kind, options: FileOptions, common: NodeOptions) -> Result<Opened<File>> {
    blocking(move || {
        let (conf, locks, options) = open::open(kind, options, common)?;
        let driver =
            File { kind, locks, counts: Counts::default(), remembered: Remembered::default(), found: Found::default() };
        Ok(Opened { driver, conf, options })
    })
    .await
}

impl Driver for File {
    type Conf = Conf;

    fn geometry(&self, conf: &Conf, _children: &[Geometry]) -> Result<Geometry> {
        Ok(Geometry { size: conf.end(), limits: conf.alignment.limits() })
    }

    #[inline]
    fn direct(&self, conf: &Conf, _cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        let moves_end = request.write && request.at.end() > conf.end();
        let refuses = request.write && conf.turned.is_read_only();
        if conf.engine == Engine::Pool || moves_end || refuses {
            return None;
        }
        let dsync = request.write && request.fua;
        let engine = if request.write { conf.engine } else { conf.reader(request.at.len()) };
        let (fd, offset) = (conf.fd.as_raw_fd(), request.at.start());
        Some(DirectPlan::new(Direct::Ring(RingEntry { fd, offset, dsync, engine })))
    }

    fn settle(&self, conf: &Conf, _cx: IoCx<'_>, request: DirectRequest, result: i32) -> Settled {
        let settled = io::settle(conf, request, result);
        if let Settled::Failed(error) = settled {
            conf.turned.heard(error);
        }
        settled
    }

    async fn read(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        io::read(conf, cx, at, buf).await
    }

    async fn write(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        conf.turned.unless_read_only(io::write(conf, cx, at, buf, flags.fua)).await?;
        conf.reaches(at.end());
        Ok(())
    }

    async fn write_zeroes(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        let zeroed = zero::write_zeroes(self.kind, &self.remembered, conf, cx, at, flags);
        let zeroed = conf.turned.unless_read_only(zeroed).await;
        self.found.forget();
        zeroed?;
        conf.reaches(at.end());
        Ok(())
    }

    async fn discard(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let result = conf.turned.unless_read_only(zero::discard(self.kind, &self.remembered, conf, cx, at)).await;
        self.found.forget();
        self.counts.discarded(at.len(), result);
        result
    }

    async fn flush(&self, conf: &Conf, cx: IoCx<'_>) -> Result<(), IoError> {
        conf.flusher.flush(io::sync(conf, cx)).await
    }

    async fn map(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(zero::map(self.kind, &self.found, conf, cx, at).await)
    }

    async fn truncate(&self, conf: &Conf, _cx: IoCx<'_>, size: u64, how: Preallocation) -> Result<Conf> {
        let kind = self.kind;
        let size = blocking_on(&conf.fd, move |fd| resize::resize(kind, fd, size, how)).await;
        self.found.forget();
        let size = size?;
        Ok(conf.resized(size))
    }

    fn end(&self, conf: &Conf) -> End {
        match self.kind {
            Kind::Regular => End::At(conf.end()),
            Kind::Device => End::Fixed,
        }
    }

    async fn set_end(&self, conf: &Conf, cx: IoCx<'_>, to: u64, how: Preallocation) -> Result<(), IoError> {
        if self.kind == Kind::Device {
            return Err(IoError::Unsupported);
        }
        let end = zero::inside(cx, &conf.fd, move |fd| resize::move_end(fd, to, how)).await;
        self.found.forget();
        let end = end?;
        // Nobody writes where something is cut off; beyond a new end somebody may have written already.
        if to < conf.end() && how != Preallocation::Falloc {
            conf.end.store(end, Ordering::Release);
        }
        conf.reaches(end);
        Ok(())
    }

    async fn reopen(&self, conf: &Conf, request: ReopenRequest<'_>) -> Result<Conf> {
        let own = request.options.downcast_ref::<FileOptions>();
        let own = own.or_else(|| request.options.downcast_ref::<HostDeviceOptions>().map(|device| &device.file));
        let options = own.expect("the catalog reopens a driver with options of its kind").clone();
        let again = open::Again::of(conf, options, request.common, self.locks.clone(), request.perms)?;
        let kind = self.kind;
        blocking(move || again.open(kind)).await
    }

    async fn set_active(&self, conf: &Conf, common: NodeOptions, perms: Perms) -> Result<Option<Conf>> {
        let again = open::Again::of(conf, conf.options.clone(), common, self.locks.clone(), perms)?;
        let (kind, flusher) = (self.kind, conf.flusher.clone());
        let new = blocking(move || again.open(kind)).await?;
        // What was lost is lost until an operator reopens the node.
        Ok(Some(Conf { flusher, ..new }))
    }

    async fn tighten(&self, conf: &Conf, perms: Perms) -> Result<()> {
        let Some(claim) = conf.claim.clone() else { return Ok(()) };
        let (filename, locking) = (conf.options.filename.clone(), conf.options.locking);
        blocking(move || claim.tighten(perms, locking, &filename)).await
    }

    async fn relax(&self, conf: &Conf, perms: Perms) {
        let Some(claim) = conf.claim.clone() else { return };
        blocking(move || claim.relax(perms)).await;
    }

    async fn info(&self, conf: &Conf) -> DriverInfo {
        let allocated = blocking_on(&conf.fd, status::allocated).await;
        status::info(self.kind, &conf.options.filename, allocated, &self.counts)
    }

    async fn close(self) {
        // The last descriptor's close may wait for a network file system; the configuration is gone already.
        blocking(move || drop(self.locks)).await;
    }
}

impl Conf {
    fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Something was written up to `at`. Few writes move the end, so few write what all threads read.
    fn reaches(&self, at: u64) {
        if at > self.end() {
            self.end.fetch_max(at, Ordering::AcqRel);
        }
    }

    /// Nothing waits for a medium, and nobody has asked for helper threads.
    fn is_waitless(&self) -> bool {
        self.in_memory && self.engine != Engine::Pool
    }

    /// Who reads so many bytes.
    fn reader(&self, bytes: u64) -> Engine {
        if self.is_waitless() && bytes <= AT_ONCE { Engine::AtOnce } else { self.engine }
    }

    /// Who writes so many bytes. The ring has a worker write to the page cache, whom to wake takes longer than the copy.
    fn writer(&self, cx: IoCx<'_>, bytes: u64) -> Engine {
        if self.engine == Engine::Cached && cx.local().may_wait() { Engine::AtOnce } else { self.reader(bytes) }
    }

    /// The same, after the size has changed to `size` bytes.
    fn resized(&self, size: u64) -> Self {
        Self {
            options: self.options.clone(),
            fd: Elsewhere::new(self.fd.clone()),
            flusher: self.flusher.clone(),
            turned: self.turned.clone(),
            claim: Elsewhere::new(self.claim.clone()),
            end: AtomicU64::new(size),
            ..*self
        }
    }
}

/// What is not longer than this, in bytes, is not worth a worker where it is only copied.
const AT_ONCE: u64 = 64 << 10;
