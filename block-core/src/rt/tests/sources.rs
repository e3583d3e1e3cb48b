//! A toy queue: a "guest" counts requests up, each is a read of one block, answers are shown by a counter.
#![expect(unsafe_code, reason = "direct operations are what is tested")]

use super::ops::until;
use super::{Kind, PATIENCE, on, on_every_engine};
use crate::rt::fd::signal;
use crate::rt::sync::Notify;
use crate::rt::{DirectOp, Engine, IoThread, Local, PollParams, SharedFd, Source, SourceId, eventfd, run_control};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

on_every_engine! {
    a_burst_is_read_and_published_in_batches
    no_request_is_lost_between_polling_and_sleeping
    two_busy_sources_take_turns
    a_busy_source_does_not_starve_the_rest
    long_tasks_leave_turns_to_sources
    a_kick_before_the_watch_counts
    an_ended_watch_kicks_no_more
    a_watch_that_the_kernel_ended_is_armed_again
    what_cannot_be_watched_costs_no_time
    a_thread_ends_after_its_sources
    quick_answers_are_polled_for
    a_guest_that_comes_with_many_is_polled_for_longer
    without_polling_nothing_is_polled
}

const BLOCK: usize = 512;
const DEPTH: u32 = 128;

/// What guest and queue share.
struct Ring {
    asked: AtomicU64,
    answered: AtomicU64,
    /// The guest need not kick.
    suppressed: AtomicBool,
    kick: SharedFd,
    publishes: AtomicU64,
    kicks: AtomicU64,
}

impl Ring {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            asked: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            suppressed: AtomicBool::new(false),
            kick: Arc::new(eventfd().unwrap()),
            publishes: AtomicU64::new(0),
            kicks: AtomicU64::new(0),
        })
    }

    fn ask(&self, count: u64) {
        self.asked.fetch_add(count, Ordering::Release);
        fence(Ordering::SeqCst);
        if !self.suppressed.load(Ordering::Relaxed) {
            signal(&self.kick);
        }
    }

    fn wait(&self, answers: u64) {
        let patience = Instant::now() + PATIENCE;
        while self.answered.load(Ordering::Acquire) < answers {
            assert!(Instant::now() < patience, "a request was lost: {}", self.answered.load(Ordering::Relaxed));
            std::hint::spin_loop();
        }
        assert_eq!(self.answered.load(Ordering::Acquire), answers, "nothing is answered twice");
    }
}

/// The queue's side. Block `n` of its file is full of the byte `n`.
struct Queue {
    ring: Arc<Ring>,
    file: File,
    taken: Cell<u64>,
    noted: Cell<u64>,
    free: RefCell<Vec<u32>>,
    iovecs: Vec<libc::iovec>,
    blocks: Vec<[Cell<u8>; BLOCK]>,
    id: Cell<Option<SourceId>>,
}

impl Queue {
    fn start(local: &Local, ring: Arc<Ring>) -> (Rc<Self>, SourceId) {
        let mut file = tempfile::tempfile().unwrap();
        (0..DEPTH).for_each(|n| file.write_all(&[u8::try_from(n).unwrap(); BLOCK]).unwrap());
        let blocks: Vec<_> = (0..DEPTH).map(|_| [const { Cell::new(0u8) }; BLOCK]).collect();
        let iovec =
            |block: &[Cell<u8>; BLOCK]| libc::iovec { iov_base: block.as_ptr().cast_mut().cast(), iov_len: BLOCK };
        let queue = Rc::new(Self {
            file,
            taken: Cell::new(0),
            noted: Cell::new(0),
            free: RefCell::new((0..DEPTH).collect()),
            iovecs: blocks.iter().map(iovec).collect(),
            blocks,
            id: Cell::new(None),
            ring: ring.clone(),
        });
        let id = local.add_source(queue.clone());
        queue.id.set(Some(id));
        local.watch(id, 3, ring.kick.clone());
        (queue, id)
    }

    fn take(&self, slot: u32) {
        let op = DirectOp {
            write: false,
            dsync: false,
            fd: self.file.as_raw_fd(),
            iovecs: &self.iovecs[slot as usize],
            count: 1,
            len: BLOCK as u64,
            offset: u64::from(slot) * BLOCK as u64,
            engine: [Engine::AtOnce, Engine::Ring, Engine::Cached][slot as usize % 3],
        };
        // SAFETY: file, list and block live as long as the queue, which is removed (and checked) after its last
        // completion; a slot is not free before that.
        unsafe { Local::current().push_direct(self.id.get().unwrap(), slot, op) };
    }
}

impl Source for Queue {
    fn kicked(&self, tag: u32) {
        assert_eq!(tag, 3);
        self.ring.kicks.fetch_add(1, Ordering::Relaxed);
    }

    fn run(&self) -> bool {
        for _ in 0..32 {
            if !self.has_work() {
                return false;
            }
            let Some(slot) = self.free.borrow_mut().pop() else { return false };
            self.taken.set(self.taken.get() + 1);
            self.take(slot);
        }
        self.has_work()
    }

    fn complete(&self, slot: u32, result: i32) {
        assert_eq!(result, i32::try_from(BLOCK).unwrap());
        let block = &self.blocks[slot as usize];
        assert!(block.iter().all(|byte| u32::from(byte.replace(0xEE)) == slot), "the bytes of slot {slot}");
        self.free.borrow_mut().push(slot);
        self.noted.set(self.noted.get() + 1);
    }

    fn publish(&self) {
        let noted = self.noted.take();
        if noted > 0 {
            self.ring.publishes.fetch_add(1, Ordering::Relaxed);
            self.ring.answered.fetch_add(noted, Ordering::Release);
        }
    }

    fn has_work(&self) -> bool {
        self.ring.asked.load(Ordering::Acquire) != self.taken.get() && !self.free.borrow().is_empty()
    }

    fn suppress(&self, on: bool) {
        self.ring.suppressed.store(on, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

/// Starts a queue on the thread; it stays until `stop`.
fn start(thread: &IoThread) -> (Arc<Ring>, SourceId) {
    let ring = Ring::new();
    let shared = ring.clone();
    let id = on(thread, |local| async move { Queue::start(&local, shared).1 });
    (ring, id)
}

fn stop(thread: &IoThread, id: SourceId) {
    on(thread, move |local| async move { local.remove_source(id) });
}

fn a_burst_is_read_and_published_in_batches(kind: Kind) {
    let thread = kind.thread();
    let (ring, id) = start(&thread);
    for round in 1..=10 {
        ring.ask(96);
        ring.wait(round * 96);
    }
    let publishes = ring.publishes.load(Ordering::Relaxed);
    let most = if kind == Kind::Ring { 480 } else { 960 };
    assert!(publishes <= most, "{publishes} publications of 960 answers");
    stop(&thread, id);
}

fn no_request_is_lost_between_polling_and_sleeping(kind: Kind) {
    let thread = kind.thread();
    let (ring, id) = start(&thread);
    let mut asked = 0;
    for round in 0..4000u32 {
        let count = u64::from(round % 5 + 1);
        ring.ask(count);
        asked += count;
        ring.wait(asked);
        // Pauses from none to longer than a poll, so that every state is met.
        for _ in 0..(round % 64) * 64 {
            std::hint::spin_loop();
        }
    }
    assert!(ring.kicks.load(Ordering::Relaxed) > 0);
    stop(&thread, id);
}

/// Has work for ever, and counts its visits.
struct Busy {
    visits: Cell<u64>,
    stop: Cell<bool>,
}

impl Busy {
    fn start(local: &Local) -> (Rc<Self>, SourceId) {
        let busy = Rc::new(Self { visits: Cell::new(0), stop: Cell::new(false) });
        let id = local.add_source(busy.clone());
        local.make_ready(id);
        (busy, id)
    }
}

impl Source for Busy {
    fn kicked(&self, _: u32) {}
    fn run(&self) -> bool {
        self.visits.set(self.visits.get() + 1);
        !self.stop.get()
    }

    fn complete(&self, _: u32, _: i32) {}
    fn publish(&self) {}
    fn has_work(&self) -> bool {
        false
    }

    fn suppress(&self, _: bool) {}
}

fn two_busy_sources_take_turns(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let ((one, first), (two, second)) = (Busy::start(&local), Busy::start(&local));
        until(&local, || one.visits.get() > 100).await;
        assert!(one.visits.get().abs_diff(two.visits.get()) <= 1);
        local.remove_source(first);
        local.remove_source(second);
    });
}

fn a_busy_source_does_not_starve_the_rest(kind: Kind) {
    let thread = kind.thread();
    let (ring, id) = start(&thread);
    let (sender, receiver) = std::sync::mpsc::channel();
    thread.remote().spawn(move |local| async move {
        let (busy, id) = Busy::start(&local);
        local.sleep(Duration::from_millis(50)).await;
        busy.stop.set(true);
        local.remove_source(id);
        sender.send(()).unwrap();
    });
    for round in 1..=10 {
        ring.ask(1);
        ring.wait(round);
    }
    receiver.recv_timeout(PATIENCE).expect("a timer starved");
    stop(&thread, id);
}

fn long_tasks_leave_turns_to_sources(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let (busy, id) = Busy::start(&local);
        let done = Rc::new(Cell::new(0));
        for _ in 0..64 {
            let done = done.clone();
            local.spawn(async move {
                let end = Instant::now() + Duration::from_millis(1);
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
                done.set(done.get() + 1);
            });
        }
        let before = busy.visits.get();
        until(&local, || done.get() == 64).await;
        let visits = busy.visits.get() - before;
        assert!(visits >= 12, "{visits} visits beside 64 polls of a millisecond");
        local.remove_source(id);
    });
}

fn a_kick_before_the_watch_counts(kind: Kind) {
    let thread = kind.thread();
    let ring = Ring::new();
    ring.ask(5);
    let shared = ring.clone();
    let id = on(&thread, |local| async move { Queue::start(&local, shared).1 });
    ring.wait(5);
    stop(&thread, id);
}

fn an_ended_watch_kicks_no_more(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let (ring, other) = (Ring::new(), Ring::new());
        let (queue, id) = Queue::start(&local, ring.clone());
        let watch = local.watch(id, 3, other.kick.clone());
        signal(&other.kick);
        until(&local, || ring.kicks.load(Ordering::Relaxed) == 1).await;
        local.unwatch(watch);
        local.unwatch(watch);
        signal(&other.kick);
        local.sleep(Duration::from_millis(5)).await;
        assert_eq!(ring.kicks.load(Ordering::Relaxed), 1);
        assert_eq!(Arc::strong_count(&other.kick), 1, "the descriptor is given back");
        local.remove_source(id);
        signal(&ring.kick);
        until(&local, || Arc::strong_count(&ring.kick) == 1).await;
        assert_eq!(ring.kicks.load(Ordering::Relaxed), 1);
        drop(queue);
    });
}

fn a_watch_that_the_kernel_ended_is_armed_again(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let (ring, other) = (Ring::new(), Ring::new());
        let (_queue, id) = Queue::start(&local, ring.clone());
        let watch = local.watch(id, 3, other.kick.clone());
        local.driver().borrow_mut().unwatch(watch.token());
        until(&local, || ring.kicks.load(Ordering::Relaxed) == 1).await;
        signal(&other.kick);
        until(&local, || ring.kicks.load(Ordering::Relaxed) == 2).await;
        local.remove_source(id);
    });
}

/// A front-end may hand over what it likes as a queue's event descriptor.
fn what_cannot_be_watched_costs_no_time(kind: Kind) {
    let thread = kind.thread();
    let (ring, id) = start(&thread);
    on(&thread, move |local| async move {
        local.watch(id, 3, Arc::new(OwnedFd::from(tempfile::tempfile().unwrap())));
        let before = local.counters().passes;
        local.sleep(Duration::from_millis(50)).await;
        let passes = local.counters().passes - before;
        assert!(passes < 100, "{passes} passes of the loop in 50 ms");
    });
    ring.ask(1);
    ring.wait(1);
    stop(&thread, id);
}

fn a_thread_ends_after_its_sources(kind: Kind) {
    let thread = kind.thread();
    let (ring, id) = start(&thread);
    let remote = thread.remote();
    let ending = std::thread::Builder::new().spawn(move || drop(thread)).unwrap();
    ring.ask(100);
    ring.wait(100);
    assert!(!ending.is_finished());
    remote.send(move |local| local.remove_source(id));
    ending.join().unwrap();
}

/// A guest that needs no processor of its own: it asks after a few looks of a poll, and kicks at once before a sleep.
struct Quick {
    kick: SharedFd,
    looks: Cell<u32>,
}

impl Source for Quick {
    fn kicked(&self, _: u32) {}

    fn run(&self) -> bool {
        self.looks.set(0);
        false
    }

    fn complete(&self, _: u32, _: i32) {}

    fn publish(&self) {}

    fn has_work(&self) -> bool {
        self.looks.set(self.looks.get() + 1);
        self.looks.get() > 20
    }

    fn suppress(&self, on: bool) {
        if !on {
            signal(&self.kick);
        }
    }
}

fn quick_answers_are_polled_for(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let quick = Rc::new(Quick { kick: Arc::new(eventfd().unwrap()), looks: Cell::new(0) });
        let id = local.add_source(quick.clone());
        local.watch(id, 0, quick.kick.clone());
        local.make_ready(id);
        until(&local, || local.counters().polls_hit > 10).await;
        local.remove_source(id);
    });
}

/// A guest that comes with many requests at a time, a while after the last ones; kicks at once before a sleep.
struct Bursts {
    kick: SharedFd,
    since: Cell<Instant>,
    runs: Cell<u32>,
    over: Notify,
}

impl Bursts {
    const LIMIT: Duration = Duration::from_millis(2);
    const GAP: Duration = Duration::from_millis(5);
    const HITS: u64 = 3;
}

impl Source for Bursts {
    fn kicked(&self, _: u32) {}

    fn run(&self) -> bool {
        let local = Local::current();
        local.requests_taken(32);
        self.since.set(Instant::now());
        self.runs.set(self.runs.get() + 1);
        if local.counters().polls_hit >= Self::HITS || self.runs.get() == 200 {
            self.over.notify_one();
        }
        false
    }

    fn complete(&self, _: u32, _: i32) {}

    fn publish(&self) {}

    fn has_work(&self) -> bool {
        self.since.get().elapsed() > Self::GAP
    }

    fn suppress(&self, on: bool) {
        if !on {
            signal(&self.kick);
        }
    }
}

fn a_guest_that_comes_with_many_is_polled_for_longer(kind: Kind) {
    let limit = u64::try_from(Bursts::LIMIT.as_nanos()).unwrap();
    let thread = kind.thread_with(PollParams { poll_max_ns: limit, ..PollParams::default() });
    on(&thread, |local| async move {
        let since = Cell::new(Instant::now());
        let kick = Arc::new(eventfd().unwrap());
        let bursts = Rc::new(Bursts { kick, since, runs: Cell::new(0), over: Notify::new() });
        let id = local.add_source(bursts.clone());
        local.watch(id, 0, bursts.kick.clone());
        local.make_ready(id);
        bursts.over.notified().await;
        assert!(local.counters().polls_hit >= Bursts::HITS, "{:?} in {} bursts", local.counters(), bursts.runs.get());
        local.remove_source(id);
    });
}

fn without_polling_nothing_is_polled(kind: Kind) {
    let thread = kind.thread();
    thread.set_params(PollParams { poll_max_ns: 0, ..thread.params() });
    assert_eq!(thread.params().poll_max_ns, 0);
    let (ring, id) = start(&thread);
    for round in 1..=200 {
        ring.ask(1);
        ring.wait(round);
    }
    let counters = on(&thread, |local| async move { local.counters() });
    assert_eq!((counters.polls_hit, counters.polls_missed), (0, 0));
    assert!(counters.sleeps > 0 && counters.passes > counters.sleeps);
    stop(&thread, id);
}

#[test]
#[should_panic(expected = "after its last completion")]
fn a_source_is_not_removed_under_the_kernel() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let reader = OwnedFd::from(reader);
    run_control(|local| async move {
        let block: &'static mut [u8; 8] = Box::leak(Box::new([0; 8]));
        let iovec = libc::iovec { iov_base: block.as_mut_ptr().cast(), iov_len: 8 };
        let iovecs: *const libc::iovec = Box::leak(Box::new(iovec));
        let (_busy, id) = Busy::start(&local);
        let op = DirectOp {
            write: false,
            dsync: false,
            fd: reader.as_raw_fd(),
            iovecs,
            count: 1,
            len: 8,
            offset: u64::MAX,
            engine: Engine::Ring,
        };
        // SAFETY: the memory is never freed; the pipe's end may be closed under the read, which then fails.
        unsafe { local.push_direct(id, 0, op) };
        local.remove_source(id);
    });
}
