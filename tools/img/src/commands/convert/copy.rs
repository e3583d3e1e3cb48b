//! The copying: several parts of the disk are under way at once, each is read, looked at for zeroes, and written.
//!
//! One place ([`Copy::next`]) says what the next part is, so every byte is somebody's and nobody's twice. Where the target
//! is to be written in order, a part waits for those before it with what it has read.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block_core::base::{ByteRange, IoError};
use block_core::graph::WriteFlags;
use block_core::pipeline::{Content, Status};
use block_core::rt::sync::{LocalMutex, Notify};
use block_core::rt::{IoBuf, Local};
use trellis_image::{Disk, Failure, Progress, Session, complain, strerror};

/// A source, all of it.
pub(super) struct Part {
    pub(super) disk: Disk,
    pub(super) size: u64,
}

/// How it is copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    /// Parts under way at once; at least 1.
    pub(super) at_once: usize,
    /// The target is written from its beginning to its end.
    pub(super) in_order: bool,
    /// The target stores data compressed, so many bytes at a time.
    pub(super) compressed: Option<u64>,
    /// Zeroes inside data are left out where there are so many bytes of them; `None`: nobody looks.
    pub(super) scan: Option<u64>,
    /// Zeroes are written like data.
    pub(super) fills: bool,
    /// The target reads as zeroes.
    pub(super) is_zero: bool,
    /// The target has just been made.
    pub(super) is_new: bool,
    /// The target stands on an image of so many bytes, which has what the source's uppermost layer has not.
    pub(super) over: Option<u64>,
    /// What cannot be read is zeroes.
    pub(super) salvages: bool,
    /// Bytes in a second at the most.
    pub(super) rate: Option<u64>,
}

/// See the module's head.
pub(super) struct Copy {
    /// What warnings begin with.
    program: String,
    parts: Vec<Part>,
    size: u64,
    target: Disk,
    manner: Manner,
    is_zero: Cell<bool>,
    place: LocalMutex<Place>,
    turn: Turn,
    done: Cell<u64>,
    begun: Instant,
    written: Cell<u64>,
    workers: Cell<usize>,
    over: Notify,
    /// Why no further part is begun.
    ended: RefCell<Option<Failure>>,
}

/// How far the parts have been given out.
#[derive(Default)]
struct Place {
    at: u64,
    number: u64,
    /// What is known of the bytes from `at` on: up to where, and what they are.
    known: Option<(u64, What)>,
}

/// What a part of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Data,
    Zero,
    /// The target has it from what it stands on.
    Below,
}

/// Something to do.
#[derive(Clone, Copy, Debug)]
struct Piece {
    at: ByteRange,
    what: What,
    /// Its place in the order.
    number: u64,
}

/// Whose turn it is to write.
#[derive(Default)]
struct Turn {
    now: Cell<u64>,
    changed: Notify,
}

impl Copy {
    /// `parts` lie one behind the other from the beginning of `target` on, which is at least as large.
    pub(super) fn new(program: &str, parts: Vec<Part>, target: Disk, manner: Manner) -> Rc<Self> {
        Rc::new(Self {
            program: program.to_owned(),
            size: parts.iter().map(|part| part.size).sum(),
            parts,
            target,
            manner,
            is_zero: Cell::new(manner.is_zero),
            place: LocalMutex::default(),
            turn: Turn::default(),
            done: Cell::new(0),
            begun: Instant::now(),
            written: Cell::new(0),
            workers: Cell::new(0),
            over: Notify::new(),
            ended: RefCell::new(None),
        })
    }

    /// Copies everything. The first thing that goes wrong is the error.
    pub(super) async fn run(self: &Rc<Self>, session: &Session, progress: &Rc<Progress>) -> Result<(), Failure> {
        self.clear().await;
        self.workers.set(self.manner.at_once);
        for _ in 0..self.manner.at_once {
            let (copy, local, progress) = (self.clone(), session.local.clone(), progress.clone());
            session.local.spawn(async move {
                copy.work(&local, &progress).await;
                copy.workers.set(copy.workers.get() - 1);
                copy.over.notify_one();
            });
        }
        while self.workers.get() > 0 {
            self.over.notified().await;
        }
        match self.ended.take() {
            Some(failure) => Err(failure),
            None => {
                progress.at(1, 1);
                Ok(())
            }
        }
    }

    /// No further part is begun.
    pub(super) fn stop(&self) {
        self.fail(Failure::new("Interrupted"));
    }

    fn fail(&self, failure: Failure) {
        self.ended.borrow_mut().get_or_insert(failure);
        self.turn.changed.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// A target with something in it is emptied, if that costs less than writing zeroes.
    async fn clear(&self) {
        let Manner { is_zero, over, fills, .. } = self.manner;
        if is_zero || fills || over.is_some() {
            return;
        }
        let flags = WriteFlags { may_unmap: true, no_fallback: true, ..WriteFlags::default() };
        let all = ByteRange::whole(self.size);
        self.is_zero.set(self.target.write_zeroes(all, flags).await.is_ok());
    }

    async fn work(&self, local: &Rc<Local>, progress: &Progress) {
        let mut buffer = None;
        while !self.has_ended() {
            let done = match self.next().await {
                Ok(None) => return,
                Ok(Some(piece)) => self.piece(local, piece, &mut buffer).await.map(|()| piece.at.len()),
                Err(failure) => Err(failure),
            };
            match done {
                Ok(bytes) => {
                    self.done.set(self.done.get() + bytes);
                    progress.at(self.done.get(), self.size);
                }
                Err(failure) => return self.fail(failure),
            }
        }
    }

    // ---- which part is next -------------------------------------------------------------------------------------

    /// The next part that there is something to do for; `None`: there is none.
    async fn next(&self) -> Result<Option<Piece>, Failure> {
        let mut place = self.place.lock().await;
        loop {
            if place.at == self.size || self.has_ended() {
                return Ok(None);
            }
            let (end, what) = match place.known.filter(|(end, _)| place.at < *end) {
                Some(known) => known,
                None => self.look(place.at).await?,
            };
            place.known = Some((end, what));
            let piece = self.cut(place.at, end, what);
            if self.is_nothing(piece.what) {
                place.at = piece.at.end();
                self.done.set(self.done.get() + piece.at.len());
                continue;
            }
            let piece = Piece { number: place.number, ..piece };
            (place.at, place.number) = (piece.at.end(), place.number + 1);
            return Ok(Some(piece));
        }
    }

    fn is_nothing(&self, what: What) -> bool {
        match what {
            What::Data => false,
            What::Zero => self.is_zero.get() && !self.manner.fills,
            What::Below => true,
        }
    }

    /// What the bytes at an offset are, and up to where all are.
    async fn look(&self, at: u64) -> Result<(u64, What), Failure> {
        let (part, inside) = self.part(at);
        let Some(over) = self.manner.over else { return self.status(part, inside, at).await };
        let failed = |error| no_status(at, error);
        let (is_own, len) = part.disk.allocated(inside).await.map_err(failed)?;
        let own = inside.split(len).0;
        if !is_own && at < over {
            return Ok(((at + len).min(over), What::Below));
        }
        let (end, what) = self.status(part, own, at).await?;
        // Behind the end of what a new image stands on it reads as zeroes.
        let is_there = what == What::Zero && at >= over && self.manner.is_new;
        Ok((end, if is_there { What::Below } else { what }))
    }

    async fn status(&self, part: &Part, inside: ByteRange, at: u64) -> Result<(u64, What), Failure> {
        match part.disk.status(inside).await {
            Ok(Status { len, content: Content::Data | Content::Encoded, .. }) => Ok((at + len, What::Data)),
            Ok(Status { len, content: Content::Zero | Content::Absent, .. }) => Ok((at + len, What::Zero)),
            // Reading shows what can be read.
            Err(_) if self.manner.salvages => Ok((at + inside.len().min(BUFFER), What::Data)),
            Err(error) => Err(no_status(at, error)),
        }
    }

    /// The source that has an offset, and all that it has from there on.
    fn part(&self, at: u64) -> (&Part, ByteRange) {
        let mut begin = 0;
        for part in &self.parts {
            if at < begin + part.size {
                let inside = ByteRange::between(at - begin, part.size).expect("the part is not over");
                return (part, inside);
            }
            begin += part.size;
        }
        unreachable!("parts are asked for inside the disk")
    }

    /// As much of what is known as is done at once.
    fn cut(&self, at: u64, end: u64, what: What) -> Piece {
        let len = end - at;
        let (len, what) = match (self.manner.compressed, what) {
            (Some(cluster), What::Data) => (cluster.min(self.size - at), What::Data),
            // Zeroes that are written like data go through a buffer, a cluster at a time.
            (Some(cluster), What::Zero) if self.manner.fills => (cluster.min(self.size - at), What::Data),
            // Only whole clusters are zeroes, or are left to what is below.
            (Some(cluster), _) if len < cluster && end < self.size => (cluster.min(self.size - at), What::Data),
            (Some(cluster), other) if end < self.size => (len / cluster * cluster, other),
            (_, What::Data) => (len.min(BUFFER), What::Data),
            (_, What::Zero) if self.manner.fills => (len.min(BUFFER), What::Zero),
            (_, other) => (len, other),
        };
        Piece { at: ByteRange::new(at, len).expect("it is inside the disk"), what, number: 0 }
    }

    // ---- one part -----------------------------------------------------------------------------------------------

    async fn piece(&self, local: &Rc<Local>, piece: Piece, buffer: &mut Option<IoBuf>) -> Result<(), Failure> {
        let Piece { at, what, number } = piece;
        if what == What::Zero && !self.manner.fills {
            self.wait(number).await;
            let written = if self.has_ended() { Ok(()) } else { self.zeroes(at).await };
            self.pass(number);
            return written;
        }
        let buf = self.buffer(buffer).map_err(|error| failed("error while reading", at.start(), error))?;
        let buf = buf.slice(0, at.len());
        match what {
            What::Data => self.read(at, &buf).await?,
            What::Zero | What::Below => buf.fill(0),
        }
        self.slow_down(local, at.len()).await;
        let runs = self.runs(at, &buf);
        self.wait(number).await;
        for (run, is_data) in runs {
            if self.has_ended() {
                break;
            }
            match is_data {
                true => self.write(run, buf.slice(run.start() - at.start(), run.len())).await?,
                false if self.is_zero.get() => {}
                false => self.zeroes(run).await?,
            }
        }
        self.pass(number);
        Ok(())
    }

    fn buffer(&self, kept: &mut Option<IoBuf>) -> Result<IoBuf, IoError> {
        if kept.is_none() {
            *kept = Some(IoBuf::private(self.manner.compressed.unwrap_or(BUFFER))?);
        }
        Ok(kept.as_ref().expect("it was made above").clone())
    }

    /// Fills `buf`, from as many sources as have something of it.
    async fn read(&self, at: ByteRange, buf: &IoBuf) -> Result<(), Failure> {
        let mut next = at.start();
        while next < at.end() {
            let (part, inside) = self.part(next);
            let piece = inside.split(at.end() - next).0;
            let into = buf.slice(next - at.start(), piece.len());
            match part.disk.read(piece, into.clone()).await {
                Ok(()) => {}
                Err(_) if self.manner.salvages => self.salvage(part, piece, next, &into).await,
                Err(error) => return Err(failed("error while reading", next, error)),
            }
            next += piece.len();
        }
        Ok(())
    }

    /// Sector by sector, with zeroes for those that cannot be read.
    async fn salvage(&self, part: &Part, at: ByteRange, at_in_all: u64, buf: &IoBuf) {
        for sector in at.pieces(SECTOR) {
            let into = buf.slice(sector.start() - at.start(), sector.len());
            if let Err(error) = part.disk.read(sector, into.clone()).await {
                into.fill(0);
                let offset = at_in_all + (sector.start() - at.start());
                complain(&format!(
                    "{}: warning: error while reading offset {offset}: {}\n",
                    self.program,
                    strerror(error)
                ));
            }
        }
    }

    /// Which parts of a buffer are written, and which are zeroes that need not be.
    fn runs(&self, at: ByteRange, buf: &IoBuf) -> Vec<(ByteRange, bool)> {
        match (self.manner.scan, self.manner.compressed) {
            (None, _) => vec![(at, true)],
            (Some(_), Some(_)) => vec![(at, !buf.is_zero())],
            (Some(unit), None) => runs(at, unit, |block| !buf.slice(block.start() - at.start(), block.len()).is_zero()),
        }
    }

    async fn write(&self, at: ByteRange, buf: IoBuf) -> Result<(), Failure> {
        let flags = WriteFlags { compressed: self.manner.compressed.is_some(), ..WriteFlags::default() };
        self.target.write(at, buf, flags).await.map_err(|error| failed("error while writing", at.start(), error))
    }

    async fn zeroes(&self, at: ByteRange) -> Result<(), Failure> {
        let written = self.target.write_zeroes(at, WriteFlags::default()).await;
        written.map_err(|error| failed("error while writing", at.start(), error))
    }

    /// Waits until all parts before this one are written.
    async fn wait(&self, number: u64) {
        while self.manner.in_order && self.turn.now.get() != number && !self.has_ended() {
            self.turn.changed.notified().await;
        }
    }

    fn pass(&self, number: u64) {
        if self.manner.in_order {
            self.turn.now.set(number + 1);
            self.turn.changed.notify_all();
        }
    }

    /// Bytes may not be written faster than they are allowed to.
    async fn slow_down(&self, local: &Rc<Local>, bytes: u64) {
        let Some(rate) = self.manner.rate else { return };
        // What goes before has to have had its time.
        let written = self.written.replace(self.written.get() + bytes);
        #[expect(clippy::cast_precision_loss, reason = "a moment more or less does not matter")]
        let due = Duration::from_secs_f64(written as f64 / rate as f64);
        let due = self.begun + due;
        while !self.has_ended() && Instant::now() < due {
            // Whoever is stopped does not sleep to the end.
            local.sleep_until(due.min(Instant::now() + NAP)).await;
        }
    }
}

/// The blocks of `unit` bytes (at least 1) of a range, joined where `is_data` says the same of them.
fn runs(at: ByteRange, unit: u64, is_data: impl Fn(ByteRange) -> bool) -> Vec<(ByteRange, bool)> {
    let mut found: Vec<(ByteRange, bool)> = Vec::new();
    let mut next = at.start();
    while next < at.end() {
        let end = (next / unit + 1).saturating_mul(unit).min(at.end());
        let block = ByteRange::between(next, end).expect("it is inside the range");
        let is_data = is_data(block);
        match found.last_mut().filter(|(_, was)| *was == is_data) {
            Some((run, _)) => *run = ByteRange::between(run.start(), end).expect("it is inside the range"),
            None => found.push((block, is_data)),
        }
        next = end;
    }
    found
}

fn no_status(at: u64, error: IoError) -> Failure {
    Failure::new(format!("error while reading block status at offset {at}: {}", strerror(error)))
}

fn failed(doing: &str, at: u64, error: IoError) -> Failure {
    Failure::new(format!("{doing} at byte {at}: {}", strerror(error)))
}

/// Bytes that are read at once.
const BUFFER: u64 = 2 << 20;
const SECTOR: u64 = 512;
const NAP: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_blocks_do() {
        let at = ByteRange::between(100, 1000).unwrap();
        let data = |block: ByteRange| block.start() < 200 || block.start() >= 500;
        let cut: Vec<_> = runs(at, 100, data).into_iter().map(|(run, data)| (run.start(), run.end(), data)).collect();
        assert_eq!(cut, [(100, 200, true), (200, 500, false), (500, 1000, true)]);
        let cut: Vec<_> =
            runs(ByteRange::between(50, 250).unwrap(), 100, |block| block.start() != 100).into_iter().collect();
        assert_eq!(cut.len(), 3);
        assert!(runs(ByteRange::whole(0), 100, |_| true).is_empty());
    }
}
