//! What a request writes, counted: two threads that send requests through the same nodes write to no cache line of each
//! other's, so neither slows the other down. Run with
//! `RUSTFLAGS="--cfg counted" cargo test -p block-core --test shared_lines --target-dir target/counted`.
//!
//! Counted are atomics and locks of the graph (`base/shim.rs`). What else is on the way of a request belongs to its thread:
//! a lane and all that it hands out is `!Send`.
#![cfg(counted)]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bench::{add, attach, image, range, writer};
use block_core::base::counted;
use block_core::graph::{DirectRequest, Graph, Passed, WriteFlags};
use block_core::port::{PortHandle, PortLane};
use block_core::rt::{IoBuf, Local, run_control};
use serde_json::json;

const REQUESTS: u64 = 1000;

/// Pairs of cache lines, and how often they were written.
type Written = BTreeMap<usize, u64>;

/// Runs the same requests on two threads of one port; gives what each wrote, without what its first request did.
async fn on_two_threads(port: &PortHandle, work: fn(&PortLane)) -> [Written; 2] {
    let threads = [bench::io_thread(), bench::io_thread()];
    let running = threads.each_ref().map(|thread| {
        let port = port.clone();
        let (tell, told) = std::sync::mpsc::channel();
        thread.remote().send(move |local: &Rc<Local>| {
            let lane = port.lane(local);
            work(&lane);
            counted::begin();
            (0..REQUESTS).for_each(|_| work(&lane));
            tell.send(counted::end()).unwrap();
        });
        told
    });
    running.map(|told| told.recv().unwrap())
}

/// What both wrote.
fn shared([one, two]: &[Written; 2]) -> Vec<u64> {
    one.iter().filter_map(|(line, times)| two.get(line).map(|others| times + others)).collect()
}

fn enter_and_leave(lane: &PortLane) {
    drop(lane.try_enter().unwrap());
}

/// A read and a write of a whole block, as a queue sends them.
fn send_both(lane: &PortLane) {
    let pin = lane.try_enter().unwrap();
    for write in [false, true] {
        let request = DirectRequest { write, at: range(8192, 4096), fua: false, memory_bits: 0 };
        let Some(Passed::Ring(_, passage)) = lane.direct(&pin, request) else { panic!("no ring entry") };
        passage.count(Duration::from_micros(1));
    }
}

/// What the count is worth: a request that is registered with a node is seen to write what threads share.
fn write_registered(lane: &PortLane) {
    let pin = lane.try_enter().unwrap();
    let buf = IoBuf::alloc(512, 1).unwrap();
    let mut write = std::pin::pin!(lane.write(&pin, range(512, 512), buf, WriteFlags::default()));
    // Whatever comes of it: it has been registered when it was polled.
    let _ = write.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
}

#[test]
fn requests_of_two_threads_write_no_line_in_common() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "x.img", 1 << 20, 0);
    run_control(async |_| {
        let graph = Graph::new(Arc::new(|_| ()));
        let file = json!({ "driver": "file", "filename": path, "aio": "io_uring" });
        // Keeps writes apart, so each of its writes is counted there.
        let blocks = json!({ "driver": "blkdebug", "align": 4096, "image": file });
        let top = add(&graph, json!({ "driver": "raw", "node-name": "top", "file": blocks })).await.unwrap();
        let port = attach(&graph, top, writer()).await.unwrap();
        for (what, work, lines) in
            [("enter and leave", enter_and_leave as fn(&PortLane), 1), ("a read and a write", send_both, 5)]
        {
            let written = on_two_threads(&port.handle(), work).await;
            for (number, one) in written.iter().enumerate() {
                let times = one.values().sum::<u64>() as f64 / REQUESTS as f64;
                println!("{what}, thread {number}: {times} writes to {} pairs of lines for each", one.len());
                assert!(one.len() >= lines, "the count misses something: {one:?}");
            }
            assert_eq!(shared(&written), [0; 0], "{what}");
        }
        let seen = shared(&on_two_threads(&port.handle(), write_registered).await);
        assert!(seen.iter().any(|times| *times >= 2 * REQUESTS), "{seen:?}");
    });
}
