//! The graph under requests and changes: each test is one of the invariants of the design (section 2), or a promise
//! that a command makes.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use block_core::base::{Error, IoError};
use block_core::graph::{
    ChildId, DriverInfo, NewNode, NodeOptions, OpKind, PermSet, Perms, Preallocation, ReopenRequest, Role,
};
use block_core::pipeline::{Filter, Filtered};
use block_core::port::{PORT, Port, PortHandle, PortNews, PortOptions};
use block_core::rt::{Engine, IoBuf, IoThread, Local, Op, PollParams, run_control};
use support::user::{READER, WRITER, port, range, read_byte, write_bytes};
use support::{Mem, Seen, Valve, add, graph, impatient, mem, park};

/// Reads byte 0 through `handle` on a thread of its own until told to stop; notes each new value it sees.
struct Load {
    thread: IoThread,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    seen: Arc<std::sync::Mutex<Vec<u8>>>,
}

impl Load {
    fn start(handle: PortHandle) -> Self {
        let thread = IoThread::spawn("load", PollParams::default()).unwrap();
        let (stop, done, seen): (Arc<AtomicBool>, Arc<AtomicU64>, Arc<std::sync::Mutex<Vec<u8>>>) = Default::default();
        let task = (stop.clone(), done.clone(), seen.clone());
        thread.remote().spawn(move |_| async move {
            let (stop, done, seen) = task;
            while !stop.load(Ordering::Relaxed) {
                let byte = read_byte(&handle, 0).await.unwrap();
                let mut seen = seen.lock().unwrap();
                if seen.last() != Some(&byte) {
                    seen.push(byte);
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            done.fetch_add(u64::MAX / 2, Ordering::Relaxed);
        });
        Self { thread, stop, done, seen }
    }

    async fn progress(&self) {
        let before = self.done.load(Ordering::Relaxed);
        while self.done.load(Ordering::Relaxed) < before + 50 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
    }

    async fn finish(self) -> Vec<u8> {
        self.stop.store(true, Ordering::Relaxed);
        while self.done.load(Ordering::Relaxed) < u64::MAX / 2 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        drop(self.thread);
        Arc::try_unwrap(self.seen).unwrap().into_inner().unwrap()
    }
}

/// Invariants 1, 2 and 9: under load, an edge moves to another node; requests see the old bytes, then the new ones,
/// and nothing else; the removed node is closed before the command returns, while another root's request hangs.
#[test]
fn an_edge_moves_under_load_while_another_root_is_stuck() {
    run_control(|_| async {
        let graph = graph();
        let (one, two, never) = (Arc::<Seen>::default(), Arc::<Seen>::default(), Arc::<Seen>::default());
        let old = add(&graph, mem("old", 1, &one)).await;
        let filter = add(&graph, park("filter", old, &Arc::default(), true)).await;
        let top = port(&graph, filter, READER).await;

        let other = add(&graph, mem("other", 7, &never)).await;
        let valve = Valve::shut();
        let stuck_filter = add(&graph, park("stuck", other, &valve, true)).await;
        let stuck = port(&graph, stuck_filter, READER).await;
        let stuck_read = Rc::new(Cell::new(None));
        let (handle, result) = (stuck.handle(), stuck_read.clone());
        Local::current().spawn(async move { result.set(Some(read_byte(&handle, 0).await)) });

        let load = Load::start(top.handle());
        load.progress().await;
        let new = add(&graph, mem("new", 2, &two)).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[filter]).await.unwrap();
        let file = graph.child(filter, "file").unwrap();
        let locks = drained.prepare(|edit, set| edit.set_edge(set.owner(filter)?, file, new)).await.unwrap();
        let change = drained.write(|edit, set| {
            edit.set_edge(set.owner(filter)?, file, new)?;
            edit.remove(old)
        });
        drop(locks);
        let committed = change.unwrap();
        assert_eq!(committed.removed(), 1);
        committed.close(&mut permit).await;
        assert!(one.closed.load(Ordering::Acquire), "closed before the reply");
        load.progress().await;
        assert_eq!(load.finish().await, [1, 2]);

        // The stuck root is got out by its own drain, and by no other.
        assert!(stuck_read.get().is_none());
        drop(permit.drain(&[stuck_filter]).await.unwrap());
        while stuck_read.get().is_none() {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(stuck_read.get(), Some(Ok(7)));
    });
}

/// Adding and removing what nothing uses drains nothing, even while every root there is hangs.
#[test]
fn unrelated_nodes_come_and_go_while_a_request_hangs() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let node = add(&graph, mem("a", 1, &seen)).await;
        let filter = add(&graph, park("f", node, &Valve::shut(), false)).await;
        let top = port(&graph, filter, READER).await;
        let handle = top.handle();
        Local::current().spawn(async move { assert!(read_byte(&handle, 0).await.is_ok()) });
        let waiting = graph.clone();
        Local::current().spawn(async move { drop(waiting.permit().drain(&[filter]).await) });
        Local::current().sleep(Duration::from_millis(5)).await;
        for round in 0..20 {
            let id = add(&graph, mem(&format!("n{round}"), 0, &seen)).await;
            graph.permit().remove(id).await.unwrap();
        }
        assert!(seen.closed.load(Ordering::Acquire));
    });
}

/// A drain has a deadline: after it, the roots go on and nothing has changed.
#[test]
fn a_drain_is_given_up_at_its_deadline() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("a", 9, &Arc::default())).await;
        let valve = Valve::shut();
        let filter = add(&graph, park("f", node, &valve, false)).await;
        let top = port(&graph, filter, READER).await;
        let result = Rc::new(Cell::new(None));
        let (handle, told) = (top.handle(), result.clone());
        Local::current().spawn(async move { told.set(Some(read_byte(&handle, 0).await)) });
        Local::current().sleep(Duration::from_millis(5)).await;
        let error = impatient(&graph).drain(&[node]).await.err().unwrap();
        assert!(error.to_string().contains("test port has 1 in flight"), "{error}");
        // The root is open again: a second request gets in and parks at the valve.
        let handle = top.handle();
        Local::current().spawn(async move { assert!(read_byte(&handle, 0).await.is_ok()) });
        Local::current().sleep(Duration::from_millis(5)).await;
        assert_eq!(top.in_flight(), 2);
        valve.open();
        while top.in_flight() > 0 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(result.get(), Some(Ok(9)));
    });
}

/// Commands whose drains overlap queue; others run side by side.
#[test]
fn overlapping_drains_queue_and_others_do_not() {
    run_control(|_| async {
        let graph = graph();
        let a = add(&graph, mem("a", 1, &Arc::default())).await;
        let b = add(&graph, mem("b", 1, &Arc::default())).await;
        let mut first = graph.permit();
        let held = first.drain(&[a]).await.unwrap();
        drop(graph.permit().drain(&[b]).await.unwrap());
        let order = Rc::new(RefCell::new(Vec::new()));
        let (waiting, noted) = (graph.clone(), order.clone());
        Local::current().spawn(async move {
            drop(waiting.permit().drain(&[a]).await.unwrap());
            noted.borrow_mut().push("second");
        });
        Local::current().sleep(Duration::from_millis(5)).await;
        order.borrow_mut().push("first");
        drop(held);
        Local::current().sleep(Duration::from_millis(5)).await;
        assert_eq!(*order.borrow(), ["first", "second"]);
    });
}

#[test]
fn refused_changes_leave_the_graph_as_it_was() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let a = add(&graph, mem("a", 1, &seen)).await;
        let f = add(&graph, park("f", a, &Arc::default(), true)).await;
        let g = add(&graph, park("g", f, &Arc::default(), true)).await;
        let error = graph.permit().add(mem("a", 2, &seen)).await.unwrap_err();
        assert_eq!(error.to_string(), "Duplicate nodes with node-name='a'");
        let error = graph.permit().remove(a).await.unwrap_err();
        assert_eq!(error.to_string(), "Node 'a' is in use by node 'f'");
        let mut permit = graph.permit();
        let drained = permit.drain(&[f]).await.unwrap();
        let file = graph.child(f, "file").unwrap();
        let error = drained.write(|edit, set| edit.set_edge(set.owner(f)?, file, g)).err().unwrap();
        assert_eq!(error.to_string(), "Making 'g' a file child of 'f' would create a cycle");
        let drained = permit.drain(&[g]).await.unwrap();
        let error = drained.write(|edit, set| edit.set_edge(set.owner(a)?, file, f)).err().unwrap();
        assert_eq!(error.to_string(), "The change needs a node that is not drained");
        assert_eq!(graph.nodes().len(), 3);
        assert!(!seen.closed.load(Ordering::Acquire), "a node that stays is not closed");
    });
}

#[test]
fn users_that_do_not_bear_each_other_are_refused() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 1, &Arc::default())).await;
        let first = port(&graph, node, Perms { uses: PermSet::WRITE, shares: PermSet::CONSISTENT_READ }).await;
        let options = PortOptions { name: "second port".into(), perms: WRITER };
        let refused = Port::attach(&mut graph.permit(), node, options.clone(), Rc::new(|_| ())).await.err().unwrap();
        let text = "Permission conflict on node 'disk': 'write' is used by test port and not shared by second port";
        let other = "Permission conflict on node 'disk': 'write' is used by second port and not shared by test port";
        assert!([text, other].contains(&refused.to_string().as_str()), "{refused}");
        first.detach(&mut graph.permit()).await;
        Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.unwrap();
    });
}

#[test]
fn a_read_only_node_has_no_writer() {
    run_control(|_| async {
        let graph = graph();
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        let node = NewNode::new("ro".into(), options, |_| (Mem::new(vec![0; 512], &Arc::default()), 512));
        let node = add(&graph, node).await;
        let wants = PortOptions { name: "p".into(), perms: WRITER };
        let error = Port::attach(&mut graph.permit(), node, wants, Rc::new(|_| ())).await.err().unwrap();
        assert_eq!(error.to_string(), "Block node 'ro' is read-only");
        // And a port that did not ask for it writes nothing, whatever it tries.
        let reader = port(&graph, node, READER).await;
        assert_eq!(write_bytes(&reader.handle(), 0, &[1]).await, Err(IoError::ReadOnly));
    });
}

/// A reader's port does not write even to a node that others may write.
#[test]
fn a_port_does_only_what_it_asked_for() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 1, &Arc::default())).await;
        let (reader, writer) = (port(&graph, node, READER).await, port(&graph, node, WRITER).await);
        assert_eq!(write_bytes(&reader.handle(), 0, &[5]).await, Err(IoError::ReadOnly));
        assert_eq!(write_bytes(&writer.handle(), 0, &[5]).await, Ok(()));
        assert_eq!(read_byte(&reader.handle(), 0).await, Ok(5));
    });
}

#[test]
fn a_resize_is_seen_by_requests_and_told_to_ports() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 1, &Arc::default())).await;
        let filter = add(&graph, park("f", node, &Arc::default(), true)).await;
        let told = Rc::new(Cell::new(None));
        let news = {
            let told = told.clone();
            Rc::new(move |PortNews::Resized(now)| told.set(Some(now.size)))
        };
        let options = PortOptions { name: "p".into(), perms: READER };
        let top = Port::attach(&mut graph.permit(), filter, options, news).await.unwrap();
        assert_eq!(read_byte(&top.handle(), 70_000).await, Err(IoError::OutOfRange));
        graph.permit().resize(filter, 131_072, Preallocation::Off).await.unwrap();
        assert_eq!(told.get(), Some(131_072));
        assert_eq!(top.geometry().size, 131_072);
        assert_eq!(read_byte(&top.handle(), 70_000).await, Ok(0));
    });
}

#[test]
fn a_resize_needs_everybody_to_bear_it() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 1, &Arc::default())).await;
        let fixed = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::CONSISTENT_READ | PermSet::WRITE };
        let _top = port(&graph, node, fixed).await;
        let error = graph.permit().resize(node, 512, Preallocation::Off).await.unwrap_err();
        assert!(error.to_string().contains("'resize' is used by block_resize and not shared by test port"), "{error}");
        assert_eq!(graph.node(node).unwrap().geometry.size, 65536);
        assert_eq!(graph.node(node).unwrap().parents.len(), 1, "the refused user is gone again");
    });
}

#[test]
fn what_was_written_is_flushed_before_a_node_goes() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let node = add(&graph, mem("disk", 1, &seen)).await;
        graph.permit().remove(node).await.unwrap();
        assert_eq!(seen.flushes.load(Ordering::Relaxed), 1);
        assert!(seen.closed.load(Ordering::Acquire));
        assert_eq!(graph.find("disk"), None);
    });
}

/// A filter whose configuration says on which thread it ends.
struct Passes(ChildId);

struct Ending(std::sync::mpsc::Sender<String>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.send(std::thread::current().name().unwrap_or_default().to_owned()).unwrap();
    }
}

impl Filter for Passes {
    type Conf = Ending;

    fn child(&self) -> ChildId {
        self.0
    }

    async fn reopen(&self, conf: &Ending, _: ReopenRequest<'_>) -> Result<Ending, Error> {
        Ok(Ending(conf.0.clone()))
    }

    fn info(&self, _: &Ending) -> DriverInfo {
        DriverInfo { driver: "passes", ..DriverInfo::default() }
    }
}

/// A file may be closed there, and that may wait for whoever has it.
#[test]
fn the_configuration_of_a_removed_node_ends_on_a_helper_thread() {
    run_control(|_| async {
        let graph = graph();
        let below = add(&graph, mem("disk", 1, &Arc::default())).await;
        let (sender, ended) = std::sync::mpsc::channel();
        let node = NewNode::new("passes".into(), NodeOptions::default(), move |edges| {
            (Filtered(Passes(edges.to("file", below, Role::Filtered))), Ending(sender))
        });
        let node = graph.permit().add(node).await.unwrap();
        ended.try_recv().unwrap_err();
        graph.permit().remove(node).await.unwrap();
        assert_eq!(ended.try_recv().unwrap(), "rt-helper", "and before the answer");
    });
}

/// What could not be made stable is said once; after that the node goes, flushed or not.
#[test]
fn a_node_that_cannot_be_flushed_goes_at_the_second_try() {
    run_control(|_| async {
        let graph = graph();
        for (error, tries) in [(IoError::Os(5), 2), (IoError::FlushLatched, 1)] {
            let seen = Arc::<Seen>::default();
            let node = add(&graph, mem("disk", 1, &seen)).await;
            *seen.flush_error.lock().unwrap() = Some(error);
            for _ in 1..tries {
                let refused = graph.permit().remove(node).await.unwrap_err().full();
                assert_eq!(refused, "Could not flush node 'disk' before removing it: Input/output error (os error 5)");
                assert!(!seen.closed.load(Ordering::Acquire));
            }
            graph.permit().remove(node).await.unwrap();
            assert!(seen.closed.load(Ordering::Acquire));
        }
    });
}

#[test]
fn an_inline_child_goes_with_its_last_parent() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let child = add(&graph, mem("child", 1, &seen).inline()).await;
        let one = add(&graph, park("one", child, &Arc::default(), true)).await;
        let two = add(&graph, park("two", child, &Arc::default(), true)).await;
        graph.permit().remove(one).await.unwrap();
        assert!(!seen.closed.load(Ordering::Acquire));
        graph.permit().remove(two).await.unwrap();
        assert!(seen.closed.load(Ordering::Acquire));
    });
}

/// A partial block is read, changed and written; a concurrent neighbour in the same block is not lost.
#[test]
fn read_modify_write_keeps_the_neighbours() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let made = Mem::aligned(vec![0xaa; 16384], &seen, 4096);
        let node = add(&graph, NewNode::new("b".into(), NodeOptions::default(), |_| (made, 16384))).await;
        let top = port(&graph, node, WRITER).await;
        let done = Rc::new(Cell::new(0));
        for sector in 0..8u64 {
            let (handle, done) = (top.handle(), done.clone());
            Local::current().spawn(async move {
                write_bytes(&handle, 4096 + sector * 512, &[sector as u8; 512]).await.unwrap();
                done.set(done.get() + 1);
            });
        }
        while done.get() < 8 {
            Local::current().sleep(Duration::from_millis(1)).await;
        }
        for sector in 0..8u64 {
            assert_eq!(read_byte(&top.handle(), 4096 + sector * 512 + 511).await, Ok(sector as u8));
        }
        assert_eq!(read_byte(&top.handle(), 4095).await, Ok(0xaa));
        assert_eq!(read_byte(&top.handle(), 8192).await, Ok(0xaa));
    });
}

/// Elsewhere the result of the padding read was ignored, and the neighbours were overwritten with garbage.
#[test]
fn a_write_fails_if_its_padding_cannot_be_read() {
    run_control(|_| async {
        let graph = graph();
        for (at, len) in [(512, 512), (0, 512), (3584, 1024)] {
            let seen = Arc::<Seen>::default();
            let made = Mem::aligned(vec![0xaa; 16384], &seen, 4096);
            let name = format!("b{at}-{len}");
            let node = add(&graph, NewNode::new(name, NodeOptions::default(), |_| (made, 16384))).await;
            let top = port(&graph, node, WRITER).await;
            seen.fail_reads.store(1, Ordering::Relaxed);
            assert_eq!(write_bytes(&top.handle(), at, &vec![0xbb; len]).await, Err(IoError::Os(5)));
            assert_eq!(seen.writes.load(Ordering::Relaxed), 0);
            assert_eq!(read_byte(&top.handle(), at).await, Ok(0xaa));
        }
    });
}

#[test]
fn counters_say_what_went_through_each_node() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 1, &Arc::default())).await;
        let filter = add(&graph, park("f", node, &Arc::default(), true)).await;
        let top = port(&graph, filter, WRITER).await;
        write_bytes(&top.handle(), 512, &[3; 512]).await.unwrap();
        read_byte(&top.handle(), 0).await.unwrap();
        read_byte(&top.handle(), 1 << 40).await.unwrap_err();
        for id in [node, filter] {
            let totals = graph.node(id).unwrap().totals;
            let [read, write, ..] = totals.ops;
            assert_eq!((read.ops, read.bytes, write.ops, write.bytes), (1, 1, 1, 512));
            assert_eq!(totals.highest_write, 1024);
        }
        assert_eq!(graph.node(filter).unwrap().totals.ops[OpKind::Read as usize].invalid, 1);
    });
}

/// Invariant 5: a job holds the graph in steps, and a drain gets through at its pause points.
#[test]
fn a_job_lets_a_drain_through_between_its_steps() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 4, &Arc::default())).await;
        let top = port(&graph, node, READER).await;
        let (steps, stop) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
        let (handle, count, told) = (top.handle(), steps.clone(), stop.clone());
        Local::current().spawn(async move {
            let mut job = handle.job(&Local::current());
            while !told.get() {
                let buf = IoBuf::alloc(1, 1).unwrap();
                job.step(async |cx| cx.child(PORT).read(range(0, 1), buf.clone()).await).await.unwrap();
                count.set(count.get() + 1);
                job.pause_point().await;
            }
        });
        let mut permit = graph.permit();
        for _ in 0..10 {
            let drained = permit.drain(&[node]).await.unwrap();
            let paused = steps.get();
            Local::current().sleep(Duration::from_millis(1)).await;
            assert_eq!(steps.get(), paused, "nothing runs inside a drained root");
            drop(drained);
            while steps.get() == paused {
                Local::current().sleep(Duration::from_millis(1)).await;
            }
        }
        stop.set(true);
    });
}

/// A root is taken out in the end, however long another command keeps what is below: nobody could take it out later.
#[test]
fn a_port_is_unplugged_however_long_others_keep_the_node() {
    run_control(async |local| {
        let graph = graph();
        let node = add(&graph, mem("disk", 4, &Arc::default())).await;
        let top = port(&graph, node, READER).await;
        let mut other = graph.permit();
        let kept = other.drain(&[node]).await.unwrap();
        let (unplugged, beside) = (Rc::new(Cell::new(false)), graph.clone());
        let done = unplugged.clone();
        local.spawn(async move {
            top.detach(&mut impatient(&beside)).await;
            done.set(true);
        });
        // Several times its deadline.
        local.sleep(Duration::from_millis(300)).await;
        assert!(!unplugged.get(), "another command has it");
        drop(kept);
        while !unplugged.get() {
            local.sleep(Duration::from_millis(1)).await;
        }
        graph.permit().remove(node).await.unwrap();
    });
}

/// Invariant 3: a request is over when its completion has arrived, not when its future is dropped.
#[test]
fn an_abandoned_operation_still_counts() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, mem("disk", 4, &Arc::default())).await;
        let top = port(&graph, node, READER).await;
        let (reader, writer) = std::io::pipe().unwrap();
        let lane = top.handle().lane(&Local::current());
        let pin = lane.try_enter().unwrap();
        {
            // A read of an empty pipe ends when somebody writes to it.
            let op = Op::Read { fd: Arc::new(reader.into()), buf: IoBuf::alloc(1, 1).unwrap(), offset: u64::MAX };
            let mut read = std::pin::pin!(pin.cx().submit(Engine::Pool, op));
            let polled = std::future::poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx).is_ready())).await;
            assert!(!polled);
        }
        drop(pin);
        assert_eq!(top.in_flight(), 1, "its future is dropped, the kernel still has its buffer");
        assert!(impatient(&graph).drain(&[node]).await.is_err());
        std::io::Write::write_all(&mut { writer }, b"x").unwrap();
        drop(graph.permit().drain(&[node]).await.unwrap());
        assert_eq!(top.in_flight(), 0);
    });
}

/// Nothing drains the control task's own requests: parked, they would keep guests out until somebody else lets them go.
#[test]
fn what_a_command_does_by_itself_does_not_park() {
    run_control(async |local| {
        let (graph, seen, valve) = (graph(), Arc::<Seen>::default(), Valve::shut());
        let below = add(&graph, mem("m", 1, &seen)).await;
        let park = add(&graph, park("park", below, &valve, true)).await;
        let mut permit = graph.permit();
        let removed = block_core::rt::within(&local, Duration::from_secs(5), permit.remove(park)).await;
        removed.expect("the flush does not wait at the valve").unwrap();
    });
}
