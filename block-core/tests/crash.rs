//! Random work through a stack of nodes, and what a crash may leave of it. How: `support/crash.rs`.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/allowed.rs"]
mod allowed;
#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/crash.rs"]
mod crash;
#[path = "support/disk.rs"]
mod disk;
#[path = "support/random.rs"]
mod random;
mod support;

use std::rc::Rc;
use std::sync::Arc;

use allowed::{Harm, Model, SECTOR, Stamp, Work, Wrong};
use bench::{add, range};
use block_core::graph::{DiscardMode, Graph, Limits, NewNode, NodeId, NodeOptions};
use block_core::rt::Local;
use crash::{Cut, How, Report, Trial, cuts};
use disk::{Change, Event};
use random::Random;
use serde_json::{Value, json};
use support::overlay::NewOverlay;

const SIZE: u64 = 16 << 10;

/// Above `disk`, as the catalog makes it.
fn stack(options: Value) -> impl AsyncFn(&Rc<Graph>) -> NodeId {
    async move |graph: &Rc<Graph>| add(graph, options.clone()).await.unwrap()
}

fn raw() -> Value {
    json!({ "driver": "raw", "node-name": "top", "discard": "unmap", "file": "disk" })
}

fn trial(seed: u64, limits: Limits) -> Trial {
    Trial { seed, images: vec![empty(SIZE)], limits, size: SIZE, resizes: true, check: |_| Ok(()) }
}

fn empty(size: u64) -> Vec<u8> {
    vec![0; size.try_into().unwrap()]
}

fn good() -> Limits {
    Limits { fua: true, discard: true, unmap_zeroes: true, ..Limits::ANY }
}

/// Raw over such a disk; what was opened of each seed.
fn all_is_well(name: &str, limits: Limits, resizes: bool) -> Vec<Report> {
    let run = |seed| {
        let report = Trial { resizes, ..trial(seed, limits) }.run(stack(raw()), stack(raw()));
        assert_eq!(report.first, None, "{name}, seed {seed}: {report:?}");
        report
    };
    let reports: Vec<_> = (1..=4).map(run).collect();
    let states: usize = reports.iter().map(|report| report.states).sum();
    eprintln!("{name}: {states} crash states");
    assert!(states > 2000);
    reports
}

/// A write of several sectors may be there in part, but a sector is there or not.
#[test]
fn fs_21_a_write_that_a_power_cut_tore_is_torn_between_sectors() {
    let reports = all_is_well("raw", good(), true);
    assert!(reports.iter().all(|report| report.tears > 100));
}

/// Between two flushes a disk writes in what order it likes; what was flushed is there all the same.
#[test]
fn fs_22_writes_between_flushes_may_be_reordered() {
    let reports = all_is_well("raw of one size", good(), false);
    assert!(reports.iter().all(|report| report.subsets > 100));
}

/// What is written through is flushed by the pipeline then.
#[test]
fn raw_keeps_it_over_a_disk_that_writes_nothing_through() {
    all_is_well("raw without FUA", Limits::ANY, true);
}

/// Each write is a read, a change and a write of what is around it too.
#[test]
fn raw_keeps_it_over_a_disk_of_large_blocks() {
    all_is_well("raw over 4 KiB blocks", Limits { request_alignment: 4096, ..good() }, false);
}

#[test]
fn a_stack_of_nodes_keeps_it() {
    let below = json!({ "driver": "raw", "offset": 1024, "size": SIZE, "file": "disk" });
    let stacked =
        json!({ "driver": "raw", "node-name": "top", "detect-zeroes": "unmap", "discard": "unmap", "file": below });
    let trial = Trial { images: vec![empty(20 << 10)], resizes: false, ..trial(5, good()) };
    let report = trial.run(stack(stacked.clone()), stack(stacked));
    assert_eq!(report.first, None, "{report:?}");
    assert!(report.states > 500, "{report:?}");
}

// ---- more than one disk, each of which fails on its own ----------------------------------------------------------

/// Runs two seeds; what was found of each.
fn stacked(name: &str, images: &[u64], stack: impl crash::Stack + Copy) -> Vec<Report> {
    let run = |seed| {
        let images = images.iter().map(|size| empty(*size)).collect();
        let report = Trial { images, resizes: false, ..trial(seed, good()) }.run(stack, stack);
        assert_eq!(report.first, None, "{name}, seed {seed}: {report:?}");
        assert!(report.states > 300 && report.tears > 50 && report.subsets > 50, "{report:?}");
        report
    };
    let reports: Vec<_> = (1..=2).map(run).collect();
    eprintln!("{name}: {} crash states", reports.iter().map(|report| report.states).sum::<usize>());
    reports
}

/// Where the copies have become three different ones, nobody can say which is right; but never of what was stable.
#[test]
fn a_quorum_keeps_it_whose_copies_are_torn_each_in_its_own_way() {
    let vote = json!({
        "driver": "quorum", "node-name": "top", "vote-threshold": 2, "children": ["disk", "disk1", "disk2"],
    });
    let reports = stacked("quorum", &[SIZE; 3], &stack(vote.clone()));
    assert!(reports.iter().all(|report| report.unreadable == 0));
    // Where every write is in all copies, a read is the first one's, whatever the others have.
    let fifo = bench::with(vote, &json!({ "vote-threshold": 3, "read-pattern": "fifo" }));
    let reports = stacked("quorum, fifo", &[SIZE; 3], &stack(fifo));
    assert!(reports.iter().all(|report| report.undecided == 0));
}

#[test]
fn what_is_copied_before_it_is_written_keeps_it() {
    let copies = json!({ "driver": "copy-before-write", "node-name": "top", "file": "disk", "target": "disk1" });
    stacked("copy-before-write", &[SIZE, SIZE], &stack(bench::with(copies, &json!({ "discard": "unmap" }))));
}

#[test]
fn what_is_logged_keeps_it() {
    let logs = json!({ "driver": "blklogwrites", "node-name": "top", "file": "disk", "log": "disk1" });
    stacked("blklogwrites", &[SIZE, 1 << 20], &stack(bench::with(logs, &json!({ "discard": "unmap" }))));
}

/// An overlay whose table is made stable by flushes, and what is read from below is copied up into it.
async fn layers(graph: &Rc<Graph>, careful: bool) -> NodeId {
    let [store, place] = ["disk", "disk1"].map(|name| graph.find(name).unwrap());
    let base = support::Mem::new(empty(SIZE), &Arc::default());
    let base = support::add(graph, NewNode::new("base".into(), NodeOptions::default(), |_| (base, SIZE))).await;
    let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
    let overlay = NewOverlay { cluster: 2048, size: SIZE, backing: Some(base), options };
    let table = overlay.table();
    let port = bench::attach(graph, place, bench::READER).await.unwrap();
    table.learn(&bench::read(&port.handle().lane(&Local::current()), range(0, 512)).await.unwrap());
    port.detach(&mut graph.permit()).await;
    let overlay =
        if careful { overlay.kept("overlay", store, place, &table) } else { overlay.over("overlay", store, &table) };
    support::add(graph, overlay).await;
    add(graph, json!({ "driver": "copy-on-read", "node-name": "top", "file": "overlay", "discard": "unmap" }))
        .await
        .unwrap()
}

#[test]
fn an_overlay_into_which_reads_are_copied_keeps_it() {
    stacked("copy-on-read over an overlay", &[SIZE, 512], async |graph: &Rc<Graph>| layers(graph, true).await);
}

// ---- the harness can fail ---------------------------------------------------------------------------------------

/// A node that drops flushes: what was promised to be stable is lost, and nothing else is wrong.
#[test]
fn a_node_that_drops_flushes_is_caught() {
    let careless = || bench::with(raw(), &json!({ "cache": { "no-flush": true } }));
    let Report { lost, leaked, torn, first, .. } = trial(1, good()).run(stack(careless()), stack(raw()));
    assert!(lost > 100 && leaked == 0 && torn == 0, "{lost} lost, {leaked} leaked, {torn} torn");
    assert!(first.unwrap().contains("(Lost)"));
}

/// A layer whose table no flush makes stable: what was written is back to what it was below.
#[test]
fn an_overlay_that_forgets_its_table_is_caught() {
    let images = vec![empty(SIZE), empty(512)];
    let trial = Trial { images, resizes: false, ..trial(1, good()) };
    let report = trial
        .run(async |graph: &Rc<Graph>| layers(graph, false).await, async |graph: &Rc<Graph>| layers(graph, true).await);
    assert!(report.lost > 100, "{report:?}");
}

/// Two of three copies that drop flushes.
#[test]
fn copies_that_drop_flushes_are_caught() {
    let careless = |name: &str| json!({ "driver": "raw", "cache": { "no-flush": true }, "file": name });
    let vote =
        |children: Value| json!({ "driver": "quorum", "node-name": "top", "vote-threshold": 2, "children": children });
    let broken = vote(json!(["disk", careless("disk1"), careless("disk2")]));
    let trial = Trial { images: vec![empty(SIZE); 3], resizes: false, ..trial(1, good()) };
    let report = trial.run(stack(broken), stack(vote(json!(["disk", "disk1", "disk2"]))));
    assert!(report.lost + report.unreadable > 50, "{report:?}");
}

/// The bytes of a sector's neighbour are no loss, but a leak.
#[test]
fn a_node_that_shows_other_sectors_is_caught() {
    let shifted = json!({ "driver": "raw", "node-name": "top", "offset": 512, "file": "disk" });
    let trial = Trial { resizes: false, ..trial(1, good()) };
    assert!(trial.run(stack(raw()), stack(shifted)).leaked > 1000);
}

#[test]
fn every_way_of_failing_is_tried() {
    let write = |sector: u64, sectors: u64, stable| {
        let at = range(sector * SECTOR as u64, sectors * SECTOR as u64);
        Event::Change(0, Change::Write { at, bytes: vec![7; at.len().try_into().unwrap()], stable })
    };
    let grown = Event::Change(0, Change::Truncate { size: SIZE });
    let log = [write(0, 2, false), grown, Event::FlushBegun(0, 1), write(2, 1, true), Event::FlushEnded(0, 1)];
    let cut = |at, how, kept: &[usize]| Cut { at, how, kept: kept.to_vec() };
    let expected = [
        cut(0, How::Everything, &[]),
        cut(1, How::Everything, &[0]),
        cut(1, How::Torn(512), &[0]),
        cut(2, How::Everything, &[0, 1]),
        cut(2, How::SizeLost, &[0]),
        cut(4, How::Everything, &[0, 1, 3]),
        // While the flush runs nothing is certain but what was written through, and the size that it needs.
        cut(4, How::Subset, &[1, 3]),
        cut(4, How::Subset, &[0, 1, 3]),
        cut(5, How::Subset, &[0, 1, 3]),
    ];
    assert_eq!(cuts(&log, &mut Random(1)), expected);
}

// ---- the model by itself ----------------------------------------------------------------------------------------

fn whole(model: &mut Model, work: Work, sector: u64) -> (allowed::OpId, Vec<u8>) {
    model.begin(work, range(sector * SECTOR as u64, SECTOR as u64))
}

fn harm(wrong: &[Wrong]) -> Vec<Harm> {
    wrong.iter().map(|wrong| wrong.harm).collect()
}

#[test]
fn a_write_is_seen_at_its_end_and_stable_after_a_flush() {
    let mut model = Model::new(1, SECTOR as u64);
    let zero = vec![0; SECTOR];
    let early = model.begin_flush();
    let (op, bytes) = whole(&mut model, Work::Write, 0);
    for either in [&zero, &bytes] {
        assert!(model.wrong_now(either).is_empty() && model.wrong_after_crash(either).is_empty());
    }
    model.end(op, true, false);
    assert_eq!(harm(&model.wrong_now(&zero)), [Harm::Lost]);
    model.end_flush(early);
    assert!(model.wrong_after_crash(&zero).is_empty(), "a flush that began before it ended says nothing of it");
    let late = model.begin_flush();
    model.end_flush(late);
    assert_eq!(harm(&model.wrong_after_crash(&zero)), [Harm::Lost]);
    assert!(model.wrong_after_crash(&bytes).is_empty());
}

#[test]
fn what_failed_or_ran_beside_may_be_there_or_not() {
    let mut model = Model::new(1, SECTOR as u64);
    let (failed, failed_bytes) = whole(&mut model, Work::Write, 0);
    model.end(failed, false, false);
    let (one, one_bytes) = whole(&mut model, Work::Write, 0);
    let (other, other_bytes) = whole(&mut model, Work::Write, 0);
    assert!(model.wrong_now(&failed_bytes).is_empty());
    model.end(one, true, true);
    model.end(other, true, true);
    for beside in [&one_bytes, &other_bytes] {
        assert!(model.wrong_now(beside).is_empty() && model.wrong_after_crash(beside).is_empty());
    }
    assert_eq!(harm(&model.wrong_now(&failed_bytes)), [Harm::Lost]);
    assert_eq!(harm(&model.wrong_after_crash(&failed_bytes)), [Harm::Lost]);
}

#[test]
fn a_discard_promises_nothing_and_a_cut_end_comes_back_empty() {
    let mut model = Model::new(1, 2 * SECTOR as u64);
    let (op, bytes) = whole(&mut model, Work::Write, 1);
    model.end(op, true, true);
    let disk = [vec![0; SECTOR], bytes].concat();
    let (op, _) = whole(&mut model, Work::Discard, 1);
    model.end(op, true, false);
    assert!(model.wrong_now(&disk).is_empty() && model.wrong_now(&[]).is_empty());
    for size in [SECTOR, 2 * SECTOR] {
        model.begin_resize(size as u64);
        model.end_resize(true);
    }
    assert_eq!(harm(&model.wrong_now(&disk)), [Harm::Lost]);
    assert!(model.wrong_after_crash(&disk).is_empty(), "no flush has made the cut stable");
}

#[test]
fn a_wrong_sector_says_where_its_bytes_come_from() {
    let mut model = Model::new(7, 2 * SECTOR as u64);
    let (op, bytes) = model.begin(Work::Write, range(0, 2 * SECTOR as u64));
    model.end(op, true, true);
    let (first, second) = bytes.split_at(SECTOR);
    assert_eq!(harm(&model.wrong_after_crash(&[second, first].concat())), [Harm::Leaked, Harm::Leaked]);
    let torn = [&first[..256], &second[256..]].concat();
    assert_eq!(harm(&model.wrong_after_crash(&[&torn, second].concat())), [Harm::Torn]);
    let other = Stamp { seed: 8, sector: 0, generation: 1, op: 1 }.bytes();
    let wrong = model.wrong_after_crash(&[&other[..], second].concat());
    assert_eq!(harm(&wrong), [Harm::Leaked], "another disk's");
    let said = wrong[0].to_string();
    assert!(said.contains("found op 1 (run 8, sector 0, its 1th), allowed op 1 (run 7"), "{said}");
}
