//! Requests that wait for each other below different roots. One of them is parked (a throttle, a breakpoint) and holds a
//! range; another root's waits for the range, and that root is drained. The drain gets through at once: who is in the way
//! is hurried as well, and nobody else is.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
mod support;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::IoError;
use block_core::graph::{Graph, NodeId};
use block_core::port::{Port, PortHandle};
use block_core::rt::run_control;
use serde_json::{Value, json};
use support::overlay::NewOverlay;
use support::user::{WRITER, a_while, beside, port, read_byte, until, write_bytes};
use support::{Valve, graph, impatient, mem, park};

type Outcome = Rc<RefCell<Option<Result<(), IoError>>>>;

/// Two ports whose requests meet in `node`; a drain of `above` is the second one's alone.
struct Meeting {
    graph: Rc<Graph>,
    first: Port,
    second: Port,
    above: NodeId,
    valve: Arc<Valve>,
}

impl Meeting {
    async fn at(graph: Rc<Graph>, first: NodeId, second: NodeId, valve: Arc<Valve>) -> Self {
        let above = support::add(&graph, park("above", second, &Arc::default(), true)).await;
        let (first, second) = (port(&graph, first, WRITER).await, port(&graph, above, WRITER).await);
        Self { graph, first, second, above, valve }
    }

    /// A driver whose options refer to `slow`, a node in memory behind the valve, and to `other`, another one.
    async fn over(options: Value) -> Self {
        let (graph, valve) = (graph(), Valve::shut());
        let below = support::add(&graph, mem("below", 1, &Arc::default())).await;
        support::add(&graph, park("slow", below, &valve, true)).await;
        support::add(&graph, mem("other", 1, &Arc::default())).await;
        let node = bench::add(&graph, options).await.unwrap();
        Self::at(graph, node, node, valve).await
    }

    fn write(port: &Port, at: u64) -> Outcome {
        let handle = port.handle();
        beside(async move { write_bytes(&handle, at, &[2; 512]).await })
    }

    async fn parked(&self) {
        until(|| self.valve.parked() > 0).await;
    }

    /// The second port's request, which waits for the first one's, is over when its root is drained, and nothing that
    /// holds up the first one's has changed.
    async fn is_let_go(&self, first: &Outcome, second: &Outcome) {
        a_while().await;
        assert!(first.borrow().is_none() && second.borrow().is_none(), "the second one waits for the first one");
        let mut permit = impatient(&self.graph);
        let drained = permit.drain(&[self.above]).await;
        drop(drained.unwrap());
        until(|| first.borrow().is_some() && second.borrow().is_some()).await;
        assert_eq!((first.take(), second.take()), (Some(Ok(())), Some(Ok(()))));
    }

    async fn end(self) {
        self.valve.open();
        self.first.detach(&mut self.graph.permit()).await;
        self.second.detach(&mut self.graph.permit()).await;
    }
}

/// Two writes in one place below this driver.
async fn two_writes(options: Value) {
    let meeting = Meeting::over(options).await;
    let first = Meeting::write(&meeting.first, 0);
    meeting.parked().await;
    let second = Meeting::write(&meeting.second, 256);
    meeting.is_let_go(&first, &second).await;
    meeting.end().await;
}

fn quorum() -> Value {
    json!({ "driver": "quorum", "node-name": "n", "children": ["slow", "other"], "vote-threshold": 2 })
}

#[test]
fn two_writes_to_the_copies_of_a_quorum() {
    run_control(|_| two_writes(quorum()));
}

#[test]
fn two_writes_that_blkverify_keeps_in_order() {
    run_control(|_| two_writes(json!({ "driver": "blkverify", "node-name": "n", "test": "slow", "raw": "other" })));
}

#[test]
fn two_writes_that_a_log_keeps_in_order() {
    run_control(|_| two_writes(json!({ "driver": "blklogwrites", "node-name": "n", "file": "slow", "log": "other" })));
}

#[test]
fn two_writes_in_one_block_of_a_node() {
    run_control(|_| two_writes(json!({ "driver": "blkdebug", "node-name": "n", "image": "slow", "align": 4096 })));
}

#[test]
fn two_writes_to_a_cluster_of_a_snapshot() {
    let options = |timeout| {
        let with = ("copy-before-write", "other", "slow");
        json!({ "driver": with.0, "node-name": "n", "file": with.1, "target": with.2, "cbw-timeout": timeout })
    };
    run_control(|_| two_writes(options(0)));
    // The copy goes on beside the request.
    run_control(|_| two_writes(options(1000)));
}

/// Whoever else is parked in the same place, of the same root, is not in anybody's way.
#[test]
fn the_neighbours_of_who_is_hurried_stay_parked() {
    run_control(async |_| {
        let meeting = Meeting::over(quorum()).await;
        let first = Meeting::write(&meeting.first, 0);
        let neighbour = Meeting::write(&meeting.first, 32768);
        meeting.parked().await;
        let second = Meeting::write(&meeting.second, 256);
        meeting.is_let_go(&first, &second).await;
        a_while().await;
        assert!(neighbour.borrow().is_none());
        meeting.valve.open();
        until(|| neighbour.borrow().is_some()).await;
        meeting.end().await;
    });
}

/// Hurry goes on from one to the next: the first is in the way of the second, the second in that of the third.
#[test]
fn hurry_is_handed_on_through_a_row() {
    run_control(async |_| {
        let meeting = Meeting::over(quorum()).await;
        let first = Meeting::write(&meeting.first, 0);
        meeting.parked().await;
        let between = Meeting::write(&meeting.first, 256);
        let third = Meeting::write(&meeting.second, 512);
        meeting.is_let_go(&first, &third).await;
        until(|| between.borrow().is_some()).await;
        meeting.end().await;
    });
}

/// A write waits for a copy that a read makes.
#[test]
fn a_write_to_what_is_being_copied_on_read() {
    run_control(async |_| {
        let (graph, valve) = (graph(), Valve::shut());
        let base = support::add(&graph, mem("base", 7, &Arc::default())).await;
        let slow = support::add(&graph, park("slow", base, &valve, true)).await;
        NewOverlay::above(Some(slow)).add(&graph, "top").await;
        let node = json!({ "driver": "copy-on-read", "node-name": "n", "file": "top" });
        let node = bench::add(&graph, node).await.unwrap();
        let meeting = Meeting::at(graph, node, node, valve).await;
        let reader = meeting.first.handle();
        let first = beside(async move { read_byte(&reader, 0).await.map(drop) });
        meeting.parked().await;
        let second = Meeting::write(&meeting.second, 0);
        meeting.is_let_go(&first, &second).await;
        meeting.end().await;
    });
}

/// A write waits for a reader of the snapshot, who is at the source.
#[test]
fn a_write_to_what_is_being_read_of_a_snapshot() {
    run_control(async |_| {
        let (graph, valve) = (graph(), Valve::shut());
        let below = support::add(&graph, mem("below", 1, &Arc::default())).await;
        support::add(&graph, park("slow", below, &valve, true)).await;
        support::add(&graph, mem("target", 0, &Arc::default())).await;
        let cbw = json!({ "driver": "copy-before-write", "node-name": "n", "file": "slow", "target": "target" });
        let cbw = bench::add(&graph, cbw).await.unwrap();
        let access = json!({ "driver": "snapshot-access", "node-name": "snapshot", "file": "n", "read-only": true });
        let access = bench::add(&graph, access).await.unwrap();
        let above = support::add(&graph, park("above", cbw, &Arc::default(), true)).await;
        let first = port(&graph, access, bench::READER).await;
        let second = port(&graph, above, WRITER).await;
        let meeting = Meeting { graph, first, second, above, valve };
        let reader: PortHandle = meeting.first.handle();
        let first = beside(async move { read_byte(&reader, 0).await.map(drop) });
        meeting.parked().await;
        // Who comes now gets through.
        meeting.valve.open_for_others();
        let second = Meeting::write(&meeting.second, 0);
        meeting.is_let_go(&first, &second).await;
        meeting.end().await;
    });
}
