//! Quorum: what is voted on and how, what is reported, what is put right, and children that come and go.
//!
//! Errors, events and names are those of `qemu-storage-daemon` 10.0.2 with blkdebug nodes in place of ours.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bench::{READER, add, attach, enter, flush, io_thread, on, range, read, reopen, with, write, writer};
use block_core::base::{ByteRange, Error, IoError};
use block_core::graph::{
    ChildId, DiscardMode, DriverInfo, Graph, IoCx, NewNode, NodeEvent, NodeId, NodeOptions, OpKind, PermSet, Perms,
    Place, Preallocation, QuorumOp, ReopenRequest, Role, WriteFlags,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::port::Port;
use block_core::rt::{IoBuf, Local, run_control};
use serde_json::{Value, json};
use support::{Seen, Valve, mem};

const SIZE: u64 = 65536;
const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

/// Three copies in memory, and what is told about them.
struct Copies {
    graph: Rc<Graph>,
    seen: [Arc<Seen>; 3],
    told: Arc<Mutex<Vec<NodeEvent>>>,
}

impl Copies {
    /// Copies `a`, `b` and `c`, each filled with its byte.
    async fn filled(fills: [u8; 3]) -> Self {
        let told: Arc<Mutex<Vec<NodeEvent>>> = Arc::default();
        let sink = told.clone();
        let graph = Graph::new(Arc::new(move |event| sink.lock().unwrap().push(event)));
        let seen: [Arc<Seen>; 3] = Default::default();
        for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
            support::add(&graph, mem(name, fills[number], &seen[number])).await;
        }
        Self { graph, seen, told }
    }

    async fn quorum(&self, more: Value) -> NodeId {
        add(&self.graph, quorum(&["a", "b", "c"], more)).await.unwrap()
    }

    async fn port(&self, more: Value) -> Port {
        attach(&self.graph, self.quorum(more).await, writer()).await.unwrap()
    }

    /// What the quorum has told since the last time; that a request failed is told of any node.
    fn told(&self) -> Vec<NodeEvent> {
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        told.into_iter().filter(|event| !matches!(event, NodeEvent::IoError { .. })).collect()
    }

    /// The first bytes of one copy.
    async fn first_of(&self, local: &Rc<Local>, name: &str) -> u8 {
        first_of(&self.graph, local, name).await
    }
}

async fn first_of(graph: &Rc<Graph>, local: &Rc<Local>, name: &str) -> u8 {
    bytes_of(graph, local, name, range(0, 512)).await[0]
}

async fn bytes_of(graph: &Rc<Graph>, local: &Rc<Local>, name: &str, at: ByteRange) -> Vec<u8> {
    let port = attach(graph, graph.find(name).unwrap(), READER).await.unwrap();
    let bytes = read(&port.handle().lane(local), at).await.unwrap();
    port.detach(&mut graph.permit()).await;
    bytes
}

fn quorum(children: &[&str], more: Value) -> Value {
    let options = json!({ "driver": "quorum", "node-name": "q", "children": children, "vote-threshold": 2 });
    with(options, &more)
}

fn bad(node: &str, op: QuorumOp, error: Option<IoError>, at: ByteRange) -> NodeEvent {
    NodeEvent::QuorumReportBad { node: node.into(), op, error, at }
}

fn failure(at: ByteRange) -> NodeEvent {
    NodeEvent::QuorumFailure { node: "q".into(), at }
}

// ---- options -------------------------------------------------------------------------------------------------------

#[test]
fn what_makes_no_quorum_is_refused_in_qemus_words() {
    run_control(async |_| {
        let Copies { graph, .. } = Copies::filled([0; 3]).await;
        support::add(&graph, support::tiny("small")).await;
        let two = ["a", "b"];
        for (options, reason) in [
            (quorum(&two, json!({ "vote-threshold": 0 })), "Parameter 'vote-threshold' expects a value >= 1"),
            (quorum(&two, json!({ "vote-threshold": i64::MIN })), "Parameter 'vote-threshold' expects a value >= 1"),
            (quorum(&two, json!({ "vote-threshold": 3 })), "threshold may not exceed children count"),
            (quorum(&two, json!({ "vote-threshold": i64::MAX })), "threshold may not exceed children count"),
            (
                quorum(&two, json!({ "vote-threshold": "2" })),
                "Invalid parameter type for 'vote-threshold', expected: integer",
            ),
            (quorum(&[], json!({})), "Number of provided children must be 1 or more"),
            (quorum(&["a", "nope"], json!({})), "Cannot find device='nope' nor node-name='nope'"),
            (quorum(&["a", "q"], json!({})), "Cannot find device='q' nor node-name='q'"),
            (
                quorum(&["a", "small"], json!({})),
                "Could not refresh total sector count: the children have different sizes (65536 and 512 bytes)",
            ),
            (
                quorum(&["a", "b", "c"], json!({ "blkverify": true })),
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ),
            (
                quorum(&two, json!({ "blkverify": true, "vote-threshold": 1 })),
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ),
            (
                quorum(&two, json!({ "blkverify": true, "rewrite-corrupted": true })),
                "rewrite-corrupted=on cannot be used with blkverify=on",
            ),
            (quorum(&two, json!({ "read-pattern": "no" })), "Parameter 'read-pattern' does not accept value 'no'"),
        ] {
            assert_eq!(add(&graph, options).await.unwrap_err(), reason);
            assert_eq!(graph.nodes().len(), 4, "{reason}");
        }
        // What belongs to comparing says nothing where nothing is compared.
        let fifo = json!({ "read-pattern": "fifo", "rewrite-corrupted": true, "blkverify": true, "vote-threshold": 1 });
        add(&graph, quorum(&two, fifo)).await.unwrap();
        let error = reopen(&graph, &[quorum(&two, json!({ "vote-threshold": 1 }))]).await.unwrap_err();
        assert_eq!(error, "Block format 'quorum' used by node 'q' does not support reopening files");
    });
}

#[test]
fn a_copy_that_cannot_be_written_is_not_put_right() {
    run_control(async |_| {
        let graph = support::graph();
        let child = json!({ "driver": "null-co", "node-name": "ro", "read-only": true });
        let one = |more: Value| {
            with(json!({ "driver": "quorum", "node-name": "q", "children": [child], "vote-threshold": 1 }), &more)
        };
        let error = add(&graph, one(json!({ "rewrite-corrupted": true }))).await.unwrap_err();
        assert_eq!(error, "Block node 'ro' is read-only");
        add(&graph, one(json!({}))).await.unwrap();
    });
}

#[test]
fn nobody_else_changes_a_copy() {
    run_control(async |_| {
        let copies = Copies::filled([0; 3]).await;
        let graph = &copies.graph;
        copies.quorum(json!({})).await;
        let a = graph.find("a").unwrap();
        let error = attach(graph, a, Perms { shares: PermSet::ALL, ..writer() }).await.err().unwrap();
        assert!(error.contains("'write'") && error.contains("node 'q'"), "{error}");
        let error = graph.permit().resize(a, 4096, Preallocation::Off).await.unwrap_err().full();
        assert!(error.contains("resize"), "{error}");
        attach(graph, a, READER).await.unwrap().detach(&mut graph.permit()).await;
    });
}

// ---- reads ---------------------------------------------------------------------------------------------------------

#[test]
fn a_read_goes_by_most_copies() {
    run_control(async |local| {
        let copies = Copies::filled([1, 9, 1]).await;
        let port = copies.port(json!({})).await;
        let lane = port.handle().lane(&local);
        let at = range(512, 8192);
        assert_eq!(read(&lane, at).await.unwrap(), [1; 8192]);
        assert_eq!(copies.told(), [bad("b", QuorumOp::Read, None, at)]);
        assert_eq!(copies.first_of(&local, "b").await, 9, "nobody asked for it to be put right");
    });
}

#[test]
fn a_copy_that_is_wrong_is_put_right_where_that_is_asked_for() {
    run_control(async |local| {
        let copies = Copies::filled([1, 9, 1]).await;
        let port = copies.port(json!({ "rewrite-corrupted": true })).await;
        let lane = port.handle().lane(&local);
        let at = range(0, 4096);
        for expected in [vec![bad("b", QuorumOp::Read, None, at)], vec![]] {
            assert_eq!(read(&lane, at).await.unwrap(), [1; 4096]);
            assert_eq!(copies.told(), expected);
        }
        let b = bytes_of(&copies.graph, &local, "b", range(0, 8192)).await;
        assert!(b[..4096].iter().all(|byte| *byte == 1) && b[4096..].iter().all(|byte| *byte == 9));
        let writes = |copy: usize| copies.seen[copy].writes.load(Ordering::Relaxed);
        assert_eq!([writes(0), writes(1), writes(2)], [0, 1, 0]);
    });
}

#[test]
fn copies_that_do_not_agree_fail_the_read() {
    run_control(async |local| {
        for (fills, threshold) in [([1, 2, 3], 2), ([1, 2, 1], 3)] {
            let copies = Copies::filled(fills).await;
            let port = copies.port(json!({ "vote-threshold": threshold, "rewrite-corrupted": true })).await;
            let at = range(0, 512);
            assert_eq!(read(&port.handle().lane(&local), at).await, Err(IoError::Os(5)));
            assert_eq!(copies.told(), [failure(at)]);
            assert_eq!(copies.first_of(&local, "b").await, 2, "who is right is not known");
        }
    });
}

#[test]
fn copies_that_cannot_be_read_have_no_vote() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let port = copies.port(json!({})).await;
        let lane = port.handle().lane(&local);
        let at = range(0, 512);
        let fails = |copy: usize, error| *copies.seen[copy].read_error.lock().unwrap() = Some(error);
        fails(0, IoError::NoSpace);
        let a = bad("a", QuorumOp::Read, Some(IoError::NoSpace), at);
        assert_eq!(read(&lane, at).await.unwrap(), [1; 512]);
        assert_eq!(copies.told(), std::slice::from_ref(&a));
        fails(1, IoError::Os(5));
        let b = bad("b", QuorumOp::Read, Some(IoError::Os(5)), at);
        assert_eq!(read(&lane, at).await, Err(IoError::Os(5)));
        assert_eq!(copies.told(), [a.clone(), b.clone(), failure(at)]);
        fails(2, IoError::NoSpace);
        let c = bad("c", QuorumOp::Read, Some(IoError::NoSpace), at);
        assert_eq!(read(&lane, at).await, Err(IoError::NoSpace), "what most of them had");
        assert_eq!(copies.told(), [a, b, c, failure(at)]);
    });
}

#[test]
fn fifo_asks_one_after_the_other() {
    run_control(async |local| {
        let copies = Copies::filled([1, 2, 3]).await;
        let port = copies.port(json!({ "read-pattern": "fifo" })).await;
        let lane = port.handle().lane(&local);
        let at = range(0, 512);
        let errors = [IoError::NoSpace, IoError::Os(5), IoError::Os(1)];
        let mut expected = Vec::new();
        for (copy, name) in ["a", "b", "c"].into_iter().enumerate() {
            assert_eq!(read(&lane, at).await.unwrap(), [u8::try_from(copy + 1).unwrap(); 512]);
            assert_eq!(copies.told(), expected);
            *copies.seen[copy].read_error.lock().unwrap() = Some(errors[copy]);
            expected.push(bad(name, QuorumOp::Read, Some(errors[copy]), at));
        }
        assert_eq!(read(&lane, at).await, Err(IoError::Os(1)), "the last one's error");
        assert_eq!(copies.told(), expected);
    });
}

// ---- writes --------------------------------------------------------------------------------------------------------

#[test]
fn a_write_is_done_when_enough_copies_have_it() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let port = copies.port(json!({})).await;
        let lane = port.handle().lane(&local);
        let at = range(0, 512);
        let fails = |copy: usize, error| *copies.seen[copy].write_error.lock().unwrap() = Some(error);
        fails(0, IoError::NoSpace);
        let a = bad("a", QuorumOp::Write, Some(IoError::NoSpace), at);
        write(&lane, 0, &[7; 512], PLAIN).await.unwrap();
        assert_eq!(copies.told(), std::slice::from_ref(&a));
        assert_eq!(read(&lane, at).await.unwrap(), [7; 512]);
        assert_eq!(copies.told(), [bad("a", QuorumOp::Read, None, at)]);
        lane.write_zeroes(&enter(&lane).await, at, PLAIN).await.unwrap();
        assert_eq!(copies.told(), std::slice::from_ref(&a));
        fails(2, IoError::Os(5));
        let c = bad("c", QuorumOp::Write, Some(IoError::Os(5)), at);
        assert_eq!(write(&lane, 0, &[8; 512], PLAIN).await, Err(IoError::Os(5)));
        assert_eq!(copies.told(), [a.clone(), c.clone(), failure(at)]);
        assert_eq!(lane.write_zeroes(&enter(&lane).await, at, PLAIN).await, Err(IoError::Os(5)));
        assert_eq!(copies.told(), [a, c, failure(at)]);
    });
}

#[test]
fn a_flush_is_voted_on_and_fails_no_range() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let port = copies.port(json!({})).await;
        let lane = port.handle().lane(&local);
        let nowhere = ByteRange::whole(0);
        let fails = |copy: usize, error| *copies.seen[copy].flush_error.lock().unwrap() = Some(error);
        fails(0, IoError::NoSpace);
        let a = bad("a", QuorumOp::Flush, Some(IoError::NoSpace), nowhere);
        flush(&lane).await.unwrap();
        assert_eq!(copies.told(), std::slice::from_ref(&a));
        fails(2, IoError::Os(5));
        assert_eq!(flush(&lane).await, Err(IoError::Os(5)));
        assert_eq!(copies.told(), [a, bad("c", QuorumOp::Flush, Some(IoError::Os(5)), nowhere)]);
        // A write that is to be stable is one that enough copies have and made stable.
        let stable = WriteFlags { fua: true, ..PLAIN };
        assert_eq!(write(&lane, 0, &[7; 512], stable).await, Err(IoError::Os(5)));
        *copies.seen[2].flush_error.lock().unwrap() = None;
        write(&lane, 0, &[7; 512], stable).await.unwrap();
    });
}

/// Whether a copy can free space shows when it is asked: where it cannot, a discard does not fill it with zeroes. Where
/// some can, the others follow them once, and no more.
#[test]
fn a_discard_writes_no_zeroes() {
    run_control(async |local| {
        let copies = Copies { seen: Default::default(), graph: support::graph(), told: Arc::default() };
        for (name, seen) in ["a", "b", "c"].into_iter().zip(&copies.seen) {
            let mem = support::Mem::new(vec![7; 65536], seen).freeing();
            let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
            support::add(&copies.graph, NewNode::new(name.into(), options, |_| (mem, SIZE))).await;
        }
        let port = copies.port(json!({ "discard": "unmap" })).await;
        let lane = port.handle().lane(&local);
        let writes = || copies.seen.each_ref().map(|seen| seen.writes.load(Ordering::Relaxed));
        lane.discard(&enter(&lane).await, range(0, SIZE)).await.unwrap();
        assert_eq!(writes(), [0; 3]);
        copies.seen[0].frees.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            lane.discard(&enter(&lane).await, range(0, 4096)).await.unwrap();
            assert_eq!(writes(), [0, 1, 1], "all of them read the same");
        }
        assert_eq!(read(&lane, range(0, 8192)).await.unwrap(), [[0; 4096], [7; 4096]].concat());
        port.detach(&mut copies.graph.permit()).await;
        assert_eq!(copies.told(), []);
    });
}

/// Copies that read differently after a discard would disagree.
#[test]
fn a_discard_leaves_copies_that_agree() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| bench::image(dir.path(), name, 65536, 7));
    run_control(async |local| {
        let graph = support::graph();
        let file = |number: usize| bench::file(&format!("f{number}"), &paths[number]);
        let unmaps = json!({ "discard": "unmap" });
        add(&graph, with(file(0), &unmaps)).await.unwrap();
        add(&graph, file(1)).await.unwrap();
        let node = add(&graph, quorum(&["f0", "f1"], unmaps.clone())).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        assert!(!port.geometry().limits.discard, "one of them ignores it");
        let lane = port.handle().lane(&local);
        lane.discard(&enter(&lane).await, range(0, 4096)).await.unwrap();
        assert_eq!(read(&lane, range(0, 4096)).await.unwrap(), [7; 4096]);
        drop(lane);
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        reopen(&graph, &[with(file(1), &unmaps)]).await.unwrap();
        let node = add(&graph, quorum(&["f0", "f1"], unmaps)).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        assert!(port.geometry().limits.discard);
        lane.discard(&enter(&lane).await, range(0, 4096)).await.unwrap();
        assert_eq!(read(&lane, range(0, 8192)).await.unwrap(), [[0; 4096], [7; 4096]].concat());
        // What all call zero is zero; what one calls data is data.
        let place = async |at| lane.map(&enter(&lane).await, at).await.unwrap().place;
        assert_eq!(place(range(0, 4096)).await, Place::Zero { allocated: true });
        assert_eq!(place(range(4096, 4096)).await, Place::Here);
    });
}

// ---- requests that meet --------------------------------------------------------------------------------------------

/// A filter whose writes wait at a valve.
struct SlowWrites {
    file: ChildId,
    valve: Arc<Valve>,
}

impl Filter for SlowWrites {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn before(&self, (): &(), _: IoCx<'_>, request: Request) -> Result<(), IoError> {
        if request.kind == OpKind::Write {
            self.valve.passed().await;
        }
        Ok(())
    }

    async fn reopen(&self, (): &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, (): &()) -> DriverInfo {
        DriverInfo { driver: "slow-writes", ..DriverInfo::default() }
    }
}

async fn slow_writes(graph: &Rc<Graph>, name: &str, below: &str, valve: &Arc<Valve>) {
    let below = graph.find(below).unwrap();
    let node = NewNode::new(name.into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(SlowWrites { file, valve: valve.clone() }), ())
    });
    support::add(graph, node).await;
}

async fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "it did not happen");
        Local::current().sleep(Duration::from_millis(1)).await;
    }
}

/// The guest changes its memory while one copy is written: the copies are the same all the same.
#[test]
fn all_copies_get_the_same_bytes() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let valve = Valve::shut();
        slow_writes(&copies.graph, "slow-c", "c", &valve).await;
        let node = add(&copies.graph, quorum(&["a", "b", "slow-c"], json!({}))).await.unwrap();
        let port = attach(&copies.graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let guests = IoBuf::from_slice(&[5; 512]).unwrap();
        let done = Rc::new(std::cell::Cell::new(false));
        let (task_lane, task_guests, task_done) = (lane.clone(), guests.clone(), done.clone());
        local.spawn(async move {
            task_lane.write(&enter(&task_lane).await, range(0, 512), task_guests, PLAIN).await.unwrap();
            task_done.set(true);
        });
        until(|| valve.parked() > 0).await;
        guests.fill(6);
        valve.open();
        until(|| done.get()).await;
        for name in ["a", "b", "c"] {
            assert_eq!(copies.first_of(&local, name).await, 5, "{name}");
        }
    });
}

/// A write has reached two of three copies when a read finds that they disagree. Nobody is wrong.
#[test]
fn a_write_that_is_under_way_is_no_disagreement() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let valve = Valve::shut();
        slow_writes(&copies.graph, "slow-b", "b", &valve).await;
        slow_writes(&copies.graph, "slow-c", "c", &valve).await;
        let options = quorum(&["a", "slow-b", "slow-c"], json!({ "rewrite-corrupted": true }));
        let node = add(&copies.graph, options).await.unwrap();
        let port = attach(&copies.graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let ended = Rc::new(std::cell::Cell::new(0));
        let (task_lane, task_ended) = (lane.clone(), ended.clone());
        local.spawn(async move {
            write(&task_lane, 0, &[5; 1024], PLAIN).await.unwrap();
            task_ended.set(task_ended.get() + 1);
        });
        until(|| valve.parked() >= 2 && copies.seen[0].writes.load(Ordering::Relaxed) == 1).await;
        let (task_lane, task_ended) = (lane.clone(), ended.clone());
        local.spawn(async move {
            assert_eq!(read(&task_lane, range(512, 512)).await.unwrap(), [5; 512]);
            task_ended.set(task_ended.get() + 1);
        });
        local.sleep(Duration::from_millis(20)).await;
        assert_eq!(ended.get(), 0, "the read waits for the write");
        // Elsewhere nobody waits.
        assert_eq!(read(&lane, range(4096, 512)).await.unwrap(), [1; 512]);
        valve.open();
        until(|| ended.get() == 2).await;
        assert_eq!(copies.told(), []);
        for name in ["a", "b", "c"] {
            assert_eq!(copies.first_of(&local, name).await, 5, "{name}");
        }
    });
}

/// Writers of two threads meet in one place, with readers that put copies right: nobody finds a copy wrong, and all end
/// up the same.
#[test]
fn writers_of_several_threads_leave_copies_that_agree() {
    run_control(async |local| {
        let copies = Copies::filled([0; 3]).await;
        let port = copies.port(json!({ "rewrite-corrupted": true })).await;
        let threads = [io_thread(), io_thread()];
        let (done, results): (Vec<_>, Vec<_>) = threads.iter().map(|_| block_core::rt::sync::oneshot()).unzip();
        for ((number, thread), done) in threads.iter().enumerate().zip(done) {
            let handle = port.handle();
            thread.remote().spawn(move |local| async move {
                let lane = handle.lane(&local);
                for step in 0..200_u64 {
                    let at = range((step % 5) * 512, 2048);
                    let fill = u8::try_from(step).unwrap() ^ (u8::try_from(number).unwrap() << 7);
                    let bytes = [fill; 2048];
                    let sent = write(&lane, at.start(), &bytes, PLAIN);
                    let (sent, got) = together(sent, read(&lane, range(0, 4096))).await;
                    sent.unwrap();
                    got.unwrap();
                }
                let _ = done.send(());
            });
        }
        for result in results {
            result.await.unwrap();
        }
        assert_eq!(copies.told(), []);
        let all = range(0, SIZE);
        let a = bytes_of(&copies.graph, &local, "a", all).await;
        for other in ["b", "c"] {
            assert!(bytes_of(&copies.graph, &local, other, all).await == a, "{other} is another disk than a");
        }
    });
}

async fn together<A, B>(one: impl Future<Output = A>, other: impl Future<Output = B>) -> (A, B) {
    let (mut first, mut second) = (None, None);
    let one: std::pin::Pin<Box<dyn Future<Output = ()> + '_>> = Box::pin(async { first = Some(one.await) });
    let other: std::pin::Pin<Box<dyn Future<Output = ()> + '_>> = Box::pin(async { second = Some(other.await) });
    block_core::rt::sync::together([one, other]).await;
    (first.unwrap(), second.unwrap())
}

// ---- size ----------------------------------------------------------------------------------------------------------

#[test]
fn all_copies_change_size_or_none() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let graph = &copies.graph;
        let node = copies.quorum(json!({})).await;
        let sizes = |names: &[&str]| -> Vec<u64> {
            names.iter().map(|name| graph.node(graph.find(name).unwrap()).unwrap().geometry.size).collect()
        };
        graph.permit().resize(node, 2 * SIZE, Preallocation::Off).await.unwrap();
        assert_eq!(sizes(&["a", "b", "c", "q"]), [2 * SIZE; 4]);
        graph.permit().resize(node, SIZE, Preallocation::Off).await.unwrap();
        assert_eq!(sizes(&["a", "b", "c", "q"]), [SIZE; 4]);
        graph.permit().remove(node).await.unwrap();
        // One of them cannot.
        add(graph, json!({ "driver": "null-co", "node-name": "fixed", "size": SIZE, "read-zeroes": true }))
            .await
            .unwrap();
        let node = add(graph, quorum(&["a", "fixed", "b"], json!({ "vote-threshold": 1 }))).await.unwrap();
        let error = graph.permit().resize(node, 2 * SIZE, Preallocation::Off).await.unwrap_err().full();
        assert_eq!(error, "Image format driver does not support resize");
        assert_eq!(sizes(&["a", "fixed", "b", "q"]), [SIZE; 4]);
        let port = attach(graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, SIZE - 512, &[3; 512], PLAIN).await.unwrap();
        assert_eq!(write(&lane, SIZE, &[3; 512], PLAIN).await, Err(IoError::OutOfRange));
    });
}

// ---- children that come and go -------------------------------------------------------------------------------------

async fn join(graph: &Rc<Graph>, child: &str) -> Result<(), String> {
    let (parent, child) = (graph.find("q").unwrap(), graph.find(child).unwrap());
    graph.permit().add_child(parent, child).await.map_err(|error| error.full())
}

async fn leave(graph: &Rc<Graph>, parent: &str, edge: &str) -> Result<(), String> {
    let parent = graph.find(parent).unwrap();
    graph.permit().remove_child(parent, edge).await.map_err(|error| error.full())
}

fn edges(graph: &Rc<Graph>) -> Vec<String> {
    let node = graph.node(graph.find("q").unwrap()).unwrap();
    node.children.iter().map(|(name, _)| name.to_string()).collect()
}

#[test]
fn children_come_and_go_in_qemus_words() {
    run_control(async |_| {
        let Copies { graph, .. } = Copies::filled([1; 3]).await;
        support::add(&graph, support::tiny("small")).await;
        support::add(&graph, mem("d", 1, &Arc::default())).await;
        add(&graph, quorum(&["a", "b"], json!({}))).await.unwrap();
        add(&graph, json!({ "driver": "raw", "node-name": "top", "file": "q" })).await.unwrap();
        add(&graph, json!({ "driver": "raw", "node-name": "r", "file": "d" })).await.unwrap();
        for (child, reason) in [
            ("a", "The node a already has a parent"),
            ("d", "The node d already has a parent"),
            ("top", "Making 'top' a children.2 child of 'q' would create a cycle"),
            ("small", "Could not refresh total sector count: the children have different sizes (65536 and 512 bytes)"),
        ] {
            assert_eq!(join(&graph, child).await.unwrap_err(), reason);
        }
        for (parent, edge, reason) in [
            ("q", "nope", "Node 'q' does not have child 'nope'"),
            ("q", "children.0", "The number of children cannot be lower than the vote threshold 2"),
            ("a", "file", "Node 'a' does not have child 'file'"),
            ("r", "file", "The node r does not support removing a child"),
        ] {
            assert_eq!(leave(&graph, parent, edge).await.unwrap_err(), reason);
        }
        let (parent, child) = (graph.find("r").unwrap(), graph.find("c").unwrap());
        let error = graph.permit().add_child(parent, child).await.unwrap_err().full();
        assert_eq!(error, "The node r does not support adding a child");
        assert_eq!(edges(&graph), ["children.0", "children.1"], "what is refused changes nothing");
        join(&graph, "c").await.unwrap();
        leave(&graph, "q", "children.0").await.unwrap();
        join(&graph, "a").await.unwrap();
        assert_eq!(edges(&graph), ["children.1", "children.2", "children.3"]);
    });
}

#[test]
fn two_that_have_to_agree_stay_two() {
    run_control(async |_| {
        let Copies { graph, .. } = Copies::filled([1; 3]).await;
        add(&graph, quorum(&["a", "b"], json!({ "blkverify": true }))).await.unwrap();
        assert_eq!(join(&graph, "c").await.unwrap_err(), "Cannot add a child to a quorum in blkverify mode");
        assert!(leave(&graph, "q", "children.0").await.is_err());
    });
}

/// A broken copy is what children are taken away for.
#[test]
fn a_child_that_cannot_be_flushed_can_go() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let port = copies.port(json!({})).await;
        for seen in &copies.seen[1..2] {
            *seen.flush_error.lock().unwrap() = Some(IoError::Os(5));
            *seen.write_error.lock().unwrap() = Some(IoError::Os(5));
        }
        leave(&copies.graph, "q", "children.1").await.unwrap();
        copies.told();
        let lane = port.handle().lane(&local);
        write(&lane, 0, &[7; 512], PLAIN).await.unwrap();
        flush(&lane).await.unwrap();
        assert_eq!(copies.told(), []);
    });
}

/// What is removed is closed, and nobody holds its file, when the command is answered.
#[test]
fn a_child_that_is_gone_leaves_its_file_free() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b", "c"].map(|name| bench::image(dir.path(), name, 65536, 7));
    run_control(async |local| {
        let graph = support::graph();
        add(&graph, bench::file("named", &paths[0])).await.unwrap();
        let inline = |path: &str| json!({ "driver": "raw", "file": { "driver": "file", "filename": path } });
        let children = json!(["named", inline(&paths[1]), inline(&paths[2])]);
        let node = add(&graph, quorum(&[], json!({ "children": children, "vote-threshold": 1 }))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        write(&lane, 0, &[1; 512], PLAIN).await.unwrap();
        let rival = async |path: &str| {
            let other = support::graph();
            let node = add(&other, bench::file("rival", path)).await.unwrap();
            attach(&other, node, writer()).await.map(drop)
        };
        for (edge, path) in [("children.0", &paths[0]), ("children.1", &paths[1])] {
            assert!(rival(path).await.is_err(), "{edge} is locked while it is a child");
            leave(&graph, "q", edge).await.unwrap();
            assert_eq!(rival(path).await, Ok(()), "{edge}");
        }
        let nodes: Vec<_> = graph.nodes().into_iter().filter(|node| node.explicit).map(|node| node.name).collect();
        assert_eq!(nodes, ["named", "q"]);
        assert_eq!(graph.nodes().len(), 4, "what was defined inside is gone with its child");
    });
}

/// Children come and go a hundred times while two threads read and write: no request fails, and nothing is reported.
#[test]
fn children_come_and_go_under_load() {
    run_control(async |local| {
        let copies = Copies::filled([0; 3]).await;
        let graph = &copies.graph;
        support::add(graph, mem("d", 0, &Arc::default())).await;
        let port = copies.port(json!({})).await;
        let threads = [io_thread(), io_thread()];
        let (over, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut ends = Vec::new();
        for (number, thread) in threads.iter().enumerate() {
            let (handle, over, requests) = (port.handle(), over.clone(), requests.clone());
            let (done, end) = block_core::rt::sync::oneshot();
            ends.push(end);
            thread.remote().spawn(move |local| async move {
                let lane = handle.lane(&local);
                let start = number as u64 * 4096;
                while !over.load(Ordering::Relaxed) {
                    write(&lane, start, &[9; 4096], PLAIN).await.unwrap();
                    assert_eq!(read(&lane, range(start, 4096)).await.unwrap(), [9; 4096]);
                    requests.fetch_add(2, Ordering::Relaxed);
                }
                let _ = done.send(());
            });
        }
        // A child that comes has what it had; the vote of the others covers that, and tells of it.
        for _ in 0..100 {
            join(graph, "d").await.unwrap();
            leave(graph, "q", "children.3").await.unwrap();
        }
        until(|| requests.load(Ordering::Relaxed) > 100).await;
        over.store(true, Ordering::Relaxed);
        for end in ends {
            end.await.unwrap();
        }
        assert_eq!(edges(graph), ["children.0", "children.1", "children.2"]);
        let others = copies.told().into_iter().filter(|event| {
            !matches!(event, NodeEvent::QuorumReportBad { node, error: None, op: QuorumOp::Read, .. } if node == "d")
        });
        assert_eq!(others.count(), 0);
        assert_eq!(first_of(graph, &local, "a").await, 9);
    });
}

/// Requests that wait for each other inside hold up no drain for longer than it takes.
#[test]
fn a_drain_waits_for_who_waits_inside() {
    run_control(async |local| {
        let copies = Copies::filled([1; 3]).await;
        let valve = Valve::shut();
        slow_writes(&copies.graph, "slow-c", "c", &valve).await;
        let node = add(&copies.graph, quorum(&["a", "b", "slow-c"], json!({}))).await.unwrap();
        let port = attach(&copies.graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&local);
        let ended = Rc::new(std::cell::Cell::new(0));
        for fill in [5, 6, 7] {
            let (lane, ended) = (lane.clone(), ended.clone());
            local.spawn(async move {
                write(&lane, 0, &[fill; 512], PLAIN).await.unwrap();
                ended.set(ended.get() + 1);
            });
        }
        until(|| valve.parked() > 0).await;
        let mut impatient = support::impatient(&copies.graph);
        assert!(impatient.remove_child(node, "children.2").await.is_err(), "three writes are inside");
        valve.open();
        copies.graph.permit().remove_child(node, "children.2").await.unwrap();
        assert_eq!(ended.get(), 3);
        for name in ["a", "b", "c"] {
            assert_eq!(copies.first_of(&local, name).await, 7, "{name} has the last one");
        }
        let done = on(&io_thread(), &port.handle(), async |lane| flush(&lane).await).await;
        assert_eq!(done, Ok(()));
    });
}
