//! Changes of the graph's shape: filters come and go, nodes and backing nodes are replaced, and several changes happen
//! as one or not at all.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

mod support;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use block_core::base::{ByteRange, Error, IoError, Result};
use block_core::graph::{
    Change, Drained, DrainedSet, Graph, GraphEdit, NodeId, Operation, Pending, PermSet, Permit, Perms, Reopen, Role,
    Step, WriteFlags,
};
use block_core::port::{Port, PortHandle, PortOptions};
use block_core::rt::{IoBuf, IoThread, Local, PollParams, run_control};
use support::overlay::NewOverlay;
use support::user::{a_while, beside, until};
use support::{Seen, Valve, add, graph, mem, park};

const READER: Perms = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };
const WRITER: Perms = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };

async fn port(graph: &Rc<Graph>, node: NodeId, perms: Perms) -> Port {
    let options = PortOptions { name: "test port".into(), perms };
    Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.unwrap()
}

async fn read_byte(handle: &PortHandle) -> Result<u8, IoError> {
    byte_at(handle, 0).await
}

async fn byte_at(handle: &PortHandle, start: u64) -> Result<u8, IoError> {
    let lane = handle.lane(&Local::current());
    let pin = loop {
        match lane.try_enter() {
            Some(pin) => break pin,
            None => lane.opened().await,
        }
    };
    let buf = IoBuf::alloc(512, 512)?;
    lane.read(&pin, ByteRange::new(start, 512).unwrap(), buf.clone()).await?;
    Ok(buf.to_vec()[0])
}

async fn write_byte(handle: &PortHandle, byte: u8) -> Result<(), IoError> {
    let lane = handle.lane(&Local::current());
    let pin = lane.try_enter().expect("nobody drains");
    let buf = IoBuf::alloc(512, 512)?;
    buf.fill(byte);
    lane.write(&pin, ByteRange::new(0, 512).unwrap(), buf, WriteFlags::default()).await
}

/// Reads on a thread of its own, as fast as it can, until it is dropped.
struct Load {
    thread: Option<IoThread>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    failed: Arc<AtomicU64>,
}

impl Load {
    fn start(handle: PortHandle) -> Self {
        let thread = IoThread::spawn("load", PollParams::default()).unwrap();
        let (stop, done, failed): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let (told, counted, wrong) = (stop.clone(), done.clone(), failed.clone());
        thread.remote().spawn(move |_| async move {
            while !told.load(Ordering::Relaxed) {
                let good = read_byte(&handle).await == Ok(1);
                wrong.fetch_add(u64::from(!good), Ordering::Relaxed);
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { thread: Some(thread), stop, done, failed }
    }

    /// Waits until some more reads have come back.
    async fn progress(&self) {
        let enough = self.done.load(Ordering::Relaxed) + 20;
        while self.done.load(Ordering::Relaxed) < enough {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
    }

    fn failed(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take());
        self.failed.load(Ordering::Relaxed)
    }
}

#[test]
fn a_filter_comes_and_goes_under_load_on_two_threads() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let (one, two) = (port(&graph, node, READER).await, port(&graph, node, READER).await);
        let loads = [Load::start(one.handle()), Load::start(two.handle())];
        let valve = Arc::<Valve>::default();
        let filter = add(&graph, park("filter", node, &valve, true)).await;
        for _ in 0..50 {
            graph.permit().insert_filter(filter, node).await.unwrap();
            assert_eq!(graph.node(node).unwrap().parents, ["node 'filter'"]);
            assert_eq!(graph.node(filter).unwrap().parents.len(), 2);
            graph.permit().remove_filter(filter).await.unwrap();
            assert_eq!(graph.node(filter).unwrap().parents, [""; 0]);
        }
        graph.permit().insert_filter(filter, node).await.unwrap();
        for load in &loads {
            load.progress().await;
        }
        assert!(graph.node(filter).unwrap().totals.ops[0].ops > 0, "requests go through the filter");
        graph.permit().remove_filter(filter).await.unwrap();
        graph.permit().remove(filter).await.unwrap();
        for load in loads {
            assert_eq!(load.failed(), 0);
        }
        one.detach(&mut graph.permit()).await;
        two.detach(&mut graph.permit()).await;
    });
}

#[test]
fn only_a_filter_above_the_node_is_inserted() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let other = add(&graph, mem("other", 1, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let refused = |result: Result<()>| result.unwrap_err().full();
        assert_eq!(refused(graph.permit().insert_filter(node, other).await), "node 'node' is not a filter");
        assert_eq!(
            refused(graph.permit().insert_filter(filter, other).await),
            "node 'filter' is no filter above the node"
        );
        assert_eq!(refused(graph.permit().remove_filter(other).await), "node 'other' is not a filter");
    });
}

/// GR-22: a node is replaced by one that somebody writes and bears no second writer of.
#[test]
fn gr_22_a_replaced_child_cannot_bring_a_second_writer() {
    run_control(|_| async {
        let graph = graph();
        let old = add(&graph, mem("old", 1, &Arc::default())).await;
        let new = add(&graph, mem("new", 2, &Arc::default())).await;
        let jealous = Perms { uses: PermSet::WRITE, shares: PermSet::CONSISTENT_READ };
        let one = port(&graph, old, jealous).await;
        let two = port(&graph, new, jealous).await;
        let error = graph.permit().replace_node(old, new).await.unwrap_err().full();
        assert!(error.starts_with("Permission conflict on node 'new': 'write' is used by test port"), "{error}");
        assert_eq!(graph.node(old).unwrap().parents.len(), 1, "nothing has changed");
        assert_eq!(read_byte(&one.handle()).await, Ok(1));
        one.detach(&mut graph.permit()).await;
        two.detach(&mut graph.permit()).await;
    });
}

/// Invariant 10: what was written to a node is stable before nobody flushes it any more, or the change fails.
#[test]
fn a_node_that_loses_its_writer_is_flushed_first() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let old = add(&graph, mem("old", 1, &seen)).await;
        let new = add(&graph, mem("new", 2, &Arc::default())).await;
        let port = port(&graph, old, WRITER).await;
        write_byte(&port.handle(), 3).await.unwrap();
        *seen.flush_error.lock().unwrap() = Some(IoError::Os(5));
        let error = graph.permit().replace_node(old, new).await.unwrap_err().full();
        assert!(error.starts_with("Could not flush node 'old' before it is replaced: Input/output error"), "{error}");
        assert_eq!(read_byte(&port.handle()).await, Ok(3), "the change did not happen");
        *seen.flush_error.lock().unwrap() = None;
        let before = seen.flushes.load(Ordering::Relaxed);
        graph.permit().replace_node(old, new).await.unwrap();
        assert_eq!(seen.flushes.load(Ordering::Relaxed), before + 1);
        assert_eq!(read_byte(&port.handle()).await, Ok(2));
        port.detach(&mut graph.permit()).await;
    });
}

#[test]
fn a_frozen_link_stays() {
    run_control(|_| async {
        let graph = graph();
        let below = add(&graph, mem("below", 1, &Arc::default())).await;
        let other = add(&graph, mem("other", 2, &Arc::default())).await;
        let filter = add(&graph, park("filter", below, &Arc::default(), true)).await;
        let change = || Change::Repoint { parent: filter, child: "file".into(), to: Some((other, Role::Filtered)) };
        let frozen = graph.freeze(filter, "file").unwrap();
        let again = graph.freeze(filter, "file").unwrap();
        for held in [frozen, again] {
            let error = graph.permit().transact(vec![Box::new(change())]).await.unwrap_err().full();
            assert_eq!(error, "Cannot change frozen 'file' link from node 'filter' to node 'below'");
            drop(held);
        }
        graph.permit().transact(vec![Box::new(change())]).await.unwrap();
        assert_eq!(graph.child_node(filter, "file"), Some(other));
        assert!(graph.freeze(filter, "backing").is_err());
    });
}

#[test]
fn a_blocked_operation_says_why() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let blocker = graph.block(node, &[Operation::Replace, Operation::Resize], "block device is in use by a test");
        let busy = "Node 'node' is busy: block device is in use by a test";
        assert_eq!(graph.permit().insert_filter(filter, node).await.unwrap_err().full(), busy);
        let resized = graph.permit().resize(node, 512, block_core::graph::Preallocation::Off).await;
        assert_eq!(resized.unwrap_err().full(), busy);
        drop(blocker);
        graph.permit().insert_filter(filter, node).await.unwrap();
    });
}

#[test]
fn an_operation_that_was_blocked_while_it_waited_is_refused() {
    run_control(async |local| {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let mut other = graph.permit();
        let drained = other.drain(&[node]).await.unwrap();
        let (result, waiting) = (Rc::new(RefCell::new(None)), graph.clone());
        let told = result.clone();
        local.spawn(async move { *told.borrow_mut() = Some(waiting.permit().insert_filter(filter, node).await) });
        local.sleep(Duration::from_millis(20)).await;
        let _blocker = graph.block(node, &[Operation::Replace], "a test has it");
        drop(drained);
        while result.borrow().is_none() {
            local.sleep(Duration::from_millis(1)).await;
        }
        let error = result.take().unwrap().unwrap_err().full();
        assert_eq!(error, "Node 'node' is busy: a test has it");
    });
}

/// Lets `filter` lead to `to` while `command` waits for the drain; gives what came of it.
async fn led_elsewhere<C>(graph: &Rc<Graph>, filter: NodeId, to: NodeId, command: C) -> Result<()>
where
    C: AsyncFnOnce(&mut Permit) -> Result<()> + 'static,
{
    let mut permit = graph.permit();
    let drained = permit.drain(&[filter]).await.unwrap();
    let waiting = graph.clone();
    let result = beside(async move { command(&mut waiting.permit()).await });
    a_while().await;
    let file = graph.child(filter, "file").unwrap();
    let locks = drained.prepare(|edit, set| edit.set_edge(set.owner(filter)?, file, to)).await.unwrap();
    let committed = drained.write(|edit, set| edit.set_edge(set.owner(filter)?, file, to)).unwrap();
    drop(locks);
    committed.close(&mut permit).await;
    until(|| result.borrow().is_some()).await;
    result.take().unwrap()
}

/// What a filter filters may change while its insertion waits for the drain: users would find another disk there.
#[test]
fn a_filter_that_leads_elsewhere_when_its_turn_comes_is_not_inserted() {
    run_control(async |_| {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let other = add(&graph, mem("other", 2, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let port = port(&graph, node, READER).await;
        let insert = async move |permit: &mut Permit| permit.insert_filter(filter, node).await;
        let error = led_elsewhere(&graph, filter, other, insert).await.unwrap_err().full();
        assert_eq!(error, "node 'filter' is no filter above the node");
        assert_eq!(read_byte(&port.handle()).await, Ok(1));
        port.detach(&mut graph.permit()).await;
    });
}

#[test]
fn a_filter_that_goes_leaves_what_it_filters_when_its_turn_comes() {
    run_control(async |_| {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let other = add(&graph, mem("other", 2, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let port = port(&graph, filter, READER).await;
        let remove = async move |permit: &mut Permit| permit.remove_filter(filter).await;
        led_elsewhere(&graph, filter, other, remove).await.unwrap();
        assert_eq!(graph.child_node(port.root(), "root"), Some(other));
        assert_eq!(read_byte(&port.handle()).await, Ok(2));
        port.detach(&mut graph.permit()).await;
    });
}

/// An overlay that gets a backing node while it waits to be appended keeps it.
#[test]
fn an_overlay_that_stands_on_something_when_its_turn_comes_is_not_appended() {
    run_control(async |_| {
        let graph = graph();
        let base = add(&graph, mem("base", 1, &Arc::default())).await;
        let other = add(&graph, mem("other", 2, &Arc::default())).await;
        let (overlay, _) = NewOverlay::above(None).add(&graph, "overlay").await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[overlay]).await.unwrap();
        let waiting = graph.clone();
        let result = beside(async move { waiting.permit().append(overlay, base).await });
        a_while().await;
        let stand = drained.write(|edit, set| edit.add_child(set.owner(overlay)?, "backing", other, Role::Cow));
        stand.unwrap().close(&mut permit).await;
        until(|| result.borrow().is_some()).await;
        let error = result.take().unwrap().unwrap_err().full();
        assert_eq!(error, "The overlay already has a backing image");
        assert_eq!(graph.child_node(overlay, "backing"), Some(other));
    });
}

/// What goes with a node is looked up again once nobody else changes it: its inline child may have gone meanwhile.
#[test]
fn a_node_is_removed_that_gets_another_child_while_its_removal_waits() {
    run_control(async |local| {
        let graph = graph();
        let inline = add(&graph, mem("inline", 1, &Arc::default()).inline()).await;
        let other = add(&graph, mem("other", 2, &Arc::default())).await;
        let filter = add(&graph, park("filter", inline, &Arc::default(), true)).await;
        let mut holder = graph.permit();
        let held = holder.drain(&[filter]).await.unwrap();
        let results = Rc::new(RefCell::new(Vec::new()));
        let (changing, told) = (graph.clone(), results.clone());
        local.spawn(async move {
            let change = Change::Repoint { parent: filter, child: "file".into(), to: Some((other, Role::Filtered)) };
            let done = changing.permit().transact(vec![Box::new(change)]).await;
            told.borrow_mut().push(done);
        });
        local.sleep(Duration::from_millis(5)).await;
        let (removing, told) = (graph.clone(), results.clone());
        local.spawn(async move {
            let done = removing.permit().remove(filter).await;
            told.borrow_mut().push(done);
        });
        local.sleep(Duration::from_millis(5)).await;
        drop(held);
        while results.borrow().len() < 2 {
            local.sleep(Duration::from_millis(1)).await;
        }
        assert!(results.borrow().iter().all(Result::is_ok), "{results:?}");
        assert_eq!(graph.nodes().len(), 1, "what came stays, since it was added by name");
    });
}

/// A step that notes what it is asked, and fails where it is told to.
struct Noting {
    number: usize,
    node: NodeId,
    fails: Option<&'static str>,
    notes: Rc<RefCell<Vec<String>>>,
}

impl Noting {
    fn note(&self, what: &'static str) -> Result<()> {
        self.notes.borrow_mut().push(format!("{what} {}", self.number));
        if self.fails == Some(what) { Err(Error::new(format!("step {} fails", self.number))) } else { Ok(()) }
    }
}

impl Step for Noting {
    fn drains(&self, _: &Graph) -> Result<Vec<NodeId>> {
        Ok(vec![self.node])
    }

    fn prepare<'a>(&'a mut self, _: &'a mut Drained<'_>) -> Pending<'a, Result<()>> {
        Box::pin(async { self.note("prepare") })
    }

    fn edit<'d>(&self, _: &mut GraphEdit<'d>, _: DrainedSet<'d>) -> Result<()> {
        if self.fails == Some("edit") { self.note("edit") } else { Ok(()) }
    }

    fn commit(&mut self) {
        let _ = self.note("commit");
    }

    fn abort<'a>(&'a mut self, _: &'a mut Drained<'_>) -> Pending<'a, ()> {
        Box::pin(async {
            let _ = self.note("abort");
        })
    }

    fn clean(&mut self) {
        let _ = self.note("clean");
    }
}

async fn noted(permit: &mut Permit, node: NodeId, fails: Option<(usize, &'static str)>) -> (Result<()>, Vec<String>) {
    let notes = Rc::new(RefCell::new(Vec::new()));
    let step = |number| {
        let fails = fails.filter(|(at, _)| *at == number).map(|(_, what)| what);
        Box::new(Noting { number, node, fails, notes: notes.clone() }) as Box<dyn Step>
    };
    let result = permit.transact((1..=3).map(step).collect()).await;
    let notes = notes.borrow().clone();
    (result, notes)
}

#[test]
fn a_transaction_is_undone_from_its_last_step_back() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let mut permit = graph.permit();
        let (result, notes) = noted(&mut permit, node, None).await;
        result.unwrap();
        let done = ["commit 3", "commit 2", "commit 1", "clean 3", "clean 2", "clean 1"];
        assert_eq!(notes, [&["prepare 1", "prepare 2", "prepare 3"], &done[..]].concat());

        let (result, notes) = noted(&mut permit, node, Some((2, "prepare"))).await;
        assert_eq!(result.unwrap_err().full(), "step 2 fails");
        assert_eq!(notes, ["prepare 1", "prepare 2", "abort 2", "abort 1", "clean 3", "clean 2", "clean 1"]);

        let (result, notes) = noted(&mut permit, node, Some((1, "edit"))).await;
        assert_eq!(result.unwrap_err().full(), "step 1 fails");
        let undone = ["edit 1", "abort 3", "abort 2", "abort 1", "clean 3", "clean 2", "clean 1"];
        assert_eq!(notes, [&["prepare 1", "prepare 2", "prepare 3"], &undone[..]].concat());
    });
}

/// GR-20: ten changes of which the seventh cannot be made.
#[test]
fn gr_20_ten_changes_of_which_the_seventh_fails_change_nothing() {
    run_control(|_| async {
        let graph = graph();
        let mut steps: Vec<Box<dyn Step>> = Vec::new();
        let mut filters = Vec::new();
        for number in 1..=10_u8 {
            let node = add(&graph, mem(&format!("node{number}"), number, &Arc::default())).await;
            let filter = add(&graph, park(&format!("filter{number}"), node, &Arc::default(), true)).await;
            let above = add(&graph, park(&format!("above{number}"), node, &Arc::default(), true)).await;
            // The seventh would make a filter its own child.
            let to = if number == 7 { above } else { filter };
            let child = if number == 7 { filter } else { above };
            if number == 7 {
                graph.permit().replace_node(node, filter).await.unwrap();
                steps.push(Box::new(Change::Repoint {
                    parent: child,
                    child: "file".into(),
                    to: Some((to, Role::Filtered)),
                }));
            } else {
                steps.push(Box::new(Change::Replace { from: node, to }));
                filters.push((filter, node));
            }
        }
        let error = graph.permit().transact(steps).await.unwrap_err().full();
        assert_eq!(error, "Making 'above7' a file child of 'filter7' would create a cycle");
        for (filter, node) in filters {
            assert_eq!(graph.node(filter).unwrap().parents, [""; 0]);
            assert_eq!(graph.node(node).unwrap().parents.len(), 2);
        }
    });
}

/// An overlay is appended to a node in use, under load, and what is written then goes to the overlay.
#[test]
fn an_overlay_is_appended_under_load() {
    run_control(|_| async {
        let graph = graph();
        let base = add(&graph, mem("base", 1, &Arc::default())).await;
        let (reader, writer) = (port(&graph, base, READER).await, port(&graph, base, WRITER).await);
        let load = Load::start(reader.handle());
        let (overlay, table) = NewOverlay::above(None).add(&graph, "overlay").await;
        load.progress().await;
        graph.permit().append(overlay, base).await.unwrap();
        assert_eq!(graph.child_node(overlay, "backing"), Some(base));
        assert_eq!(graph.node(base).unwrap().parents, ["node 'overlay'"]);
        load.progress().await;
        assert_eq!(load.failed(), 0);
        write_byte(&writer.handle(), 9).await.unwrap();
        assert_eq!((read_byte(&reader.handle()).await, table.allocated()), (Ok(9), 1));
        assert_eq!(graph.node(base).unwrap().totals.ops[1].ops, 0, "the base is not written any more");
        let error = graph.permit().append(overlay, base).await.unwrap_err().full();
        assert_eq!(error, "Node 'base' is busy: node is used as backing hd of 'overlay'");
        reader.detach(&mut graph.permit()).await;
        writer.detach(&mut graph.permit()).await;
    });
}

/// What was written to a node may be lost since one of its flushes failed. An overlay that comes above it does not hide
/// that: flushes go on failing until the overlay is reopened. A filter passes them on, and has nothing to hide.
#[test]
fn an_overlay_inherits_that_flushes_fail() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let base = add(&graph, mem("base", 1, &seen)).await;
        let filter = add(&graph, park("filter", base, &Arc::default(), true)).await;
        let port = port(&graph, base, WRITER).await;
        let flush = async || {
            let lane = port.handle().lane(&Local::current());
            lane.flush(&lane.try_enter().unwrap()).await
        };
        *seen.flush_error.lock().unwrap() = Some(IoError::FlushLatched);
        graph.permit().insert_filter(filter, base).await.unwrap();
        assert_eq!(flush().await, Err(IoError::FlushLatched));
        *seen.flush_error.lock().unwrap() = None;
        assert_eq!(flush().await, Ok(()), "the filter keeps nothing");
        *seen.flush_error.lock().unwrap() = Some(IoError::FlushLatched);
        let (overlay, _) = NewOverlay::above(None).add(&graph, "overlay").await;
        graph.permit().append(overlay, filter).await.unwrap();
        assert_eq!(flush().await, Err(IoError::FlushLatched));
        let common = graph.node(overlay).unwrap().options;
        let again = Reopen { node: overlay, options: Box::new(()), common, children: Vec::new() };
        graph.permit().reopen(vec![again]).await.unwrap();
        assert_eq!(flush().await, Ok(()));
        // One that goes where the data is not needed starts anew.
        let (other, _) = NewOverlay::above(None).add(&graph, "other").await;
        graph.permit().replace_node(overlay, other).await.unwrap();
        assert_eq!(flush().await, Ok(()));
        port.detach(&mut graph.permit()).await;
    });
}

#[test]
fn a_backing_node_is_set_and_taken_away() {
    run_control(|_| async {
        let graph = graph();
        let one = add(&graph, mem("one", 1, &Arc::default())).await;
        let two = add(&graph, mem("two", 2, &Arc::default())).await;
        let (overlay, _) = NewOverlay::above(Some(one)).add(&graph, "overlay").await;
        let port = port(&graph, overlay, READER).await;
        assert_eq!(read_byte(&port.handle()).await, Ok(1));
        graph.permit().set_backing(overlay, Some(two)).await.unwrap();
        assert_eq!(read_byte(&port.handle()).await, Ok(2));
        graph.permit().set_backing(overlay, None).await.unwrap();
        assert_eq!(read_byte(&port.handle()).await, Ok(0));
        assert_eq!(graph.node(two).unwrap().parents, [""; 0]);
        let frozen = graph.freeze(overlay, "store").unwrap();
        graph.permit().set_backing(overlay, Some(one)).await.unwrap();
        assert_eq!(read_byte(&port.handle()).await, Ok(1));
        drop(frozen);
        let error = graph.permit().set_backing(overlay, Some(overlay)).await.unwrap_err().full();
        assert_eq!(error, "Making 'overlay' a backing child of 'overlay' would create a cycle");
        let error = graph.permit().set_backing(one, Some(two)).await.unwrap_err().full();
        assert_eq!(error, "The node one does not support adding a child");
        port.detach(&mut graph.permit()).await;
    });
}

/// What is prepared for a node is prepared for what it was; a second configuration would undo the first.
#[test]
fn a_node_is_reopened_once_in_a_transaction() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let common = block_core::graph::NodeOptions::default();
        let again = || Reopen { node, options: Box::new(()), common, children: Vec::new() }.step();
        let error = graph.permit().transact(vec![again(), again()]).await.unwrap_err().full();
        assert_eq!(error, "node 'node' is changed twice in one transaction");
        graph.permit().transact(vec![again()]).await.unwrap();
    });
}

/// GR-21: an overlay that is larger or smaller than what it is put above. Past the end of the base there are zeroes.
#[test]
fn gr_21_an_overlay_of_another_size_than_its_base() {
    run_control(|_| async {
        for (size, tail) in [(131_072, Some(0)), (32_768, None)] {
            let graph = graph();
            let base = add(&graph, mem("base", 7, &Arc::default())).await;
            let port = port(&graph, base, READER).await;
            let (overlay, _) = NewOverlay { size, ..NewOverlay::above(None) }.add(&graph, "overlay").await;
            graph.permit().append(overlay, base).await.unwrap();
            assert_eq!(port.geometry().size, size, "who is plugged in hears of it");
            assert_eq!(read_byte(&port.handle()).await, Ok(7));
            assert_eq!(byte_at(&port.handle(), 65_536).await.ok(), tail);
            port.detach(&mut graph.permit()).await;
        }
    });
}

#[test]
fn a_reopen_can_be_shut_out() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let common = block_core::graph::NodeOptions::default();
        let again = || vec![Reopen { node, options: Box::new(()), common, children: Vec::new() }];
        let blocker = graph.block(node, &[Operation::Reopen], "a test has it");
        let error = graph.permit().reopen(again()).await.unwrap_err().full();
        assert_eq!(error, "Node 'node' is busy: a test has it");
        drop(blocker);
        graph.permit().reopen(again()).await.unwrap();
    });
}
