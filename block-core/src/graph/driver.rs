//! What a driver author writes: [`Driver`]. What the graph stores: its erased twin, private to this room.
//!
//! A driver reaches its children through the [`IoCx`] of a request and in no other way; it keeps [`ChildId`]s. What
//! requests only read (size, file descriptor, options) is its `Conf`: it belongs to the view, and reopen or resize
//! publish a new one. What requests change (caches, counters, latches) lives in `self`, which all versions share.

use std::any::Any;
use std::future::Future;
use std::mem::needs_drop;
use std::pin::Pin;
use std::sync::Arc;

use super::backing::BackingName;
use super::bitmaps::NodeBitmap;
use super::check::{CheckReport, Findings, Repair};
use super::cx::IoCx;
use super::debug_event::{DebugEvent, Pause};
use super::geometry::Geometry;
use super::id::ChildId;
use super::objects::Objects;
use super::options::NodeOptions;
use super::passage::DirectPlan;
use super::permission::{Perms, Role};
use super::snapshots::{SnapshotChange, SnapshotInfo, Snapshotted};
use crate::base::{ByteRange, Error, IoError};
use crate::rt::{Engine, IoBuf, blocking};

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Stable before it completes.
    pub fua: bool,
    /// Zeroing may free the space.
    pub may_unmap: bool,
    /// Zeroing that is not cheaper than writing zeroes fails with [`IoError::Unsupported`] instead.
    pub no_fallback: bool,
    /// The image stores the data compressed, if its limits say that it can; else the write fails.
    pub compressed: bool,
    /// What a reader sees stays as it was (copy-on-read): `WRITE_UNCHANGED` is enough.
    pub unchanged: bool,
}

/// How to make room when a node grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing is allocated.
    #[default]
    Off,
    /// Tables are allocated, data is not.
    Metadata,
    /// Space is reserved without being written.
    Falloc,
    /// Zeroes are written.
    Full,
}

/// The first part of a range whose bytes all live in the same kind of place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, from the start of the range that was asked for; at least 1, at most the range's length.
    pub len: u64,
    /// Where they live.
    pub place: Place,
}

/// Where guest data lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the node itself (protocols), allocated.
    Here,
    /// In a child, byte for byte, from `offset` on.
    Data {
        /// Which child.
        child: ChildId,
        /// Where in it the extent begins, in bytes.
        offset: u64,
    },
    /// Reads as zeroes. `allocated`: this layer says so, rather than there being nothing.
    Zero {
        /// This layer has an opinion on it; an overlay hides what is below.
        allocated: bool,
    },
    /// Not in this layer: the backing child has it.
    Below(ChildId),
    /// This node is no layer of its own: whatever the child says of the same range.
    Passed(ChildId),
    /// In this layer, but not byte for byte (compressed, encrypted).
    Encoded,
}

/// Reads and writes that may skip the async path.
#[derive(Clone, Copy, Debug)]
pub struct DirectRequest {
    /// A write, else a read.
    pub write: bool,
    /// The range in the node that is asked, already checked against its size and alignment.
    pub at: ByteRange,
    /// The write is to be stable when it completes.
    pub fua: bool,
    /// All buffer addresses and lengths, or-ed: their common alignment.
    pub memory_bits: usize,
}

/// Where a direct request's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingEntry {
    /// Valid as long as the view is pinned.
    pub fd: std::os::fd::RawFd,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// The write carries `RWF_DSYNC`.
    pub dsync: bool,
    /// How the ring goes about it; not [`Engine::Pool`].
    pub engine: Engine,
}

/// How a direct request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    /// By one ring entry. A result other than the full length is settled by the driver.
    Ring(RingEntry),
    /// It is done, and no buffer was touched.
    Done,
    /// It is done once the buffer has been filled with zeroes.
    Zeroed,
}

/// What becomes of a direct request whose ring entry did not move all bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Send it again on the async path, from its beginning.
    Again,
    /// It failed.
    Failed(IoError),
}

/// Where a node ends while requests run. What its geometry says was true when the graph was last changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Where its geometry says: only a change of the graph moves it.
    Fixed,
    /// At this many bytes just now. Writers that may resize the node move it.
    At(u64),
    /// Where this child ends.
    Of(ChildId),
}

/// What `query-named-block-nodes` and `query-blockstats` say about a node beyond the common members.
#[derive(Clone, Debug, Default)]
pub struct DriverInfo {
    /// The driver's name in QMP.
    pub driver: &'static str,
    /// What a person would call the image; for protocols the file name.
    pub filename: String,
    /// Bytes that the image occupies, where known.
    pub allocated: Option<u64>,
    /// Bytes in a cluster, for images that have them.
    pub cluster_size: Option<u64>,
    /// Where in the image's guest address space the state of a machine is kept, in bytes, for images that keep one.
    pub vm_state_offset: Option<u64>,
    /// Whether the image was not closed in good order, for images that know.
    pub dirty: Option<bool>,
    /// The guest's data is encrypted.
    pub encrypted: bool,
    /// What the image says that it stands on: the file's name and its format.
    pub backing: Option<(String, Option<String>)>,
    /// `image.format-specific` of `query-named-block-nodes`: QMP's tagged `{type, data}` object.
    pub specific: Option<serde_json::Value>,
    /// `driver-specific` of `query-blockstats`.
    pub statistics: Option<serde_json::Value>,
}

/// What a reopen asks of a driver.
pub struct ReopenRequest<'a> {
    /// The driver's own options, complete, as the catalog parsed them.
    pub options: &'a (dyn Any + Send),
    /// The common options that will be in force.
    pub common: NodeOptions,
    /// What the node's users will use and bear.
    pub perms: Perms,
    /// What the options may refer to by id.
    pub objects: &'a Objects,
}

/// What is asked of an image that is open (`x-blockdev-amend`).
pub struct AmendRequest<'a> {
    /// The driver's own options for it, as the catalog parsed them.
    pub options: &'a (dyn Any + Send),
    /// What the options may refer to by id.
    pub objects: &'a Objects,
    /// What came of the work that the driver asked for; nothing at first.
    pub done: Option<Box<dyn Any + Send>>,
}

/// How far an image has been amended.
pub enum Amending {
    /// It is done.
    Done,
    /// First comes this, which takes long. Nobody waits for it inside the graph; then the driver is asked again.
    After(LongWork),
}

/// What takes long, and comes to something that the driver knows.
pub type LongWork = Pin<Box<dyn Future<Output = Result<Box<dyn Any + Send>, Error>>>>;

/// How the children of a node change: what QMP calls the edge, and what the driver calls the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildChange<'a> {
    /// One more, after all others.
    Comes(&'a str, ChildId),
    /// One less; those after it move up.
    Goes(&'a str, ChildId),
}

/// A block driver for the graph. Requests run on any number of IOThreads at once.
///
/// The node handle has checked range, alignment, read-only and permissions before a request arrives here; `at` is
/// never empty, and `buf` has its length.
pub trait Driver: Send + Sync + 'static {
    /// What requests only read. Replaced, never changed: see the module's head.
    type Conf: Send + Sync + 'static;

    /// Size and limits, from the configuration and the children (in edge order). No I/O: what has to be asked is in
    /// `conf` already.
    fn geometry(&self, conf: &Self::Conf, children: &[Geometry]) -> Result<Geometry, Error>;

    /// An answer from memory, or `None` for the async path, which a write that moves the end has to take. Called once a
    /// request; it may not block nor allocate.
    fn direct(&self, _conf: &Self::Conf, _cx: IoCx<'_>, _request: DirectRequest) -> Option<DirectPlan> {
        None
    }

    /// A ring entry of [`Driver::direct`] ended with `result` (bytes, or a negative errno) instead of the full length.
    fn settle(&self, _conf: &Self::Conf, _cx: IoCx<'_>, _request: DirectRequest, _result: i32) -> Settled {
        Settled::Again
    }

    /// Fills `buf`.
    fn read(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
    ) -> impl Future<Output = Result<(), IoError>>;

    /// Writes `buf`. `flags.fua` is set only if the limits say that the driver can do it.
    fn write(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<(), IoError>>;

    /// Makes the range read as zeroes; [`IoError::Unsupported`] sends the pipeline down its ladder.
    fn write_zeroes(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<(), IoError>>;

    /// The bytes are no longer needed. Afterwards they read as before or as zeroes.
    fn discard(&self, conf: &Self::Conf, cx: IoCx<'_>, at: ByteRange) -> impl Future<Output = Result<(), IoError>>;

    /// Whatever was completed before is stable when this completes.
    fn flush(&self, conf: &Self::Conf, cx: IoCx<'_>) -> impl Future<Output = Result<(), IoError>>;

    /// Where the first bytes of the range live.
    fn map(&self, conf: &Self::Conf, cx: IoCx<'_>, at: ByteRange) -> impl Future<Output = Result<Extent, IoError>>;

    /// Fills `buf` with what the node's snapshot has there. Only drivers that keep one (copy-before-write) offer it.
    fn read_snapshot(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
        _buf: IoBuf,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// Where the first bytes of the range live in the node's snapshot.
    fn map_snapshot(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
    ) -> impl Future<Output = Result<Extent, IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// Nobody will read this part of the node's snapshot any more.
    fn discard_snapshot(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _at: ByteRange,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// Hears what happens to this node, if its limits say that it listens. The request waits for what this gives, at
    /// most until its root is drained.
    fn hear(&self, _conf: &Self::Conf, _cx: IoCx<'_>, _event: DebugEvent) -> Option<Pause> {
        None
    }

    /// Changes the size; nobody else is inside. The new configuration is published by the caller.
    fn truncate(
        &self,
        conf: &Self::Conf,
        cx: IoCx<'_>,
        size: u64,
        preallocation: Preallocation,
    ) -> impl Future<Output = Result<Self::Conf, Error>>;

    /// Goes through the image and compares what it says of itself; puts right what `repair` says. Nobody else is inside,
    /// and the node may be written if anything is to be put right. What is found goes to `findings`, after an error too. Only
    /// formats with tables of their own offer it.
    fn check(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _repair: Repair,
        _findings: &mut Findings,
    ) -> impl Future<Output = Result<CheckReport, Error>> {
        std::future::ready(Err(Error::new("This image format does not support checks")))
    }

    /// The image says that it was not closed in good order, so that [`Driver::check`] has to repair it before it is
    /// written; until then writes fail. Asked when the node has been added.
    fn is_unclean(&self) -> bool {
        false
    }

    /// The dirty bitmaps that the image stores, the youngest first. Asked when the node is added, perhaps several times.
    fn bitmaps(&self) -> Vec<NodeBitmap> {
        Vec::new()
    }

    /// The image shall store these bitmaps, which nobody else changes now, and what it says of any that it has becomes
    /// untrue. Fails where it cannot store them; `false`: it cannot store any. Nobody else is inside.
    fn keep_bitmaps(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _bitmaps: &[NodeBitmap],
    ) -> impl Future<Output = Result<bool, Error>> {
        std::future::ready(Ok(false))
    }

    /// Stores the bitmaps, if what the image says of them is untrue. Comes before [`Driver::finish`].
    fn store_bitmaps(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _bitmaps: &[NodeBitmap],
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// Where the node ends just now. Who says anything but [`End::Fixed`] takes writes, and writes of zeroes, past its end
    /// from users that may resize it, and [`Driver::set_end`].
    fn end(&self, _conf: &Self::Conf) -> End {
        End::Fixed
    }

    /// Moves the end to `to` bytes, while other requests run. Who asks has seen to it that nobody uses what is cut off.
    fn set_end(
        &self,
        _conf: &Self::Conf,
        _cx: IoCx<'_>,
        _to: u64,
        _how: Preallocation,
    ) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Err(IoError::Unsupported))
    }

    /// Leaves the children as somebody else may find them: what is kept in memory alone is written. The node is drained,
    /// and is about to be closed or reopened, or to become inactive; it may be used again afterwards.
    fn finish(&self, _conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// Nobody can make the node grow any more; space that was taken for that is given back. Others may be using the node.
    fn end_growth(&self, _conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Result<(), IoError>> {
        std::future::ready(Ok(()))
    }

    /// The node's internal snapshots, the oldest first. From memory. `None`: it cannot have any.
    fn snapshots(&self, _conf: &Self::Conf) -> Option<Vec<SnapshotInfo>> {
        None
    }

    /// Takes, deletes or applies an internal snapshot; nobody else is inside. What it was about, and a new configuration
    /// if there is one, which the caller publishes. After an error all is as before.
    fn change_snapshots(
        &self,
        conf: &Self::Conf,
        _cx: IoCx<'_>,
        _change: &SnapshotChange,
    ) -> impl Future<Output = Result<(SnapshotInfo, Option<Self::Conf>), Error>> {
        async {
            let driver = self.info(conf).await.driver;
            Err(Error::new(format!("Driver '{driver}' does not support internal snapshots")))
        }
    }

    /// The image names another backing file, or none; nobody else is inside. Nothing is opened, and the node's children stay.
    /// After an error the name is what it was.
    fn change_backing_file(
        &self,
        conf: &Self::Conf,
        _cx: IoCx<'_>,
        _backing: Option<BackingName<'_>>,
    ) -> impl Future<Output = Result<(), Error>> {
        async {
            let driver = self.info(conf).await.driver;
            Err(Error::new(format!("Driver '{driver}' does not name a backing file")))
        }
    }

    /// Changes what the image is like, beside other requests. After an error all is as before, or as the error says.
    fn amend(
        &self,
        conf: &Self::Conf,
        _cx: IoCx<'_>,
        _request: AmendRequest<'_>,
    ) -> impl Future<Output = Result<Amending, Error>> {
        async {
            let driver = self.info(conf).await.driver;
            Err(Error::new(format!("Driver '{driver}' has nothing that can be amended")))
        }
    }

    /// The layer has nothing of its own any more: what it stands on is seen everywhere. Nobody else is inside. A crash leaves
    /// it with some of what it had.
    fn make_empty(&self, conf: &Self::Conf, _cx: IoCx<'_>) -> impl Future<Output = Result<(), Error>> {
        async {
            let driver = self.info(conf).await.driver;
            Err(Error::new(format!("Driver '{driver}' cannot empty a layer")))
        }
    }

    /// A node whose size is a child's says which child has to change, and to what size in bytes. `None`: it changes by
    /// itself, through [`Driver::truncate`].
    fn passes_size(&self, _conf: &Self::Conf, _size: u64) -> Result<Option<(ChildId, u64)>, Error> {
        Ok(None)
    }

    /// The same for a node whose size is that of several children: all have to change.
    fn passes_sizes(&self, conf: &Self::Conf, size: u64) -> Result<Vec<(ChildId, u64)>, Error> {
        Ok(self.passes_size(conf, size)?.into_iter().collect())
    }

    /// Prepares a configuration for new options. Dropping it aborts; publishing it commits.
    fn reopen(&self, conf: &Self::Conf, request: ReopenRequest<'_>) -> impl Future<Output = Result<Self::Conf, Error>>;

    /// A configuration for a node that becomes active or inactive, as `common` says. `None`: the old one will do.
    fn set_active(
        &self,
        _conf: &Self::Conf,
        _common: NodeOptions,
        _perms: Perms,
    ) -> impl Future<Output = Result<Option<Self::Conf>, Error>> {
        std::future::ready(Ok(None))
    }

    /// What the edge to one more child is to be called, and what the child will be. `None`: there cannot be one more.
    /// Only drivers whose children may come and go (quorum) offer it.
    fn next_child(&self, _conf: &Self::Conf) -> Result<Option<(String, Role)>, Error> {
        Ok(None)
    }

    /// A configuration after a change of the children, while the node is drained. `None`: they cannot change. Offered by
    /// drivers whose children may come and go: quorum, and formats for their backing node.
    fn with_children(&self, _conf: &Self::Conf, _change: ChildChange<'_>) -> Result<Option<Self::Conf>, Error> {
        Ok(None)
    }

    /// The child that this node passes requests on to, if it is a filter: no layer of its own.
    fn filtered(&self) -> Option<ChildId> {
        None
    }

    /// What this node needs of a child, if its users need `above`.
    fn child_perms(&self, _conf: &Self::Conf, _child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        role.child_perms(above, writable)
    }

    /// Takes what `perms` needs from the outside world (file locks) on top of what is held. [`Driver::relax`] follows,
    /// with the same permissions if the change went through, with the old ones if not.
    fn tighten(&self, _conf: &Self::Conf, _perms: Perms) -> impl Future<Output = Result<(), Error>> {
        std::future::ready(Ok(()))
    }

    /// Gives back what `perms` does not need. Cannot fail: loosening never does.
    fn relax(&self, _conf: &Self::Conf, _perms: Perms) -> impl Future<Output = ()> {
        std::future::ready(())
    }

    /// For queries; may ask the kernel.
    fn info(&self, conf: &Self::Conf) -> impl Future<Output = DriverInfo>;

    /// Nobody can reach the node any more; `self` is the last owner's, so nothing can follow it.
    fn close(self) -> impl Future<Output = ()>
    where
        Self: Sized,
    {
        std::future::ready(())
    }
}

// ---- the erased twin -------------------------------------------------------------------------------------------

pub(crate) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// The private twin of [`Driver`]. No default bodies: a forgotten forward must not compile.
pub(crate) trait DynDriver: Send + Sync {
    fn geometry(&self, children: &[Geometry]) -> Result<Geometry, Error>;
    fn direct(&self, cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan>;
    fn settle(&self, cx: IoCx<'_>, request: DirectRequest, result: i32) -> Settled;
    fn read<'a>(&'a self, cx: IoCx<'a>, at: ByteRange, buf: IoBuf) -> Boxed<'a, Result<(), IoError>>;
    fn write<'a>(
        &'a self,
        cx: IoCx<'a>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Boxed<'a, Result<(), IoError>>;
    fn write_zeroes<'a>(&'a self, cx: IoCx<'a>, at: ByteRange, flags: WriteFlags) -> Boxed<'a, Result<(), IoError>>;
    fn discard<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<(), IoError>>;
    fn flush<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), IoError>>;
    fn map<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<Extent, IoError>>;
    fn read_snapshot<'a>(&'a self, cx: IoCx<'a>, at: ByteRange, buf: IoBuf) -> Boxed<'a, Result<(), IoError>>;
    fn map_snapshot<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<Extent, IoError>>;
    fn discard_snapshot<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<(), IoError>>;
    fn hear(&self, cx: IoCx<'_>, event: DebugEvent) -> Option<Pause>;
    fn truncate<'a>(
        &'a self,
        cx: IoCx<'a>,
        size: u64,
        preallocation: Preallocation,
    ) -> Boxed<'a, Result<Arc<dyn DynDriver>, Error>>;
    fn snapshots(&self) -> Option<Vec<SnapshotInfo>>;
    fn change_snapshots<'a>(
        &'a self,
        cx: IoCx<'a>,
        change: &'a SnapshotChange,
    ) -> Boxed<'a, Result<Snapshotted, Error>>;
    fn change_backing_file<'a>(
        &'a self,
        cx: IoCx<'a>,
        backing: Option<BackingName<'a>>,
    ) -> Boxed<'a, Result<(), Error>>;
    fn amend<'a>(&'a self, cx: IoCx<'a>, request: AmendRequest<'a>) -> Boxed<'a, Result<Amending, Error>>;
    fn make_empty<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), Error>>;
    fn check<'a>(
        &'a self,
        cx: IoCx<'a>,
        repair: Repair,
        findings: &'a mut Findings,
    ) -> Boxed<'a, Result<CheckReport, Error>>;
    fn is_unclean(&self) -> bool;
    fn bitmaps(&self) -> Vec<NodeBitmap>;
    fn keep_bitmaps<'a>(&'a self, cx: IoCx<'a>, bitmaps: &'a [NodeBitmap]) -> Boxed<'a, Result<bool, Error>>;
    fn store_bitmaps<'a>(&'a self, cx: IoCx<'a>, bitmaps: &'a [NodeBitmap]) -> Boxed<'a, Result<(), IoError>>;
    fn end(&self) -> End;
    fn set_end<'a>(&'a self, cx: IoCx<'a>, to: u64, how: Preallocation) -> Boxed<'a, Result<(), IoError>>;
    fn finish<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), IoError>>;
    fn end_growth<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), IoError>>;
    fn set_active<'a>(
        &'a self,
        common: NodeOptions,
        perms: Perms,
    ) -> Boxed<'a, Result<Option<Arc<dyn DynDriver>>, Error>>;
    fn next_child(&self) -> Result<Option<(String, Role)>, Error>;
    fn with_children(&self, change: ChildChange<'_>) -> Result<Option<Arc<dyn DynDriver>>, Error>;
    fn passes_sizes(&self, size: u64) -> Result<Vec<(ChildId, u64)>, Error>;
    fn reopen<'a>(&'a self, request: ReopenRequest<'a>) -> Boxed<'a, Result<Arc<dyn DynDriver>, Error>>;
    fn filtered(&self) -> Option<ChildId>;
    fn child_perms(&self, child: ChildId, role: Role, above: Perms, writable: bool) -> Perms;
    fn tighten<'a>(&'a self, perms: Perms) -> Boxed<'a, Result<(), Error>>;
    fn relax<'a>(&'a self, perms: Perms) -> Boxed<'a, ()>;
    fn info<'a>(&'a self) -> Boxed<'a, DriverInfo>;
    /// Closes the driver by value. The caller has seen the last view go.
    fn close(self: Arc<Self>) -> Boxed<'static, ()>;
    fn driver(&self) -> Arc<dyn Any + Send + Sync>;
}

/// A driver under one configuration.
pub(crate) struct Body<D: Driver> {
    pub(crate) driver: Arc<D>,
    pub(crate) conf: D::Conf,
}

impl<D: Driver> Body<D> {
    /// The same driver under another configuration.
    fn under(&self, conf: D::Conf) -> Arc<dyn DynDriver> {
        Arc::new(Self { driver: self.driver.clone(), conf })
    }
}

impl<D: Driver> DynDriver for Body<D> {
    fn geometry(&self, children: &[Geometry]) -> Result<Geometry, Error> {
        self.driver.geometry(&self.conf, children)
    }
    #[inline]
    fn direct(&self, cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        self.driver.direct(&self.conf, cx, request)
    }
    fn settle(&self, cx: IoCx<'_>, request: DirectRequest, result: i32) -> Settled {
        self.driver.settle(&self.conf, cx, request, result)
    }
    fn read<'a>(&'a self, cx: IoCx<'a>, at: ByteRange, buf: IoBuf) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.read(&self.conf, cx, at, buf))
    }
    fn write<'a>(
        &'a self,
        cx: IoCx<'a>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.write(&self.conf, cx, at, buf, flags))
    }
    fn write_zeroes<'a>(&'a self, cx: IoCx<'a>, at: ByteRange, flags: WriteFlags) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.write_zeroes(&self.conf, cx, at, flags))
    }
    fn discard<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.discard(&self.conf, cx, at))
    }
    fn flush<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.flush(&self.conf, cx))
    }
    fn map<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<Extent, IoError>> {
        Box::pin(self.driver.map(&self.conf, cx, at))
    }
    fn read_snapshot<'a>(&'a self, cx: IoCx<'a>, at: ByteRange, buf: IoBuf) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.read_snapshot(&self.conf, cx, at, buf))
    }
    fn map_snapshot<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<Extent, IoError>> {
        Box::pin(self.driver.map_snapshot(&self.conf, cx, at))
    }
    fn discard_snapshot<'a>(&'a self, cx: IoCx<'a>, at: ByteRange) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.discard_snapshot(&self.conf, cx, at))
    }
    fn hear(&self, cx: IoCx<'_>, event: DebugEvent) -> Option<Pause> {
        self.driver.hear(&self.conf, cx, event)
    }
    fn truncate<'a>(
        &'a self,
        cx: IoCx<'a>,
        size: u64,
        preallocation: Preallocation,
    ) -> Boxed<'a, Result<Arc<dyn DynDriver>, Error>> {
        Box::pin(async move { Ok(self.under(self.driver.truncate(&self.conf, cx, size, preallocation).await?)) })
    }
    fn snapshots(&self) -> Option<Vec<SnapshotInfo>> {
        self.driver.snapshots(&self.conf)
    }
    fn change_snapshots<'a>(
        &'a self,
        cx: IoCx<'a>,
        change: &'a SnapshotChange,
    ) -> Boxed<'a, Result<Snapshotted, Error>> {
        Box::pin(async move {
            let (info, conf) = self.driver.change_snapshots(&self.conf, cx, change).await?;
            Ok((info, conf.map(|conf| self.under(conf))))
        })
    }
    fn change_backing_file<'a>(
        &'a self,
        cx: IoCx<'a>,
        backing: Option<BackingName<'a>>,
    ) -> Boxed<'a, Result<(), Error>> {
        Box::pin(self.driver.change_backing_file(&self.conf, cx, backing))
    }
    fn amend<'a>(&'a self, cx: IoCx<'a>, request: AmendRequest<'a>) -> Boxed<'a, Result<Amending, Error>> {
        Box::pin(self.driver.amend(&self.conf, cx, request))
    }
    fn make_empty<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), Error>> {
        Box::pin(self.driver.make_empty(&self.conf, cx))
    }
    fn check<'a>(
        &'a self,
        cx: IoCx<'a>,
        repair: Repair,
        findings: &'a mut Findings,
    ) -> Boxed<'a, Result<CheckReport, Error>> {
        Box::pin(self.driver.check(&self.conf, cx, repair, findings))
    }
    fn is_unclean(&self) -> bool {
        self.driver.is_unclean()
    }
    fn bitmaps(&self) -> Vec<NodeBitmap> {
        self.driver.bitmaps()
    }
    fn keep_bitmaps<'a>(&'a self, cx: IoCx<'a>, bitmaps: &'a [NodeBitmap]) -> Boxed<'a, Result<bool, Error>> {
        Box::pin(self.driver.keep_bitmaps(&self.conf, cx, bitmaps))
    }
    fn store_bitmaps<'a>(&'a self, cx: IoCx<'a>, bitmaps: &'a [NodeBitmap]) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.store_bitmaps(&self.conf, cx, bitmaps))
    }
    fn end(&self) -> End {
        self.driver.end(&self.conf)
    }
    fn set_end<'a>(&'a self, cx: IoCx<'a>, to: u64, how: Preallocation) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.set_end(&self.conf, cx, to, how))
    }
    fn finish<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.finish(&self.conf, cx))
    }
    fn end_growth<'a>(&'a self, cx: IoCx<'a>) -> Boxed<'a, Result<(), IoError>> {
        Box::pin(self.driver.end_growth(&self.conf, cx))
    }
    fn set_active<'a>(
        &'a self,
        common: NodeOptions,
        perms: Perms,
    ) -> Boxed<'a, Result<Option<Arc<dyn DynDriver>>, Error>> {
        Box::pin(async move {
            let conf = self.driver.set_active(&self.conf, common, perms).await?;
            Ok(conf.map(|conf| self.under(conf)))
        })
    }
    fn next_child(&self) -> Result<Option<(String, Role)>, Error> {
        self.driver.next_child(&self.conf)
    }
    fn with_children(&self, change: ChildChange<'_>) -> Result<Option<Arc<dyn DynDriver>>, Error> {
        Ok(self.driver.with_children(&self.conf, change)?.map(|conf| self.under(conf)))
    }
    fn passes_sizes(&self, size: u64) -> Result<Vec<(ChildId, u64)>, Error> {
        self.driver.passes_sizes(&self.conf, size)
    }
    fn reopen<'a>(&'a self, request: ReopenRequest<'a>) -> Boxed<'a, Result<Arc<dyn DynDriver>, Error>> {
        Box::pin(async move { Ok(self.under(self.driver.reopen(&self.conf, request).await?)) })
    }
    fn filtered(&self) -> Option<ChildId> {
        self.driver.filtered()
    }
    fn child_perms(&self, child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        self.driver.child_perms(&self.conf, child, role, above, writable)
    }
    fn tighten<'a>(&'a self, perms: Perms) -> Boxed<'a, Result<(), Error>> {
        Box::pin(self.driver.tighten(&self.conf, perms))
    }
    fn relax<'a>(&'a self, perms: Perms) -> Boxed<'a, ()> {
        Box::pin(self.driver.relax(&self.conf, perms))
    }
    fn info<'a>(&'a self) -> Boxed<'a, DriverInfo> {
        Box::pin(self.driver.info(&self.conf))
    }
    fn close(self: Arc<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            let body = Arc::into_inner(self).expect("a node is closed after the last view that names it has gone");
            let driver = Arc::into_inner(body.driver).expect("no configuration outlives the last view");
            if needs_drop::<D::Conf>() {
                // It may be the last to have a file open, whose close may wait for a network.
                blocking(move || drop(body.conf)).await;
            }
            driver.close().await;
        })
    }
    fn driver(&self) -> Arc<dyn Any + Send + Sync> {
        self.driver.clone()
    }
}
