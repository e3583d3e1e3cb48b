//! qcow2: a disk in a file that grows with what is written to it, over a backing file or not.
//!
//! The facts are those of the format's specification (QEMU's `docs/interop/qcow2.rst`); words are its too. One room a file:
//!
//! | | |
//! |---|---|
//! | `header` `extensions` `entry` `refcounts` `snapshots` `directory` `layout` | bytes of the image, parsed into what cannot be wrong |
//! | `compression` | bytes to bytes |
//! | `slices` `meta` `regions` `turns` `clean` | tables in memory, and who may use them when |
//! | `options` `info` `references` | what an operator says, and is told |
//! | `create` `measure` | a new image |
//! | `open` `map` `tables` | reading |
//! | `allocate` `write` `zero` `packed` `resize` | changing, in memory |
//! | `history` `sharing` | internal snapshots, and what they share with the disk |
//! | `commit` | writing the change down so that a crash may come at any time |
//! | `crypt` | encrypted images: where the key is, and other passphrases |
//! | `bitmap` `heading` | dirty bitmaps that are kept in the image |
//! | `amend` `rewrite` | other names, features, refcount widths and versions |
//! | `check` `counted` `counts` `repair` | whether refcounts are true, and making them true |
//! | `reuse` | when what was set free may be used again |
//!
//! Any thread serves any request. What is found in memory is found without a lock; guest clusters that are being given
//! room are one writer's at a time; the lock around `Meta` is never held while anything is waited for.

mod allocate;
mod amend;
mod bitmap;
mod check;
mod clean;
mod commit;
mod compression;
mod counted;
mod counts;
mod create;
mod crypt;
mod directory;
mod entry;
mod extensions;
#[cfg(fuzzing)]
pub mod fuzzing;
mod header;
mod heading;
mod history;
mod info;
mod layout;
mod map;
mod measure;
mod meta;
mod open;
mod options;
mod packed;
mod refcounts;
mod references;
mod regions;
mod repair;
mod resize;
mod reuse;
mod rewrite;
mod sharing;
mod slices;
mod snapshots;
mod tables;
mod turns;
mod write;
mod zero;

use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::amend::{AmendOptions, amend};
pub use self::check::check;
pub use self::create::{CreateOptions, create};
pub use self::crypt::{KeyOptions, Qcow2Encryption};
pub use self::measure::{Measured, measure, measure_bitmaps};
pub use self::options::{OverlapChecks, OverlapFlags, OverlapMode, Qcow2Options};
pub use self::references::{References, is_it, references};
pub use self::write::Room;

use self::bitmap::Stored;
use self::clean::Cleaner;
use self::commit::write_header;
use self::crypt::Crypt;
use self::entry::CORRUPT;
use self::extensions::Extensions;
use self::header::{AT_AUTOCLEAR, AT_INCOMPATIBLE, CORRUPT_BIT, Compression, Fields, Header, RAW_DATA_FILE};
use self::layout::Layout;
use self::meta::Meta;
use self::options::Discards;
use self::regions::Regions;
use self::slices::Slices;
use self::snapshots::Snapshot;
use self::turns::Turns;
use crate::base::{ByteRange, Error, IoError, Result};
use crate::graph::{
    AmendRequest, Amending, BackingName, CheckReport, ChildChange, ChildId, DriverInfo, EventSink, Extent, Findings,
    Geometry, IoCx, Limits, NodeBitmap, NodeEvent, NodeOptions, Perms, Preallocation, ReopenRequest, Repair,
    SnapshotChange, SnapshotInfo, WriteFlags,
};
use crate::pipeline::{Access, Format, Seal};
use crate::rt::IoBuf;

/// An open image.
pub struct Image {
    name: String,
    events: EventSink,
    file: ChildId,
    /// Where guest data is, if that is another file.
    data: Option<ChildId>,
    /// That file is the disk, byte for byte.
    raw_data: bool,
    layout: Layout,
    /// As it was when the image was opened.
    header: Header,
    /// As they are now, but for the bitmaps'.
    extensions: Mutex<Arc<Extensions>>,
    compression: Compression,
    /// How guest data is encrypted, if it is.
    crypt: Option<Crypt>,
    /// Why the image may not be written, if that is so.
    refusal: Option<String>,
    options: Qcow2Options,
    stored: Mutex<Stored>,
    slices: Arc<Slices>,
    regions: Regions,
    meta: Arc<Mutex<Meta>>,
    /// What gives memory of tables back is at work as long as this is here.
    _cleaner: Option<Cleaner>,
    // Turns, in the order in which one task may take several.
    readying: Turns,
    guests: Turns,
    tables: Turns,
    packing: Turns,
    neighbours: Turns,
    loads: Turns,
    committing: Turns,
    reclaiming: Turns,
    blocks: Turns,
    header_turn: Turns,
    /// The header says nothing any more that a write would make untrue.
    is_ready: AtomicBool,
    /// Tables have been found to contradict each other: nothing is written any more.
    is_corrupt: AtomicBool,
    /// The image was not closed in good order: it is repaired before anything is written.
    is_unclean: AtomicBool,
    /// Refcounts may be late (`lazy-refcounts`).
    is_lazy: bool,
    /// Some may be late now, and the header marks the image as dirty.
    is_late: AtomicBool,
}

/// What requests only read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of the disk, in bytes.
    size: u64,
    backing: Option<ChildId>,
    discards: Discards,
}

impl Image {
    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extensions(&self) -> Arc<Extensions> {
        self.extensions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the header says now of features.
    fn header_word(&self, at: usize) -> u64 {
        if self.layout.version < 3 { 0 } else { Fields(&self.meta().header).u64(at).unwrap_or(0) }
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A table that is watched has a part of the host cluster at `start`.
    fn is_table(&self, start: u64) -> bool {
        self.regions.may_own(start >> self.layout.cluster_bits)
            && self.meta().owner_of(self.layout.around(start)).is_some()
    }

    /// The header may say something else than memory: nothing is written any more, so that what was written is found by
    /// whoever opens the image again.
    fn give_up(&self, what: &str, error: IoError) {
        tracing::error!("the image of '{}' is not written any more, for {what} may be half-done: {error}", self.name);
        self.is_corrupt.store(true, Release);
    }

    /// Before the first write: what the header says of the image has to stay true.
    async fn ready(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        if self.is_corrupt.load(Acquire) || self.is_unclean.load(Acquire) {
            return Err(CORRUPT);
        }
        if self.is_ready.load(Acquire) {
            return Ok(());
        }
        let _turn = self.readying.at(cx, 0).await;
        if self.is_ready.load(Acquire) {
            return Ok(());
        }
        self.mark_in_use(cx).await?;
        let autoclear = self.header_word(AT_AUTOCLEAR);
        let known = autoclear & (self.vouches_for_bitmaps() | if self.data.is_some() { RAW_DATA_FILE } else { 0 });
        if autoclear != known {
            write_header(self, cx, AT_AUTOCLEAR, &known.to_be_bytes()).await?;
            cx.child(self.file).flush().await?;
        }
        self.is_ready.store(true, Release);
        Ok(())
    }

    /// The tables contradict each other: says so, in the image too, and gives the error that the request gets.
    async fn corrupt(&self, cx: IoCx<'_>, what: &str, at: ByteRange) -> IoError {
        if self.is_corrupt.swap(true, Release) {
            return CORRUPT;
        }
        (self.events)(NodeEvent::ImageCorrupted { node: self.name.clone(), what: what.to_owned(), at });
        tracing::error!("the image of '{}' is corrupt, and is not written any more: {what}, at {at:?}", self.name);
        if self.layout.version >= 3 {
            let bits = self.header_word(AT_INCOMPATIBLE) | CORRUPT_BIT;
            if let Err(error) = write_header(self, cx, AT_INCOMPATIBLE, &bits.to_be_bytes()).await {
                tracing::error!("the image of '{}' could not be marked corrupt: {error}", self.name);
            }
        }
        CORRUPT
    }

    fn limits(&self, file: Limits) -> Limits {
        let (cluster, granule) = (1u32 << self.layout.cluster_bits, self.layout.granule());
        Limits {
            max_transfer: Limits::ANY.max_transfer,
            max_write_zeroes: u64::MAX,
            max_discard: u64::MAX,
            write_zeroes_alignment: u32::try_from(granule).unwrap_or(cluster),
            discard_alignment: cluster,
            fua: false,
            unmap_zeroes: self.layout.version >= 3,
            discard: true,
            compressed_cluster: if self.data.is_some() || self.crypt.is_some() { 0 } else { cluster },
            request_alignment: if self.crypt.is_some() { 512 } else { 1 },
            memory_alignment: 1,
            ..file.passed_on()
        }
    }
}

impl Format for Image {
    type Conf = Shape;
    type Ticket<'t> = Room<'t>;
    const MOVES: bool = true;

    fn geometry(&self, shape: &Shape, children: &[Geometry]) -> Result<Geometry> {
        let file = children.first().map_or(Limits::ANY, |file| file.limits);
        Ok(Geometry { size: shape.size, limits: self.limits(file) })
    }

    #[inline]
    fn seal(&self) -> Option<&Seal> {
        self.crypt.as_ref().map(|crypt| &crypt.seal)
    }

    #[inline]
    fn map_now(&self, shape: &Shape, at: ByteRange, access: Access) -> Option<Extent> {
        if access == Access::Write && (!self.is_ready.load(Acquire) || self.is_corrupt.load(Acquire)) {
            return None;
        }
        self.place_now(shape, at, access)
    }

    async fn map(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange, access: Access) -> Result<Extent, IoError> {
        if access == Access::Write {
            self.ready(cx).await?;
        }
        self.place(shape, cx, at, access).await
    }

    /// The tail of a cluster that was never written is not written either. A data file may be as short as it likes.
    fn unit(&self) -> Option<u64> {
        self.data.is_none().then(|| self.layout.cluster())
    }

    async fn read_encoded(&self, _: &Shape, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<bool, IoError> {
        self.unpacked(cx, at, &buf).await
    }

    async fn allocate<'t>(&'t self, shape: &'t Shape, cx: IoCx<'t>, at: ByteRange) -> Result<Room<'t>, IoError> {
        self.room(shape, cx, at).await
    }

    async fn write_compressed(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        _: WriteFlags,
    ) -> Result<(), IoError> {
        self.write_packed(shape, cx, at, &buf).await
    }

    async fn write_zeroes(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        self.zero(shape, cx, at, flags).await
    }

    async fn discard(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        self.forget(shape, cx, at).await
    }

    async fn flush(&self, _: &Shape, cx: IoCx<'_>) -> Result<(), IoError> {
        self.commit_for_guest(cx).await
    }

    async fn finish(&self, _: &Shape, cx: IoCx<'_>) -> Result<(), IoError> {
        self.settle(cx).await
    }

    fn snapshots(&self, _: &Shape) -> Option<Vec<SnapshotInfo>> {
        // As in QEMU: what is in another file is in no snapshot.
        self.data.is_none().then(|| self.meta().snapshots.iter().map(Snapshot::info).collect())
    }

    async fn change_snapshots(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        change: &SnapshotChange,
    ) -> Result<(SnapshotInfo, Option<Shape>)> {
        self.change_history(shape, cx, change).await
    }

    async fn change_backing_file(&self, _: &Shape, cx: IoCx<'_>, backing: Option<BackingName<'_>>) -> Result<()> {
        self.rename_backing(cx, backing).await
    }

    async fn amend(&self, _: &Shape, cx: IoCx<'_>, request: AmendRequest<'_>) -> Result<Amending> {
        self.change_keys(cx, request).await
    }

    async fn make_empty(&self, shape: &Shape, cx: IoCx<'_>) -> Result<()> {
        self.emptied(*shape, cx).await
    }

    async fn truncate(&self, shape: &Shape, cx: IoCx<'_>, size: u64, how: Preallocation) -> Result<Shape> {
        self.resize(*shape, cx, size, how).await
    }

    async fn check(&self, _: &Shape, cx: IoCx<'_>, repair: Repair, findings: &mut Findings) -> Result<CheckReport> {
        self.checked(cx, repair, findings).await
    }

    fn is_unclean(&self) -> bool {
        self.is_unclean.load(Acquire)
    }

    fn bitmaps(&self) -> Vec<NodeBitmap> {
        self.loaded_bitmaps()
    }

    async fn keep_bitmaps(&self, shape: &Shape, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<bool> {
        self.keep(shape, cx, bitmaps).await.map(|()| true)
    }

    async fn store_bitmaps(&self, _: &Shape, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<(), IoError> {
        self.store(cx, bitmaps).await
    }

    fn with_children(&self, shape: &Shape, change: ChildChange<'_>) -> Result<Option<Shape>> {
        Ok(match change {
            ChildChange::Comes("backing", id) => Some(Shape { backing: Some(id), ..*shape }),
            ChildChange::Goes("backing", _) => Some(Shape { backing: None, ..*shape }),
            ChildChange::Comes(..) | ChildChange::Goes(..) => None,
        })
    }

    async fn reopen(&self, shape: &Shape, request: ReopenRequest<'_>) -> Result<Shape> {
        let own: &Qcow2Options = request.options.downcast_ref().expect("the catalog reopens with options of its kind");
        if !own.is_same_but_for_discards(&self.options) {
            return Err(Error::new("Only the options about discards can be changed while a qcow2 image is open"));
        }
        if let Some(refusal) = self.refusal.as_ref().filter(|_| !request.common.read_only) {
            return Err(Error::new(refusal.clone()));
        }
        if self.is_unclean.load(Acquire) && !request.common.read_only {
            return Err(Error::new(
                "The image was not closed in good order. It is repaired when it is opened for writing: remove the node, and \
                 add it without 'read-only'",
            ));
        }
        Ok(Shape { discards: own.discards(self.layout.version, request.common)?, ..*shape })
    }

    async fn set_active(&self, _: &Shape, _: NodeOptions, _: Perms) -> Result<Option<Shape>> {
        Err(Error::new("A qcow2 node cannot be made inactive, or active again, yet"))
    }

    async fn info(&self, shape: &Shape) -> DriverInfo {
        self.described(shape)
    }
}
