//! `preallocate`: a file that grows by writing is given space ahead of the writer, much at a time.
//!
//! The space is taken past the end of the data and is no part of the node. Taking it never changes bytes, so that two
//! writers may do it at the same time; it is given back when nobody makes the file grow any more.

use std::sync::atomic::{AtomicU64, Ordering};

use qmp::Qapi;

use crate::base::{ByteRange, Error, IoError, Result, ResultExt, SECTOR, align_up, is_aligned};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    Child, ChildId, DirectRequest, DriverInfo, End, Geometry, IoCx, PermSet, Perms, Preallocation, ReopenRequest, Role,
    WriteFlags,
};
use crate::pipeline::{Filter, Filtered};
use crate::rt::IoBuf;

/// A file that grows by writing gets space ahead of the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsPreallocate")]
pub struct PreallocateOptions {
    /// The file's end is a multiple of this while there is space ahead, in bytes; a multiple of 512.
    #[qapi(default = 1 << 20)]
    pub prealloc_align: u64,
    /// How much space there is past a write that goes past the file's end, in bytes.
    #[qapi(default = 128 << 20)]
    pub prealloc_size: u64,
}

impl PreallocateOptions {
    fn check(self) -> Result<Self> {
        if !is_aligned(self.prealloc_align, SECTOR) {
            return Err(Error::new("prealloc-align parameter of preallocate filter is not aligned to 512"));
        }
        Ok(self)
    }
}

impl Open for PreallocateOptions {
    type Driver = Filtered<Preallocate>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let driver = Preallocate { file: site.child("file"), end: AtomicU64::new(AS_FILE) };
        Ok(Opened { driver: Filtered(driver), conf: self.check()?, options: site.common })
    }
}

/// The filter.
pub struct Preallocate {
    file: ChildId,
    /// Of the data, in bytes: what the node's users see. [`AS_FILE`] while nobody makes the file grow.
    end: AtomicU64,
}

/// All of the file is data: others may change its size.
const AS_FILE: u64 = u64::MAX;

impl Preallocate {
    fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// From now on the file's end is not the data's, until nobody makes it grow any more: who does has it for himself.
    fn part_from(&self, file: Child<'_>) {
        let _ = self.end.compare_exchange(AS_FILE, file.size(), Ordering::AcqRel, Ordering::Acquire);
    }

    /// Something was written up to `at`.
    fn reaches(&self, at: u64) {
        if at > self.end() {
            self.end.fetch_max(at, Ordering::AcqRel);
        }
    }

    /// Takes space for a write that goes past the end of the file, and for those that are going to follow it. Where there
    /// is none, or it cannot be taken, the write finds out by itself.
    async fn make_room(&self, conf: PreallocateOptions, file: Child<'_>, at: ByteRange) {
        if at.end() <= file.size() {
            return;
        }
        self.part_from(file);
        let wanted = at.end().checked_add(conf.prealloc_size);
        let Some(wanted) = wanted.and_then(|end| align_up(end, conf.prealloc_align.max(1))) else { return };
        // Reserved, and never written: another writer may be there already.
        if let Err(error) = file.set_end(wanted, Preallocation::Falloc).await {
            tracing::debug!("no space was taken ahead of a write to {}: {error}", file.name());
        }
    }
}

impl Filter for Preallocate {
    type Conf = PreallocateOptions;

    fn child(&self) -> ChildId {
        self.file
    }

    fn geometry(&self, _: &PreallocateOptions, child: Geometry, _: &[Geometry]) -> Result<Geometry> {
        Ok(Geometry { size: child.size.min(self.end()), ..child })
    }

    /// Inside the data nothing has to be done.
    fn passes(&self, _: &PreallocateOptions, _: IoCx<'_>, request: DirectRequest) -> bool {
        !request.write || request.at.end() <= self.end()
    }

    async fn write(
        &self,
        conf: &PreallocateOptions,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let file = cx.child(self.file);
        self.make_room(*conf, file, at).await;
        file.write(at, buf, flags).await?;
        self.reaches(at.end());
        Ok(())
    }

    async fn write_zeroes(
        &self,
        conf: &PreallocateOptions,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let file = cx.child(self.file);
        self.make_room(*conf, file, at).await;
        file.write_zeroes(at, flags).await?;
        self.reaches(at.end());
        Ok(())
    }

    fn end(&self, _: &PreallocateOptions) -> End {
        match self.end() {
            AS_FILE => End::Of(self.file),
            end => End::At(end),
        }
    }

    async fn set_end(&self, _: &PreallocateOptions, cx: IoCx<'_>, to: u64, how: Preallocation) -> Result<(), IoError> {
        cx.child(self.file).set_end(to, how).await?;
        match how {
            _ if self.end() == AS_FILE => {}
            // Who takes space may have seen an older end.
            Preallocation::Falloc => self.reaches(to),
            Preallocation::Off | Preallocation::Metadata | Preallocation::Full => self.end.store(to, Ordering::Release),
        }
        Ok(())
    }

    /// Gives back what was taken ahead.
    async fn end_growth(&self, _: &PreallocateOptions, cx: IoCx<'_>) -> Result<(), IoError> {
        let file = cx.child(self.file);
        if file.moving_end().is_some_and(|end| end > self.end()) {
            file.set_end(self.end(), Preallocation::Off).await?;
        }
        self.end.store(AS_FILE, Ordering::Release);
        Ok(())
    }

    fn passes_size(&self, _: &PreallocateOptions, _: u64) -> Result<Option<(ChildId, u64)>> {
        Ok(None)
    }

    async fn truncate(
        &self,
        conf: &PreallocateOptions,
        cx: IoCx<'_>,
        size: u64,
        how: Preallocation,
    ) -> Result<PreallocateOptions> {
        self.set_end(conf, cx, size, how).await.doing(|| "Failed to resize the file")?;
        Ok(*conf)
    }

    /// Who makes the file grow has it for itself: others would take the space ahead for data.
    fn child_perms(&self, _: &PreallocateOptions, _: ChildId, _: Role, above: Perms, _: bool) -> Perms {
        let grows = PermSet::WRITE | PermSet::RESIZE;
        let shares = if above.uses.contains(grows) { above.shares.without(grows) } else { above.shares };
        Perms { shares, ..above }
    }

    async fn reopen(&self, _: &PreallocateOptions, request: ReopenRequest<'_>) -> Result<PreallocateOptions> {
        let own: Option<&PreallocateOptions> = request.options.downcast_ref();
        own.expect("the catalog reopens a driver with options of its kind").check()
    }

    fn info(&self, _: &PreallocateOptions) -> DriverInfo {
        DriverInfo { driver: "preallocate", ..DriverInfo::default() }
    }
}
