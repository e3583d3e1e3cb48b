//! Random schedules over the types that threads meet at: the gate under drains, late parkers, pins and the reclamation
//! of views, tracked requests and their haste, throttle groups. `graph_loom.rs` proves the memory orderings of small worlds; here the worlds are larger,
//! and each is run in 25,000 schedules, half of them by PCT. Run with
//! `RUSTFLAGS="--cfg shuttle" cargo test -p block-core --test schedules --target-dir target/shuttle`.
//!
//! A lost wake-up shows as a deadlock. A failure prints its schedule, which `shuttle::replay` runs again. Each canary
//! removes one piece of a protocol; the model that is there for it must then fail.
#![cfg(shuttle)]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

use std::future::poll_fn;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use block_core::base::ByteRange;
use block_core::drivers::filter::throttle::turnstile::{Asking, Direction, Look, Turnstile};
use block_core::drivers::filter::throttle::{Limits, Rate, Rates};
use block_core::graph::gate::{Gate, LaneCount};
use block_core::graph::haste::Haste;
use block_core::graph::tracked::{Tracked, WriteCount};
use block_core::graph::uses::{UseGuard, Uses};
use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner, thread};

/// For each model.
const SCHEDULES: usize = 25_000;

/// How many changes of priority a PCT schedule has.
const PCT_DEPTH: usize = 3;

fn explore(model: fn()) {
    let config = || {
        let mut config = Config::new();
        config.silence_warnings = true; // memory orderings are loom's business
        config
    };
    Runner::new(RandomScheduler::new(SCHEDULES / 2), config()).run(model);
    Runner::new(PctScheduler::new(PCT_DEPTH, SCHEDULES / 2), config()).run(model);
}

// ---- requests against drains ---------------------------------------------------------------------------------------

/// What stands behind a gate. `edge` and `walking` are no synchronisation and cost no schedule: they only tell on it.
struct World {
    gate: Gate<u32>,
    edge: AtomicU32,
    walking: AtomicU32,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self { gate: Gate::new(1), edge: AtomicU32::new(1), walking: AtomicU32::new(0) })
    }

    /// Enters as soon as the gate is open; gives the version.
    fn enter(&self, lane: &LaneCount) -> u64 {
        loop {
            if let Some(version) = self.gate.enter(lane, 1) {
                return version;
            }
            self.gate.leave(lane, 0);
            let mut key = None;
            block_on(poll_fn(|cx| self.gate.poll_open(&mut key, cx)));
            self.gate.forget_open(&mut key);
        }
    }

    /// A request inside: what it sees is whole, and stays so until it leaves.
    fn walk(&self, version: u64) {
        self.walking.fetch_add(1, Ordering::Relaxed);
        let edge = self.edge.load(Ordering::Relaxed);
        assert_eq!(self.gate.view(), edge, "a request saw a view that does not match the world");
        assert_eq!(u64::from(edge), version / 2, "admitted with a version that is not the view's");
        thread::yield_now();
        assert_eq!(self.edge.load(Ordering::Relaxed), edge, "an edge moved under a request");
        self.walking.fetch_sub(1, Ordering::Relaxed);
    }

    /// One request, and another one that it forks and that may outlive it.
    fn request(&self, lane: &LaneCount) {
        let version = self.enter(lane);
        let forks = thread_rng().gen_bool(0.5);
        if forks {
            self.gate.fork(lane, 2);
        }
        self.walk(version);
        if forks {
            self.gate.leave(lane, 1);
            self.walk(version);
        }
        self.gate.leave(lane, 0);
    }

    fn stop_and_empty(&self) {
        self.gate.stop();
        let mut key = None;
        block_on(poll_fn(|cx| self.gate.poll_empty(&mut key, cx)));
        self.gate.forget_empty(&mut key);
        assert_eq!(self.walking.load(Ordering::Relaxed), 0, "drained, and a request is inside");
    }

    /// A drain that is spent on a change, or given up.
    fn drain(&self, change: Option<u32>) {
        self.stop_and_empty();
        thread::yield_now();
        assert_eq!(self.walking.load(Ordering::Relaxed), 0, "a request came in while the gate was stopped");
        if let Some(to) = change {
            self.edge.store(to, Ordering::Relaxed);
        }
        self.gate.resume(change);
    }
}

/// Three threads with two requests each, which attach whenever they come, against three drains.
#[test]
fn requests_against_drains() {
    explore(|| {
        let world = World::new();
        let io: Vec<_> = (0..3)
            .map(|_| {
                let world = world.clone();
                thread::spawn(move || {
                    let lane = world.gate.attach();
                    (0..2).for_each(|_| world.request(&lane));
                    world.gate.detach(&lane);
                })
            })
            .collect();
        world.drain(Some(2));
        world.drain(None);
        world.drain(Some(3));
        io.into_iter().for_each(|io| io.join().unwrap());
    });
}

/// Requests park inside, at whatever moment, and nothing but the stop lets them go. Nothing is resumed either.
#[test]
fn late_parkers() {
    explore(|| {
        let world = World::new();
        let io: Vec<_> = (0..3)
            .map(|_| {
                let world = world.clone();
                thread::spawn(move || {
                    let lane = world.gate.attach();
                    if world.gate.enter(&lane, 1).is_some() {
                        let mut key = None;
                        block_on(poll_fn(|cx| world.gate.poll_hurried(&mut key, cx)));
                        world.gate.forget_hurried(&mut key);
                    }
                    world.gate.leave(&lane, 0);
                })
            })
            .collect();
        world.stop_and_empty();
        io.into_iter().for_each(|io| io.join().unwrap());
    });
}

// ---- pins and the reclamation of views ---------------------------------------------------------------------------

/// A node as views name it.
struct Node {
    uses: Arc<Uses>,
    closed: AtomicBool,
}

impl Node {
    fn new() -> Arc<Self> {
        Arc::new(Self { uses: Uses::new(), closed: AtomicBool::new(false) })
    }

    fn close(&self) {
        block_on(poll_fn(|cx| self.uses.poll_unused(cx)));
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// A view of one node. The guard is dropped after what it guards.
struct View {
    node: Arc<Node>,
    _guard: UseGuard,
}

impl View {
    fn of(node: &Arc<Node>) -> Arc<Self> {
        Arc::new(Self { node: node.clone(), _guard: node.uses.guard() })
    }

    fn use_node(&self) {
        assert!(!self.node.closed.load(Ordering::Relaxed), "a node is closed while a view names it");
    }
}

/// One thread's way in, with its cached view: what a lane does.
struct Lane {
    gate: Arc<Gate<Arc<View>>>,
    count: Arc<LaneCount>,
    cached: (u64, Arc<View>),
}

impl Lane {
    fn new(gate: &Arc<Gate<Arc<View>>>) -> Self {
        let version = gate.version();
        Self { gate: gate.clone(), count: gate.attach(), cached: (version, gate.view()) }
    }

    fn request(&mut self) {
        if let Some(version) = self.gate.enter(&self.count, 1) {
            if self.cached.0 != version {
                self.cached = (version, self.gate.view());
            }
            let pinned = self.cached.1.clone();
            pinned.use_node();
            thread::yield_now();
            pinned.use_node();
            drop(pinned);
        }
        self.gate.leave(&self.count, 0);
    }
}

/// A node is replaced while two threads use it, and a third looks at it in a plan. It is closed after the last view
/// that names it, and its closer is woken.
#[test]
fn views_are_reclaimed() {
    explore(|| {
        let (old, new) = (Node::new(), Node::new());
        let gate = Arc::new(Gate::new(View::of(&old)));
        let io: Vec<_> = (0..2)
            .map(|_| {
                let gate = gate.clone();
                thread::spawn(move || {
                    let mut lane = Lane::new(&gate);
                    (0..2).for_each(|_| lane.request());
                    gate.detach(&lane.count);
                })
            })
            .collect();
        let plan = thread::spawn({
            let view = gate.view();
            move || view.use_node()
        });
        gate.stop();
        let mut key = None;
        block_on(poll_fn(|cx| gate.poll_empty(&mut key, cx)));
        gate.forget_empty(&mut key);
        gate.resume(Some(View::of(&new)));
        old.close();
        io.into_iter().for_each(|io| io.join().unwrap());
        plan.join().unwrap();
        assert!(!new.closed.load(Ordering::Relaxed));
    });
}

// ---- tracked requests ------------------------------------------------------------------------------------------------

/// The requests that are working on one node now.
#[derive(Default)]
struct Inside(std::sync::Mutex<Vec<(ByteRange, bool)>>);

impl Inside {
    fn begin(&self, range: ByteRange, serialising: bool) {
        let mut all = self.0.lock().unwrap();
        let meets = all.iter().find(|(other, alone)| (serialising || *alone) && range.overlaps(*other));
        assert_eq!(meets, None, "{range:?} (serialising: {serialising}) runs beside what it excludes");
        all.push((range, serialising));
    }

    fn end(&self, range: ByteRange, serialising: bool) {
        let mut all = self.0.lock().unwrap();
        let at = all.iter().position(|one| *one == (range, serialising)).unwrap();
        all.swap_remove(at);
    }
}

/// One request over some of four blocks. One in four is abandoned before its turn, as a dropped future does. A plain
/// one goes by a ring entry where it can, and now and then together with a second one.
fn tracked_request(tracked: &Tracked, count: &WriteCount, inside: &Inside) {
    let (start, len) = (thread_rng().gen_range(0..4), thread_rng().gen_range(1..4));
    let (range, serialising) = (ByteRange::new(start, len).unwrap(), thread_rng().gen_bool(0.6));
    if !serialising && thread_rng().gen_bool(0.75) {
        let depth = thread_rng().gen_range(1..3);
        let counted = (0..depth).filter(|_| tracked.try_write(count)).count();
        (0..counted).for_each(|_| inside.begin(range, false));
        for _ in 0..counted {
            thread::yield_now();
            inside.end(range, false);
            tracked.wrote(count);
        }
        if counted > 0 {
            return;
        }
    }
    let ticket = tracked.enter(range, serialising, &Arc::default());
    if thread_rng().gen_bool(0.25) {
        block_on(poll_fn(|cx| {
            let _ = ticket.poll_alone(cx);
            Poll::Ready(())
        }));
        return;
    }
    block_on(poll_fn(|cx| ticket.poll_alone(cx)));
    inside.begin(range, serialising);
    thread::yield_now();
    inside.end(range, serialising);
}

/// Four threads with two overlapping requests each: no two that exclude each other run side by side, nobody waits in a
/// circle, and nobody is forgotten.
#[test]
fn tracked_requests() {
    explore(|| {
        let world = Arc::new((Tracked::default(), Inside::default()));
        let io: Vec<_> = (0..4)
            .map(|_| {
                let world = world.clone();
                thread::spawn(move || {
                    let count = world.0.attach();
                    (0..2).for_each(|_| tracked_request(&world.0, &count, &world.1));
                    world.0.detach(&count);
                })
            })
            .collect();
        io.into_iter().for_each(|io| io.join().unwrap());
        assert!(world.1.0.lock().unwrap().is_empty());
    });
}

/// One request is parked with a range that another one wants, whose root is drained: both get on.
#[test]
fn hurry_is_handed_on() {
    explore(|| {
        let tracked = Arc::<Tracked>::default();
        let holder = Arc::<Haste>::default();
        let ticket = tracked.enter(ByteRange::new(0, 1).unwrap(), true, &holder);
        let other = tracked.clone();
        let drained = thread::spawn(move || {
            let ticket = other.enter(ByteRange::new(0, 1).unwrap(), true, &Arc::default());
            ticket.hurry_others();
            block_on(poll_fn(|cx| ticket.poll_alone(cx)));
        });
        block_on(poll_fn(|cx| holder.poll_hurried(cx)));
        drop(ticket);
        drained.join().unwrap();
    });
}

// ---- throttle groups -------------------------------------------------------------------------------------------------

/// Time that passes only when somebody sleeps: from one alarm to the next.
#[derive(Default)]
struct Clock {
    time: shuttle::sync::Mutex<Time>,
    changed: shuttle::sync::Condvar,
}

#[derive(Default)]
struct Time {
    now: Duration,
    alarms: Vec<(Duration, Waker)>,
    ended: bool,
}

impl Clock {
    fn now(&self) -> Duration {
        self.time.lock().unwrap().now
    }

    fn wake_at(&self, at: Duration, waker: &Waker) {
        self.time.lock().unwrap().alarms.push((at, waker.clone()));
        self.changed.notify_one();
    }

    fn end(&self) {
        self.time.lock().unwrap().ended = true;
        self.changed.notify_one();
    }

    fn run(&self) {
        loop {
            let idle = |time: &mut Time| time.alarms.is_empty() && !time.ended;
            let mut time = self.changed.wait_while(self.time.lock().unwrap(), idle).unwrap();
            let first = time.alarms.iter().enumerate().min_by_key(|(_, (at, _))| *at);
            let Some(first) = first.map(|(number, _)| number) else { return };
            let (at, waker) = time.alarms.swap_remove(first);
            time.now = time.now.max(at);
            drop(time);
            waker.wake();
        }
    }
}

/// Requests a second.
fn limits(rate: u64) -> Limits {
    let total = Rate { rate, ..Rate::default() };
    Limits { iops: Rates { total, ..Rates::default() }, ..Limits::default() }
}

/// One request of a member. One in four gives up when it is told to wait, as one under a drained root does.
fn throttled(turnstile: &Turnstile, clock: &Clock, member: u64) -> bool {
    let direction = if thread_rng().gen_bool(0.5) { Direction::Read } else { Direction::Write };
    let (mut asking, gives_up) = (Asking::new(member, direction, 512), thread_rng().gen_bool(0.25));
    let passes = block_on(poll_fn(|cx| match turnstile.look(&mut asking, || clock.now(), cx.waker()) {
        Look::Passes => Poll::Ready(true),
        Look::Waits(_) if gives_up => Poll::Ready(false),
        Look::Waits(alarm) => {
            if let Some(alarm) = alarm {
                clock.wake_at(alarm, cx.waker());
            }
            Poll::Pending
        }
    }));
    turnstile.leave(&mut asking, || clock.now());
    passes
}

/// Three members with two requests each share ten requests a second, and twenty later. Nobody is forgotten, whoever
/// gives up meanwhile, and no more pass than may.
#[test]
fn throttled_requests() {
    explore(|| {
        let world = Arc::new((Turnstile::new(limits(10)), Clock::default(), AtomicU32::new(0)));
        let clock = thread::spawn({
            let world = world.clone();
            move || world.1.run()
        });
        let io: Vec<_> = (0..3)
            .map(|member| {
                let world = world.clone();
                thread::spawn(move || {
                    let (turnstile, clock, passed) = &*world;
                    for _ in 0..2 {
                        if throttled(turnstile, clock, member) {
                            let passed = passed.fetch_add(1, Ordering::Relaxed) + 1;
                            let most = 3 + clock.now().as_millis() * 20 / 1000;
                            assert!(u128::from(passed) <= most, "{passed} have passed, {most} may");
                        }
                    }
                })
            })
            .collect();
        world.0.set_limits(limits(20), || world.1.now());
        io.into_iter().for_each(|io| io.join().unwrap());
        world.1.end();
        clock.join().unwrap();
    });
}

// ---- canaries ---------------------------------------------------------------------------------------------------------

/// Every canary is caught by the model that is there for it.
#[test]
fn canaries_are_caught() {
    let cases = [
        ("lower_flag", "requests_against_drains"),
        ("open_before_publish", "requests_against_drains"),
        ("late_parker", "late_parkers"),
        ("late_register", "views_are_reclaimed"),
        ("tracked_late_waker", "tracked_requests"),
        ("tracked_plain_first", "tracked_requests"),
        ("tracked_circle", "tracked_requests"),
        ("haste_late_waker", "hurry_is_handed_on"),
        ("tracked_uncounted", "tracked_requests"),
        ("throttle_unheard", "throttled_requests"),
        ("throttle_no_handover", "throttled_requests"),
    ];
    let exe = std::env::current_exe().unwrap();
    for (canary, model) in cases {
        let mut child = Command::new(&exe);
        child.args(["--exact", model]).env("TRELLIS_CANARY", canary);
        assert!(!child.output().unwrap().status.success(), "the model '{model}' does not notice the canary '{canary}'");
    }
}
