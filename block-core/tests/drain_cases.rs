//! What a drain promises: QEMU's thirty cases of draining, each as a property of our own graph. What QEMU finds in
//! them, what we find, and why that differs, is in `docs/graph-lock-cases.md`.
//!
//! Where QEMU counts drain callbacks and a node's quiesce counter, there is one thing to see here: a root is stopped,
//! or it is not.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

mod support;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block_core::base::{Error, IoError, Result};
use block_core::graph::{
    ChildId, DriverInfo, Graph, GraphEdit, IoCx, NewNode, NodeId, NodeOptions, Owner, ReopenRequest, Role,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::port::Port;
use block_core::rt::sync::{Notify, oneshot};
use block_core::rt::{IoThread, Local, Remote, run_control};
use support::user::{
    READER, TestJob, WRITER, a_while, beside, io_thread, is_stopped, lead, port, read_byte, reads, until,
};
use support::{Seen, Valve, add, graph, mem, park, twice};

/// How much a command drains. Draining all is what shutdown does, one root after the other; a list of all nodes comes
/// to the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    All,
    One,
}

impl What {
    /// How many different drains of a job's nodes it stands for.
    fn drains(self) -> usize {
        match self {
            Self::All => 1,
            Self::One => 3,
        }
    }
}

/// A port over "node" over "backing" over "disk", and a second port over "backing" alone. Requests can be held at the
/// valves of "node" and "backing".
struct Bench {
    graph: Rc<Graph>,
    node: NodeId,
    backing: NodeId,
    disk: NodeId,
    valves: [Arc<Valve>; 2],
    top: Port,
    low: Port,
}

type Answer = Rc<RefCell<Option<Result<u8, IoError>>>>;

impl Bench {
    /// `hurries`: who is held at a valve goes on when its root is drained.
    async fn new(hurries: bool) -> Self {
        let graph = graph();
        let valves = [Arc::<Valve>::default(), Arc::<Valve>::default()];
        let disk = add(&graph, mem("disk", 1, &Arc::default())).await;
        let backing = add(&graph, park("backing", disk, &valves[1], hurries)).await;
        let node = add(&graph, park("node", backing, &valves[0], hurries)).await;
        let (top, low) = (port(&graph, node, READER).await, port(&graph, backing, READER).await);
        Self { graph, node, backing, disk, valves, top, low }
    }

    fn drained(&self, what: What) -> Vec<NodeId> {
        match what {
            What::All => all(&self.graph),
            What::One => vec![self.node],
        }
    }

    fn stopped(&self) -> [bool; 2] {
        [is_stopped(&self.top), is_stopped(&self.low)]
    }

    /// A read through each port, held at "node" and at "backing".
    async fn hold_reads(&self) -> [Answer; 2] {
        self.valves.iter().for_each(|valve| valve.close());
        let reads = [&self.top, &self.low].map(reading);
        until(|| self.top.in_flight() == 1 && self.low.in_flight() == 1).await;
        reads
    }

    fn open_valves(&self) {
        self.valves.iter().for_each(|valve| valve.open());
    }
}

fn all(graph: &Graph) -> Vec<NodeId> {
    graph.nodes().into_iter().map(|node| node.id).collect()
}

/// A read of byte 0 beside the test.
fn reading(port: &Port) -> Answer {
    let handle = port.handle();
    beside(async move { read_byte(&handle, 0).await })
}

// ---- who is reached, and how often -----------------------------------------------------------------------------------

/// Requests that are held under a drained root hear of it and end before the drain has begun; the others hear nothing.
async fn a_drain_hurries(what: What) {
    let bench = Bench::new(true).await;
    let [top, low] = bench.hold_reads().await;
    let drained = bench.drained(what);
    let mut permit = bench.graph.permit();
    let drained = permit.drain(&drained).await.unwrap();
    assert_eq!(top.take(), Some(Ok(1)), "what was inside is over");
    a_while().await;
    assert_eq!(low.borrow().is_some(), what == What::All, "a root that is not above the change is left alone");
    drop(drained);
    let again = reading(&bench.top);
    bench.open_valves();
    until(|| again.borrow().is_some() && low.borrow().is_some()).await;
    assert_eq!([again.take(), low.take()], [Some(Ok(1)); 2], "afterwards requests flow again");
}

/// Roots above what is drained are shut, and no other; all are open afterwards.
async fn a_drain_shuts(what: What) {
    let bench = Bench::new(true).await;
    assert_eq!(bench.stopped(), [false; 2]);
    let mut permit = bench.graph.permit();
    let drained = permit.drain(&bench.drained(what)).await.unwrap();
    assert_eq!(bench.stopped(), [true, what == What::All]);
    let waiting = reading(&bench.top);
    a_while().await;
    assert!(waiting.borrow().is_none() && bench.top.in_flight() == 0, "it waits outside, uncounted");
    drop(drained);
    assert_eq!(bench.stopped(), [false; 2]);
    until(|| waiting.borrow().is_some()).await;
    assert_eq!(waiting.take(), Some(Ok(1)));
}

/// Runs what a command does in a task that has just been in the graph itself: QEMU's "from a coroutine".
fn in_a_task(work: impl AsyncFnOnce() + 'static) {
    run_control(|_| async {
        let bench = Bench::new(true).await;
        let over = beside(async move {
            assert_eq!(read_byte(&bench.top.handle(), 0).await, Ok(1));
            work().await;
        });
        until(|| over.borrow().is_some()).await;
    });
}

#[test]
fn driver_cb_drain_all() {
    run_control(|_| a_drain_hurries(What::All));
}

#[test]
fn driver_cb_drain() {
    run_control(|_| a_drain_hurries(What::One));
}

#[test]
fn driver_cb_co_drain_all() {
    in_a_task(|| a_drain_hurries(What::All));
}

#[test]
fn driver_cb_co_drain() {
    in_a_task(|| a_drain_hurries(What::One));
}

#[test]
fn quiesce_drain_all() {
    run_control(|_| a_drain_shuts(What::All));
}

#[test]
fn quiesce_drain() {
    run_control(|_| a_drain_shuts(What::One));
}

#[test]
fn quiesce_co_drain_all() {
    in_a_task(|| a_drain_shuts(What::All));
}

#[test]
fn quiesce_co_drain() {
    in_a_task(|| a_drain_shuts(What::One));
}

/// One command cannot nest drains (`compile_fail/no_second_drain.rs`). Those of two commands come one after the other:
/// the end of one lets nobody in whom the other keeps out.
#[test]
fn nested() {
    run_control(|_| async {
        for (outer, inner) in
            [(What::All, What::All), (What::All, What::One), (What::One, What::All), (What::One, What::One)]
        {
            let bench = Bench::new(true).await;
            let mut permit = bench.graph.permit();
            let first = permit.drain(&bench.drained(outer)).await.unwrap();
            let (begun, end) = (Rc::new(Cell::new(false)), Rc::new(Notify::new()));
            let (graph, nodes, told, asked) = (bench.graph.clone(), bench.drained(inner), begun.clone(), end.clone());
            let second = beside(async move {
                let mut permit = graph.permit();
                let drained = permit.drain(&nodes).await.unwrap();
                told.set(true);
                asked.notified().await;
                drop(drained);
            });
            a_while().await;
            assert!(!begun.get(), "{inner:?} inside {outer:?}");
            assert_eq!(bench.stopped(), [true, outer == What::All]);
            drop(first);
            until(|| begun.get()).await;
            assert_eq!(bench.stopped(), [true, inner == What::All]);
            end.notify_one();
            until(|| second.borrow().is_some()).await;
            assert_eq!(bench.stopped(), [false; 2]);
        }
    });
}

/// While all is drained, what is new and stands on nothing drained comes and goes and works; what stands on a drained
/// node waits until that drain is over.
#[test]
fn graph_change_drain_all() {
    run_control(|_| async {
        let bench = Bench::new(true).await;
        let graph = &bench.graph;
        let mut permit = graph.permit();
        let drained = permit.drain(&all(graph)).await.unwrap();
        let (a, b) = (add(graph, mem("a", 5, &Arc::default())).await, add(graph, mem("b", 6, &Arc::default())).await);
        let (over_a, over_b) = (port(graph, a, READER).await, port(graph, b, READER).await);
        let (graph, node) = (bench.graph.clone(), bench.node);
        let over_node = beside(async move { port(&graph, node, READER).await });
        over_a.detach(&mut bench.graph.permit()).await;
        bench.graph.permit().remove(a).await.unwrap();
        assert_eq!(read_byte(&over_b.handle(), 0).await, Ok(6));
        a_while().await;
        assert!(over_node.borrow().is_none());
        drop(drained);
        until(|| over_node.borrow().is_some()).await;
        assert_eq!(read_byte(&over_node.take().unwrap().handle(), 0).await, Ok(1));
        assert_eq!(read_byte(&over_b.handle(), 0).await, Ok(6));
    });
}

// ---- requests of other threads -----------------------------------------------------------------------------------------

/// A filter whose requests take a detour through another thread, which is held up at a valve.
struct Detour {
    file: ChildId,
    by: Remote,
    valve: Arc<Valve>,
}

impl Filter for Detour {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn before(&self, _: &(), _: IoCx<'_>, _: Request) -> Result<(), IoError> {
        let (done, over) = oneshot();
        let valve = self.valve.clone();
        self.by.spawn(move |_| async move {
            valve.passed().await;
            done.send(()).unwrap();
        });
        over.await.map_err(|_| IoError::Os(5))
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "detour", ..DriverInfo::default() }
    }
}

/// A read on thread A that goes through thread B. A drain does not end while it is under way, wherever it is.
async fn a_drain_waits_for_threads(what: What) {
    let (a, b, valve) = (io_thread(), io_thread(), Valve::shut());
    let graph = graph();
    let disk = add(&graph, mem("disk", 1, &Arc::default())).await;
    let node = detour("node", disk, b.remote(), &valve);
    let node = add(&graph, node).await;
    let top = Rc::new(port(&graph, node, READER).await);
    let read = read_on(&a, &top);
    until(|| valve.parked() > 0).await;
    let nodes = if what == What::All { all(&graph) } else { vec![node] };
    let counted = top.clone();
    let drained = beside(async move {
        let mut permit = graph.permit();
        let drained = permit.drain(&nodes).await.unwrap();
        let inside = counted.in_flight();
        drop(drained);
        inside
    });
    a_while().await;
    assert!(drained.borrow().is_none());
    valve.open();
    until(|| drained.borrow().is_some() && read.borrow().is_some()).await;
    assert_eq!((drained.take(), read.take()), (Some(0), Some(Ok(1))));
}

fn detour(name: &str, below: NodeId, by: Remote, valve: &Arc<Valve>) -> NewNode {
    NewNode::new(name.into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(Detour { file, by, valve: valve.clone() }), ())
    })
}

fn read_on(thread: &IoThread, port: &Port) -> Answer {
    let handle = port.handle();
    let (done, over) = oneshot();
    thread.remote().spawn(move |_| async move {
        done.send(read_byte(&handle, 0).await).unwrap();
    });
    beside(async move { over.await.unwrap() })
}

#[test]
fn iothread_drain_all() {
    run_control(|_| a_drain_waits_for_threads(What::All));
}

/// Also at the wish of thread A: it asks the control thread when its own request is over, since a permit stays there.
#[test]
fn iothread_drain() {
    run_control(|_| async {
        a_drain_waits_for_threads(What::One).await;
        let bench = Bench::new(true).await;
        let a = io_thread();
        let (ask, asked) = oneshot();
        let (answer, answered) = oneshot::<u32>();
        let (told, over) = oneshot();
        let handle = bench.top.handle();
        a.remote().spawn(move |_| async move {
            let read = read_byte(&handle, 0).await;
            ask.send(()).unwrap();
            told.send((read, answered.await)).unwrap();
        });
        asked.await.unwrap();
        let mut permit = bench.graph.permit();
        let drained = permit.drain(&[bench.node]).await.unwrap();
        answer.send(bench.top.in_flight()).unwrap();
        assert_eq!(over.await, Ok((Ok(1), Ok(0))));
        drop(drained);
    });
}

/// Nodes have no thread. Three threads come to a drained part: all wait outside, and all are let in at its end.
#[test]
fn set_aio_context() {
    run_control(|_| async {
        let bench = Bench::new(true).await;
        let (a, b) = (io_thread(), io_thread());
        let mut permit = bench.graph.permit();
        let drained = permit.drain(&[bench.backing]).await.unwrap();
        let waiting = [read_on(&a, &bench.top), read_on(&b, &bench.top), reading(&bench.top)];
        a_while().await;
        assert!(waiting.iter().all(|read| read.borrow().is_none()) && bench.top.in_flight() == 0);
        drop(drained);
        until(|| waiting.iter().all(|read| read.borrow().is_some())).await;
        assert!(waiting.iter().all(|read| read.take() == Some(Ok(1))));
    });
}

// ---- jobs ------------------------------------------------------------------------------------------------------------------

/// A job over "source" over "source-disk", with "target".
struct JobBench {
    graph: Rc<Graph>,
    source: NodeId,
    source_disk: NodeId,
    target: NodeId,
    seen: [Arc<Seen>; 2],
    ports: [Port; 2],
    job: TestJob,
    _thread: Option<IoThread>,
}

/// Where a job runs.
#[derive(Clone, Copy)]
enum Home {
    Control,
    IoThread,
}

impl JobBench {
    async fn start(home: Home) -> Self {
        let graph = graph();
        let seen: [Arc<Seen>; 2] = Default::default();
        let source_disk = add(&graph, mem("source-disk", 1, &seen[0])).await;
        let source = add(&graph, park("source", source_disk, &Arc::default(), true)).await;
        let target = add(&graph, mem("target", 2, &seen[1])).await;
        let ports = [port(&graph, source, READER).await, port(&graph, target, WRITER).await];
        let thread = matches!(home, Home::IoThread).then(io_thread);
        let on = thread.as_ref().map_or_else(|| Local::current().remote(), IoThread::remote);
        let job = TestJob::start(&on, ports[0].handle(), ports[1].handle());
        Self { graph, source, source_disk, target, seen, ports, job, _thread: thread }
    }

    /// What is drained, one time after the other.
    fn drains(&self, what: What) -> Vec<Vec<NodeId>> {
        match what {
            What::All => vec![all(&self.graph)],
            What::One => vec![vec![self.source], vec![self.target], vec![self.source_disk]],
        }
    }

    /// Unplugs the job: commands that drain its roots.
    async fn dismiss(self) {
        for port in self.ports {
            port.detach(&mut self.graph.permit()).await;
        }
    }
}

/// A drain of what the job uses pauses it at its next pause point; it goes on afterwards, and completes if it was told
/// so meanwhile.
async fn a_job_pauses(what: What, home: Home) {
    let bench = JobBench::start(home).await;
    let mut permit = bench.graph.permit();
    for nodes in bench.drains(what) {
        bench.job.progress().await;
        let drained = permit.drain(&nodes).await.unwrap();
        bench.job.rests().await;
        drop(drained);
        bench.job.progress().await;
    }
    let drained = permit.drain(&[bench.source]).await.unwrap();
    bench.job.complete();
    bench.job.rests().await;
    assert_eq!(bench.job.outcome(), None);
    drop(drained);
    assert_eq!(bench.job.ended().await, Ok(()));
    assert_eq!(read_byte(&bench.ports[1].handle(), 0).await, Ok(1));
    bench.dismiss().await;
}

/// A job fails while it runs, or when it prepares to complete: it says so and ends, although drains come in between and
/// although its end flushes both sides.
async fn a_job_fails(what: What, home: Home) {
    for at_the_end in [false, true] {
        for round in 0..what.drains() {
            let bench = JobBench::start(home).await;
            bench.job.progress().await;
            let mut permit = bench.graph.permit();
            let drained = permit.drain(&bench.drains(what)[round]).await.unwrap();
            if at_the_end {
                *bench.seen[1].flush_error.lock().unwrap() = Some(IoError::Os(5));
                bench.job.complete();
            } else {
                bench.seen[0].fail_reads.store(1, Ordering::Relaxed);
            }
            bench.job.rests().await;
            drop(drained);
            drop(permit.drain(&[bench.target]).await.unwrap());
            assert_eq!(bench.job.ended().await, Err(IoError::Os(5)));
            assert_eq!(bench.seen[0].flushes.load(Ordering::Relaxed), 1, "its end made the source stable");
            bench.dismiss().await;
        }
    }
}

#[test]
fn blockjob_drain_all() {
    run_control(|_| a_job_pauses(What::All, Home::Control));
}

#[test]
fn blockjob_drain() {
    run_control(|_| a_job_pauses(What::One, Home::Control));
}

#[test]
fn blockjob_error_drain_all() {
    run_control(|_| a_job_fails(What::All, Home::Control));
}

#[test]
fn blockjob_error_drain() {
    run_control(|_| a_job_fails(What::One, Home::Control));
}

#[test]
fn blockjob_iothread_drain_all() {
    run_control(|_| a_job_pauses(What::All, Home::IoThread));
}

#[test]
fn blockjob_iothread_drain() {
    run_control(|_| a_job_pauses(What::One, Home::IoThread));
}

#[test]
fn blockjob_iothread_error_drain_all() {
    run_control(|_| a_job_fails(What::All, Home::IoThread));
}

#[test]
fn blockjob_iothread_error_drain() {
    run_control(|_| a_job_fails(What::One, Home::IoThread));
}

/// A job that may complete as soon as a drain ends does so in its own turn, not inside that end; what it then unplugs
/// may be what stood above the drained node.
#[test]
fn blockjob_commit_by_drained_end() {
    run_control(|_| async {
        let JobBench { graph, source_disk, ports, job, .. } = JobBench::start(Home::Control).await;
        job.progress().await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[source_disk]).await.unwrap();
        job.complete();
        job.rests().await;
        drop(drained);
        assert_eq!(job.outcome(), None, "the end of a drain runs nobody's work");
        let unplugging = graph.clone();
        let unplugged = beside(async move {
            assert_eq!(job.ended().await, Ok(()));
            for port in ports {
                port.detach(&mut unplugging.permit()).await;
            }
        });
        until(|| unplugged.borrow().is_some()).await;
        assert!(graph.nodes().iter().all(|node| !node.parents.contains(&"test port".into())));
    });
}

/// A node goes from the middle of a chain while a job above waits to complete: the change is one step, in which nobody
/// else runs.
#[test]
fn bdrv_drop_intermediate_poll() {
    run_control(|_| async {
        let bench = Bench::new(true).await;
        let (graph, target) = (&bench.graph, add(&bench.graph, mem("target", 2, &Arc::default())).await);
        let to = port(graph, target, WRITER).await;
        let job = TestJob::start(&Local::current().remote(), bench.top.handle(), to.handle());
        job.progress().await;
        bench.low.detach(&mut graph.permit()).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[bench.backing]).await.unwrap();
        job.complete();
        job.rests().await;
        let file = graph.child(bench.node, "file").unwrap();
        let committed = drained.write(|edit, set| {
            edit.set_edge(set.owner(bench.node)?, file, bench.disk)?;
            edit.remove(bench.backing)
        });
        let committed = committed.unwrap();
        assert_eq!(job.outcome(), None);
        committed.close(&mut permit).await;
        assert_eq!(graph.find("backing"), None);
        assert_eq!(job.ended().await, Ok(()));
        assert_eq!(read_byte(&bench.top.handle(), 0).await, Ok(1));
    });
}

// ---- changes that a drain sets off ---------------------------------------------------------------------------------------

/// A drain of the child ends a read of the parent, whose task then takes the parent out. It waits for the drain's end.
#[test]
fn deletion_drain() {
    run_control(|_| async {
        let Bench { graph, node, backing, valves, top, low, .. } = Bench::new(true).await;
        valves[0].close();
        let deleting = graph.clone();
        let deleted = beside(async move {
            assert_eq!(read_byte(&top.handle(), 0).await, Ok(1));
            top.detach(&mut deleting.permit()).await;
            deleting.permit().remove(node).await.unwrap();
        });
        until(|| valves[0].parked() > 0).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[backing]).await.unwrap();
        a_while().await;
        assert!(deleted.borrow().is_none() && graph.find("node").is_some());
        valves[0].open();
        drop(drained);
        until(|| deleted.borrow().is_some()).await;
        assert_eq!(graph.find("node"), None);
        assert_eq!(read_byte(&low.handle(), 0).await, Ok(1));
    });
}

/// The same with a parent of two children, both of which it gives up. They are closed afterwards.
async fn a_drained_read_detaches(what: What) {
    let graph = graph();
    let (seen, valve) = (<[Arc<Seen>; 2]>::default(), Valve::shut());
    let [a, b] = [add(&graph, mem("a", 1, &seen[0])).await, add(&graph, mem("b", 1, &seen[1])).await];
    let c = add(&graph, mem("c", 3, &Arc::default())).await;
    let held = add(&graph, park("held", a, &valve, true)).await;
    let both = add(&graph, twice("both", held, b)).await;
    let top = port(&graph, both, READER).await;
    let (handle, detaching) = (top.handle(), graph.clone());
    let detached = beside(async move {
        assert_eq!(read_byte(&handle, 0).await, Ok(1));
        lead(&detaching, both, "file", c).await;
        lead(&detaching, both, "other", c).await;
        for node in [held, a, b] {
            detaching.permit().remove(node).await.unwrap();
        }
    });
    until(|| valve.parked() > 0).await;
    let mut permit = graph.permit();
    let drained = permit.drain(&if what == What::All { all(&graph) } else { vec![a] }).await.unwrap();
    a_while().await;
    assert_eq!(graph.nodes().len(), 5, "nothing changes inside a drain of somebody else");
    valve.open();
    drop(drained);
    until(|| detached.borrow().is_some()).await;
    assert_eq!(graph.nodes().len(), 2);
    assert!(seen.iter().all(|node| node.closed.load(Ordering::Acquire)));
    assert_eq!(read_byte(&top.handle(), 0).await, Ok(3));
}

#[test]
fn detach_drain_all() {
    run_control(|_| a_drained_read_detaches(What::All));
}

#[test]
fn detach_drain() {
    run_control(|_| a_drained_read_detaches(What::One));
}

/// Parent "pa" over A, parent "pb" over A and B. Requests of "pa" are held at the valve.
struct Parents {
    graph: Rc<Graph>,
    pb: NodeId,
    abc: [NodeId; 3],
    valve: Arc<Valve>,
    over_pa: Port,
    over_pb: Port,
}

impl Parents {
    async fn new(hurries: bool) -> Self {
        let (graph, valve) = (graph(), Valve::shut());
        let abc = [
            add(&graph, mem("a", 1, &Arc::default())).await,
            add(&graph, mem("b", 1, &Arc::default())).await,
            add(&graph, mem("c", 1, &Arc::default())).await,
        ];
        let pa = add(&graph, park("pa", abc[0], &valve, hurries)).await;
        let pb = add(&graph, twice("pb", abc[0], abc[1])).await;
        let (over_pa, over_pb) = (port(&graph, pa, READER).await, port(&graph, pb, READER).await);
        Self { graph, pb, abc, valve, over_pa, over_pb }
    }

    fn children(&self) -> Vec<NodeId> {
        self.graph.node(self.pb).unwrap().children.into_iter().map(|(_, node)| node).collect()
    }

    fn users(&self) -> [usize; 3] {
        self.abc.map(|node| self.graph.node(node).unwrap().parents.len())
    }

    async fn check_replaced(&self) {
        let [a, _, c] = self.abc;
        assert_eq!((self.children(), self.users()), (vec![a, c], [2, 0, 1]));
        self.valve.open();
        assert_eq!(read_byte(&self.over_pa.handle(), 0).await, Ok(1));
        assert_eq!(read_byte(&self.over_pb.handle(), 0).await, Ok(1));
        assert_eq!((reads(&self.graph, c), is_stopped(&self.over_pa), is_stopped(&self.over_pb)), (1, false, false));
    }
}

/// A request of "pa", as it ends during a drain of A, has "pb" use C instead of B: after the drain, and whole.
#[test]
fn detach_parent_cb() {
    run_control(|_| async {
        let parents = Parents::new(true).await;
        let [a, b, c] = parents.abc;
        let (handle, graph, pb) = (parents.over_pa.handle(), parents.graph.clone(), parents.pb);
        let replaced = beside(async move {
            assert_eq!(read_byte(&handle, 0).await, Ok(1));
            lead(&graph, pb, "other", c).await;
        });
        until(|| parents.valve.parked() > 0).await;
        let mut permit = parents.graph.permit();
        let drained = permit.drain(&[a]).await.unwrap();
        a_while().await;
        assert_eq!((parents.children(), parents.users()), (vec![a, b], [2, 1, 0]));
        drop(drained);
        until(|| replaced.borrow().is_some()).await;
        parents.check_replaced().await;
    });
}

/// The same, set off by the begin of the drain, which is still waiting then: it sees no half of it.
#[test]
fn detach_driver_cb() {
    run_control(|_| async {
        let parents = Rc::new(Parents::new(false).await);
        let [a, b, c] = parents.abc;
        let read = reading(&parents.over_pa);
        until(|| parents.valve.parked() > 0).await;
        let looking = parents.clone();
        let replaced = beside(async move {
            until(|| is_stopped(&looking.over_pb)).await;
            lead(&looking.graph, looking.pb, "other", c).await;
        });
        let draining = parents.clone();
        let drained = beside(async move {
            let mut permit = draining.graph.permit();
            let drained = permit.drain(&[a]).await.unwrap();
            a_while().await;
            assert_eq!(draining.children(), [a, b]);
            drop(drained);
        });
        a_while().await;
        assert!(drained.borrow().is_none() && replaced.borrow().is_none(), "one waits for the read, one for the other");
        assert_eq!(parents.children(), [a, b]);
        parents.valve.open();
        until(|| drained.borrow().is_some() && replaced.borrow().is_some()).await;
        assert_eq!(read.take(), Some(Ok(1)));
        parents.check_replaced().await;
    });
}

// ---- changes that a drain is for -----------------------------------------------------------------------------------------

/// An overlay comes in above a drained node: no request meets it before the drain ends, and afterwards all do.
#[test]
fn attach_drain() {
    run_control(|_| async {
        let Bench { graph, node, backing, valves, top, low, .. } = Bench::new(true).await;
        let mut permit = graph.permit();
        let drained = permit.drain(&[backing]).await.unwrap();
        let waiting = [reading(&top), reading(&low)];
        a_while().await;
        let overlay = park("overlay", backing, &valves[1], true);
        let file = graph.child(node, "file").unwrap();
        let before = reads(&graph, backing);
        let id = overlay.id();
        let locks = drained.prepare(|edit, set| insert(edit, set.owner(node)?, file, &overlay)).await.unwrap();
        let committed = drained.write(|edit, set| insert(edit, set.owner(node)?, file, &overlay)).unwrap();
        drop(locks);
        assert!(waiting.iter().all(|read| read.borrow().is_none()));
        committed.close(&mut permit).await;
        until(|| waiting.iter().all(|read| read.borrow().is_some())).await;
        assert_eq!((reads(&graph, id), reads(&graph, backing) - before), (1, 2));
        assert_eq!(top.in_flight() + low.in_flight(), 0);
        assert!(!is_stopped(&top) && !is_stopped(&low));
    });
}

fn insert<'d>(edit: &mut GraphEdit<'d>, parent: Owner<'d>, edge: ChildId, overlay: &NewNode) -> Result<()> {
    let overlay = edit.add(overlay.clone())?;
    edit.set_edge(parent, edge, overlay)
}

/// A parent's child is replaced: four times, with the old child, the new child, both or neither drained beside the
/// parent, which always is. Nobody reads from a drained child; who waits for the parent reads the new one.
#[test]
fn replace_child_mid_drain() {
    run_control(|_| async {
        for (drain_old, drain_new) in [(false, false), (false, true), (true, false), (true, true)] {
            let (graph, valve) = (graph(), Valve::shut());
            let old = add(&graph, mem("old", 1, &Arc::default())).await;
            let new = add(&graph, mem("new", 2, &Arc::default())).await;
            let parent = add(&graph, park("parent", old, &valve, true)).await;
            let top = port(&graph, parent, READER).await;
            let [over_old, over_new] = [port(&graph, old, READER).await, port(&graph, new, READER).await];
            let under_way = reading(&top);
            until(|| valve.parked() > 0).await;
            let nodes = [Some(parent), drain_old.then_some(old), drain_new.then_some(new)];
            let nodes: Vec<_> = nodes.into_iter().flatten().collect();
            let mut permit = graph.permit();
            let drained = permit.drain(&nodes).await.unwrap();
            assert_eq!(under_way.take(), Some(Ok(1)), "it ended where it began");
            let waiting = [reading(&top), reading(&over_old), reading(&over_new)];
            a_while().await;
            let passed = waiting.each_ref().map(|read| read.borrow().is_some());
            assert_eq!(passed, [false, !drain_old, !drain_new]);
            assert_eq!([reads(&graph, old), reads(&graph, new)], [1 + u64::from(!drain_old), u64::from(!drain_new)]);
            let file = graph.child(parent, "file").unwrap();
            let committed = drained.write(|edit, set| edit.set_edge(set.owner(parent)?, file, new)).unwrap();
            committed.close(&mut permit).await;
            valve.open();
            until(|| waiting.iter().all(|read| read.borrow().is_some())).await;
            assert_eq!(waiting.map(|read| read.take()), [Some(Ok(2)), Some(Ok(1)), Some(Ok(2))]);
        }
    });
}

/// What another command has drained is not reached into, and the refused change has left nothing behind.
#[test]
fn a_change_keeps_out_of_another_commands_drain() {
    run_control(|_| async {
        let Bench { graph, node, disk, top, .. } = Bench::new(true).await;
        let new = add(&graph, mem("new", 2, &Arc::default())).await;
        let mut other = graph.permit();
        let held = other.drain(&[new]).await.unwrap();
        let mut permit = graph.permit();
        let file = graph.child(node, "file").unwrap();
        let drained = permit.drain(&[node]).await.unwrap();
        let refused = drained.write(|edit, set| edit.set_edge(set.owner(node)?, file, new)).err().unwrap();
        assert_eq!(refused.to_string(), "Another command is changing the same part of the graph");
        assert_eq!(read_byte(&top.handle(), 0).await, Ok(1));
        assert_eq!((reads(&graph, new), reads(&graph, disk)), (0, 1));
        drop(held);
        lead(&graph, node, "file", new).await;
        assert_eq!(read_byte(&top.handle(), 0).await, Ok(2));
    });
}
