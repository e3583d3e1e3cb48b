//! The graph's lock, model-checked: entry, publish, drain, late parkers, lanes that attach meanwhile, the reclamation of
//! views, writes that are only counted beside one that rewrites whole blocks, and grace periods. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p block-core --test graph_loom --release --target-dir target/loom`.
//!
//! An "edge" is an `UnsafeCell`: loom reports a request that walks it while the writer changes it, and a lost wake-up
//! shows as a deadlock. Each canary removes one piece of the protocol; the models must then fail. A loom deadlock can
//! abort the process, so every canary runs in a child.
#![cfg(loom)]
#![expect(unsafe_code, reason = "loom's cells are how it sees data races")]

use std::future::poll_fn;
use std::process::Command;

use block_core::base::ByteRange;
use block_core::graph::gate::Gate;
use block_core::graph::grace::{Grace, Share};
use block_core::graph::tracked::Tracked;
use block_core::graph::uses::Uses;
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

struct World {
    gate: Gate<u32>,
    edge: UnsafeCell<u32>,
}

fn world() -> Arc<World> {
    Arc::new(World { gate: Gate::new(1), edge: UnsafeCell::new(1) })
}

impl World {
    fn walk(&self, version: u64) {
        let view = self.gate.view();
        // SAFETY: the gate is what keeps the writer away; loom checks that it does.
        let edge = self.edge.with(|edge| unsafe { *edge });
        assert_eq!(view, edge, "a request saw a view that does not match the world");
        assert_eq!(u64::from(view), version / 2, "admitted with a version that is not the view's");
    }

    /// Enters `depth` requests one after the other and leaves with all of them.
    fn requests(&self, depth: u32) {
        let lane = self.gate.attach();
        let mut inside = 0;
        for number in 1..=depth {
            let Some(version) = self.gate.enter(&lane, number) else {
                self.gate.leave(&lane, number - 1);
                break;
            };
            self.walk(version);
            inside = number;
        }
        for left in (0..inside).rev() {
            self.gate.leave(&lane, left);
        }
    }

    fn drain_and_change(&self) {
        self.gate.stop();
        let mut key = None;
        block_on(poll_fn(|cx| self.gate.poll_empty(&mut key, cx)));
        self.gate.forget_empty(&mut key);
        // SAFETY: nobody is inside; loom checks it.
        self.edge.with_mut(|edge| unsafe { *edge = 2 });
        self.gate.resume(Some(2));
    }
}

#[test]
fn one_thread_against_a_drain() {
    loom::model(|| {
        let world = world();
        let io = thread::spawn({
            let world = world.clone();
            move || {
                world.requests(1);
                world.requests(1);
            }
        });
        world.drain_and_change();
        io.join().unwrap();
    });
}

#[test]
fn a_busy_lane_pays_one_fence() {
    loom::model(|| {
        let world = world();
        let io = thread::spawn({
            let world = world.clone();
            move || world.requests(2)
        });
        world.drain_and_change();
        io.join().unwrap();
    });
}

#[test]
fn two_threads_against_a_drain() {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(3);
    bounded.check(|| {
        let world = world();
        let io: Vec<_> = (0..2)
            .map(|_| {
                let world = world.clone();
                thread::spawn(move || world.requests(1))
            })
            .collect();
        world.drain_and_change();
        io.into_iter().for_each(|io| io.join().unwrap());
    });
}

/// Enters, then parks in a node: the drain has to get it out, however late it parks.
#[test]
fn a_late_parker_is_hurried() {
    loom::model(|| {
        let world = world();
        let io = thread::spawn({
            let world = world.clone();
            move || {
                let lane = world.gate.attach();
                if world.gate.enter(&lane, 1).is_some() {
                    let mut key = None;
                    block_on(poll_fn(|cx| world.gate.poll_hurried(&mut key, cx)));
                    world.gate.forget_hurried(&mut key);
                }
                world.gate.leave(&lane, 0);
            }
        });
        world.gate.stop();
        let mut key = None;
        block_on(poll_fn(|cx| world.gate.poll_empty(&mut key, cx)));
        world.gate.forget_empty(&mut key);
        io.join().unwrap(); // nothing is resumed: the parked one has to see the stop
    });
}

/// Arrives while the root is stopped: is woken by the resume, and then sees the new view.
#[test]
fn a_late_arrival_waits_outside() {
    loom::model(|| {
        let world = world();
        let io = thread::spawn({
            let world = world.clone();
            move || {
                let lane = world.gate.attach();
                loop {
                    if let Some(version) = world.gate.enter(&lane, 1) {
                        world.walk(version);
                        world.gate.leave(&lane, 0);
                        break;
                    }
                    world.gate.leave(&lane, 0);
                    let mut key = None;
                    block_on(poll_fn(|cx| world.gate.poll_open(&mut key, cx)));
                    world.gate.forget_open(&mut key);
                }
            }
        });
        world.drain_and_change();
        io.join().unwrap();
    });
}

/// Two views name a node; whoever drops the last one wakes the closer, and what the views held is gone by then.
#[test]
fn a_node_closes_after_its_last_view() {
    loom::model(|| {
        let uses = Uses::new();
        let body = Arc::new(UnsafeCell::new(0));
        let io: Vec<_> = (0..2)
            .map(|_| {
                let (guard, body) = (uses.guard(), body.clone());
                thread::spawn(move || {
                    // SAFETY: read while the guard lives; loom checks that the closer waits for it.
                    body.with(|body| unsafe { *body });
                    drop(guard);
                })
            })
            .collect();
        block_on(poll_fn(|cx| uses.poll_unused(cx)));
        // SAFETY: no view is left; loom checks it.
        body.with_mut(|body| unsafe { *body = 1 });
        io.into_iter().for_each(|io| io.join().unwrap());
    });
}

/// One block of a node that keeps writes apart.
struct Block {
    tracked: Tracked,
    bytes: UnsafeCell<u32>,
}

impl Block {
    fn new() -> Arc<Self> {
        Arc::new(Self { tracked: Tracked::default(), bytes: UnsafeCell::new(0) })
    }

    /// Plain writes may meet each other, so they only look.
    fn write(&self) {
        // SAFETY: who changes it is kept away; loom checks it.
        self.bytes.with(|bytes| unsafe { *bytes });
    }

    /// `depth` writes at once by ring entries, or where that is not possible one after the other, registered.
    fn writes(&self, depth: u32) {
        let count = self.tracked.attach();
        let counted = (0..depth).filter(|_| self.tracked.try_write(&count)).count();
        for _ in 0..counted {
            self.write();
            self.tracked.wrote(&count);
        }
        if counted == 0 {
            self.registered(false, Self::write);
        }
        self.tracked.detach(&count);
    }

    fn registered(&self, serialising: bool, work: fn(&Self)) {
        let ticket = self.tracked.enter(ByteRange::whole(4096), serialising, &std::sync::Arc::default());
        block_on(poll_fn(|cx| ticket.poll_alone(cx)));
        work(self);
        drop(ticket);
    }

    fn rewrite(&self) {
        // SAFETY: no write is under way; loom checks it.
        self.registered(true, |block| block.bytes.with_mut(|bytes| unsafe { *bytes += 1 }));
    }
}

#[test]
fn counted_writes_against_a_rewrite() {
    loom::model(|| {
        let block = Block::new();
        let io = thread::spawn({
            let block = block.clone();
            move || block.writes(2)
        });
        block.rewrite();
        io.join().unwrap();
    });
}

#[test]
fn two_rewrites_against_counted_writes() {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(3);
    bounded.check(|| {
        let block = Block::new();
        let io = [|block: &Block| block.writes(1), Block::rewrite].map(|work| {
            let block = block.clone();
            thread::spawn(move || work(&block))
        });
        block.rewrite();
        io.into_iter().for_each(|io| io.join().unwrap());
        // SAFETY: all are over.
        block.bytes.with(|bytes| assert_eq!(unsafe { *bytes }, 2));
    });
}

/// A table that leads to a cluster until somebody sets that free, and what the lane's thread is asked.
struct Table {
    gate: Gate<u32>,
    leads: AtomicBool,
    cluster: UnsafeCell<u32>,
    /// `None`: the thread has ended, and what it is sent is dropped.
    asked: Mutex<Option<Vec<Share>>>,
}

impl Table {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            gate: Gate::new(1),
            leads: AtomicBool::new(true),
            cluster: UnsafeCell::new(1),
            asked: Mutex::new(Some(Vec::new())),
        })
    }

    /// Finds the cluster or not, by a load that orders nothing.
    fn look(&self) {
        if self.leads.load(Ordering::Relaxed) {
            // SAFETY: who uses it for something else waits for this; loom checks it.
            self.cluster.with(|cluster| unsafe { *cluster });
        }
    }

    /// Sets the cluster free, and uses it again when all who may know it have gone.
    fn reuse(&self, lane: &block_core::graph::gate::LaneCount) {
        self.leads.store(false, Ordering::Relaxed);
        let ask = |(), share| self.asked.lock().unwrap().as_mut().map(|asked| asked.push(share)).unwrap_or_default();
        let grace = Grace::begin([(lane, ())].into_iter(), ask);
        block_on(poll_fn(|cx| grace.poll_over(cx)));
        assert!(grace.is_over());
        // SAFETY: nobody knows it any more; loom checks it.
        self.cluster.with_mut(|cluster| unsafe { *cluster = 2 });
    }
}

/// The thread hears what it is asked between its requests, and when it ends.
#[test]
fn a_cluster_is_used_again_after_a_period() {
    loom::model(|| {
        let table = Table::new();
        let lane = table.gate.attach();
        let io = thread::spawn({
            let (table, lane) = (table.clone(), lane.clone());
            move || {
                table.gate.enter(&lane, 1).unwrap();
                table.look();
                table.gate.enter(&lane, 2).unwrap();
                // The first one's turn: nothing that was known before is known from here on.
                let heard = table.asked.lock().unwrap().replace(Vec::new());
                drop(heard);
                table.look();
                table.gate.leave(&lane, 1);
                table.gate.leave(&lane, 0);
                let heard = table.asked.lock().unwrap().take();
                drop(heard);
            }
        });
        table.reuse(&lane);
        io.join().unwrap();
    });
}

/// Every canary is caught by the model that is there for it.
#[test]
fn canaries_are_caught() {
    let cases = [
        ("enter_fence", "one_thread_against_a_drain"),
        ("leave_fence", "one_thread_against_a_drain"),
        ("lower_flag", "one_thread_against_a_drain"),
        ("open_before_publish", "a_late_arrival_waits_outside"),
        ("late_register", "a_node_closes_after_its_last_view"),
        ("late_parker", "a_late_parker_is_hurried"),
        ("write_fence", "counted_writes_against_a_rewrite"),
        ("wrote_fence", "counted_writes_against_a_rewrite"),
        ("serialising_fence", "counted_writes_against_a_rewrite"),
        ("grace_fence", "a_cluster_is_used_again_after_a_period"),
        ("grace_late_waker", "a_cluster_is_used_again_after_a_period"),
        ("grace_early", "a_cluster_is_used_again_after_a_period"),
    ];
    let exe = std::env::current_exe().unwrap();
    for (canary, model) in cases {
        let run = |canary: &str| {
            let mut child = Command::new(&exe);
            child.args(["--exact", model, "--test-threads=1"]).env("TRELLIS_CANARY", canary);
            child.output().unwrap().status.success()
        };
        assert!(!run(canary), "the model '{model}' does not notice the canary '{canary}'");
    }
}
