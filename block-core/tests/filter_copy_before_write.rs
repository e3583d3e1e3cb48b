//! Snapshots by copying before writing: what `copy-before-write` keeps, and what `snapshot-access` shows of it.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bench::{READER, add, attach, enter, image, io_thread, on, range, read, reopen, started, with, write, writer};
use block_core::base::{ByteRange, IoError};
use block_core::graph::{
    BitmapAction, BitmapChange, ChildId, DirectRequest, Extent, Graph, NewNode, NodeId, NodeOptions, PermSet, Perms,
    Place, Preallocation, WriteFlags,
};
use block_core::port::{Port, PortLane};
use block_core::rt::sync::yield_now;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};
use support::user::{beside, until};
use support::{Mem, Seen, Valve, graph, impatient, park};

const KIB: u64 = 1024;
const CLUSTER: u64 = 64 * KIB;
const SIZE: u64 = 1 << 20;
/// What a backup does: it reads, and gives back what it has read.
const BACKUP: Perms = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };
const NO_ACCESS: Result<(), IoError> = Err(IoError::Os(libc::EACCES));

fn cbw(file: &str, target: &str) -> Value {
    json!({ "driver": "copy-before-write", "node-name": "cbw", "file": file, "target": target, "discard": "unmap" })
}

fn access() -> Value {
    json!({ "driver": "snapshot-access", "node-name": "snapshot", "file": "cbw", "discard": "unmap" })
}

/// A node of `SIZE` bytes in memory.
fn mem(name: &str, fill: u8, seen: &Arc<Seen>) -> NewNode {
    let mem = Mem::new(vec![fill; SIZE as usize], seen);
    NewNode::new(name.into(), NodeOptions::default(), |_| (mem, SIZE))
}

/// A source in memory full of ones, a target, the filter and the view, with a port above each of the latter two.
struct Fleecing {
    graph: Rc<Graph>,
    source: Arc<Seen>,
    target: Arc<Seen>,
    cbw: NodeId,
    guest: Port,
    backup: Port,
}

impl Fleecing {
    async fn new(more: Value) -> Self {
        let graph = graph();
        Self::over(graph, "source", "target", more).await
    }

    /// With nodes of other names in place of the source or the target.
    async fn over(graph: Rc<Graph>, file: &str, target_name: &str, more: Value) -> Self {
        let (source, target) = (Arc::<Seen>::default(), Arc::<Seen>::default());
        if file == "source" {
            support::add(&graph, mem("source", 1, &source)).await;
        }
        if target_name == "target" {
            support::add(&graph, mem("target", 0xaa, &target)).await;
        }
        let cbw = add(&graph, with(cbw(file, target_name), &more)).await.unwrap();
        let snapshot = add(&graph, access()).await.unwrap();
        let guest = attach(&graph, cbw, writer()).await.unwrap();
        let backup = attach(&graph, snapshot, BACKUP).await.unwrap();
        Self { graph, source, target, cbw, guest, backup }
    }

    fn lanes(&self) -> (Rc<PortLane>, Rc<PortLane>) {
        let local = Local::current();
        (self.guest.handle().lane(&local), self.backup.handle().lane(&local))
    }
}

async fn put(lane: &PortLane, at: u64, byte: u8, len: u64) -> Result<(), IoError> {
    write(lane, at, &vec![byte; len as usize], WriteFlags::default()).await
}

async fn has(lane: &PortLane, at: ByteRange, byte: u8) {
    let bytes = read(lane, at).await.unwrap();
    assert!(bytes.iter().all(|seen| *seen == byte), "{at:?} is not all {byte}");
}

#[test]
fn a_write_copies_whole_clusters_first_and_once() {
    run_control(|_| async {
        let all = Fleecing::new(json!({})).await;
        let (guest, backup) = all.lanes();
        put(&guest, CLUSTER - 512, 2, 1024).await.unwrap();
        assert_eq!(all.target.writes.load(Ordering::Relaxed), 1, "two neighbours in one go");
        put(&guest, CLUSTER - 1024, 3, 2048).await.unwrap();
        guest.write_zeroes(&enter(&guest).await, range(0, 2 * CLUSTER), WriteFlags::default()).await.unwrap();
        assert_eq!(all.target.writes.load(Ordering::Relaxed), 1);
        guest.discard(&enter(&guest).await, range(5 * CLUSTER + 1, 1)).await.unwrap();
        assert_eq!(all.target.writes.load(Ordering::Relaxed), 2, "a discard may change what is read");
        has(&backup, range(0, SIZE), 1).await;
        has(&guest, range(0, 2 * CLUSTER), 0).await;
        has(&guest, range(2 * CLUSTER, SIZE - 2 * CLUSTER), 1).await;
    });
}

#[test]
fn clusters_are_as_large_as_they_have_to_be() {
    run_control(|_| async {
        for (least, cluster) in [(0, 64 * KIB), (512, 64 * KIB), (256 * KIB, 256 * KIB), (1 << 62, SIZE)] {
            let all = Fleecing::new(json!({ "min-cluster-size": least })).await;
            let (guest, _) = all.lanes();
            put(&guest, 0, 2, 512).await.unwrap();
            assert_eq!(all.target.largest.load(Ordering::Relaxed), cluster, "{least}");
        }
    });
}

#[test]
fn what_copies_nothing_but_zeroes_says_so() {
    run_control(|_| async {
        let graph = graph();
        let dir = tempfile::tempdir().unwrap();
        let (image, room) = (image(dir.path(), "s", SIZE as usize, 0), image(dir.path(), "t", SIZE as usize, 9));
        let target = with(bench::file("room", &room), &json!({ "discard": "unmap" }));
        add(&graph, bench::file("image", &image)).await.unwrap();
        add(&graph, target).await.unwrap();
        let all = Fleecing::over(graph, "image", "room", json!({})).await;
        let (guest, backup) = all.lanes();
        put(&guest, 0, 2, 512).await.unwrap();
        has(&backup, range(0, CLUSTER), 0).await;
        let Extent { len, place } = backup.map(&enter(&backup).await, range(0, SIZE)).await.unwrap();
        assert_eq!((len, place), (CLUSTER, Place::Zero { allocated: true }));
        let Extent { place, .. } = backup.map(&enter(&backup).await, range(CLUSTER, 512)).await.unwrap();
        assert_eq!(place, Place::Here);
    });
}

#[test]
fn what_makes_no_snapshot_is_refused() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::default();
        support::add(&graph, mem("source", 1, &seen)).await;
        support::add(&graph, mem("target", 0, &seen)).await;
        support::add(&graph, support::tiny("tiny")).await;
        add(&graph, json!({ "driver": "null-co", "node-name": "ro", "size": SIZE, "read-only": true })).await.unwrap();
        add(&graph, json!({ "driver": "null-co", "node-name": "vast", "size": 1u64 << 62 })).await.unwrap();
        let prefix = "Cannot create block-copy-state: min-cluster-size";
        let most = i64::MAX;
        for (options, reason) in [
            (
                json!({ "driver": "copy-before-write", "node-name": "c", "file": "source" }),
                "Parameter 'target' is missing",
            ),
            (
                json!({ "driver": "copy-before-write", "node-name": "c", "target": "source" }),
                "Parameter 'file' is missing",
            ),
            (cbw("source", "nope"), "Cannot find device='nope' nor node-name='nope'"),
            (cbw("source", "tiny"), "The target is smaller (512 bytes) than the source (1048576 bytes)"),
            (cbw("source", "ro"), "Block node 'ro' is read-only"),
            (cbw("vast", "vast"), "A snapshot of 70368744177664 clusters is more than is supported"),
            (
                with(cbw("source", "target"), &json!({ "min-cluster-size": 1000 })),
                &format!("{prefix} needs to be a power of 2"),
            ),
            (
                with(cbw("source", "target"), &json!({ "min-cluster-size": most })),
                &format!("{prefix} needs to be a power of 2"),
            ),
            (
                with(cbw("source", "target"), &json!({ "min-cluster-size": 1u64 << 63 })),
                &format!("{prefix} too large: {} > {most}", 1u64 << 63),
            ),
            (with(cbw("source", "target"), &json!({ "cbw-timeout": -1 })), "Parameter 'cbw-timeout'"),
            (with(cbw("source", "target"), &json!({ "cbw-timeout": 1u64 << 32 })), "Parameter 'cbw-timeout'"),
            (
                with(cbw("source", "target"), &json!({ "on-cbw-error": "x" })),
                "Parameter 'on-cbw-error' does not accept value 'x'",
            ),
        ] {
            let error = add(&graph, options.clone()).await.expect_err(&options.to_string());
            let error = error.replace("Value '-1' is out of range for parameter", "Parameter");
            let error = error.replace("Value '4294967296' is out of range for parameter", "Parameter");
            assert!(error.starts_with(reason), "{error}");
        }
        assert_eq!(graph.nodes().len(), 5);
    });
}

#[test]
fn a_view_of_what_keeps_no_snapshot_shows_nothing() {
    run_control(|local| async move {
        let graph = graph();
        support::add(&graph, mem("cbw", 1, &Arc::default())).await;
        let node = add(&graph, access()).await.unwrap();
        let port = attach(&graph, node, BACKUP).await.unwrap();
        let lane = port.handle().lane(&local);
        assert_eq!(read(&lane, range(0, 512)).await, Err(IoError::Unsupported));
        assert_eq!(lane.map(&enter(&lane).await, range(0, 512)).await, Err(IoError::Unsupported));
    });
}

#[test]
fn the_view_is_not_written_to() {
    run_control(|_| async {
        let all = Fleecing::new(json!({})).await;
        let (_, backup) = all.lanes();
        assert_eq!(put(&backup, 0, 2, 512).await, Err(IoError::Unsupported));
        let zeroes = backup.write_zeroes(&enter(&backup).await, range(0, 512), WriteFlags::default()).await;
        assert_eq!(zeroes, Err(IoError::Unsupported));
    });
}

/// Otherwise somebody writes past the filter, and the snapshot changes.
#[test]
fn the_source_has_no_other_writer_while_the_snapshot_is_used() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::default();
        let source = support::add(&graph, mem("source", 1, &seen)).await;
        support::add(&graph, mem("target", 0, &seen)).await;
        let cbw = add(&graph, cbw("source", "target")).await.unwrap();
        // Nobody uses the filter yet: this is how it comes above a node that is in use.
        let beside = attach(&graph, source, writer()).await.unwrap();
        let error = add(&graph, access()).await.unwrap_err();
        assert!(error.contains("'write'"), "{error}");
        attach(&graph, cbw, writer()).await.err().unwrap();
        beside.detach(&mut graph.permit()).await;
        add(&graph, access()).await.unwrap();
        attach(&graph, source, writer()).await.err().unwrap();
        graph.permit().resize(cbw, 2 * SIZE, Preallocation::Off).await.unwrap_err();
        graph.permit().resize(source, 2 * SIZE, Preallocation::Off).await.unwrap_err();
    });
}

/// The filter has no user, so permissions say nothing against the resize.
#[test]
fn a_resize_that_the_filter_refuses_cuts_nothing_off() {
    let dir = tempfile::tempdir().unwrap();
    let source = image(dir.path(), "source", SIZE as usize, 5);
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, bench::file("source", &source)).await.unwrap();
        support::add(&graph, mem("target", 0, &Arc::default())).await;
        add(&graph, cbw("source", "target")).await.unwrap();
        let error = graph.permit().resize(node, SIZE / 2, Preallocation::Off).await.unwrap_err().full();
        assert!(error.contains("while a snapshot is kept"), "{error}");
        assert_eq!(std::fs::read(&source).unwrap(), vec![5; SIZE as usize]);
    });
}

#[test]
fn a_copy_that_fails_breaks_the_write_or_the_snapshot() {
    run_control(|_| async {
        let all = Fleecing::new(json!({})).await;
        let (guest, backup) = all.lanes();
        all.source.fail_reads.store(1, Ordering::Relaxed);
        assert_eq!(put(&guest, 0, 2, 512).await, Err(IoError::Os(libc::EIO)));
        has(&backup, range(0, SIZE), 1).await;
        put(&guest, 0, 2, 512).await.unwrap();
        has(&backup, range(0, SIZE), 1).await;

        let all = Fleecing::new(json!({ "on-cbw-error": "break-snapshot" })).await;
        let (guest, backup) = all.lanes();
        put(&guest, 0, 2, 512).await.unwrap();
        all.source.fail_reads.store(1, Ordering::Relaxed);
        put(&guest, CLUSTER, 2, 512).await.unwrap();
        assert_eq!(read(&backup, range(0, 512)).await.map(drop), NO_ACCESS, "what was copied, too");
        assert_eq!(read(&backup, range(SIZE - 512, 512)).await.map(drop), NO_ACCESS);
        assert_eq!(backup.map(&enter(&backup).await, range(0, 512)).await.map(drop), NO_ACCESS);
        let writes = all.target.writes.load(Ordering::Relaxed);
        put(&guest, 4 * CLUSTER, 2, 512).await.unwrap();
        assert_eq!(all.target.writes.load(Ordering::Relaxed), writes, "nothing is copied for nobody");
    });
}

#[test]
fn what_is_discarded_is_copied_no_more_and_read_no_more() {
    run_control(|_| async {
        let all = Fleecing::new(json!({})).await;
        let (guest, backup) = all.lanes();
        put(&guest, 0, 2, 512).await.unwrap();
        // Clusters 0 (copied) and 1 (not), and a part of 2.
        backup.discard(&enter(&backup).await, range(0, 2 * CLUSTER + 512)).await.unwrap();
        for at in [0, CLUSTER, 2 * CLUSTER - 512] {
            assert_eq!(read(&backup, range(at, 512)).await.map(drop), NO_ACCESS);
            assert_eq!(backup.map(&enter(&backup).await, range(at, 512)).await.map(drop), NO_ACCESS);
        }
        assert_eq!(read(&backup, range(0, SIZE)).await.map(drop), NO_ACCESS);
        put(&guest, 0, 3, 2 * CLUSTER).await.unwrap();
        assert_eq!(all.target.writes.load(Ordering::Relaxed), 1);
        put(&guest, 2 * CLUSTER, 3, 512).await.unwrap();
        has(&backup, range(2 * CLUSTER, SIZE - 2 * CLUSTER), 1).await;
    });
}

#[test]
fn only_what_a_bitmap_names_is_kept() {
    run_control(|_| async {
        let graph = graph();
        let source = support::add(&graph, mem("source", 1, &Arc::default())).await;
        let target = Arc::<Seen>::default();
        support::add(&graph, mem("target", 0, &target)).await;
        let other = add(&graph, json!({ "driver": "null-co", "node-name": "other", "size": 512 })).await.unwrap();
        let added = |node| {
            let what = BitmapAction::Add { granularity: Some(512), recording: true, persistent: false };
            Box::new(BitmapChange { node, name: "b".into(), what })
        };
        graph.permit().transact(vec![added(source), added(other)]).await.unwrap();
        let before = attach(&graph, source, writer()).await.unwrap();
        put(&before.handle().lane(&Local::current()), 3 * CLUSTER + 512, 1, 512).await.unwrap();
        before.detach(&mut graph.permit()).await;
        for (bitmap, reason) in [
            (json!({ "node": "nope", "name": "b" }), "Node 'nope' not found"),
            (json!({ "node": "source", "name": "c" }), "Dirty bitmap 'c' not found"),
            (
                json!({ "node": "other", "name": "b" }),
                "Cannot create block-copy-state: Failed to merge bitmap 'b' to internal copy-bitmap: Bitmaps are of \
                 different sizes (destination size is 1048576, source size is 512) and can't be merged",
            ),
        ] {
            let refused = add(&graph, with(cbw("source", "target"), &json!({ "bitmap": bitmap }))).await.unwrap_err();
            assert_eq!(refused, reason);
        }
        let named = json!({ "bitmap": { "node": "source", "name": "b" } });
        let filter = add(&graph, with(cbw("source", "target"), &named)).await.unwrap();
        let snapshot = add(&graph, access()).await.unwrap();
        let (guest, backup) =
            (attach(&graph, filter, writer()).await.unwrap(), attach(&graph, snapshot, BACKUP).await.unwrap());
        let (guest, backup) = (guest.handle().lane(&Local::current()), backup.handle().lane(&Local::current()));
        put(&guest, 0, 2, SIZE).await.unwrap();
        assert_eq!(target.writes.load(Ordering::Relaxed), 1);
        has(&backup, range(3 * CLUSTER, CLUSTER), 1).await;
        assert_eq!(read(&backup, range(3 * CLUSTER - 512, 1024)).await.map(drop), NO_ACCESS);
        let refused = reopen(&graph, &[cbw("source", "target")]).await.unwrap_err();
        assert_eq!(refused, "Cannot change the option 'bitmap'");
    });
}

/// The direct path knows, without asking anybody, what may be written.
#[test]
fn settled_clusters_and_all_reads_go_the_direct_way() {
    run_control(|_| async {
        let graph = graph();
        for name in ["fast", "room"] {
            add(&graph, json!({ "driver": "null-co", "node-name": name, "size": SIZE })).await.unwrap();
        }
        let all = Fleecing::over(graph, "fast", "room", json!({})).await;
        let (guest, backup) = all.lanes();
        let pin = enter(&guest).await;
        let goes = |write, at| guest.direct(&pin, DirectRequest { write, at, fua: false, memory_bits: 0 }).is_some();
        assert!(goes(false, range(0, 512)) && !goes(true, range(0, 512)));
        put(&guest, 0, 2, 512).await.unwrap();
        assert!(goes(true, range(0, CLUSTER)) && !goes(true, range(CLUSTER - 512, 1024)));
        backup.discard(&enter(&backup).await, range(CLUSTER, CLUSTER)).await.unwrap();
        assert!(goes(true, range(0, 2 * CLUSTER)));
    });
}

/// Who reads much of the snapshot keeps writers from where he is, not from all that he is going to read.
#[test]
fn a_long_read_of_the_snapshot_is_in_the_way_of_few_writes() {
    run_control(|_| async {
        const LEN: u64 = 4 << 20;
        let (graph, valve) = (graph(), Valve::shut());
        let big = |name: &str| {
            let mem = Mem::new(vec![1; LEN as usize], &Arc::default());
            NewNode::new(name.into(), NodeOptions::default(), |_| (mem, LEN))
        };
        let below = support::add(&graph, big("below")).await;
        support::add(&graph, park("slow", below, &valve, false)).await;
        support::add(&graph, big("kept")).await;
        let all = Fleecing::over(graph, "slow", "kept", json!({})).await;
        let backup = all.backup.handle();
        let reading = beside(async move { read(&backup.lane(&Local::current()), range(0, LEN)).await });
        until(|| valve.parked() > 0).await;
        valve.open_for_others();
        let guest = all.guest.handle();
        let written = beside(async move { put(&guest.lane(&Local::current()), LEN - CLUSTER, 2, CLUSTER).await });
        until(|| written.borrow().is_some()).await;
        assert_eq!((written.take(), reading.take()), (Some(Ok(())), None));
        valve.open();
        until(|| reading.borrow().is_some()).await;
        assert!(reading.take().unwrap().unwrap().iter().all(|byte| *byte == 1));
    });
}

/// A snapshot may have very many clusters. Whoever gives them all back leaves the thread to others in between.
#[test]
fn a_long_discard_of_the_snapshot_leaves_the_thread_to_others() {
    run_control(|_| async {
        const LEN: u64 = 1 << 36;
        let graph = graph();
        for name in ["huge", "kept"] {
            let null = json!({ "driver": "null-co", "node-name": name, "size": LEN, "read-zeroes": true });
            add(&graph, null).await.unwrap();
        }
        let all = Fleecing::over(graph, "huge", "kept", json!({})).await;
        let backup = all.backup.handle();
        let discarded = beside(async move {
            let lane = backup.lane(&Local::current());
            lane.discard(&enter(&lane).await, range(0, LEN)).await
        });
        let mut turns = 0;
        while discarded.borrow().is_none() {
            turns += 1;
            yield_now().await;
        }
        assert_eq!(discarded.take(), Some(Ok(())));
        assert!(turns >= 32, "{turns} turns for others");
    });
}

/// A target that hangs: the guest's request has its answer in time, and the copy is in flight until it is over.
#[test]
fn a_target_that_hangs_holds_requests_no_longer_than_the_timeout() {
    for (policy, answer) in [("break-guest-write", Err(IoError::Os(libc::ETIMEDOUT))), ("break-snapshot", Ok(()))] {
        run_control(|_| async move {
            let (graph, valve) = (graph(), Valve::shut());
            let below = support::add(&graph, mem("below", 0, &Arc::default())).await;
            support::add(&graph, park("slow", below, &valve, false)).await;
            let all =
                Fleecing::over(graph, "source", "slow", json!({ "cbw-timeout": 1, "on-cbw-error": policy })).await;
            let (guest, backup) = all.lanes();
            assert_eq!(put(&guest, 0, 2, 512).await, answer);
            // The next one waits for the same copy, and no longer.
            assert_eq!(put(&guest, 512, 3, 512).await, answer);
            assert_eq!(all.guest.in_flight(), 1);
            let refused = impatient(&all.graph).drain(&[all.cbw]).await.err().expect("the copy is in flight").full();
            assert!(refused.contains("1 in flight"), "{refused}");
            valve.open();
            drop(all.graph.permit().drain(&[all.cbw]).await.unwrap());
            if answer.is_ok() {
                assert_eq!(read(&backup, range(0, 512)).await.map(drop), NO_ACCESS);
                has(&guest, range(0, 512), 2).await;
            } else {
                has(&backup, range(0, SIZE), 1).await;
                put(&guest, 0, 2, 512).await.unwrap();
                has(&backup, range(0, SIZE), 1).await;
            }
        });
    }
}

/// What cannot be copied in time under another policy can be, once the options say so.
#[test]
fn the_policy_and_the_timeout_may_change_and_the_clusters_may_not() {
    run_control(|_| async {
        let all = Fleecing::new(json!({})).await;
        let (guest, backup) = all.lanes();
        let again = with(cbw("source", "target"), &json!({ "on-cbw-error": "break-snapshot", "cbw-timeout": 5 }));
        reopen(&all.graph, &[again]).await.unwrap();
        all.source.fail_reads.store(1, Ordering::Relaxed);
        put(&guest, 0, 2, 512).await.unwrap();
        assert_eq!(read(&backup, range(0, 512)).await.map(drop), NO_ACCESS);
        let other = with(cbw("source", "target"), &json!({ "min-cluster-size": 1 << 20 }));
        assert_eq!(reopen(&all.graph, &[other]).await.unwrap_err(), "Cannot change the option 'min-cluster-size'");
    });
}

/// Writers of one cluster on two threads: one copies, all others wait for it, and no drain hangs on them.
#[test]
fn writers_of_one_cluster_share_one_copy() {
    run_control(|_| async {
        let (graph, valve) = (graph(), Valve::shut());
        let target = Arc::<Seen>::default();
        let below = support::add(&graph, mem("below", 0, &target)).await;
        support::add(&graph, park("slow", below, &valve, true)).await;
        let all = Fleecing::over(graph, "source", "slow", json!({})).await;
        let threads = [io_thread(), io_thread()];
        let writers: Vec<_> = (0..16u64)
            .map(|number| {
                started(&threads[number as usize % 2], &all.guest.handle(), async move |lane| {
                    put(&lane, number * 512, 2, 512).await
                })
            })
            .collect();
        while all.guest.in_flight() < 16 || valve.parked() == 0 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        // Parked at the target they are hurried through, whoever waits for whom.
        drop(all.graph.permit().drain(&[all.cbw]).await.unwrap());
        for writer in writers {
            writer.await.unwrap().unwrap();
        }
        assert_eq!(target.writes.load(Ordering::Relaxed), 1);
        valve.open();
        let (guest, backup) = all.lanes();
        has(&backup, range(0, SIZE), 1).await;
        has(&guest, range(0, 16 * 512), 2).await;
    });
}

/// A backup may go although the guest's copy hangs: what it gives back is a hint, and what it reads waits for nobody.
#[test]
fn a_backup_that_waits_for_a_copy_is_let_go() {
    run_control(|_| async {
        let (graph, valve) = (graph(), Valve::shut());
        let below = support::add(&graph, mem("below", 0, &Arc::default())).await;
        support::add(&graph, park("slow", below, &valve, false)).await;
        let all = Fleecing::over(graph, "source", "slow", json!({})).await;
        let (thread, other) = (io_thread(), io_thread());
        let guest = started(&thread, &all.guest.handle(), async |lane| put(&lane, 0, 2, 512).await);
        while valve.parked() == 0 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        on(&other, &all.backup.handle(), async |lane| has(&lane, range(0, SIZE), 1).await).await;
        let backup = started(&other, &all.backup.handle(), async |lane| {
            lane.discard(&enter(&lane).await, range(0, CLUSTER)).await
        });
        while all.backup.in_flight() == 0 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        all.backup.detach(&mut all.graph.permit()).await;
        assert_eq!(backup.await.unwrap(), Ok(()));
        assert_eq!(all.guest.in_flight(), 1);
        valve.open();
        guest.await.unwrap().unwrap();
    });
}

// ---- a guest that writes while a backup reads ----------------------------------------------------------------------

/// Bytes that differ everywhere.
fn pattern(size: u64) -> Vec<u8> {
    (0..size).map(|at| (at / 512 % 251) as u8 ^ (at % 7) as u8).collect()
}

fn patterned(dir: &Path, name: &str, size: u64) -> String {
    let path = dir.join(name);
    std::fs::write(&path, pattern(size)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Random requests of a guest; gives what its disk must have afterwards.
async fn guest_at_work(lane: Rc<PortLane>, seed: u64, share: ByteRange, steps: usize) -> Vec<u8> {
    let mut model = read(&lane, share).await.unwrap();
    let mut random = Random(seed);
    for step in 0..steps {
        let at = random.range(share.len());
        let here = at.start() as usize..at.end() as usize;
        let there = range(share.start() + at.start(), at.len());
        match random.below(8) {
            0 => {
                lane.write_zeroes(&enter(&lane).await, there, WriteFlags::default()).await.unwrap();
                model[here].fill(0);
            }
            1 => {
                lane.discard(&enter(&lane).await, there).await.unwrap();
                model[here].copy_from_slice(&read(&lane, there).await.unwrap());
            }
            _ => {
                let bytes = vec![step as u8 ^ seed as u8; at.len() as usize];
                write(&lane, there.start(), &bytes, WriteFlags::default()).await.unwrap();
                model[here].copy_from_slice(&bytes);
            }
        }
    }
    assert!(read(&lane, share).await.unwrap() == model, "the guest's own disk is not as it wrote it");
    model
}

/// Reads random parts of the snapshot until it is told to stop; gives how many.
async fn backup_at_work(lane: Rc<PortLane>, expected: Arc<Vec<u8>>, stop: Arc<AtomicBool>) -> usize {
    let mut random = Random(7);
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        let at = random.range(expected.len() as u64);
        let seen = read(&lane, at).await.unwrap();
        let differs = seen.iter().zip(&expected[at.start() as usize..]).position(|(seen, expected)| seen != expected);
        assert_eq!(differs, None, "the snapshot has changed in {at:?}");
        reads += 1;
    }
    reads
}

#[test]
fn the_snapshot_stays_as_it_was_while_two_queues_write() {
    let dir = tempfile::tempdir().unwrap();
    // Neither the sector nor the cluster at the end is complete.
    let size = (4 << 20) + 9 * 512;
    for engine in [json!({ "aio": "threads" }), json!({ "aio": "io_uring" })] {
        let (source, room) = (patterned(dir.path(), "source", size), image(dir.path(), "room", size as usize, 0xee));
        run_control(|_| async {
            let graph = graph();
            add(&graph, with(with(bench::file("image", &source), &engine), &json!({ "discard": "unmap" })))
                .await
                .unwrap();
            add(&graph, with(bench::file("room", &room), &engine)).await.unwrap();
            let all = Fleecing::over(graph, "image", "room", json!({})).await;
            let threads = [io_thread(), io_thread(), io_thread()];
            let (expected, stop) = (Arc::new(pattern(size)), Arc::<AtomicBool>::default());
            let backup = {
                let (expected, stop) = (expected.clone(), stop.clone());
                started(&threads[0], &all.backup.handle(), |lane| backup_at_work(lane, expected, stop))
            };
            // Each has its own sectors; they share clusters.
            let half = size / 1024 * 512;
            let guests = [(1, range(0, half)), (2, range(half, size - half))].map(|(number, share)| {
                started(&threads[number], &all.guest.handle(), move |lane| {
                    guest_at_work(lane, 40 + number as u64, share, 300)
                })
            });
            for guest in guests {
                guest.await.unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            assert!(backup.await.unwrap() > 0);
            let (_, backup) = all.lanes();
            assert!(read(&backup, range(0, size)).await.unwrap() == *expected);
        });
    }
}

/// The filter comes under a guest that is at work, and goes again.
#[test]
fn the_filter_comes_and_goes_under_a_guest_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let size = 2 << 20;
    let (source, room) = (patterned(dir.path(), "source", size), image(dir.path(), "room", size as usize, 0xee));
    run_control(|_| async {
        let graph = graph();
        let file = add(&graph, bench::file("image", &source)).await.unwrap();
        add(&graph, bench::file("room", &room)).await.unwrap();
        let disk = add(&graph, json!({ "driver": "raw", "node-name": "disk", "file": "image" })).await.unwrap();
        let guest = attach(&graph, disk, writer()).await.unwrap();
        let thread = io_thread();
        let at_work = started(&thread, &guest.handle(), move |lane| guest_at_work(lane, 5, range(0, size), 1500));
        let edge = graph.child(disk, "file").unwrap();
        for _ in 0..3 {
            Local::current().sleep(Duration::from_millis(5)).await;
            let filter = add(&graph, cbw("image", "room")).await.unwrap();
            lead(&graph, disk, edge, filter).await;
            let snapshot = add(&graph, access()).await.unwrap();
            let backup = attach(&graph, snapshot, READER).await.unwrap();
            let first =
                on(&io_thread(), &backup.handle(), async move |lane| read(&lane, range(0, size)).await.unwrap()).await;
            Local::current().sleep(Duration::from_millis(5)).await;
            let again =
                on(&io_thread(), &backup.handle(), async move |lane| read(&lane, range(0, size)).await.unwrap()).await;
            assert!(first == again, "a snapshot is of one moment");
            backup.detach(&mut graph.permit()).await;
            graph.permit().remove(snapshot).await.unwrap();
            lead(&graph, disk, edge, file).await;
            graph.permit().remove(filter).await.unwrap();
        }
        at_work.await.unwrap();
    });
}

/// Lets an edge lead to another node, under a drain.
async fn lead(graph: &Rc<Graph>, owner: NodeId, edge: ChildId, to: NodeId) {
    let mut permit = graph.permit();
    let drained = permit.drain(&[owner]).await.unwrap();
    let locks = drained.prepare(|edit, set| edit.set_edge(set.owner(owner)?, edge, to)).await.unwrap();
    let committed = drained.write(|edit, set| edit.set_edge(set.owner(owner)?, edge, to)).unwrap();
    drop(locks);
    committed.close(&mut permit).await;
}

/// A small generator (xorshift): the same requests in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// Some sectors inside `size`.
    fn range(&mut self, size: u64) -> ByteRange {
        let sectors = size / 512;
        let start = self.below(sectors);
        let len = 1 + self.below((sectors - start).min(200));
        range(start * 512, len * 512)
    }
}
