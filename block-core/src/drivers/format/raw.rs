//! `raw`: the bytes of the file as they are, all of them or a window.
//!
//! Nothing is ever probed here: whatever a guest writes to its first sector, the node stays raw. Tools that guess formats
//! say so where raw is what they have guessed: then the first sector may not become that of another format, which the next
//! guess would come to.

use qmp::Qapi;

use super::start::{PROBED, guessed};
use crate::base::{ByteRange, Error, IoError, Result, SECTOR, is_aligned};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    ChildId, DebugEvent, DriverInfo, End, Extent, Geometry, IoCx, Limits, PermSet, Perms, Place, Preallocation,
    ReopenRequest, Role, WriteFlags,
};
use crate::pipeline::{Access, Format, Mapped, NoTicket};
use crate::rt::IoBuf;

/// The bytes of the file as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsRaw")]
pub struct RawOptions {
    /// Where in the file the node begins, in bytes; a multiple of 512.
    pub offset: Option<i64>,
    /// How many bytes the node has, a multiple of 512; without it, all from the offset on.
    pub size: Option<i64>,
    /// Nobody said that it is raw: it looks like nothing else. A write that would change that fails. For programs: operators
    /// cannot ask for it, since nothing is guessed for them.
    #[qapi(skip)]
    pub is_guess: bool,
}

impl Open for RawOptions {
    type Driver = Mapped<Raw>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Mapped<Raw>>> {
        let driver = Mapped(Raw { file: site.child("file"), is_guess: self.is_guess });
        Ok(Opened { driver, conf: Window::of(self)?, options: site.common })
    }
}

/// The format: it knows only its child.
pub struct Raw {
    file: ChildId,
    is_guess: bool,
}

impl Raw {
    /// The write reaches bytes that a format is known by, and that matters.
    fn is_watched(&self, at: ByteRange) -> bool {
        self.is_guess && at.start() < PROBED
    }
}

/// Which part of the child the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// In bytes.
    offset: u64,
    /// In bytes; `None`: up to the child's end.
    size: Option<u64>,
}

impl Window {
    fn of(options: &RawOptions) -> Result<Self> {
        let offset = options.offset.map_or(Ok(0), |offset| whole_sectors("offset", offset))?;
        let size = options.size.map(|size| whole_sectors("size", size)).transpose()?;
        Ok(Self { offset, size })
    }

    fn is_whole(self) -> bool {
        self == Self { offset: 0, size: None }
    }

    /// The node's size over a child of `below` bytes.
    fn size_over(self, below: u64) -> Result<u64> {
        let Self { offset, size } = self;
        let Some(rest) = below.checked_sub(offset) else {
            return Err(Error::new(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({below})"
            )));
        };
        match size {
            Some(size) if size > rest => Err(Error::new(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size of the \
                 containing file ({below})"
            ))),
            Some(size) => Ok(size),
            None => Ok(rest),
        }
    }

    /// Blocks of the child that the offset cuts are no blocks of this node. Raw bytes are not compressed, whatever the
    /// file is.
    fn limits_over(self, below: Limits) -> Limits {
        let is_cut = !is_aligned(self.offset, below.discard_alignment.into());
        let discard_alignment = if is_cut { 1 } else { below.discard_alignment };
        Limits { discard_alignment, compressed_cluster: 0, ..below.passed_on() }
    }

    fn extent(self, file: ChildId, at: ByteRange) -> Extent {
        Extent { len: at.len(), place: Place::Data { child: file, offset: at.start() + self.offset } }
    }

    fn below(self, at: ByteRange) -> Result<ByteRange, IoError> {
        at.shifted(self.offset).ok_or(IoError::OutOfRange)
    }
}

fn whole_sectors(name: &str, value: i64) -> Result<u64> {
    let bytes = u64::try_from(value);
    let bytes = bytes.map_err(|_| Error::new(format!("Parameter '{name}' expects a value that is not negative")))?;
    if !is_aligned(bytes, SECTOR) {
        return Err(Error::new(format!("Specified {name} is not multiple of 512")));
    }
    Ok(bytes)
}

impl Format for Raw {
    type Conf = Window;
    type Ticket<'t> = NoTicket;

    fn geometry(&self, window: &Window, children: &[Geometry]) -> Result<Geometry> {
        let [file] = children else { unreachable!("raw has one child") };
        Ok(Geometry { size: window.size_over(file.size)?, limits: window.limits_over(file.limits) })
    }

    #[inline]
    fn map_now(&self, window: &Window, at: ByteRange, access: Access) -> Option<Extent> {
        if access == Access::Write && self.is_watched(at) {
            return None;
        }
        Some(window.extent(self.file, at))
    }

    async fn map(&self, window: &Window, _: IoCx<'_>, at: ByteRange, _: Access) -> Result<Extent, IoError> {
        Ok(window.extent(self.file, at))
    }

    /// The first bytes, as they would be, must not be those of a format. In QEMU's word for it.
    async fn check_write(&self, window: &Window, cx: IoCx<'_>, at: ByteRange, buf: &IoBuf) -> Result<(), IoError> {
        if !self.is_watched(at) {
            return Ok(());
        }
        let file = cx.child(self.file);
        let there = window.below(ByteRange::whole(PROBED))?.intersection(ByteRange::whole(file.size()));
        let mut start = Vec::new();
        if let Some(there) = there {
            let before = IoBuf::private(there.len())?;
            file.read(there, before.clone()).await?;
            start = before.to_vec();
        }
        let part = at.split(PROBED - at.start()).0;
        let written = buf.slice(0, part.len()).to_vec();
        let from = usize::try_from(part.start()).map_err(|_| IoError::OutOfRange)?;
        let to = from.saturating_add(written.len());
        start.resize(start.len().max(to), 0);
        start.get_mut(from..to).ok_or(IoError::OutOfRange)?.copy_from_slice(&written);
        if matches!(guessed(&start), Ok("raw")) { Ok(()) } else { Err(IoError::Os(EPERM)) }
    }

    /// Never asked for: all data has its place.
    async fn allocate<'t>(&'t self, _: &'t Window, _: IoCx<'t>, _: ByteRange) -> Result<NoTicket, IoError> {
        Err(IoError::Unsupported)
    }

    async fn write_zeroes(
        &self,
        window: &Window,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        cx.child(self.file).write_zeroes(window.below(at)?, flags).await
    }

    async fn discard(&self, window: &Window, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        cx.child(self.file).discard(window.below(at)?).await
    }

    async fn flush(&self, _: &Window, cx: IoCx<'_>) -> Result<(), IoError> {
        cx.child(self.file).announce(DebugEvent::FlushToDisk).await;
        cx.child(self.file).flush().await
    }

    async fn truncate(&self, window: &Window, _: IoCx<'_>, size: u64, _: Preallocation) -> Result<Window> {
        self.passes_size(window, size)?;
        Ok(*window)
    }

    /// All of a file ends where the file ends.
    fn end(&self, window: &Window) -> End {
        if window.is_whole() { End::Of(self.file) } else { End::Fixed }
    }

    fn passes_size(&self, window: &Window, size: u64) -> Result<Option<(ChildId, u64)>> {
        if window.size.is_some() {
            return Err(Error::new("Cannot resize fixed-size raw disks"));
        }
        let below = ByteRange::new(window.offset, size);
        let below = below.ok_or_else(|| Error::new("Disk size too large for the chosen offset"))?;
        Ok(Some((self.file, below.end())))
    }

    async fn reopen(&self, _: &Window, request: ReopenRequest<'_>) -> Result<Window> {
        let own = request.options.downcast_ref();
        Window::of(own.expect("the catalog reopens a driver with options of its kind"))
    }

    /// All of the file is the file: its users are the file's users. A window is not; but it lies inside the file, so
    /// its writes grow nothing, and other windows may be written beside it.
    fn child_perms(&self, window: &Window, _: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        if window.is_whole() {
            return above;
        }
        let data = role.child_perms(above, writable);
        let grows = PermSet::RESIZE.without(above.uses);
        Perms { uses: data.uses.without(grows), ..data }
    }

    async fn info(&self, _: &Window) -> DriverInfo {
        DriverInfo { driver: "raw", ..DriverInfo::default() }
    }
}

/// Operation not permitted.
const EPERM: i32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn window(offset: i64, size: Option<i64>) -> Result<Window> {
        Window::of(&RawOptions { offset: Some(offset), size, ..RawOptions::default() })
    }

    #[test]
    fn a_window_is_whole_sectors() {
        for (offset, size) in [(100, None), (-512, None), (0, Some(100)), (512, Some(-1)), (i64::MIN, None)] {
            window(offset, size).unwrap_err();
        }
        assert_eq!(Window::of(&RawOptions::default()).unwrap(), Window { offset: 0, size: None });
    }

    #[test]
    fn a_window_lies_inside_the_file() {
        let size = |offset, size, below| window(offset, size).unwrap().size_over(below);
        assert_eq!(size(512, None, 4096).unwrap(), 3584);
        assert_eq!(size(4096, None, 4096).unwrap(), 0);
        assert_eq!(size(512, Some(3584), 4096).unwrap(), 3584);
        let refused = |offset, bytes| size(offset, bytes, 4096).unwrap_err().full();
        assert_eq!(refused(4608, None), "Offset (4608) cannot be greater than size of the containing file (4096)");
        assert!(refused(512, Some(4096)).starts_with("The sum of offset (512) and size (4096)"));
        let largest = i64::MAX - 511;
        refused(largest, Some(largest));
    }

    #[test]
    fn a_window_that_cuts_blocks_has_none() {
        let below = Limits { request_alignment: 4096, discard_alignment: 4096, ..Limits::ANY };
        assert_eq!(window(8192, None).unwrap().limits_over(below).discard_alignment, 4096);
        assert_eq!(window(512, None).unwrap().limits_over(below).discard_alignment, 1);
    }
}
