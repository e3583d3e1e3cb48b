//! blkverify: two disks that have to agree, and what becomes of a request where they do not.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bench::{add, attach, enter, flush, io_thread, on, range, read, started, with, write, writer};
use block_core::base::IoError;
use block_core::drivers::filter::blkverify::BlkVerify;
use block_core::graph::{Graph, NewNode, NodeId, NodeOptions, Preallocation, WriteFlags};
use block_core::pipeline::Filtered;
use block_core::port::Port;
use block_core::rt::run_control;
use serde_json::{Value, json};
use support::{Mem, Seen, Valve, mem, park};

const SIZE: u64 = 65536;
const NO: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };
const MISMATCH: IoError = IoError::Os(libc::EIO);

/// Two memory disks below a blkverify node.
struct Pair {
    graph: Rc<Graph>,
    node: NodeId,
    port: Port,
    test: Arc<Seen>,
    raw: Arc<Seen>,
}

impl Pair {
    async fn new(test: u8, raw: u8) -> Self {
        let graph = Graph::new(Arc::new(|_| ()));
        let seen = (Arc::default(), Arc::default());
        graph.permit().add(mem("test", test, &seen.0)).await.unwrap();
        graph.permit().add(mem("raw", raw, &seen.1)).await.unwrap();
        let node = add(&graph, verify(json!({}))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        Self { graph, node, port, test: seen.0, raw: seen.1 }
    }

    fn mismatches(&self) -> u64 {
        self.graph.look_into(self.node, |driver: &Filtered<BlkVerify>| driver.0.mismatches()).unwrap()
    }
}

fn verify(more: Value) -> Value {
    with(json!({ "driver": "blkverify", "node-name": "v", "test": "test", "raw": "raw", "discard": "unmap" }), &more)
}

#[test]
fn disks_that_agree_are_one() {
    run_control(async |local| {
        let pair = Pair::new(7, 7).await;
        let lane = pair.port.handle().lane(&local);
        write(&lane, 100, &[1; 5000], NO).await.unwrap();
        lane.write_zeroes(&enter(&lane).await, range(200, 100), NO).await.unwrap();
        // A discard leaves what it likes, so none gets through.
        lane.discard(&enter(&lane).await, range(0, 4096)).await.unwrap();
        flush(&lane).await.unwrap();
        assert_eq!(read(&lane, range(99, 102)).await.unwrap(), [&[7][..], &[1; 100], &[0]].concat());
        assert_eq!((pair.test.flushes.load(Relaxed), pair.raw.flushes.load(Relaxed)), (1, 1));
        assert_eq!(pair.mismatches(), 0);
    });
}

#[test]
fn other_bytes_fail_the_read_and_are_counted() {
    run_control(async |local| {
        let pair = Pair::new(7, 8).await;
        let lane = pair.port.handle().lane(&local);
        assert_eq!(read(&lane, range(0, 512)).await, Err(MISMATCH));
        assert_eq!(pair.mismatches(), 1);
        write(&lane, 0, &[1; 512], NO).await.unwrap();
        assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [1; 512]);
        assert_eq!(read(&lane, range(511, 2)).await, Err(MISMATCH));
        assert_eq!(pair.mismatches(), 2);
    });
}

#[test]
fn other_results_are_a_mismatch_and_the_same_error_is_not() {
    run_control(async |local| {
        let pair = Pair::new(7, 7).await;
        let lane = pair.port.handle().lane(&local);
        pair.test.fail_reads.store(1, Relaxed);
        assert_eq!(read(&lane, range(0, 512)).await, Err(MISMATCH));
        assert_eq!(pair.mismatches(), 1);
        *pair.test.flush_error.lock().unwrap() = Some(IoError::NoSpace);
        assert_eq!(flush(&lane).await, Err(MISMATCH));
        *pair.raw.flush_error.lock().unwrap() = Some(IoError::NoSpace);
        assert_eq!(flush(&lane).await, Err(IoError::NoSpace));
        assert_eq!(pair.mismatches(), 2);
    });
}

#[test]
fn disks_of_different_sizes_are_refused() {
    run_control(async |_| {
        let pair = Pair::new(7, 7).await;
        let Pair { graph, node, port, .. } = pair;
        port.detach(&mut graph.permit()).await;
        let tiny =
            NewNode::new("tiny".into(), NodeOptions::default(), |_| (Mem::new(vec![0; 512], &Arc::default()), 512));
        graph.permit().add(tiny).await.unwrap();
        let error = add(&graph, verify(json!({ "node-name": "w", "raw": "tiny" }))).await.unwrap_err();
        assert_eq!(error, "blkverify needs disks of one size: 'test' has 65536 bytes, 'raw' 512");
        for node in [node, graph.find("raw").unwrap(), graph.find("test").unwrap()] {
            graph.permit().resize(node, 2 * SIZE, Preallocation::Off).await.unwrap_err();
        }
        assert_eq!(graph.node(node).unwrap().geometry.size, SIZE);
    });
}

/// Two writes meet, and one disk is slower: both disks end up with the same one.
#[test]
fn writes_that_overlap_are_in_one_order_on_both_disks() {
    run_control(async |local| {
        let graph = Graph::new(Arc::new(|_| ()));
        let valve = Valve::shut();
        graph.permit().add(mem("below", 7, &Arc::default())).await.unwrap();
        graph.permit().add(mem("raw", 7, &Arc::default())).await.unwrap();
        let below = graph.find("below").unwrap();
        graph.permit().add(park("test", below, &valve, false)).await.unwrap();
        let node = add(&graph, verify(json!({}))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let thread = io_thread();
        let first = started(&thread, &port.handle(), async |lane| write(&lane, 0, &[1; 1024], NO).await);
        while valve.parked() < 1 {
            on(&thread, &port.handle(), async |_| ()).await;
        }
        valve.open_for_others();
        let second = started(&thread, &port.handle(), async |lane| write(&lane, 512, &[2; 1024], NO).await);
        let reader = started(&thread, &port.handle(), async |lane| read(&lane, range(0, 2048)).await);
        for _ in 0..100 {
            on(&thread, &port.handle(), async |_| ()).await;
        }
        valve.open();
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        reader.await.unwrap().unwrap();
        let lane = port.handle().lane(&local);
        assert_eq!(read(&lane, range(0, 2048)).await.unwrap()[512..1536], [2; 1024]);
        assert_eq!(graph.look_into(node, |driver: &Filtered<BlkVerify>| driver.0.mismatches()), Some(0));
    });
}

/// Four threads write their own parts at once, and a drain comes between while a disk lets nobody through.
#[test]
fn requests_of_several_threads_and_a_drain_agree() {
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let valve = Valve::shut();
        graph.permit().add(mem("below", 7, &Arc::default())).await.unwrap();
        graph.permit().add(mem("raw", 7, &Arc::default())).await.unwrap();
        let below = graph.find("below").unwrap();
        graph.permit().add(park("test", below, &valve, true)).await.unwrap();
        let node = add(&graph, verify(json!({}))).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let mut threads = Vec::new();
        for number in 0..4 {
            let (thread, (done, result)) = (io_thread(), block_core::rt::sync::oneshot());
            let handle = port.handle();
            thread.remote().spawn(move |local| async move {
                let lane = handle.lane(&local);
                for step in (number..64).step_by(4) {
                    write(&lane, step * 1024, &[1; 1024], NO).await.unwrap();
                    assert_eq!(read(&lane, range(step * 1024, 1024)).await.unwrap(), [1; 1024]);
                }
                let _ = done.send(());
            });
            threads.push((thread, result));
        }
        while valve.parked() < 4 {
            on(&threads[0].0, &port.handle(), async |_| ()).await;
        }
        drop(graph.permit().drain(&[node]).await.unwrap());
        valve.open();
        for (_, result) in &mut threads {
            result.await.unwrap();
        }
        assert_eq!(graph.look_into(node, |driver: &Filtered<BlkVerify>| driver.0.mismatches()), Some(0));
    });
}
