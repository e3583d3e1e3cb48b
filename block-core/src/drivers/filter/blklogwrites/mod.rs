//! `blklogwrites`: whatever is written goes to a log too, in the order in which it completed, so that a tool can replay
//! it up to any point (crash tests of file systems).
//!
//! `layout` is the log's bytes, `journal` who gets which place. An entry gets its place when its write is over; a flush
//! gets it before the flush begins, because it covers nothing that comes later. Overlapping writes are kept apart until
//! they have their places. The log lies in a node of fixed size: where it is full, or an entry could not be written,
//! writing ends, and what is there can be replayed.
//!
//! A change of the disk's size is a mark with the text `size=` and the bytes in decimal digits, before the first entry
//! that was made under the new size. A flush that failed is a mark `flush failed`. Of a write that failed the log has what
//! the disk has there; a discard that failed may have happened.

mod journal;
mod layout;

use std::future::{Future, poll_fn};
use std::sync::OnceLock;

use qmp::Qapi;

use self::journal::{Journal, Placed};
use self::layout::{Entry, Superblock, is_sector_size};
use crate::base::{ByteRange, Error, IoError, Result, Sparingly};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{Child, ChildId, DriverInfo, Geometry, IoCx, Limits, ReopenRequest, Tracked, WriteFlags};
use crate::pipeline::{Filter, Filtered};
use crate::rt::IoBuf;

/// A filter that logs what is written, as the kernel's dm-log-writes does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsBlklogwrites")]
pub struct BlkLogWritesOptions {
    /// Bytes in a log sector, a power of two from 64 up to 8 MiB; 512 if absent. Not together with `log-append`.
    pub log_sector_size: Option<u32>,
    /// Go on after the entries that are in the log; what is wrong with it is found at the first write. False if absent.
    pub log_append: Option<bool>,
    /// The superblock is written after this many entries, besides after each flush; 4096 if absent.
    pub log_super_update_interval: Option<u64>,
}

const SECTOR: u32 = 512;
const INTERVAL: u64 = 4096;
/// Data is logged in pieces of at most this many bytes, and what their log sectors have besides.
const PIECE: u64 = 1 << 20;
/// Zeroes have one entry for this many bytes at the most.
const ZEROES_AT_ONCE: u64 = 64 << 20;

impl Open for BlkLogWritesOptions {
    type Driver = Filtered<BlkLogWrites>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let conf = Conf::new(self)?;
        let driver = BlkLogWrites {
            name: site.name.to_owned(),
            file: site.child("file"),
            log: site.child("log"),
            journal: OnceLock::new(),
            writing: Tracked::default(),
            log_head: Tracked::default(),
            complaints: Sparingly::default(),
        };
        Ok(Opened { driver: Filtered(driver), conf, options: site.common })
    }
}

/// The options, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conf {
    start: Start,
    /// The superblock is written after this many entries.
    interval: u64,
}

/// Where the log begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// At its beginning, in sectors of this size.
    Anew(u32),
    /// After what is there.
    Append,
}

impl Conf {
    fn new(options: &BlkLogWritesOptions) -> Result<Self> {
        let start = match (options.log_append.unwrap_or(false), options.log_sector_size) {
            (true, Some(_)) => return Err(Error::new("log-append and log-sector-size are mutually exclusive")),
            (true, None) => Start::Append,
            (false, bytes) => Start::Anew(sector_size(bytes.unwrap_or(SECTOR))?),
        };
        let interval = options.log_super_update_interval.unwrap_or(INTERVAL);
        if interval == 0 {
            return Err(Error::new("Invalid log superblock update interval 0"));
        }
        Ok(Self { start, interval })
    }
}

fn sector_size(bytes: u32) -> Result<u32> {
    if is_sector_size(bytes) { Ok(bytes) } else { Err(Error::new(format!("Invalid log sector size {bytes}"))) }
}

/// The driver.
pub struct BlkLogWrites {
    name: String,
    file: ChildId,
    log: ChildId,
    /// Set by the first request that writes.
    journal: OnceLock<Journal>,
    /// Writes that have no place in the log yet.
    writing: Tracked,
    /// Who reads or writes the superblock.
    log_head: Tracked,
    complaints: Sparingly,
}

/// What an entry has besides its own sector.
enum Payload {
    Nothing,
    /// In the entry's sector.
    Text(String),
    /// Whole sectors.
    Data(IoBuf),
    /// The same, all 0.
    Zeroes,
}

impl BlkLogWrites {
    /// A request that changes the range, and its entry.
    async fn logged(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        (flags, payload): (u64, Payload),
        work: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        let journal = self.journal(conf, cx).await?;
        journal.goes_on()?;
        let sector = u64::from(journal.sector);
        let wide = at.widened(sector).ok_or(IoError::OutOfRange)?;
        let alone = cx.alone(&self.writing, wide, true).await;
        let owed = journal.owes();
        let result = work.await;
        if result.is_err() && flags & layout::DISCARD == 0 {
            self.log_what_is_there(conf, cx, journal, wide).await?;
            owed.paid();
            return result;
        }
        let whole = if flags & layout::DISCARD != 0 { at.whole_units(sector) } else { Some(wide) };
        let Some(whole) = whole else {
            owed.paid();
            return result;
        };
        let payload = if whole == at { Ok(payload) } else { self.as_it_is_now(cx, whole, payload).await };
        let payload = payload.map_err(|error| self.ended(journal.end(error)))?;
        let data = if flags & layout::DISCARD != 0 { 0 } else { whole.len() / sector };
        let placed = self.place(cx, journal, data)?;
        owed.paid();
        drop(alone);
        let entry = Entry { sector: whole.start() / sector, sectors: whole.len() / sector, flags, text: 0 };
        let is_logged = self.put(conf, cx, journal, placed, entry, payload).await;
        result.and(is_logged)
    }

    /// What failed may have been written in part, or not at all: the log gets what the disk has now.
    async fn log_what_is_there(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        journal: &Journal,
        whole: ByteRange,
    ) -> Result<(), IoError> {
        let sector = u64::from(journal.sector);
        for piece in whole.pieces(PIECE.max(sector)) {
            let payload = self.as_it_is_now(cx, piece, Payload::Zeroes).await;
            let payload = payload.map_err(|error| self.ended(journal.end(error)))?;
            let placed = self.place(cx, journal, piece.len() / sector)?;
            let entry = Entry { sector: piece.start() / sector, sectors: piece.len() / sector, flags: 0, text: 0 };
            self.put(conf, cx, journal, placed, entry, payload).await?;
        }
        Ok(())
    }

    fn place<'j>(&self, cx: IoCx<'_>, journal: &'j Journal, data: u64) -> Result<Placed<'j>, IoError> {
        let (size, room) = (cx.child(self.file).size(), cx.child(self.log).size());
        journal.place(data, size, room, cx.haste()).map_err(|error| self.ended(error))
    }

    /// A write that begins or ends inside a log sector is logged with what is beside it.
    async fn as_it_is_now(&self, cx: IoCx<'_>, whole: ByteRange, payload: Payload) -> Result<Payload, IoError> {
        if let Payload::Nothing | Payload::Text(_) = payload {
            return Ok(payload);
        }
        let file = cx.child(self.file);
        let buf = IoBuf::private(whole.len())?;
        let inside = whole.split(file.size().saturating_sub(whole.start())).0;
        file.read(inside, buf.slice(0, inside.len())).await?;
        Ok(Payload::Data(buf))
    }

    /// Writes an entry to its place, after the remark that goes before it, and the superblock where it is due.
    async fn put(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        journal: &Journal,
        placed: Placed<'_>,
        entry: Entry,
        payload: Payload,
    ) -> Result<(), IoError> {
        let log = cx.child(self.log);
        if let Some(place) = placed.resized {
            let (mark, text) = mark(format!("size={}", cx.child(self.file).size()));
            let result = write_entry(log, journal, place.at, mark, text).await;
            place.settle(result, false);
            result.map_err(|error| self.ended(error))?;
        }
        let (number, counts) = (placed.entry.number, entry.flags & (layout::FLUSH | layout::FUA) != 0);
        let result = write_entry(log, journal, placed.entry.at, entry, payload).await;
        let due = counts || placed.entry.ends(conf.interval);
        let mut is_due = placed.entry.settle(result, due);
        if counts && result.is_ok() {
            // Whoever is told that this is stable can count on the superblock, which counts no entry before a gap.
            let complete = poll_fn(|task| journal.poll_complete(number, task));
            let complete = cx.handing_on(complete, || journal.hurry_before(number)).await;
            complete.map_err(|error| self.ended(error))?;
            is_due = true;
        }
        if is_due {
            self.count(log, journal).await.map_err(|error| self.ended(error))?;
        }
        result.map_err(|error| self.ended(error))
    }

    /// Writes the superblock, after what it counts is stable.
    async fn count(&self, log: Child<'_>, journal: &Journal) -> Result<(), IoError> {
        let _alone = log.cx().alone(&self.log_head, ByteRange::whole(1), true).await;
        let Some(entries) = journal.uncounted() else { return Ok(()) };
        log.flush().await?;
        let head = IoBuf::private(journal.sector.into())?;
        head.write_at(0, &Superblock { entries, sector: journal.sector }.to_bytes());
        let stable = WriteFlags { fua: true, ..WriteFlags::default() };
        log.write(ByteRange::whole(journal.sector.into()), head, stable).await?;
        journal.counted(entries);
        Ok(())
    }

    /// The log, looked at when it is first written to.
    async fn journal(&self, conf: &Conf, cx: IoCx<'_>) -> Result<&Journal, IoError> {
        if let Some(journal) = self.journal.get() {
            return Ok(journal);
        }
        let _alone = cx.alone(&self.log_head, ByteRange::whole(1), true).await;
        if self.journal.get().is_none() {
            let journal = match conf.start {
                Start::Anew(sector) => Journal::new(sector, 1, 0),
                Start::Append => self.continued(cx.child(self.log)).await?,
            };
            // Nobody else sets it while we are alone.
            let _ = self.journal.set(journal);
        }
        Ok(self.journal.get().expect("it has just been set"))
    }

    /// A log that has entries already.
    async fn continued(&self, log: Child<'_>) -> Result<Journal, IoError> {
        let refused = |why: String| {
            self.complain(&format!("the log cannot be continued: {why}"));
            IoError::Os(libc::EINVAL)
        };
        let mut window = Window::default();
        let superblock = Superblock::parse(&window.bytes_at(log, 0).await?).map_err(|why| refused(why.to_string()))?;
        let (mut next, sector) = (1_u64, u64::from(superblock.sector));
        for number in 0..superblock.entries {
            let beyond = || refused(format!("the log ends before its entry {number}"));
            let start = next.checked_mul(sector).filter(|start| *start < log.size()).ok_or_else(beyond)?;
            let entry = Entry::parse(&window.bytes_at(log, start).await?);
            let len = entry.len().ok_or_else(|| refused(format!("entry {number} of the log makes no sense")))?;
            next = next.checked_add(len).ok_or_else(beyond)?;
        }
        Ok(Journal::new(superblock.sector, next, superblock.entries))
    }

    fn ended(&self, error: IoError) -> IoError {
        self.complain(&format!("the log could not be written: {error}"));
        error
    }

    fn complain(&self, what: &str) {
        if let Some(left_out) = self.complaints.due() {
            tracing::error!(left_out, "node '{}': {what}", self.name);
        }
    }
}

fn mark(text: String) -> (Entry, Payload) {
    (Entry { sector: 0, sectors: 0, flags: layout::MARK, text: text.len() as u64 }, Payload::Text(text))
}

/// What was read of a log: entries stand close together, and each of them is a few bytes.
#[derive(Default)]
struct Window {
    buf: Option<(ByteRange, IoBuf)>,
}

impl Window {
    /// What a log that is continued is read in, in bytes.
    const BYTES: u64 = 256 << 10;

    async fn bytes_at<const N: usize>(&mut self, log: Child<'_>, start: u64) -> Result<[u8; N], IoError> {
        let at = ByteRange::new(start, N as u64).ok_or(IoError::OutOfRange)?;
        let (range, buf) = match self.buf.take().filter(|(range, _)| range.intersection(at) == Some(at)) {
            Some(there) => there,
            None => {
                let left = log.size().saturating_sub(start).clamp(at.len(), Self::BYTES);
                let range = ByteRange::new(start, left).ok_or(IoError::OutOfRange)?;
                let buf = IoBuf::private(left)?;
                log.read(range, buf.clone()).await?;
                (range, buf)
            }
        };
        let mut bytes = [0; N];
        buf.read_at(start - range.start(), &mut bytes);
        self.buf = Some((range, buf));
        Ok(bytes)
    }
}

async fn write_entry(
    log: Child<'_>,
    journal: &Journal,
    at: ByteRange,
    entry: Entry,
    payload: Payload,
) -> Result<(), IoError> {
    let head = IoBuf::private(journal.sector.into())?;
    head.write_at(0, &entry.to_bytes());
    let (head_at, data_at) = at.split(head.len());
    match payload {
        Payload::Nothing => log.write(head_at, head, WriteFlags::default()).await,
        Payload::Text(text) => {
            head.write_at(Entry::BYTES as u64, text.as_bytes());
            log.write(head_at, head, WriteFlags::default()).await
        }
        Payload::Data(data) => log.write(at, IoBuf::concat(&[head, data]), WriteFlags::default()).await,
        Payload::Zeroes => {
            if let Some(data_at) = data_at {
                log.write_zeroes(data_at, WriteFlags::default()).await?;
            }
            log.write(head_at, head, WriteFlags::default()).await
        }
    }
}

fn flags_of(flags: WriteFlags) -> u64 {
    if flags.fua { layout::FUA } else { 0 }
}

impl Filter for BlkLogWrites {
    type Conf = Conf;

    fn child(&self) -> ChildId {
        self.file
    }

    /// A write is copied, so it comes in pieces; a cluster that is stored compressed stays whole.
    fn geometry(&self, _: &Conf, child: Geometry, _: &[Geometry]) -> Result<Geometry> {
        let piece = PIECE.max(child.limits.compressed_cluster.into());
        let limits = Limits { max_transfer: child.limits.max_transfer.min(piece), ..child.limits };
        Ok(Geometry { limits, ..child })
    }

    /// Only what is written is of interest.
    fn is_transparent(&self, _: &Conf, write: bool) -> bool {
        !write
    }

    /// The same bytes go to both, whatever the guest does to its memory meanwhile.
    async fn write(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let data = IoBuf::private(at.len())?;
        data.copy_from(&buf);
        let work = cx.child(self.file).write(at, data.clone(), flags);
        self.logged(conf, cx, at, (flags_of(flags), Payload::Data(data)), work).await
    }

    /// Parts of log sectors are logged with the bytes beside them, so they go by themselves: the rest, which may be
    /// large, takes no memory.
    async fn write_zeroes(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        let sector = self.journal(conf, cx).await?.sector;
        // One that fails is read back: not for longer than it takes to read so much.
        let most = ZEROES_AT_ONCE.max(sector.into());
        for part in at.cut_at_units(sector.into()).into_iter().flatten().flat_map(|part| part.pieces(most)) {
            let work = cx.child(self.file).write_zeroes(part, flags);
            self.logged(conf, cx, part, (flags_of(flags), Payload::Zeroes), work).await?;
        }
        Ok(())
    }

    async fn discard(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let work = cx.child(self.file).discard(at);
        self.logged(conf, cx, at, (layout::DISCARD, Payload::Nothing), work).await
    }

    /// A node that writes nothing logs nothing: its log may not be written to either.
    async fn flush(&self, conf: &Conf, cx: IoCx<'_>) -> Result<(), IoError> {
        if cx.options().read_only || !cx.options().active {
            return cx.child(self.file).flush().await;
        }
        let journal = self.journal(conf, cx).await?;
        let file = cx.child(self.file);
        let placed = self.place(cx, journal, 0)?;
        let result = file.flush().await;
        let (entry, payload) = match result {
            Ok(()) => (Entry { sector: 0, sectors: 0, flags: layout::FLUSH, text: 0 }, Payload::Nothing),
            Err(_) => mark("flush failed".into()),
        };
        let is_logged = self.put(conf, cx, journal, placed, entry, payload).await;
        result.and(is_logged)
    }

    async fn reopen(&self, conf: &Conf, request: ReopenRequest<'_>) -> Result<Conf, Error> {
        let own = request.options.downcast_ref::<BlkLogWritesOptions>();
        let new = Conf::new(own.expect("the catalog reopens a driver with options of its kind"))?;
        match (conf.start, new.start) {
            (old, new) if old == new => {}
            (Start::Anew(_), Start::Anew(_)) => return Err(Error::new("Cannot change the option 'log-sector-size'")),
            (Start::Anew(_), Start::Append) | (Start::Append, Start::Anew(_) | Start::Append) => {
                return Err(Error::new("Cannot change the option 'log-append'"));
            }
        }
        Ok(new)
    }

    fn info(&self, _: &Conf) -> DriverInfo {
        DriverInfo { driver: "blklogwrites", ..DriverInfo::default() }
    }
}
