//! What a crash may leave of a disk, and whether that is allowed.
//!
//! A [`Trial`] does random work through a stack of nodes over one or more [`Disk`]s, and then goes through their log. At each
//! place where the power may fail it makes the images that may be found: everything up to there; all subsets of what no
//! flush has made stable (64 of them at random, where there are more than eight changes); the last write torn at each
//! sector; a change of the size lost. Each image is opened again, and every sector has to hold an allowed value. A test
//! file declares `allowed`, `bench`, `disk`, `random` and this.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::ByteRange;
use block_core::graph::{Graph, Limits, NodeId, PermSet, Perms, Preallocation, WriteFlags};
use block_core::port::{Port, PortLane};
use block_core::rt::sync::oneshot;
use block_core::rt::{Local, run_control};

use crate::allowed::{Harm, Model, SECTOR, Told, Work, Wrong};
use crate::bench::{attach, enter, flush, range, read, write};
use crate::disk::{Change, Disk, Event, Log};
use crate::random::Random;

/// How a stack is put above the node `disk`; gives its top.
pub trait Stack: AsyncFn(&Rc<Graph>) -> NodeId {}
impl<T: AsyncFn(&Rc<Graph>) -> NodeId> Stack for T {}

/// One run.
pub struct Trial {
    /// Of all that is random; not 0.
    pub seed: u64,
    /// What is on each of the disks at the beginning: empty images. The first one is the node `disk`, then `disk1` and so on.
    pub images: Vec<Vec<u8>>,
    /// How the disk wants its requests.
    pub limits: Limits,
    /// Bytes of the stack's top, all zero at the beginning.
    pub size: u64,
    /// `block_resize` is part of the work.
    pub resizes: bool,
    /// Looks at an image that a crash has left; an error says what is wrong (`qemu-img check`).
    pub check: fn(&[u8]) -> Result<(), String>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// Images that were opened.
    pub states: usize,
    /// Of them with a torn write, and with a part of what no flush had made stable.
    pub tears: usize,
    pub subsets: usize,
    /// Sectors, over all images.
    pub lost: usize,
    pub leaked: usize,
    pub torn: usize,
    /// Sectors that could not be read, though they were stable; and those that were not.
    pub unreadable: usize,
    pub undecided: usize,
    /// The first thing that is wrong.
    pub first: Option<String>,
}

impl Trial {
    /// Works through the stack, and opens what crashes may leave with `again`, which is the same stack unless a test
    /// wants to see it fail.
    pub fn run(&self, stack: impl Stack, again: impl Stack) -> Report {
        let log = run_control(async |_| self.work(stack).await);
        run_control(async |_| self.judge(&log, again).await)
    }

    // ---- work --------------------------------------------------------------------------------------------------

    async fn work(&self, stack: impl Stack) -> Vec<Event> {
        let log = Log::default();
        let (graph, top, port) = self.opened(self.images.clone(), &log, &stack).await;
        let lane = port.handle().lane(&Local::current());
        let user = Rc::new(User { lane, log: log.clone(), model: RefCell::new(Model::new(self.seed, self.size)) });
        let mut random = Random(self.seed);
        for _ in 0..ROUNDS {
            let beside: Vec<_> = (0..USERS).map(|_| user.start(random.next() | 1)).collect();
            for one in beside {
                one.await.expect("a user of the disk got through");
            }
            if self.resizes && random.below(3) == 0 {
                let size = self.size / 2 + random.below(self.size / SECTOR as u64) * SECTOR as u64;
                user.tell(|| Told::BeginResize(size));
                let resized = graph.permit().resize(top, size, Preallocation::Off).await;
                user.tell(|| Told::EndResize(resized.is_ok()));
                resized.unwrap();
            }
        }
        let size = user.model.borrow().size();
        let now = read(&user.lane, range(0, size)).await.unwrap();
        assert!(user.model.borrow().wrong_now(&now).is_empty(), "even without a crash");
        log.events()
    }

    async fn opened(&self, images: Vec<Vec<u8>>, log: &Log, stack: &impl Stack) -> (Rc<Graph>, NodeId, Port) {
        let graph = Graph::new(Arc::new(|_| ()));
        for (number, image) in images.into_iter().enumerate() {
            graph.permit().add(Disk::node(number, image, self.limits, log)).await.unwrap();
        }
        let top = stack(&graph).await;
        let perms = Perms { uses: PermSet::CONSISTENT_READ | PermSet::WRITE, shares: PermSet::ALL };
        let port = attach(&graph, top, perms).await.unwrap();
        (graph, top, port)
    }

    // ---- judgement ---------------------------------------------------------------------------------------------

    async fn judge(&self, log: &[Event], stack: impl Stack) -> Report {
        let mut report = Report::default();
        let (mut model, mut heard) = (Model::new(self.seed, self.size), 0);
        for cut in cuts(log, &mut Random(self.seed)) {
            for event in &log[heard..cut.at] {
                if let Event::Told(told) = event {
                    model.hear(told);
                }
            }
            heard = cut.at;
            let images = cut.images(&self.images, log);
            let checked = (self.check)(&images[0]);
            let (found, unreadable, used) = self.found(images, &stack).await;
            let mut wrong = model.wrong_after_crash(&found);
            wrong.retain(|wrong| !unreadable.contains(&wrong.sector));
            let (settled, undecided): (Vec<u64>, Vec<u64>) =
                unreadable.into_iter().partition(|sector| model.is_settled(*sector));
            wrong.extend(settled.into_iter().map(Wrong::unreadable));
            report.undecided += undecided.len();
            report.add(&cut, checked.and(used), &wrong);
        }
        report
    }

    /// Opens the images; gives what is in them, which sectors cannot be read, and whether they can be used.
    async fn found(&self, images: Vec<Vec<u8>>, stack: &impl Stack) -> (Vec<u8>, Vec<u64>, Result<(), String>) {
        let (_graph, _top, port) = self.opened(images, &Log::default(), stack).await;
        let lane = port.handle().lane(&Local::current());
        let all = range(0, port.geometry().size);
        let (bytes, unreadable) = match read(&lane, all).await {
            Ok(bytes) => (bytes, Vec::new()),
            Err(_) => by_sectors(&lane, all).await,
        };
        let used = async {
            write(&lane, 0, &[1; SECTOR], WriteFlags::default()).await?;
            flush(&lane).await?;
            read(&lane, range(0, SECTOR as u64)).await
        };
        let used = used.await.map_err(|error| format!("it cannot be used: {error}"));
        let used = used.map(|bytes| assert_eq!(bytes, [1; SECTOR]));
        (bytes, unreadable, used)
    }
}

/// Copies that are not the same may still agree on single sectors.
async fn by_sectors(lane: &PortLane, all: ByteRange) -> (Vec<u8>, Vec<u64>) {
    let (mut bytes, mut unreadable) = (Vec::new(), Vec::new());
    for sector in all.pieces(SECTOR as u64) {
        match read(lane, sector).await {
            Ok(found) => bytes.extend(found),
            Err(_) => {
                unreadable.push(sector.start() / SECTOR as u64);
                bytes.resize(usize::try_from(sector.end()).unwrap(), 0);
            }
        }
    }
    (bytes, unreadable)
}

const ROUNDS: usize = 12;
const USERS: usize = 3;
const REQUESTS: usize = 3;

impl Report {
    fn add(&mut self, cut: &Cut, checked: Result<(), String>, wrong: &[Wrong]) {
        self.states += 1;
        self.tears += usize::from(matches!(cut.how, How::Torn(_)));
        self.subsets += usize::from(cut.how == How::Subset);
        let count = |harm: Harm| wrong.iter().filter(|wrong| wrong.harm == harm).count();
        self.lost += count(Harm::Lost);
        self.leaked += count(Harm::Leaked);
        self.torn += count(Harm::Torn);
        self.unreadable += count(Harm::Unreadable);
        let first = checked.err().or_else(|| wrong.first().map(Wrong::to_string));
        if let (None, Some(first)) = (&self.first, first) {
            self.first = Some(format!("line {} of the log, {:?}: {first}", cut.at, cut.how));
        }
    }
}

/// What works with the disk. Several of it at once, without knowing of each other.
struct User {
    lane: Rc<PortLane>,
    log: Log,
    model: RefCell<Model>,
}

impl User {
    fn start(self: &Rc<Self>, seed: u64) -> block_core::rt::sync::Receiver<()> {
        let (done, result) = oneshot();
        let user = self.clone();
        Local::current().spawn(async move {
            let mut random = Random(seed);
            for _ in 0..REQUESTS {
                user.request(&mut random).await;
            }
            let _ = done.send(());
        });
        result
    }

    async fn request(&self, random: &mut Random) {
        let sectors = self.model.borrow().size() / SECTOR as u64;
        let start = random.below(sectors);
        let count = 1 + random.below((sectors - start).min(12));
        let at = range(start * SECTOR as u64, count * SECTOR as u64);
        let (fua, may_unmap) = (random.below(5) == 0, random.below(2) == 0);
        let flags = WriteFlags { fua, may_unmap, ..WriteFlags::default() };
        match random.below(8) {
            0..4 => self.changed(Work::Write, at, flags).await,
            4 => self.changed(Work::Zeroes, at, flags).await,
            5 => self.changed(Work::Discard, at, WriteFlags::default()).await,
            _ => self.flushed().await,
        }
    }

    async fn changed(&self, work: Work, at: ByteRange, flags: WriteFlags) {
        let (op, bytes) = self.model.borrow_mut().begin(work, at);
        self.log.push(Event::Told(Told::Begin(work, at)));
        let result = match work {
            Work::Write => write(&self.lane, at.start(), &bytes, flags).await,
            Work::Zeroes => self.lane.write_zeroes(&enter(&self.lane).await, at, flags).await,
            Work::Discard => self.lane.discard(&enter(&self.lane).await, at).await,
        };
        self.tell(|| Told::End(op, result.is_ok(), flags.fua));
        result.unwrap();
    }

    async fn flushed(&self) {
        let begun = self.model.borrow_mut().begin_flush();
        self.log.push(Event::Told(Told::BeginFlush));
        flush(&self.lane).await.unwrap();
        self.tell(|| Told::EndFlush(begun));
    }

    fn tell(&self, told: impl FnOnce() -> Told) {
        let told = told();
        self.model.borrow_mut().hear(&told);
        self.log.push(Event::Told(told));
    }
}

// ---- what a crash may leave ------------------------------------------------------------------------------------

/// A way of failing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Lines of the log that were written before it.
    pub at: usize,
    pub how: How,
    /// The lines whose changes are on the disk.
    pub kept: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Everything,
    /// Of the last change only so many bytes.
    Torn(usize),
    SizeLost,
    Subset,
}

/// All ways of failing, in the order of the log.
pub fn cuts(log: &[Event], random: &mut Random) -> Vec<Cut> {
    let mut cuts = vec![Cut { at: 0, how: How::Everything, kept: Vec::new() }];
    let mut cache = Cache { log, stable: Vec::new(), pending: Vec::new(), begun: HashMap::new() };
    for (line, event) in log.iter().enumerate() {
        match event {
            Event::Change(_, change) => {
                cache.pending.push(line);
                cuts.extend(cache.at_change(line + 1, change));
            }
            Event::FlushBegun(disk, number) => drop(cache.begun.insert((*disk, *number), line)),
            Event::FlushEnded(disk, number) => {
                cuts.extend(cache.subsets(line, random));
                cache.settle(*disk, *number);
            }
            Event::Told(_) => {}
        }
    }
    cuts.extend(cache.subsets(log.len(), random));
    cuts
}

/// A disk with a cache, while its log is read.
struct Cache<'a> {
    log: &'a [Event],
    /// Lines whose changes no crash takes away.
    stable: Vec<usize>,
    /// The others so far.
    pending: Vec<usize>,
    /// At which line each flush began.
    begun: HashMap<(usize, u64), usize>,
}

impl Cache<'_> {
    fn at_change(&self, at: usize, change: &Change) -> Vec<Cut> {
        let mut cuts = vec![self.cut(at, How::Everything, |_| true)];
        if let Change::Write { bytes, .. } = change {
            cuts.extend((SECTOR..bytes.len()).step_by(SECTOR).map(|torn| self.cut(at, How::Torn(torn), |_| true)));
        }
        let loses = |line: usize| self.is_truncate(line) && !self.stays(line);
        if self.pending.iter().any(|line| loses(*line)) {
            cuts.push(self.cut(at, How::SizeLost, |line| !loses(line)));
        }
        cuts
    }

    fn subsets(&self, at: usize, random: &mut Random) -> Vec<Cut> {
        let loose: Vec<_> = self.pending.iter().copied().filter(|line| !self.stays(*line)).collect();
        let masks: Vec<u64> = match loose.len() {
            count @ 0..=8 => (0..1 << count).collect(),
            _ => (0..64).map(|_| random.next()).collect(),
        };
        let chosen = |mask: u64| {
            let loose = &loose;
            move |line: usize| {
                let number = loose.iter().position(|other| *other == line);
                number.is_none_or(|number| mask.rotate_right(u32::try_from(number).unwrap()) & 1 == 1)
            }
        };
        masks.into_iter().map(|mask| self.cut(at, How::Subset, chosen(mask))).collect()
    }

    fn cut(&self, at: usize, how: How, chosen: impl Fn(usize) -> bool) -> Cut {
        let pending = self.pending.iter().copied().filter(|line| chosen(*line));
        let mut kept: Vec<_> = self.stable.iter().copied().chain(pending).collect();
        kept.sort_unstable();
        Cut { at, how, kept }
    }

    fn settle(&mut self, disk: usize, flush: u64) {
        let begun = self.begun[&(disk, flush)];
        let is_there = |line: usize| matches!(&self.log[line], Event::Change(on, _) if *on == disk);
        let (stable, pending) = self.pending.iter().partition(|line| **line < begun && is_there(**line));
        self.stable.extend::<Vec<_>>(stable);
        self.pending = pending;
    }

    /// It was written through; or it is the size with which something was written through that needs it.
    fn stays(&self, line: usize) -> bool {
        let is_stable = |line: usize| matches!(&self.log[line], Event::Change(_, change) if change.is_stable());
        let last = self.pending.iter().rev().copied().find(|line| is_stable(*line));
        is_stable(line) || (self.is_truncate(line) && last.is_some_and(|last| line < last))
    }

    fn is_truncate(&self, line: usize) -> bool {
        matches!(&self.log[line], Event::Change(_, Change::Truncate { .. }))
    }
}

impl Cut {
    /// What is on the disks then.
    pub fn images(&self, start: &[Vec<u8>], log: &[Event]) -> Vec<Vec<u8>> {
        let mut images = start.to_vec();
        for line in &self.kept {
            let Event::Change(disk, change) = &log[*line] else { unreachable!("only changes are kept") };
            let image = &mut images[*disk];
            match (self.how, change) {
                (How::Torn(torn), Change::Write { at, bytes, stable }) if self.kept.last() == Some(line) => {
                    let at = range(at.start(), torn as u64);
                    Change::Write { at, bytes: bytes[..torn].to_vec(), stable: *stable }.apply(image);
                }
                _ => change.apply(image),
            }
        }
        images
    }
}
