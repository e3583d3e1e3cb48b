//! `copy-before-write`: keeps what its child had when it was put there. Before a request changes a cluster, the
//! cluster's old contents go to the target, inside that request (design, section 2, invariant 6).
//!
//! `clusters.rs` knows which clusters are where. Who reads the snapshot asks through `snapshot-access`, a node above.

#[doc(hidden)] // public for the models alone
pub mod clusters;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use qmp::Qapi;
use qmp::schema::Size;

use self::clusters::{Clusters, End, Side, Take, Taken};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::bitmap::Bitmap;
use crate::drivers::{BlockDirtyBitmap, Open, Opened, Site};
use crate::graph::{
    ChildId, DirectRequest, DriverInfo, Extent, Geometry, IoCx, OpKind, PermSet, Perms, Place, ReopenRequest, Role,
    WriteFlags,
};
use crate::pipeline::{Content, Filter, Filtered, Request};
use crate::rt::sync::{oneshot, yield_now};
use crate::rt::{IoBuf, within};

/// Keeps what its child had, by copying what is about to be overwritten.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsCbw")]
pub struct CopyBeforeWriteOptions {
    /// Only what is dirty in this bitmap now is kept.
    pub bitmap: Option<BlockDirtyBitmap>,
    /// What a copy that fails breaks.
    #[qapi(default = OnCbwError::BreakGuestWrite)]
    pub on_cbw_error: OnCbwError,
    /// How long a request waits for its copies, in seconds, before they count as failed. 0: for ever.
    #[qapi(default = 0)]
    pub cbw_timeout: u32,
    /// Clusters have at least this many bytes; 0 or a power of two.
    #[qapi(default = Size(0))]
    pub min_cluster_size: Size,
}

/// What a copy that fails breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum OnCbwError {
    /// The guest's request fails, and the snapshot is whole.
    BreakGuestWrite,
    /// The guest's request goes on, and all later reads of the snapshot fail.
    BreakSnapshot,
}

impl Open for CopyBeforeWriteOptions {
    type Driver = Filtered<CopyBeforeWrite>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        check_cluster_size(self.min_cluster_size.0).doing(|| "Cannot create block-copy-state")?;
        let wanted = self.bitmap.clone().map(|named| Wanted::of(&site, named)).transpose()?;
        let driver = CopyBeforeWrite {
            file: site.child("file"),
            target: site.child("target"),
            min_cluster_size: self.min_cluster_size.0,
            wanted,
            snapshot: OnceLock::new(),
        };
        Ok(Opened { driver: Filtered(driver), conf: Conf::of(self), options: site.common })
    }
}

fn check_cluster_size(bytes: u64) -> Result<()> {
    let most = i64::MAX as u64;
    if bytes > most {
        return Err(Error::new(format!("min-cluster-size too large: {bytes} > {most}")));
    }
    if bytes != 0 && !bytes.is_power_of_two() {
        return Err(Error::new("min-cluster-size needs to be a power of 2"));
    }
    Ok(())
}

/// A bitmap that says what is to be kept.
struct Wanted {
    named: BlockDirtyBitmap,
    bits: Arc<Bitmap>,
    /// Its node may have more bytes by now.
    grows: bool,
}

impl Wanted {
    fn of(site: &Site<'_>, named: BlockDirtyBitmap) -> Result<Self> {
        let (bits, grows) = site.bitmap(&named)?;
        Ok(Self { named, bits, grows })
    }
}

/// The driver. What it keeps belongs to one size of its child, which therefore stays.
pub struct CopyBeforeWrite {
    file: ChildId,
    target: ChildId,
    min_cluster_size: u64,
    /// What is to be kept, if not all.
    wanted: Option<Wanted>,
    /// Made when the children are known: see [`CopyBeforeWrite::begin`].
    snapshot: OnceLock<Snapshot>,
}

/// The options that may change.
pub struct Conf {
    on_error: OnCbwError,
    /// Zero: none.
    timeout: Duration,
}

impl Conf {
    fn of(options: &CopyBeforeWriteOptions) -> Self {
        Self { on_error: options.on_cbw_error, timeout: Duration::from_secs(options.cbw_timeout.into()) }
    }
}

/// What is kept.
struct Snapshot {
    clusters: Arc<Clusters>,
    /// A copy failed, and the guest's write went on.
    broken: AtomicBool,
}

impl Snapshot {
    /// A write to the range may go straight on.
    #[inline]
    fn lets_pass(&self, at: ByteRange) -> bool {
        self.clusters.are_settled(at) || self.is_broken()
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// To be asked after reading, too: what broke it did not wait for readers.
    fn check(&self) -> Result<(), IoError> {
        if self.is_broken() { Err(NO_ACCESS) } else { Ok(()) }
    }
}

/// What readers get for what the snapshot has not, or no longer.
const NO_ACCESS: IoError = IoError::Os(libc::EACCES);

impl CopyBeforeWrite {
    fn snapshot(&self) -> &Snapshot {
        self.snapshot.get().expect("a node's geometry is known before its first request")
    }

    /// The snapshot over these children. It begins with all clusters to copy, so nothing is lost if the node is only
    /// put above its child later.
    fn begin(&self, file: Geometry, target: Geometry) -> Result<&Snapshot> {
        if let Some(snapshot) = self.snapshot.get() {
            return Ok(snapshot);
        }
        let cluster = DEFAULT_CLUSTER.max(self.min_cluster_size).max(target.limits.compressed_cluster.into());
        let clusters = match &self.wanted {
            None => Clusters::new(file.size, cluster)?,
            Some(Wanted { named, bits, grows }) => Clusters::only(file.size, cluster, bits, *grows)
                .doing(|| format!("Failed to merge bitmap '{}' to internal copy-bitmap", named.name))
                .doing(|| "Cannot create block-copy-state")?,
        };
        let clusters = Arc::new(clusters);
        Ok(self.snapshot.get_or_init(|| Snapshot { clusters, broken: AtomicBool::new(false) }))
    }

    /// Sees to it that the range may be changed.
    async fn keep(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let snapshot = self.snapshot();
        if snapshot.lets_pass(at) {
            return Ok(());
        }
        match self.copy_all(conf, cx, at).await {
            Err(_) if conf.on_error == OnCbwError::BreakSnapshot => {
                snapshot.broken.store(true, Ordering::Release);
                Ok(())
            }
            other => other,
        }
    }

    async fn copy_all(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        if conf.timeout.is_zero() {
            return self.copy_in_turn(cx, at, async |taken| copy(cx, self.file, self.target, taken).await).await;
        }
        // What takes too long goes on beside the request: the target may still be about to write. It is counted, and
        // its clusters stay taken, until that is over.
        let copies = self.copy_in_turn(cx, at, async |taken| self.copy_beside(cx, taken).await);
        within(cx.local(), conf.timeout, copies).await.unwrap_or(Err(IoError::Os(libc::ETIMEDOUT)))
    }

    /// Copies what nobody has copied, and waits for what others are copying.
    ///
    /// Who waits for another's copy waits for I/O that is under way, as if it were his own. If he is hurried, so is the
    /// other: his I/O may be waiting at a throttle.
    async fn copy_in_turn(
        &self,
        cx: IoCx<'_>,
        at: ByteRange,
        copy: impl AsyncFn(Taken) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let snapshot = self.snapshot();
        for piece in at.pieces(LOOKED_AT_ONCE) {
            while !snapshot.is_broken() {
                match snapshot.clusters.take(piece, COPIED_AT_ONCE, cx.haste()) {
                    Take::Nothing => break,
                    Take::Busy(wait) => cx.handing_on(wait.over(), || wait.hurry()).await,
                    Take::Ours(taken) => copy(taken).await?,
                }
            }
        }
        Ok(())
    }

    async fn copy_beside(&self, cx: IoCx<'_>, taken: Taken) -> Result<(), IoError> {
        let (done, over) = oneshot();
        let (forked, file, target) = (cx.fork(), self.file, self.target);
        cx.local().spawn(async move {
            // Who has given up is not told.
            let _ = done.send(copy(forked.cx(), file, target, taken).await);
        });
        over.await.unwrap_or(Err(IoError::Os(libc::ECANCELED)))
    }

    /// Reads the first bytes of the range; gives how many.
    async fn read_some(&self, cx: IoCx<'_>, at: ByteRange, buf: &IoBuf) -> Result<u64, IoError> {
        let snapshot = self.snapshot();
        snapshot.check()?;
        // Who writes there waits for this.
        let look = snapshot.clusters.look(at.split(READ_AT_ONCE).0, cx.haste()).ok_or(NO_ACCESS)?;
        let child = cx.child(self.on(look.side));
        child.read(at.split(look.len).0, buf.slice(0, look.len)).await?;
        snapshot.check()?;
        Ok(look.len)
    }

    fn on(&self, side: Side) -> ChildId {
        match side {
            Side::Source => self.file,
            Side::Target => self.target,
        }
    }
}

/// Copies clusters, and settles them.
async fn copy(cx: IoCx<'_>, file: ChildId, target: ChildId, taken: Taken) -> Result<(), IoError> {
    let (file, target) = (cx.child(file), cx.child(target));
    let memory = file.geometry().limits.memory_alignment.max(target.geometry().limits.memory_alignment);
    for piece in taken.range().pieces(COPIED_AT_ONCE) {
        let len = usize::try_from(piece.len()).map_err(|_| IoError::NoMemory)?;
        let buf = IoBuf::alloc(len, memory as usize)?;
        file.read(piece, buf.clone()).await?;
        if buf.is_zero() {
            target.write_zeroes(piece, WriteFlags { may_unmap: true, ..WriteFlags::default() }).await?;
        } else {
            target.write(piece, buf, WriteFlags::default()).await?;
        }
    }
    settle(cx, &taken, End::Copied).await;
    Ok(())
}

async fn settle(cx: IoCx<'_>, taken: &Taken, end: End) {
    cx.handing_on(taken.settle(end), || taken.hurry_readers()).await;
}

/// Lets nobody have the old contents any more.
async fn release(cx: IoCx<'_>, clusters: &Arc<Clusters>, whole: ByteRange) {
    for piece in whole.pieces(LOOKED_AT_ONCE) {
        loop {
            match clusters.take(piece, LOOKED_AT_ONCE, cx.haste()) {
                Take::Nothing => break,
                Take::Busy(wait) => wait.over().await,
                Take::Ours(taken) => settle(cx, &taken, End::Released).await,
            }
        }
        clusters.release_copied(piece);
        // There may be very many of them, and the thread has others to serve.
        yield_now().await;
    }
}

impl Filter for CopyBeforeWrite {
    type Conf = Conf;

    fn child(&self) -> ChildId {
        self.file
    }

    fn geometry(&self, _: &Conf, child: Geometry, all: &[Geometry]) -> Result<Geometry> {
        let target = *self.target.of(all);
        let kept = self.begin(child, target)?.clusters.size();
        if child.size != kept {
            return Err(Error::new(format!("The size may not change from {kept} bytes while a snapshot is kept")));
        }
        if target.size < kept {
            let size = target.size;
            return Err(Error::new(format!("The target is smaller ({size} bytes) than the source ({kept} bytes)")));
        }
        Ok(child)
    }

    #[inline]
    fn passes(&self, _: &Conf, _: IoCx<'_>, request: DirectRequest) -> bool {
        !request.write || self.snapshot().lets_pass(request.at)
    }

    async fn before(&self, conf: &Conf, cx: IoCx<'_>, request: Request) -> Result<(), IoError> {
        let changes = match request.kind {
            OpKind::Write => !request.flags.unchanged,
            OpKind::Unmap => true,
            OpKind::Read | OpKind::Flush => false,
        };
        if changes { self.keep(conf, cx, request.at).await } else { Ok(()) }
    }

    async fn read_snapshot(&self, _: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let mut left = Some(at);
        while let Some(now) = left {
            let part = buf.slice(now.start() - at.start(), now.len());
            let done = self.read_some(cx, now, &part).await?;
            left = now.split(done).1;
        }
        Ok(())
    }

    async fn map_snapshot(&self, _: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        let snapshot = self.snapshot();
        snapshot.check()?;
        let look = snapshot.clusters.look(at.split(LOOKED_AT_ONCE).0, cx.haste()).ok_or(NO_ACCESS)?;
        let status = cx.child(self.on(look.side)).status(at.split(look.len).0).await?;
        snapshot.check()?;
        let place = match status.content {
            Content::Data => Place::Here,
            Content::Encoded => Place::Encoded,
            Content::Zero => Place::Zero { allocated: true },
            Content::Absent => Place::Zero { allocated: false },
        };
        Ok(Extent { len: status.len, place })
    }

    async fn discard_snapshot(&self, _: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let clusters = &self.snapshot().clusters;
        let Some(whole) = clusters.whole_inside(at) else { return Ok(()) };
        // A discard is a hint: who wants this request out of the graph need not wait for copies and readers.
        match cx.unless_hurried(release(cx, clusters, whole)).await {
            Some(()) => cx.child(self.target).discard(whole).await,
            None => Ok(()),
        }
    }

    fn passes_size(&self, _: &Conf, _: u64) -> Result<Option<(ChildId, u64)>> {
        Err(Error::new("The size may not change while a snapshot is kept"))
    }

    /// The target is written whatever is above. The source is read to be copied, and nobody may write to it by another
    /// way: that would go by the snapshot.
    fn child_perms(&self, _: &Conf, child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        if child == self.target {
            return Perms { uses: PermSet::WRITE, shares: PermSet::ALL.without(PermSet::RESIZE) };
        }
        let below = role.child_perms(above, writable);
        if above == Perms::IDLE {
            return below;
        }
        let read = if below.uses.contains(PermSet::WRITE) { PermSet::CONSISTENT_READ } else { PermSet::NONE };
        Perms { uses: below.uses | read, shares: below.shares.without(PermSet::WRITE | PermSet::RESIZE) }
    }

    async fn reopen(&self, _: &Conf, request: ReopenRequest<'_>) -> Result<Conf> {
        let own = request.options.downcast_ref::<CopyBeforeWriteOptions>();
        let own = own.expect("the catalog reopens a driver with options of its kind");
        if own.min_cluster_size.0 != self.min_cluster_size {
            return Err(Error::new("Cannot change the option 'min-cluster-size'"));
        }
        if own.bitmap.as_ref() != self.wanted.as_ref().map(|wanted| &wanted.named) {
            return Err(Error::new("Cannot change the option 'bitmap'"));
        }
        Ok(Conf::of(own))
    }

    fn info(&self, _: &Conf) -> DriverInfo {
        DriverInfo { driver: "copy-before-write", ..DriverInfo::default() }
    }
}

/// Bytes of a cluster where nobody asks for more.
const DEFAULT_CLUSTER: u64 = 64 << 10;
/// Bytes that are copied at once.
const COPIED_AT_ONCE: u64 = 1 << 20;
/// Bytes of the snapshot that a reader keeps from being overwritten at once.
const READ_AT_ONCE: u64 = 1 << 20;
/// Bytes whose clusters are looked at in one go.
const LOOKED_AT_ONCE: u64 = 1 << 30;
