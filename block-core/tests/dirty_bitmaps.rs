//! Dirty bitmaps of nodes: what marks them, and how they come, change and go.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bench::{add, attach, enter, image, io_thread, range, started, with, write, writer};
use block_core::base::IoError;
use block_core::graph::{
    BitmapAction, BitmapChange, DirectRequest, Graph, NodeId, Passed, PermSet, Perms, Preallocation, Step, WriteFlags,
};
use block_core::port::PortLane;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

const KIB: u64 = 1024;
const SIZE: u64 = 1 << 20;

fn graph() -> Rc<Graph> {
    Graph::new(Arc::new(|_| ()))
}

fn disk(name: &str) -> Value {
    json!({ "driver": "null-co", "node-name": name, "size": SIZE, "discard": "unmap" })
}

/// A file and a raw node above it.
async fn chain(graph: &Rc<Graph>, dir: &Path, more: Value) -> (NodeId, NodeId) {
    let path = image(dir, "x.img", 2 << 20, 0);
    let unmaps = json!({ "discard": "unmap" });
    let file = add(graph, with(bench::file("file", &path), &unmaps)).await.unwrap();
    let raw = with(json!({ "driver": "raw", "node-name": "top", "file": "file" }), &unmaps);
    (file, add(graph, with(raw, &more)).await.unwrap())
}

fn change(node: NodeId, name: &str, what: BitmapAction) -> Box<dyn Step> {
    Box::new(BitmapChange { node, name: name.into(), what })
}

fn added(granularity: u32) -> BitmapAction {
    BitmapAction::Add { granularity: Some(granularity), recording: true, persistent: false }
}

async fn make(graph: &Rc<Graph>, steps: Vec<Box<dyn Step>>) -> Result<(), String> {
    graph.permit().transact(steps).await.map_err(|error| error.full())
}

fn runs(graph: &Graph, node: NodeId, name: &str) -> Vec<(u64, u64)> {
    graph.bitmap(node, name).unwrap().bits.dirty().map(|run| (run.start(), run.end())).collect()
}

async fn put(lane: &PortLane, at: u64, len: usize) -> Result<(), IoError> {
    write(lane, at, &vec![1; len], WriteFlags::default()).await
}

#[test]
fn whatever_changes_a_range_marks_it_in_every_node_that_it_passes() {
    let dir = tempfile::tempdir().unwrap();
    run_control(|local| async move {
        let graph = graph();
        let (file, top) = chain(&graph, dir.path(), json!({ "offset": 64 * KIB, "size": SIZE })).await;
        make(&graph, vec![change(file, "b", added(4096)), change(top, "b", added(4096))]).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        put(&lane, 4000, 200).await.unwrap();
        lane.write_zeroes(&enter(&lane).await, range(64 * KIB, 1), WriteFlags::default()).await.unwrap();
        lane.discard(&enter(&lane).await, range(128 * KIB, 4096)).await.unwrap();
        bench::read(&lane, range(0, SIZE)).await.unwrap();
        bench::flush(&lane).await.unwrap();
        put(&lane, SIZE, 512).await.unwrap_err();
        let expected = [(0, 8 * KIB), (64 * KIB, 68 * KIB), (128 * KIB, 132 * KIB)];
        assert_eq!(runs(&graph, top, "b"), expected);
        assert_eq!(runs(&graph, file, "b"), expected.map(|(start, end)| (start + 64 * KIB, end + 64 * KIB)));
    });
}

#[test]
fn a_discard_that_is_ignored_and_a_write_that_is_refused_mark_nothing() {
    run_control(|local| async move {
        let graph = graph();
        let node = add(&graph, with(disk("n"), &json!({ "discard": "ignore" }))).await.unwrap();
        make(&graph, vec![change(node, "b", added(512))]).await.unwrap();
        let port = attach(&graph, node, bench::READER).await.unwrap();
        let lane = port.handle().lane(&local);
        assert_eq!(put(&lane, 0, 512).await, Err(IoError::ReadOnly));
        port.detach(&mut graph.permit()).await;
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        lane.discard(&enter(&lane).await, range(0, 4096)).await.unwrap();
        assert_eq!(runs(&graph, node, "b"), []);
    });
}

/// What is answered on the spot is over before it could be recorded; the direct path is open again when nobody records.
#[test]
fn writes_that_nothing_waits_for_leave_the_direct_path_while_somebody_records() {
    run_control(|local| async move {
        let graph = graph();
        let node = add(&graph, disk("n")).await.unwrap();
        let top = add(&graph, json!({ "driver": "raw", "node-name": "top", "file": "n" })).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let goes = async |write| {
            let request = DirectRequest { write, at: range(0, 512), fua: false, memory_bits: 0 };
            lane.direct(&enter(&lane).await, request).is_some()
        };
        assert!(goes(true).await);
        make(&graph, vec![change(node, "b", added(512))]).await.unwrap();
        assert!(!goes(true).await && goes(false).await);
        make(&graph, vec![change(node, "b", BitmapAction::Disable)]).await.unwrap();
        assert!(goes(true).await);
        put(&lane, 0, 512).await.unwrap();
        assert_eq!(runs(&graph, node, "b"), [], "it does not record");
        make(&graph, vec![change(node, "b", BitmapAction::Enable)]).await.unwrap();
        assert!(!goes(true).await);
        put(&lane, 0, 512).await.unwrap();
        assert_eq!(runs(&graph, node, "b"), [(0, 512)]);
        make(&graph, vec![change(node, "b", BitmapAction::Remove)]).await.unwrap();
        assert!(goes(true).await);
    });
}

/// The range is marked when the entry is over, not before: who copies what is dirty would miss it.
#[test]
fn a_write_by_a_ring_entry_is_recorded_when_it_is_over() {
    let dir = tempfile::tempdir().unwrap();
    run_control(|local| async move {
        let graph = graph();
        let below = bench::file("file", &image(dir.path(), "x.img", 2 << 20, 0));
        let file = add(&graph, with(below, &json!({ "aio": "io_uring" }))).await.unwrap();
        let above = json!({ "driver": "raw", "node-name": "top", "file": "file", "offset": 64 * KIB });
        let top = add(&graph, above).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let send = async |write, at| {
            let request = DirectRequest { write, at, fua: false, memory_bits: 0 };
            lane.direct(&enter(&lane).await, request)
        };
        make(&graph, vec![change(file, "b", added(4096))]).await.unwrap();
        let read = send(false, range(0, 512)).await.unwrap();
        let write = send(true, range(4096, 8192)).await.unwrap();
        assert!(matches!((&read, &write), (Passed::Ring(..), Passed::Ring(..))));
        assert_eq!(runs(&graph, file, "b"), []);
        drop((read, write));
        assert_eq!(runs(&graph, file, "b"), [(68 * KIB, 76 * KIB)]);
        make(&graph, vec![change(top, "b", added(4096))]).await.unwrap();
        assert!(send(true, range(0, 4096)).await.is_none(), "one node can be told by an entry, not two");
        assert!(send(false, range(0, 4096)).await.is_some());
    });
}

#[test]
fn several_changes_happen_at_one_moment_or_not_at_all() {
    run_control(|local| async move {
        let graph = graph();
        let (one, two) = (add(&graph, disk("one")).await.unwrap(), add(&graph, disk("two")).await.unwrap());
        make(&graph, vec![change(one, "a", added(512)), change(two, "b", added(65536))]).await.unwrap();
        let ports = [attach(&graph, one, writer()).await.unwrap(), attach(&graph, two, writer()).await.unwrap()];
        let lanes = ports.each_ref().map(|port| port.handle().lane(&local));
        put(&lanes[0], 0, 512).await.unwrap();
        put(&lanes[1], 512 * KIB, 512).await.unwrap();
        let all = |last: &str| {
            vec![
                change(one, "sum", BitmapAction::Add { granularity: None, recording: false, persistent: false }),
                change(one, "sum", BitmapAction::Merge(vec![(one, "a".into()), (two, "b".into())])),
                change(one, "a", BitmapAction::Clear),
                change(one, "a", BitmapAction::Disable),
                change(two, last, BitmapAction::Remove),
            ]
        };
        assert_eq!(make(&graph, all("nope")).await.unwrap_err(), "Dirty bitmap 'nope' not found");
        assert_eq!(graph.node(one).unwrap().bitmaps.len(), 1);
        assert!(graph.bitmap(one, "a").unwrap().recording);
        assert_eq!(runs(&graph, one, "a"), [(0, 512)]);
        make(&graph, all("b")).await.unwrap();
        assert_eq!(runs(&graph, one, "sum"), [(0, 64 * KIB), (512 * KIB, 576 * KIB)]);
        assert_eq!(runs(&graph, one, "a"), []);
        let names: Vec<_> = graph.node(one).unwrap().bitmaps.into_iter().map(|bitmap| bitmap.name).collect();
        assert_eq!(names, ["sum", "a"]);
        assert!(graph.node(two).unwrap().bitmaps.is_empty());
        put(&lanes[0], 4096, 512).await.unwrap();
        assert_eq!(runs(&graph, one, "a"), []);
    });
}

#[test]
fn what_makes_no_change_is_refused_in_qemus_words() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, disk("n")).await.unwrap();
        let large = add(&graph, with(disk("large"), &json!({ "size": 2 << 20 }))).await.unwrap();
        let vast = add(&graph, with(disk("vast"), &json!({ "size": 1u64 << 62 }))).await.unwrap();
        make(&graph, vec![change(node, "b", added(512)), change(large, "b", added(512))]).await.unwrap();
        let merge = |from: NodeId, name: &str| BitmapAction::Merge(vec![(node, "b".into()), (from, name.into())]);
        for (step, reason) in [
            (change(node, "b", added(512)), "Bitmap already exists: b"),
            (change(node, "", added(512)), "Bitmap name cannot be empty"),
            (change(node, &"x".repeat(1024), added(512)), "Bitmap name too long: xxx"),
            (change(node, "c", added(256)), "Granularity must be power of 2 and at least 512"),
            (change(node, "c", added(0)), "Granularity must be power of 2 and at least 512"),
            (change(vast, "c", added(512)), "A bitmap of 9007199254740992 bits is more than is supported"),
            (change(node, "c", BitmapAction::Remove), "Dirty bitmap 'c' not found"),
            (change(node, "c", BitmapAction::Clear), "Dirty bitmap 'c' not found"),
            (change(node, "c", BitmapAction::Enable), "Dirty bitmap 'c' not found"),
            (change(node, "c", BitmapAction::Disable), "Dirty bitmap 'c' not found"),
            (change(node, "c", merge(node, "b")), "Dirty bitmap 'c' not found"),
            (change(node, "b", merge(large, "c")), "Dirty bitmap 'c' not found"),
            (
                change(node, "b", merge(large, "b")),
                "Bitmaps are of different sizes (destination size is 1048576, source size is 2097152) and can't be merged",
            ),
        ] {
            let error = make(&graph, vec![step]).await.unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
        make(&graph, vec![change(node, &"x".repeat(1023), added(1 << 31))]).await.unwrap();
        make(&graph, vec![change(node, "b", merge(node, "b"))]).await.unwrap();
        let suits = BitmapAction::Add { granularity: None, recording: true, persistent: false };
        make(&graph, vec![change(node, "suits", suits)]).await.unwrap();
        assert_eq!(graph.bitmap(node, "suits").unwrap().bits.granularity(), 65536);
    });
}

/// As QEMU's: what is cut off is forgotten, what is new has not changed.
#[test]
fn bitmaps_have_the_size_of_their_node() {
    let dir = tempfile::tempdir().unwrap();
    run_control(|local| async move {
        let graph = graph();
        let (file, top) = chain(&graph, dir.path(), json!({})).await;
        make(&graph, vec![change(file, "b", added(65536)), change(top, "b", added(65536))]).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        put(&lane, 0, 1).await.unwrap();
        put(&lane, SIZE, 1).await.unwrap();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        for (size, marks) in [
            (4 << 20, vec![(0, 65536), (SIZE, SIZE + 65536)]),
            (SIZE + 512, vec![(0, 65536), (SIZE, SIZE + 512)]),
            (SIZE, vec![(0, 65536)]),
            (2 << 20, vec![(0, 65536)]),
        ] {
            graph.permit().resize(top, size, Preallocation::Off).await.unwrap();
            for node in [file, top] {
                assert_eq!(graph.bitmap(node, "b").unwrap().bits.size(), size);
                assert_eq!(runs(&graph, node, "b"), marks);
            }
        }
    });
}

/// An image that grows moves the end of its file, past what the bitmap of the file could note: that has changed, too.
#[test]
fn what_a_file_grows_by_is_dirty() {
    let dir = tempfile::tempdir().unwrap();
    run_control(|local| async move {
        let graph = graph();
        let file = add(&graph, bench::file("file", &image(dir.path(), "x.img", 1 << 20, 0))).await.unwrap();
        let top = add(&graph, json!({ "driver": "raw", "node-name": "top", "file": "file" })).await.unwrap();
        make(&graph, vec![change(file, "b", added(65536)), change(top, "b", added(65536))]).await.unwrap();
        make(&graph, vec![change(file, "off", added(65536)), change(file, "off", BitmapAction::Disable)])
            .await
            .unwrap();
        let uses = PermSet::CONSISTENT_READ | PermSet::WRITE | PermSet::RESIZE;
        let grower = Perms { uses, shares: PermSet::ALL };
        let port = attach(&graph, top, grower).await.unwrap();
        let lane = port.handle().lane(&local);
        put(&lane, 0, 512).await.unwrap();
        put(&lane, SIZE + 128 * KIB, 512).await.unwrap();
        let end = SIZE + 128 * KIB + 512;
        drop(lane);
        port.detach(&mut graph.permit()).await;
        // A snapshot of what has changed has what is new.
        let target = json!({ "driver": "null-co", "node-name": "target", "size": end, "read-zeroes": true });
        add(&graph, target).await.unwrap();
        let bitmap = json!({ "node": "file", "name": "b" });
        let cbw = json!({ "driver": "copy-before-write", "node-name": "cbw", "file": "file", "target": "target",
                          "bitmap": bitmap });
        let cbw = add(&graph, cbw).await.unwrap();
        let access =
            add(&graph, json!({ "driver": "snapshot-access", "node-name": "access", "file": "cbw" })).await.unwrap();
        let reader = attach(&graph, access, bench::READER).await.unwrap();
        let snapshot = reader.handle().lane(&local);
        bench::read(&snapshot, range(end - 512, 512)).await.unwrap();
        bench::read(&snapshot, range(0, 512)).await.unwrap();
        bench::read(&snapshot, range(128 * KIB, 512)).await.unwrap_err();
        drop(snapshot);
        reader.detach(&mut graph.permit()).await;
        for node in [access, cbw] {
            graph.permit().remove(node).await.unwrap();
        }
        // Each change of bitmaps looks at the end first.
        let port = attach(&graph, top, grower).await.unwrap();
        let lane = port.handle().lane(&local);
        put(&lane, end, 512).await.unwrap();
        make(&graph, vec![change(file, "c", added(65536))]).await.unwrap();
        let grown = vec![(0, 65536), (SIZE, end + 512)];
        assert_eq!((runs(&graph, file, "b"), runs(&graph, top, "b")), (grown.clone(), grown));
        assert_eq!((runs(&graph, file, "c"), runs(&graph, file, "off")), (vec![], vec![]));
        put(&lane, end + 512, 512).await.unwrap();
        make(&graph, vec![change(file, "b", BitmapAction::Clear)]).await.unwrap();
        assert_eq!(runs(&graph, file, "b"), []);
        put(&lane, end + 1024, 512).await.unwrap();
        drop(lane);
        port.detach(&mut graph.permit()).await;
        // So does who resizes: what an operator makes a disk larger by has not changed.
        graph.permit().resize(top, 4 << 20, Preallocation::Off).await.unwrap();
        assert_eq!(runs(&graph, file, "b"), [(SIZE + 128 * KIB, SIZE + 192 * KIB)]);
        assert_eq!(runs(&graph, top, "b").last(), Some(&(SIZE, SIZE + 192 * KIB)));
    });
}

/// Two threads write while a bitmap comes and goes: what it marked is what was written between these two moments.
#[test]
fn no_write_is_missed_while_a_bitmap_comes_and_goes() {
    const WRITES: u64 = 2000;
    run_control(|_| async {
        let graph = graph();
        let size = 2 * WRITES * 512;
        let node = add(&graph, with(disk("n"), &json!({ "size": size }))).await.unwrap();
        make(&graph, vec![change(node, "all", added(512))]).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let threads = [io_thread(), io_thread()];
        let writers = [0, 1].map(|number| {
            started(&threads[number], &port.handle(), async move |lane| {
                for sector in (number as u64..2 * WRITES).step_by(2) {
                    put(&lane, sector * 512, 512).await.unwrap();
                }
            })
        });
        let bits = |name: &str| graph.bitmap(node, name).unwrap().bits;
        let mut marked = 0;
        while bits("all").count() < size {
            let mut begin = taken(node, "before");
            begin.push(change(node, "late", added(512)));
            make(&graph, begin).await.unwrap();
            Local::current().sleep(std::time::Duration::from_micros(300)).await;
            let mut end = taken(node, "after");
            end.push(change(node, "late", BitmapAction::Disable));
            make(&graph, end).await.unwrap();
            marked += bits("late").count();
            let sum = bits("before").copied().unwrap();
            sum.merge(&bits("late")).unwrap();
            assert!(sum.all_words().eq(bits("after").all_words()));
            let gone = ["before", "late", "after"].map(|name| change(node, name, BitmapAction::Remove));
            make(&graph, gone.into()).await.unwrap();
        }
        assert!(marked > 0, "all writes came between the rounds");
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

/// Keeps what "all" is at this moment.
fn taken(node: NodeId, name: &str) -> Vec<Box<dyn Step>> {
    let made = BitmapAction::Add { granularity: Some(512), recording: false, persistent: false };
    vec![change(node, name, made), change(node, name, BitmapAction::Merge(vec![(node, "all".into())]))]
}
