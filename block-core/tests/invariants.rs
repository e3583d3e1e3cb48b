//! The invariants of the graph lock that no other test shows. All eleven, with what shows each, are in
//! `docs/graph-lock-cases.md`; the numbers are those of the design's section 2.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/random.rs"]
mod random;
mod support;

use std::cell::{Cell, RefCell};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use block_core::base::{Error, IoError};
use block_core::catalog;
use block_core::graph::{
    ChildId, DriverInfo, Graph, IoCx, NewNode, NodeId, NodeOptions, OpKind, PermSet, Perms, Reopen, ReopenRequest, Role,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::port::Port;
use block_core::rt::{IoBuf, Local, run_control};
use random::Random;
use serde_json::json;
use support::user::{
    READER, a_while, beside, io_thread, is_stopped, lead, port, range, read_byte, read_through, until,
};
use support::{Seen, Valve, add, graph, impatient, mem, park};

// ---- 1: a view is what its root reaches --------------------------------------------------------------------------------

/// Which disk a read ends in, as the graph has it now.
fn bottom(graph: &Graph, mut node: NodeId) -> String {
    loop {
        let report = graph.node(node).unwrap();
        match report.children.first() {
            Some((_, child)) => node = *child,
            None => return report.name,
        }
    }
}

/// Three hundred times an edge of some filter is led elsewhere. After each time, a thread that has kept its lane and its
/// cached view reads, through every root, what the graph says.
#[test]
fn what_a_root_reads_is_what_its_graph_says() {
    run_control(|_| async {
        let (graph, thread) = (graph(), io_thread());
        let mut nodes = Vec::new();
        for disk in 0..3 {
            nodes.push(add(&graph, mem(&disk.to_string(), disk, &Arc::default())).await);
        }
        for filter in 3..9 {
            nodes.push(add(&graph, park(&format!("f{filter}"), nodes[filter - 1], &Arc::default(), true)).await);
        }
        let ports = [port(&graph, nodes[8], READER).await, port(&graph, nodes[6], READER).await];
        let handles = ports.each_ref().map(Port::handle);
        let (ask, asked) = mpsc::channel::<()>();
        let (answer, answered) = mpsc::channel();
        thread.remote().spawn(move |local| async move {
            let lanes = handles.map(|handle| handle.lane(&local));
            while asked.recv().is_ok() {
                for lane in &lanes {
                    answer.send(read_through(lane, 0).await.unwrap()).unwrap();
                }
            }
        });
        let mut random = Random(1);
        let mut below = |limit: usize| usize::try_from(random.below(limit as u64)).unwrap();
        for _ in 0..300 {
            let filter = 3 + below(6);
            lead(&graph, nodes[filter], "file", nodes[below(filter)]).await;
            ask.send(()).unwrap();
            for top in [nodes[8], nodes[6]] {
                assert_eq!(answered.recv().unwrap().to_string(), bottom(&graph, top));
            }
        }
        drop(ask);
    });
}

// ---- 3: who is counted, until when -------------------------------------------------------------------------------------

/// A filter whose requests start work that outlives them: it waits at the valve, then flushes the child.
struct Later {
    file: ChildId,
    valve: Arc<Valve>,
}

impl Filter for Later {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn before(&self, _: &(), cx: IoCx<'_>, request: Request) -> Result<(), IoError> {
        if request.kind == OpKind::Read {
            let (file, valve, forked) = (self.file, self.valve.clone(), cx.fork());
            cx.local().spawn(async move {
                valve.passed().await;
                forked.cx().child(file).flush().await.unwrap();
            });
        }
        Ok(())
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "later", ..DriverInfo::default() }
    }
}

fn later(name: &str, below: NodeId, valve: &Arc<Valve>) -> NewNode {
    NewNode::new(name.into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(Later { file, valve: valve.clone() }), ())
    })
}

/// A request is over, what it forked is not: the root is not empty, and a drain waits. A fork needs no admission, so
/// that a request which was inside before the drain can still make one.
#[test]
fn forked_work_counts_until_it_is_over() {
    run_control(|_| async {
        let (graph, seen, inside, after) = (graph(), Arc::<Seen>::default(), Valve::shut(), Valve::shut());
        let disk = add(&graph, mem("disk", 1, &seen)).await;
        let node = add(&graph, later("node", disk, &after)).await;
        let held = add(&graph, park("held", node, &inside, true)).await;
        let top = port(&graph, held, READER).await;
        let handle = top.handle();
        let read = beside(async move { read_byte(&handle, 0).await });
        until(|| inside.parked() > 0).await;
        // The drain stops the root, and only then the request comes to where it forks.
        assert!(impatient(&graph).drain(&[disk]).await.is_err());
        assert_eq!((read.take(), top.in_flight()), (Some(Ok(1)), 1));
        let draining = graph.clone();
        let drained = beside(async move { drop(draining.permit().drain(&[disk]).await.unwrap()) });
        a_while().await;
        assert!(drained.borrow().is_none());
        after.open();
        until(|| drained.borrow().is_some()).await;
        assert_eq!((seen.flushes.load(Ordering::Relaxed), top.in_flight()), (1, 0));
    });
}

// ---- 5: nobody waits for the control task --------------------------------------------------------------------------------

/// The control thread stands still until another thread has done a thousand requests.
#[test]
fn requests_end_while_the_control_thread_stands_still() {
    run_control(|_| async {
        let (graph, thread) = (graph(), io_thread());
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let filter = add(&graph, park("filter", node, &Arc::default(), true)).await;
        let handle = port(&graph, filter, READER).await.handle();
        let (done, over) = mpsc::channel();
        thread.remote().spawn(move |_| async move {
            let mut read = 0;
            while read < 1000 && read_byte(&handle, 0).await.is_ok() {
                read += 1;
            }
            done.send(read).unwrap();
        });
        assert_eq!(over.recv(), Ok(1000));
    });
}

// ---- 6: what a node refers to --------------------------------------------------------------------------------------------

/// A reference asks for nothing and bears everything. It is an edge all the same: what it leads to stays, and who
/// changes that drains who refers to it.
#[test]
fn a_reference_is_an_edge_without_permissions() {
    run_control(|_| async {
        let graph = graph();
        let [disk, store] =
            [add(&graph, mem("disk", 1, &Arc::default())).await, add(&graph, mem("store", 2, &Arc::default())).await];
        let node = NewNode::new("node".into(), NodeOptions::default(), |edges| {
            let file = edges.to("file", disk, Role::Filtered);
            edges.to("store", store, Role::Reference);
            (Filtered(Later { file, valve: Arc::default() }), ())
        });
        let node = add(&graph, node).await;
        let alone = Perms { uses: PermSet::ALL, shares: PermSet::NONE };
        let [top, sole] = [port(&graph, node, alone).await, port(&graph, store, alone).await];
        sole.detach(&mut graph.permit()).await;
        let refused = graph.permit().remove(store).await.unwrap_err();
        assert_eq!(refused.full(), "Node 'store' is in use by node 'node'");
        let mut permit = graph.permit();
        let drained = permit.drain(&[store]).await.unwrap();
        assert!(is_stopped(&top));
        drop(drained);
    });
}

// ---- 7: how far a change reaches -----------------------------------------------------------------------------------------

/// A node that is reopened is drained with all that is above it, by whatever way.
#[test]
fn a_reopen_drains_all_that_is_above() {
    run_control(|_| async {
        let (graph, valve) = (graph(), Arc::<Valve>::default());
        let disk = add(&graph, mem("disk", 1, &Arc::default())).await;
        let node = add(&graph, park("node", disk, &valve, false)).await;
        let left = add(&graph, park("left", node, &Arc::default(), true)).await;
        let right = add(&graph, park("right", left, &Arc::default(), true)).await;
        let above =
            [port(&graph, node, READER).await, port(&graph, left, READER).await, port(&graph, right, READER).await];
        let beside_it = port(&graph, disk, READER).await;
        valve.close();
        let reopening = graph.clone();
        let reopened = beside(async move {
            let all =
                vec![Reopen { node, options: Box::new(()), common: NodeOptions::default(), children: Vec::new() }];
            reopening.permit().reopen(all).await.map_err(|error| error.full())
        });
        until(|| valve.parked() > 0).await; // its flush
        assert!(above.iter().all(is_stopped) && !is_stopped(&beside_it));
        valve.open();
        until(|| reopened.borrow().is_some()).await;
        assert_eq!(reopened.take(), Some(Ok(())));
        assert!(!above.iter().any(is_stopped));
    });
}

// ---- 8: a drained command's own I/O --------------------------------------------------------------------------------------

/// Who has drained a node does I/O on it, and on no other, while everybody else waits. It is over when all that it
/// started is over.
#[test]
fn a_drained_command_does_io_of_its_own() {
    run_control(|_| async {
        let (graph, valve) = (graph(), Valve::shut());
        let disk = add(&graph, mem("disk", 7, &Arc::default())).await;
        let node = add(&graph, later("node", disk, &valve)).await;
        let top = port(&graph, node, READER).await;
        let mut permit = graph.permit();
        let mut drained = permit.drain(&[node]).await.unwrap();
        let refused = drained.exclusive(disk).err().unwrap();
        assert_eq!(refused.to_string(), "The change needs a node that is not drained");
        let opened = Rc::new(Cell::new(false));
        let told = opened.clone();
        Local::current().spawn(async move {
            until(|| valve.parked() > 0).await;
            a_while().await;
            told.set(true);
            valve.open();
        });
        let buf = IoBuf::alloc(1, 1).unwrap();
        let mut exclusive = drained.exclusive(node).unwrap();
        let read = exclusive.with(async |child| child.read(range(0, 1), buf.clone()).await).await;
        drop(exclusive);
        assert_eq!((read, buf.to_vec()), (Ok(()), vec![7]));
        assert!(opened.get(), "what the read forked is over too");
        assert!(is_stopped(&top));
        drop(drained);
        assert!(!is_stopped(&top));
    });
}

// ---- 9: closed before the reply ------------------------------------------------------------------------------------------

/// A thread that has been inside and is idle still has the old view cached. It is told to forget it, so that the removed
/// node closes. A thread that cannot be told holds the command up: that is the twin.
#[test]
fn an_idle_thread_keeps_no_removed_node() {
    run_control(|_| async {
        let (graph, thread) = (graph(), io_thread());
        let (first, second) = (Arc::<Seen>::default(), Arc::<Seen>::default());
        let one = add(&graph, mem("one", 1, &first)).await;
        let two = add(&graph, mem("two", 2, &second)).await;
        let three = add(&graph, mem("three", 3, &Arc::default())).await;
        let filter = add(&graph, park("filter", one, &Arc::default(), true)).await;
        let top = port(&graph, filter, READER).await;
        let (handle, idle) = (top.handle(), Arc::<AtomicBool>::default());
        let told = idle.clone();
        thread.remote().spawn(move |local| async move {
            let lane = handle.lane(&local);
            assert_eq!(read_through(&lane, 0).await, Ok(1));
            told.store(true, Ordering::Release);
            std::future::pending::<()>().await;
            drop(lane);
        });
        until(|| idle.load(Ordering::Acquire)).await;
        lead(&graph, filter, "file", two).await;
        let removed = removing(&graph, one);
        until(|| removed.borrow().is_some()).await;
        assert_eq!(removed.take(), Some(Ok(())));
        assert!(first.closed.load(Ordering::Acquire));

        let (listen, deaf) = mpsc::channel::<()>();
        thread.remote().send(move |_| assert!(deaf.recv().is_err()));
        lead(&graph, filter, "file", three).await;
        let removed = removing(&graph, two);
        a_while().await;
        assert!(removed.borrow().is_none() && !second.closed.load(Ordering::Acquire));
        drop(listen);
        until(|| removed.borrow().is_some()).await;
        assert_eq!(removed.take(), Some(Ok(())));
        assert!(second.closed.load(Ordering::Acquire));
    });
}

fn removing(graph: &Rc<Graph>, node: NodeId) -> Rc<RefCell<Option<Result<(), String>>>> {
    let graph = graph.clone();
    beside(async move { graph.permit().remove(node).await.map_err(|error| error.full()) })
}

// ---- 11: blocking system calls -------------------------------------------------------------------------------------------

/// A lease on a file: who opens it waits in `open` until the lease is given back.
struct Lease(tempfile::NamedTempFile);

impl Lease {
    fn take() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(65536).unwrap();
        // The holder is told by a signal; this one is ignored by default.
        fcntl(&file, F_SETSIG, libc::SIGURG);
        fcntl(&file, libc::F_SETLEASE, libc::F_WRLCK);
        Self(file)
    }

    fn give_back(&self) {
        fcntl(&self.0, libc::F_SETLEASE, libc::F_UNLCK);
    }
}

#[expect(unsafe_code, reason = "leases have no safe form")]
fn fcntl(file: &tempfile::NamedTempFile, command: i32, argument: i32) {
    // SAFETY: both commands take a number.
    let result = unsafe { libc::fcntl(file.as_file().as_raw_fd(), command, argument) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// `<asm-generic/fcntl.h>`; the libc crate has it for few machines.
const F_SETSIG: i32 = 10;

/// An `open` that hangs in the kernel hangs no command but its own, and no request.
#[test]
fn an_open_that_hangs_holds_up_nobody_else() {
    run_control(|_| async {
        let (graph, lease) = (graph(), Lease::take());
        let node = add(&graph, mem("node", 1, &Arc::default())).await;
        let top = port(&graph, node, READER).await;
        let options = json!({"driver": "file", "node-name": "leased", "filename": lease.0.path(), "read-only": true});
        let options = qmp::schema::from_value(options).unwrap();
        let opening = graph.clone();
        let opened =
            beside(async move { catalog::add(&mut opening.permit(), options).await.map_err(|error| error.full()) });
        for round in 0..10 {
            a_while().await;
            assert_eq!(read_byte(&top.handle(), 0).await, Ok(1));
            let other = add(&graph, mem(&format!("n{round}"), 0, &Arc::default())).await;
            graph.permit().remove(other).await.unwrap();
        }
        assert!(opened.borrow().is_none());
        lease.give_back();
        until(|| opened.borrow().is_some()).await;
        assert!(opened.take().unwrap().is_ok());
    });
}
