//! Commands of several monitors that meet at one node: none may pull away what another one still looks at.
#![cfg(not(loom))]

mod support;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use block_core::base::{ByteRange, IoError};
use block_core::graph::{Change, Graph, NodeId, NodeOptions, PermSet, Perms, Reopen, Role, Step};
use block_core::port::{Port, PortOptions};
use block_core::rt::sync::oneshot;
use block_core::rt::{IoBuf, Local, run_control};
use support::user::{READER, WRITER, a_while, beside, io_thread, until};
use support::{Seen, SlowLocks, Valve, add, graph, impatient, mem, park, slow, tiny};

async fn attach(graph: &Rc<Graph>, node: NodeId, perms: Perms) -> Result<Port, String> {
    let options = PortOptions { name: "test port".into(), perms };
    Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.map_err(|error| error.full())
}

/// An export is added above a node that another monitor is just deleting: the delete goes through, the export is
/// refused. What the export's plan saw of the node may not be in the delete's way.
#[test]
fn a_node_goes_while_somebody_waits_to_use_it() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let valve = Valve::shut();
        let below = add(&graph, mem("below", 0, &seen)).await;
        let node = add(&graph, park("node", below, &valve, false)).await;

        let deleting = graph.clone();
        let deleted = beside(async move { deleting.permit().remove(node).await.map_err(|error| error.full()) });
        until(|| valve.parked() > 0).await; // its flush
        let adding = graph.clone();
        let added = beside(async move { attach(&adding, node, READER).await.err() });
        Local::current().sleep(Duration::from_millis(20)).await;
        assert!(added.borrow().is_none() && deleted.borrow().is_none());
        valve.open();
        until(|| added.borrow().is_some() && deleted.borrow().is_some()).await;
        assert_eq!(deleted.take(), Some(Ok(())));
        assert_eq!(added.take(), Some(Some("There is no such node".into())));
    });
}

/// The same, while the export waits for the lock of a file further down.
#[test]
fn a_node_goes_while_locks_are_taken_for_its_user() {
    run_control(|_| async {
        let graph = graph();
        let locks = SlowLocks::new();
        let file = add(&graph, slow("file", &locks)).await;
        locks.valve.close();
        let node = add(&graph, park("node", file, &Arc::default(), false)).await;
        let adding = graph.clone();
        let added = beside(async move { attach(&adding, node, READER).await.err() });
        until(|| locks.valve.parked() > 0).await;
        let deleting = graph.clone();
        let deleted = beside(async move { deleting.permit().remove(node).await.map_err(|error| error.full()) });
        Local::current().sleep(Duration::from_millis(20)).await;
        locks.valve.open();
        until(|| added.borrow().is_some() && deleted.borrow().is_some()).await;
        assert_eq!(deleted.take(), Some(Ok(())));
        assert_eq!(added.take(), Some(Some("There is no such node".into())));
    });
}

/// Giving a lock back takes a while. A writer who comes meanwhile does not build on what is being given back.
#[test]
fn a_lock_that_is_being_given_back_is_not_counted_on() {
    run_control(|_| async {
        let graph = graph();
        let locks = SlowLocks::new();
        let file = add(&graph, slow("file", &locks)).await;
        let first = attach(&graph, file, WRITER).await.unwrap();
        assert_eq!(locks.uses(), PermSet::WRITE);
        locks.valve.close();
        let leaving = graph.clone();
        let left = beside(async move { first.detach(&mut leaving.permit()).await });
        until(|| locks.valve.parked() > 0).await;
        let coming = graph.clone();
        let second = beside(async move { attach(&coming, file, WRITER).await });
        Local::current().sleep(Duration::from_millis(20)).await;
        locks.valve.open();
        until(|| left.borrow().is_some() && second.borrow().is_some()).await;
        let second = second.take().unwrap().unwrap();
        assert_eq!(locks.uses(), PermSet::WRITE, "who writes has the lock for it");
        second.detach(&mut graph.permit()).await;
        assert_eq!(locks.uses(), PermSet::NONE);
    });
}

/// A command that is dropped while it gives locks back leaves nobody waiting for them.
#[test]
fn a_command_that_is_dropped_leaves_no_claim() {
    run_control(|_| async {
        let graph = graph();
        let locks = SlowLocks::new();
        let file = add(&graph, slow("file", &locks)).await;
        let port = attach(&graph, file, WRITER).await.unwrap();
        locks.valve.close();
        let mut permit = graph.permit();
        {
            let mut leaving = pin!(port.detach(&mut permit));
            while locks.valve.parked() == 0 {
                let over = poll_fn(|cx| Poll::Ready(leaving.as_mut().poll(cx).is_ready())).await;
                assert!(!over);
                Local::current().sleep(Duration::from_millis(1)).await;
            }
        }
        locks.valve.open();
        let coming = graph.clone();
        let second = beside(async move { attach(&coming, file, WRITER).await });
        until(|| second.borrow().is_some()).await;
        second.take().unwrap().unwrap();
        assert_eq!(locks.uses(), PermSet::WRITE);
    });
}

/// Very many users of one node: each is checked against all others, and the limit is an error and no more.
#[test]
fn a_node_has_as_many_users_as_there_may_be() {
    run_control(|_| async {
        let graph = graph();
        let file = add(&graph, mem("file", 0, &Arc::default())).await;
        let mut all: Vec<_> =
            (0..4000).map(|number| park(&format!("n{number}"), file, &Arc::default(), false)).collect();
        graph.permit().apply(|edit| all.iter().try_for_each(|node| edit.add(node.clone()).map(drop))).await.unwrap();
        let alone = Perms { uses: PermSet::WRITE, shares: PermSet::ALL.without(PermSet::WRITE) };
        let sole = attach(&graph, graph.find("n7").unwrap(), alone).await.unwrap();
        let refused = attach(&graph, graph.find("n9").unwrap(), WRITER).await.err().unwrap();
        assert_eq!(
            refused,
            "Permission conflict on node 'file': 'write' is used by node 'n9' and not shared by node 'n7'"
        );
        sole.detach(&mut graph.permit()).await;
        attach(&graph, graph.find("n9").unwrap(), WRITER).await.unwrap();
        all.clear();
        graph.permit().remove(graph.find("n11").unwrap()).await.unwrap();
    });
}

/// GR-12: the limit is an error; what is there goes on.
#[test]
fn there_is_a_limit_for_nodes() {
    run_control(|_| async {
        let graph = graph();
        for number in 0..65_535 {
            add(&graph, tiny(&format!("n{number}"))).await;
        }
        let last = add(&graph, tiny("last")).await;
        let refused = graph.permit().add(tiny("more")).await.unwrap_err();
        assert_eq!(refused.full(), "There may not be more than 65536 nodes and exports");
        assert!(attach(&graph, last, READER).await.is_err());
        graph.permit().remove(graph.find("n5").unwrap()).await.unwrap();
        attach(&graph, last, READER).await.unwrap();
    });
}

/// Deleting a node stalls nobody above what it only referred to.
#[test]
fn a_delete_drains_the_node_and_what_is_defined_in_it() {
    run_control(|_| async {
        let graph = graph();
        let valve = Valve::shut();
        let inner = mem("inner", 0, &Arc::default()).inline();
        let by_name = park("by-name", inner.id(), &Arc::default(), false);
        let (shared, both) = (by_name.id(), [inner, by_name]);
        graph.permit().apply(|edit| both.iter().try_for_each(|node| edit.add(node.clone()).map(drop))).await.unwrap();
        drop(both);
        let top = add(&graph, park("top", shared, &Arc::default(), false)).await;
        let stuck = add(&graph, park("stuck", shared, &valve, false)).await;
        let busy = attach(&graph, stuck, READER).await.unwrap().handle();
        let reading = beside(async move {
            let lane = busy.lane(&Local::current());
            let pin = lane.try_enter().unwrap();
            let at = ByteRange::new(0, 512).unwrap();
            lane.read(&pin, at, IoBuf::alloc(512, 1).unwrap()).await
        });
        until(|| valve.parked() > 0).await;
        impatient(&graph).remove(top).await.unwrap();
        assert!(graph.find("inner").is_some());
        valve.open();
        until(|| reading.borrow().is_some()).await;
    });
}

/// What was written before a reopen is stable after it, or the reopen fails; a failure that is known is no obstacle.
#[test]
fn a_reopen_flushes_what_was_written() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let node = add(&graph, mem("node", 0, &seen)).await;
        let again =
            || vec![Reopen { node, options: Box::new(()), common: NodeOptions::default(), children: Vec::new() }];
        graph.permit().reopen(again()).await.unwrap();
        assert_eq!(seen.flushes.load(Ordering::Relaxed), 1);
        *seen.flush_error.lock().unwrap() = Some(IoError::Os(5));
        let refused = graph.permit().reopen(again()).await.unwrap_err().full();
        assert_eq!(refused, "Could not flush node 'node' before reopening it: Input/output error (os error 5)");
        *seen.flush_error.lock().unwrap() = Some(IoError::FlushLatched);
        graph.permit().reopen(again()).await.unwrap();
    });
}

/// A thread keeps its lane of a port that is gone: the nodes below are closed all the same.
#[test]
fn an_idle_lane_of_a_removed_port_keeps_no_node() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let node = add(&graph, mem("node", 0, &seen)).await;
        let port = attach(&graph, node, READER).await.unwrap();
        let lane = port.handle().lane(&Local::current());
        drop(lane.try_enter().expect("nobody drains"));
        port.detach(&mut graph.permit()).await;
        let removing = graph.clone();
        let removed = beside(async move { removing.permit().remove(node).await.map_err(|error| error.full()) });
        until(|| removed.borrow().is_some()).await;
        assert_eq!(*removed.borrow(), Some(Ok(())));
        assert!(seen.closed.load(Ordering::Acquire));
        assert!(lane.try_enter().is_none(), "nobody comes in any more");
    });
}

/// The same for who has kept a handle, and makes a lane when the port is gone already; and for lanes that come and go on
/// another thread while it goes.
#[test]
fn a_handle_of_a_removed_port_keeps_no_node() {
    run_control(|_| async {
        let graph = graph();
        let thread = io_thread();
        for round in 0..50 {
            let seen = Arc::<Seen>::default();
            let node = add(&graph, mem("node", 0, &seen)).await;
            let port = attach(&graph, node, READER).await.unwrap();
            let (handle, (done, made)) = (port.handle(), oneshot());
            let lanes = handle.clone();
            thread.remote().spawn(move |local| async move {
                let lanes: Vec<_> = (0..round).map(|_| lanes.lane(&local)).collect();
                let _ = done.send(());
                local.sleep(Duration::from_millis(1)).await;
                drop(lanes);
            });
            port.detach(&mut graph.permit()).await;
            let late = handle.lane(&Local::current());
            assert!(late.try_enter().is_none(), "nobody comes in any more");
            graph.permit().remove(node).await.unwrap();
            assert!(seen.closed.load(Ordering::Acquire));
            made.await.unwrap();
        }
    });
}

/// A change that leads to what another command has drained waits for it; that one's change and its own both happen.
#[test]
fn a_change_waits_for_the_drain_that_it_reaches_into() {
    run_control(|_| async {
        let graph = graph();
        let old = add(&graph, mem("old", 1, &Arc::default())).await;
        let new = add(&graph, mem("new", 2, &Arc::default())).await;
        let parent = add(&graph, park("parent", old, &Arc::default(), true)).await;
        let port = attach(&graph, parent, READER).await.unwrap();
        let mut other = graph.permit();
        let drained = other.drain(&[new]).await.unwrap();
        let leading = graph.clone();
        let led = beside(async move { leading.permit().transact(vec![leads(parent, new)]).await });
        a_while().await;
        assert!(led.borrow().is_none(), "it waits");
        drop(drained);
        until(|| led.borrow().is_some()).await;
        led.take().unwrap().unwrap();
        assert_eq!(graph.child_node(parent, "file"), Some(new));
        port.detach(&mut graph.permit()).await;
    });
}

/// It does not wait for ever: whoever is drained for it stands still meanwhile.
#[test]
fn a_change_gives_up_waiting_when_a_drain_would() {
    run_control(|_| async {
        let graph = graph();
        let old = add(&graph, mem("old", 1, &Arc::default())).await;
        let new = add(&graph, mem("new", 2, &Arc::default())).await;
        let parent = add(&graph, park("parent", old, &Arc::default(), true)).await;
        let mut other = graph.permit();
        let drained = other.drain(&[new]).await.unwrap();
        let error = impatient(&graph).transact(vec![leads(parent, new)]).await.unwrap_err().full();
        assert_eq!(error, "Another command is changing the same part of the graph");
        drop(drained);
        impatient(&graph).transact(vec![leads(parent, new)]).await.unwrap();
    });
}

/// Two commands, each of which reaches into what the other one has drained: the second one is refused at once, and the
/// first one goes on.
#[test]
fn two_changes_do_not_wait_for_each_other() {
    run_control(|_| async {
        let graph = graph();
        let old = add(&graph, mem("old", 1, &Arc::default())).await;
        let one = add(&graph, park("one", old, &Arc::default(), true)).await;
        let two = add(&graph, park("two", old, &Arc::default(), true)).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[two]).await.unwrap();
        let leading = graph.clone();
        let led = beside(async move { leading.permit().transact(vec![leads(one, two)]).await });
        a_while().await;
        let file = graph.child(two, "file").unwrap();
        let refused = drained.prepare(|edit, set| edit.set_edge(set.owner(two)?, file, one)).await.err().unwrap();
        assert_eq!(refused.full(), "Another command is changing the same part of the graph");
        drop(drained);
        until(|| led.borrow().is_some()).await;
        led.take().unwrap().unwrap();
    });
}

fn leads(parent: NodeId, to: NodeId) -> Box<dyn Step> {
    Box::new(Change::Repoint { parent, child: "file".into(), to: Some((to, Role::Filtered)) })
}
