//! Copy-before-write's clusters, model-checked: who copies, who writes, who reads the snapshot, who gives it back. Run
//! with `RUSTFLAGS="--cfg loom" cargo test -p block-core --test clusters_loom --release --target-dir target/loom`.
//!
//! Source and target are `UnsafeCell`s: loom reports a write to the source beside somebody who reads its old contents,
//! and a lost wake-up shows as a deadlock. Each canary removes one piece of the protocol; the models must then fail.
#![cfg(loom)]
#![expect(unsafe_code, reason = "loom's cells are how it sees data races")]

use std::process::Command;

use block_core::base::ByteRange;
use block_core::drivers::filter::copy_before_write::clusters::{Clusters, End, Side, Take};
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::thread;
use std::sync::Arc;

const OLD: u32 = 1;
const SECTORS: usize = 2;

/// One cluster of two sectors. Each guest writes a sector of its own.
struct World {
    clusters: Arc<Clusters>,
    source: [UnsafeCell<u32>; SECTORS],
    target: [UnsafeCell<u32>; SECTORS],
}

fn world() -> Arc<World> {
    let cells = |value| [UnsafeCell::new(value), UnsafeCell::new(value)];
    Arc::new(World { clusters: Arc::new(Clusters::new(512, 512).unwrap()), source: cells(OLD), target: cells(0) })
}

fn all() -> ByteRange {
    ByteRange::new(0, 512).unwrap()
}

fn get(cell: &UnsafeCell<u32>) -> u32 {
    // SAFETY: the clusters keep writers away; loom checks that they do.
    cell.with(|value| unsafe { *value })
}

fn set(cell: &UnsafeCell<u32>, to: u32) {
    // SAFETY: the clusters keep readers away; loom checks that they do.
    cell.with_mut(|value| unsafe { *value = to });
}

impl World {
    fn write(&self, sector: usize) {
        while !self.clusters.are_settled(all()) {
            match self.clusters.take(all(), 512, &Arc::default()) {
                Take::Nothing => break,
                Take::Busy(wait) => block_on(wait.over()),
                Take::Ours(taken) => {
                    self.source.iter().zip(&self.target).for_each(|(from, to)| set(to, get(from)));
                    block_on(taken.settle(End::Copied));
                }
            }
        }
        set(&self.source[sector], 2);
    }

    fn read_snapshot(&self) {
        let Some(look) = self.clusters.look(all(), &Arc::default()) else { return };
        let side = match look.side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        };
        assert!(side.iter().all(|sector| get(sector) == OLD), "the snapshot has changed");
    }

    fn give_back(&self) {
        loop {
            match self.clusters.take(all(), 512, &Arc::default()) {
                Take::Nothing => break,
                Take::Busy(wait) => block_on(wait.over()),
                Take::Ours(taken) => block_on(taken.settle(End::Released)),
            }
        }
    }
}

/// Runs these side by side, on at most three threads.
fn model(work: &'static [fn(&World)]) {
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(3);
    bounded.check(move || {
        let world = world();
        let threads: Vec<_> = work
            .iter()
            .map(|one| {
                let world = world.clone();
                thread::spawn(move || one(&world))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn one_copies_and_the_other_waits() {
    model(&[|world| world.write(0), |world| world.write(1)]);
}

#[test]
fn a_reader_keeps_writers_from_the_source() {
    model(&[|world| world.write(0), World::read_snapshot]);
}

#[test]
fn two_readers_and_a_writer() {
    model(&[|world| world.write(0), World::read_snapshot, World::read_snapshot]);
}

#[test]
fn who_gives_back_what_is_being_copied_waits() {
    model(&[|world| world.write(0), World::give_back, World::read_snapshot]);
}

/// Every canary is caught by the model that is there for it.
#[test]
fn canaries_are_caught() {
    let cases = [
        ("relaxed_settle", "one_copies_and_the_other_waits"),
        ("reader_holds_nothing", "a_reader_keeps_writers_from_the_source"),
        ("reader_wakes_nobody", "a_reader_keeps_writers_from_the_source"),
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
