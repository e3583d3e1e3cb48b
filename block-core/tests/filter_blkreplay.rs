//! blkreplay: the order in which requests end is that of the seed, and no other.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;

use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bench::{add, attach, enter, flush, io_thread, on, range, read, reopen, with, write, writer};
use block_core::base::IoError;
use block_core::graph::{Graph, NodeId, WriteFlags};
use block_core::port::Port;
use block_core::rt::{Local, run_control};
use serde_json::{Value, json};

const NO: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };

async fn replay(more: Value) -> (Rc<Graph>, NodeId, Port) {
    let graph = Graph::new(Arc::new(|_| ()));
    let image = json!({ "driver": "null-co", "size": 1 << 20, "read-zeroes": true });
    let node =
        add(&graph, with(json!({ "driver": "blkreplay", "node-name": "n", "image": image }), &more)).await.unwrap();
    let port = attach(&graph, node, writer()).await.unwrap();
    (graph, node, port)
}

/// Eight writes at once from each of so many threads; gives the order in which they ended.
async fn order(seed: u64, window: u64, threads: usize) -> Vec<usize> {
    let (_graph, _, port) = replay(json!({ "x-seed": seed, "x-window": window, "x-patience-ms": 100 })).await;
    let ended = Arc::new(Mutex::new(Vec::new()));
    let threads: Vec<_> = (0..threads).map(|_| io_thread()).collect();
    let mut running = Vec::new();
    for at in 0..8 * threads.len() {
        let thread = &threads[at / 8];
        let (handle, ended, (done, result)) = (port.handle(), ended.clone(), block_core::rt::sync::oneshot());
        thread.remote().spawn(move |local| async move {
            write(&handle.lane(&local), at as u64 * 512, &[1; 512], NO).await.unwrap();
            ended.lock().unwrap().push(at);
            let _ = done.send(());
        });
        running.push(result);
    }
    for result in running {
        result.await.unwrap();
    }
    let ended = ended.lock().unwrap();
    ended.clone()
}

#[test]
fn the_same_seed_gives_the_same_order_and_another_one_another() {
    run_control(async |_| {
        let first = order(7, 8, 1).await;
        assert_eq!(order(7, 8, 1).await, first);
        assert_ne!(order(8, 8, 1).await, first);
        assert_ne!(first, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(order(7, 1, 1).await, [0, 1, 2, 3, 4, 5, 6, 7], "with a window of 1 nobody waits");
    });
}

/// With a window of all of them, it does not matter which thread was faster.
#[test]
fn which_thread_was_faster_does_not_matter() {
    run_control(async |_| {
        let first = order(3, 16, 2).await;
        assert_eq!(first.len(), 16);
        assert_eq!(order(3, 16, 2).await, first);
    });
}

#[test]
fn every_kind_of_request_ends_and_results_are_kept() {
    run_control(async |local| {
        let (graph, _, port) = replay(json!({ "x-patience-ms": 1 })).await;
        let lane = port.handle().lane(&local);
        write(&lane, 0, &[1; 512], NO).await.unwrap();
        assert_eq!(read(&lane, range(0, 512)).await.unwrap(), [0; 512]);
        lane.write_zeroes(&enter(&lane).await, range(0, 512), NO).await.unwrap();
        flush(&lane).await.unwrap();
        let failing = json!({ "driver": "blkdebug", "image": "n", "inject-error": [{ "event": "none" }] });
        let options = json!({ "driver": "blkreplay", "node-name": "top", "x-patience-ms": 1, "image": failing });
        port.detach(&mut graph.permit()).await;
        let top = add(&graph, options).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        assert_eq!(read(&port.handle().lane(&local), range(0, 512)).await, Err(IoError::Os(libc::EIO)));
    });
}

#[test]
fn a_drain_lets_all_end() {
    run_control(async |_| {
        let (graph, node, port) = replay(json!({ "x-window": 1000, "x-patience-ms": u32::MAX })).await;
        let thread = io_thread();
        let mut running = Vec::new();
        for at in 0..8 {
            let (handle, (done, result)) = (port.handle(), block_core::rt::sync::oneshot());
            thread.remote().spawn(move |local| async move {
                let _ = done.send(write(&handle.lane(&local), at as u64 * 512, &[1; 512], NO).await);
            });
            running.push(result);
        }
        on(&thread, &port.handle(), async |_| Local::current().sleep(Duration::from_millis(20)).await).await;
        assert_eq!(port.in_flight(), 8);
        drop(graph.permit().drain(&[node]).await.unwrap());
        for result in running {
            result.await.unwrap().unwrap();
        }
    });
}

#[test]
fn options_that_mean_nothing_are_refused() {
    run_control(async |_| {
        let (graph, _, port) = replay(json!({})).await;
        port.detach(&mut graph.permit()).await;
        for (wrong, reason) in [
            (json!({ "x-window": 0 }), "Value '0' is out of range for parameter 'x-window'"),
            (json!({ "x-seed": -1 }), "Parameter 'x-seed' expects uint64"),
            (json!({ "image": "nope" }), "Cannot find device='nope' nor node-name='nope'"),
        ] {
            let options = with(json!({ "driver": "blkreplay", "node-name": "m", "image": "n" }), &wrong);
            assert_eq!(add(&graph, options).await.unwrap_err(), reason);
        }
        let most = json!({ "x-seed": u64::MAX, "x-window": u32::MAX, "x-patience-ms": u32::MAX });
        add(&graph, with(json!({ "driver": "blkreplay", "node-name": "m", "image": "n" }), &most)).await.unwrap();
        let image = json!({ "driver": "null-co", "size": 1 << 20, "read-zeroes": true });
        let again = json!({ "driver": "blkreplay", "node-name": "n", "x-seed": 9, "image": image });
        reopen(&graph, &[again]).await.unwrap();
    });
}
