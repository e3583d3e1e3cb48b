//! Requests from other threads than the one that made the graph: QEMU's twenty-two cases of iothreads, each as a
//! property of our own graph. The table is in `docs/graph-lock-cases.md`.
//!
//! In QEMU a node is moved to a thread. Here nodes have none: what was a move is a request that arrives from another
//! thread, and the tests look at where it is worked on and what it finds.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

mod support;

use std::rc::Rc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use block_core::base::{ByteRange, Error, IoError, SECTOR};
use block_core::graph::{
    Child, ChildId, DiscardMode, DriverInfo, Extent, Graph, IoCx, NewNode, NodeId, NodeOptions, OpKind, Place,
    Preallocation, Reopen, ReopenRequest, Role, ViewPin, WriteFlags,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::port::{PORT, Port, PortHandle, PortLane};
use block_core::rt::sync::oneshot;
use block_core::rt::{IoBuf, IoThread, Local, Remote, run_control};
use support::user::{
    READER, TestJob, WRITER, beside, entered, io_thread, lead, port, range, read_byte, read_through, reads, until,
    write_bytes,
};
use support::{Mem, Seen, Valve, add, graph, impatient, mem, park, twice};

/// What is past the end of every node of these tests, at both ends of what can be said.
fn beyond() -> [ByteRange; 2] {
    [range(1 << 40, SECTOR), range(i64::MAX as u64 - SECTOR, SECTOR)]
}

/// A node of 64 KiB of ones, a port over it, and a thread for its requests.
struct Bench {
    graph: Rc<Graph>,
    node: NodeId,
    top: Port,
    thread: IoThread,
}

impl Bench {
    async fn new() -> Self {
        Self::with(NodeOptions::default()).await
    }

    async fn with(options: NodeOptions) -> Self {
        let graph = graph();
        let made = Mem::new(vec![1; 65536], &Arc::default());
        let node = add(&graph, NewNode::new("node".into(), options, |_| (made, 65536))).await;
        let perms = if options.read_only { READER } else { WRITER };
        let top = port(&graph, node, perms).await;
        Self { graph, node, top, thread: io_thread() }
    }

    /// One request through the port (QEMU: the BlockBackend API), on the thread.
    async fn by_port<T: Send + 'static>(
        &self,
        request: impl AsyncFnOnce(&PortLane, &ViewPin) -> T + Send + 'static,
    ) -> T {
        let handle = self.top.handle();
        on(&self.thread.remote(), async move |local| {
            let lane = handle.lane(&local);
            let pin = entered(&lane).await;
            request(&lane, &pin).await
        })
        .await
    }

    /// One request straight to the child (QEMU: the edge API), as a job's step, on the thread.
    async fn by_edge<T: Send + 'static>(&self, request: impl AsyncFnOnce(Child<'_>) -> T + Send + 'static) -> T {
        let handle = self.top.handle();
        on(&self.thread.remote(), async move |local| {
            handle.job(&local).step(async |cx| request(cx.child(PORT)).await).await
        })
        .await
    }
}

/// Runs `work` on another thread and gives its answer.
async fn on<T: Send + 'static>(thread: &Remote, work: impl AsyncFnOnce(Rc<Local>) -> T + Send + 'static) -> T {
    let (done, over) = oneshot();
    thread.spawn(move |local| async move {
        // Nobody may be waiting any more: that is no error.
        let _ = done.send(work(local).await);
    });
    over.await.unwrap()
}

async fn read_on(thread: &IoThread, handle: PortHandle) -> Result<u8, IoError> {
    on(&thread.remote(), async move |_| read_byte(&handle, 0).await).await
}

fn buf(len: u64) -> IoBuf {
    IoBuf::alloc(usize::try_from(len).unwrap(), 1).unwrap()
}

fn filled(len: u64, byte: u8) -> IoBuf {
    let buf = buf(len);
    buf.fill(byte);
    buf
}

/// Two pieces, as a vector is.
fn vector(byte: u8) -> IoBuf {
    IoBuf::concat(&[filled(100, byte), filled(SECTOR - 100, byte)])
}

// ---- one request each ----------------------------------------------------------------------------------------------------

/// A range with a negative start, or with an end that no file can have, cannot be made: it never comes to a node.
#[test]
fn sync_op_ranges() {
    let minus_two = (-2_i64).cast_unsigned();
    assert_eq!(ByteRange::new(minus_two, SECTOR), None);
    assert_eq!(ByteRange::new(0, minus_two), None);
    assert_eq!(ByteRange::new(i64::MAX as u64, 1), None);
}

#[test]
fn sync_op_pread() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let by_port = async |lane: &PortLane, pin: &ViewPin| {
            let data = buf(SECTOR);
            lane.read(pin, range(0, SECTOR), data.clone()).await.map(|()| data.to_vec())
        };
        assert_eq!(bench.by_port(by_port).await, Ok(vec![1; 512]));
        let by_edge = async |child: Child<'_>| child.read(range(0, SECTOR), buf(SECTOR)).await;
        assert_eq!(bench.by_edge(by_edge).await, Ok(()));
        for at in beyond() {
            let by_port = async move |lane: &PortLane, pin: &ViewPin| lane.read(pin, at, buf(SECTOR)).await;
            assert_eq!(bench.by_port(by_port).await, Err(IoError::OutOfRange));
            let by_edge = async move |child: Child<'_>| child.read(at, buf(SECTOR)).await;
            assert_eq!(bench.by_edge(by_edge).await, Err(IoError::OutOfRange));
        }
    });
}

#[test]
fn sync_op_pwrite() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let flags = WriteFlags::default();
        let by_port = async move |lane: &PortLane, pin: &ViewPin| {
            lane.write(pin, range(0, SECTOR), filled(SECTOR, 7), flags).await
        };
        assert_eq!(bench.by_port(by_port).await, Ok(()));
        let by_edge = async move |child: Child<'_>| child.write(range(512, SECTOR), filled(SECTOR, 8), flags).await;
        assert_eq!(bench.by_edge(by_edge).await, Ok(()));
        for at in beyond() {
            let by_port = async move |lane: &PortLane, pin: &ViewPin| lane.write(pin, at, buf(SECTOR), flags).await;
            assert_eq!(bench.by_port(by_port).await, Err(IoError::OutOfRange));
            let by_edge = async move |child: Child<'_>| child.write(at, buf(SECTOR), flags).await;
            assert_eq!(bench.by_edge(by_edge).await, Err(IoError::OutOfRange));
        }
        for (at, byte) in [(511, 7), (512, 8), (1024, 1)] {
            assert_eq!(read_byte(&bench.top.handle(), at).await, Ok(byte), "at {at}");
        }
    });
}

#[test]
fn sync_op_preadv() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let into_two = async |lane: &PortLane, pin: &ViewPin| {
            let data = vector(0);
            lane.read(pin, range(0, SECTOR), data.clone()).await.map(|()| data.to_vec())
        };
        assert_eq!(bench.by_port(into_two).await, Ok(vec![1; 512]));
        let beside = async |lane: &PortLane, pin: &ViewPin| lane.read(pin, beyond()[0], vector(0)).await;
        assert_eq!(bench.by_port(beside).await, Err(IoError::OutOfRange));
    });
}

#[test]
fn sync_op_pwritev() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let flags = WriteFlags::default();
        let from_two =
            async move |lane: &PortLane, pin: &ViewPin| lane.write(pin, range(0, SECTOR), vector(3), flags).await;
        assert_eq!(bench.by_port(from_two).await, Ok(()));
        assert_eq!(read_byte(&bench.top.handle(), 511).await, Ok(3));
        let beside = async move |lane: &PortLane, pin: &ViewPin| lane.write(pin, beyond()[0], vector(3), flags).await;
        assert_eq!(bench.by_port(beside).await, Err(IoError::OutOfRange));
    });
}

/// A part of a longer vector: what lies around it stays as it was.
#[test]
fn sync_op_preadv_part() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let into_a_part = async |lane: &PortLane, pin: &ViewPin| {
            let whole = vector(9);
            lane.read(pin, range(0, 200), whole.slice(50, 200)).await.map(|()| whole.to_vec())
        };
        let bytes = bench.by_port(into_a_part).await.unwrap();
        assert_eq!((&bytes[..50], &bytes[50..250], &bytes[250..]), (&[9; 50][..], &[1; 200][..], &[9; 262][..]));
        let beside =
            async |lane: &PortLane, pin: &ViewPin| lane.read(pin, range(1 << 40, 200), vector(9).slice(50, 200)).await;
        assert_eq!(bench.by_port(beside).await, Err(IoError::OutOfRange));
    });
}

#[test]
fn sync_op_pwritev_part() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let flags = WriteFlags::default();
        let from_a_part = async move |lane: &PortLane, pin: &ViewPin| {
            let whole = IoBuf::concat(&[filled(100, 4), filled(100, 5), filled(100, 6)]);
            lane.write(pin, range(0, 102), whole.slice(99, 102), flags).await
        };
        assert_eq!(bench.by_port(from_a_part).await, Ok(()));
        for (at, byte) in [(0, 4), (1, 5), (100, 5), (101, 6), (102, 1)] {
            assert_eq!(read_byte(&bench.top.handle(), at).await, Ok(byte), "at {at}");
        }
        let beside = async move |lane: &PortLane, pin: &ViewPin| {
            lane.write(pin, range(1 << 40, 102), vector(9).slice(99, 102), flags).await
        };
        assert_eq!(bench.by_port(beside).await, Err(IoError::OutOfRange));
    });
}

#[test]
fn sync_op_pwrite_zeroes() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let flags = WriteFlags::default();
        let zeroes = async move |lane: &PortLane, pin: &ViewPin| lane.write_zeroes(pin, range(0, SECTOR), flags).await;
        assert_eq!(bench.by_port(zeroes).await, Ok(()));
        assert_eq!(read_byte(&bench.top.handle(), 511).await, Ok(0));
        for at in beyond() {
            let zeroes = async move |lane: &PortLane, pin: &ViewPin| lane.write_zeroes(pin, at, flags).await;
            assert_eq!(bench.by_port(zeroes).await, Err(IoError::OutOfRange));
        }
    });
}

/// Whether the space may be given up is the node's option, not the request's: with both, a discard succeeds.
#[test]
fn sync_op_pdiscard() {
    run_control(|_| async {
        for discard in [DiscardMode::Ignore, DiscardMode::Unmap] {
            let bench = Bench::with(NodeOptions { discard, ..NodeOptions::default() }).await;
            let by_port = async |lane: &PortLane, pin: &ViewPin| lane.discard(pin, range(0, SECTOR)).await;
            assert_eq!(bench.by_port(by_port).await, Ok(()));
            let by_edge = async |child: Child<'_>| child.discard(range(0, SECTOR)).await;
            assert_eq!(bench.by_edge(by_edge).await, Ok(()));
            for at in beyond() {
                let by_port = async move |lane: &PortLane, pin: &ViewPin| lane.discard(pin, at).await;
                assert_eq!(bench.by_port(by_port).await, Err(IoError::OutOfRange));
                let by_edge = async move |child: Child<'_>| child.discard(at).await;
                assert_eq!(bench.by_edge(by_edge).await, Err(IoError::OutOfRange));
            }
        }
    });
}

/// A command's business, for which it drains: the thread's requests see the old size or the new one. A read-only node
/// keeps its size.
#[test]
fn sync_op_truncate() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let look = async |lane: &PortLane, pin: &ViewPin| (lane.geometry(pin).size, read_at(lane, pin, 65536).await);
        assert_eq!(bench.by_port(look).await, (65536, Err(IoError::OutOfRange)));
        bench.graph.permit().resize(bench.node, 131_072, Preallocation::Off).await.unwrap();
        assert_eq!(bench.by_port(look).await, (131_072, Ok(())));
        let by_edge = async |child: Child<'_>| child.size();
        assert_eq!(bench.by_edge(by_edge).await, 131_072);

        let fixed = Bench::with(NodeOptions { read_only: true, ..NodeOptions::default() }).await;
        let refused = fixed.graph.permit().resize(fixed.node, 512, Preallocation::Off).await.unwrap_err();
        assert_eq!(refused.full(), "Block node 'node' is read-only");
        assert_eq!(fixed.by_port(look).await, (65536, Err(IoError::OutOfRange)));
    });
}

async fn read_at(lane: &PortLane, pin: &ViewPin, at: u64) -> Result<(), IoError> {
    lane.read(pin, range(at, SECTOR), buf(SECTOR)).await
}

/// Every driver says where its data is, so there is no answer for one that does not; and no answer where there are no
/// bytes.
#[test]
fn sync_op_block_status() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let status = |at: ByteRange| bench.by_port(async move |lane: &PortLane, pin: &ViewPin| lane.map(pin, at).await);
        assert_eq!(status(range(0, 65536)).await, Ok(Extent { len: 65536, place: Place::Here }));
        assert_eq!(status(range(512, 1)).await, Ok(Extent { len: 1, place: Place::Here }));
        assert_eq!(status(range(0, 0)).await, Err(IoError::OutOfRange));
        assert_eq!(status(range(65000, SECTOR * 2)).await, Err(IoError::OutOfRange));
        for at in beyond() {
            assert_eq!(status(at).await, Err(IoError::OutOfRange));
        }
    });
}

#[test]
fn sync_op_flush() {
    run_control(|_| async {
        for read_only in [false, true] {
            let bench = Bench::with(NodeOptions { read_only, ..NodeOptions::default() }).await;
            let by_port = async |lane: &PortLane, pin: &ViewPin| lane.flush(pin).await;
            assert_eq!(bench.by_port(by_port).await, Ok(()));
            let by_edge = async |child: Child<'_>| child.flush().await;
            assert_eq!(bench.by_edge(by_edge).await, Ok(()));
            let flushes = bench.graph.node(bench.node).unwrap().totals.ops[OpKind::Flush as usize].ops;
            assert_eq!(flushes, 2);
        }
    });
}

/// To make active what is active changes nothing. Nobody makes inactive what is being written to.
#[test]
fn sync_op_activate() {
    run_control(|_| async {
        let bench = Bench::new().await;
        let active = |active: bool| {
            let common = NodeOptions { active, ..NodeOptions::default() };
            vec![Reopen { node: bench.node, options: Box::new(()), common, children: Vec::new() }]
        };
        bench.graph.permit().reopen(active(true)).await.unwrap();
        let write = async |lane: &PortLane, pin: &ViewPin| {
            lane.write(pin, range(0, SECTOR), filled(SECTOR, 2), WriteFlags::default()).await
        };
        assert_eq!(bench.by_port(write).await, Ok(()));
        let refused = bench.graph.permit().reopen(active(false)).await.unwrap_err();
        assert_eq!(refused.full(), "Block node 'node' is inactive");
        assert_eq!(bench.by_port(write).await, Ok(()));
    });
}

// ---- who works where -----------------------------------------------------------------------------------------------------

/// A filter that notes on which threads its requests are worked on.
struct Witness {
    file: ChildId,
    threads: Arc<Mutex<Vec<ThreadId>>>,
}

impl Filter for Witness {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn before(&self, _: &(), _: IoCx<'_>, _: Request) -> Result<(), IoError> {
        self.threads.lock().unwrap().push(std::thread::current().id());
        Ok(())
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "witness", ..DriverInfo::default() }
    }
}

type Threads = Arc<Mutex<Vec<ThreadId>>>;

fn witness(name: &str, below: NodeId, threads: &Threads) -> NewNode {
    NewNode::new(name.into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(Witness { file, threads: threads.clone() }), ())
    })
}

/// Where this task runs.
async fn home(thread: &Remote) -> ThreadId {
    on(thread, async |_| std::thread::current().id()).await
}

/// One after the other, four jobs through one port: on the control thread, on a thread, back, on another. Each works
/// where it was started, and its requests do so too.
#[test]
fn attach_blockjob() {
    run_control(|_| async {
        let (a, b) = (io_thread(), io_thread());
        let (graph, threads) = (graph(), Threads::default());
        let disk = add(&graph, mem("disk", 1, &Arc::default())).await;
        let source = add(&graph, witness("source", disk, &threads)).await;
        let target = add(&graph, mem("target", 2, &Arc::default())).await;
        let [from, to] = [port(&graph, source, READER).await, port(&graph, target, WRITER).await];
        let control = Local::current().remote();
        for thread in [&control, &a.remote(), &control, &b.remote()] {
            threads.lock().unwrap().clear();
            let job = TestJob::start(thread, from.handle(), to.handle());
            job.progress().await;
            drop(graph.permit().drain(&[source, target]).await.unwrap());
            job.progress().await;
            job.complete();
            assert_eq!(job.ended().await, Ok(()));
            let home = home(thread).await;
            assert_eq!(job.home(), Some(home));
            assert!(threads.lock().unwrap().iter().all(|at| *at == home));
        }
    });
}

/// A node comes in above one that a thread works on, and has a user on another thread: that drains nothing and moves
/// nothing.
#[test]
fn attach_second_node() {
    run_control(|_| async {
        let (a, b) = (io_thread(), io_thread());
        let (graph, threads, valve) = (graph(), Threads::default(), Valve::shut());
        let disk = add(&graph, mem("disk", 1, &Arc::default())).await;
        let below = add(&graph, witness("below", disk, &threads)).await;
        let held = add(&graph, park("held", below, &valve, false)).await;
        let first = port(&graph, held, READER).await;
        let handle = first.handle();
        let stuck = beside(async move { on(&a.remote(), async move |_| read_byte(&handle, 0).await).await });
        until(|| valve.parked() > 0).await;
        let above = add(&graph, park("above", below, &Arc::default(), true)).await;
        let second = port(&graph, above, READER).await;
        assert_eq!(read_on(&b, second.handle()).await, Ok(1));
        assert_eq!(read_byte(&second.handle(), 0).await, Ok(1));
        let homes = [home(&b.remote()).await, std::thread::current().id()];
        assert_eq!(*threads.lock().unwrap(), homes);
        assert!(stuck.borrow().is_none());
        valve.open();
        until(|| stuck.borrow().is_some()).await;
        assert_eq!(stuck.take(), Some(Ok(1)));
    });
}

/// What a port stands on goes and comes back; the thread and its lane stay. A port without a node is no state here.
#[test]
fn attach_preserve_blk_ctx() {
    run_control(|_| async {
        let thread = io_thread();
        let (graph, seen, now) = (graph(), Arc::<Seen>::default(), Arc::new(AtomicU8::new(0)));
        let first = add(&graph, mem("first", 1, &seen)).await;
        let top = add(&graph, park("top", first, &Arc::default(), true)).await;
        let user = port(&graph, top, READER).await;
        let (handle, told) = (user.handle(), now.clone());
        let reading = beside(async move {
            on(&thread.remote(), async move |local| {
                let lane = handle.lane(&local);
                while told.load(Ordering::Acquire) < 3 {
                    told.store(read_through(&lane, 0).await.unwrap(), Ordering::Release);
                }
            })
            .await;
        });
        until(|| now.load(Ordering::Acquire) == 1).await;
        assert!(graph.permit().remove(top).await.is_err(), "a port keeps its node");
        for (name, fill) in [("second", 2), ("first", 3)] {
            let old = graph.node(top).unwrap().children[0].1;
            let new = add(&graph, mem(name, fill, &Arc::default())).await;
            lead(&graph, top, "file", new).await;
            graph.permit().remove(old).await.unwrap();
            until(|| now.load(Ordering::Acquire) == fill).await;
        }
        until(|| reading.borrow().is_some()).await;
        assert!(seen.closed.load(Ordering::Acquire));
    });
}

/// A request works on all children of its node where it is itself, from whatever thread it comes.
#[test]
fn propagate_basic() {
    run_control(|_| async {
        let (a, b) = (io_thread(), io_thread());
        let (graph, threads) = (graph(), Threads::default());
        let [one, other] =
            [add(&graph, mem("one", 1, &Arc::default())).await, add(&graph, mem("other", 1, &Arc::default())).await];
        let [left, right] =
            [add(&graph, witness("left", one, &threads)).await, add(&graph, witness("right", other, &threads)).await];
        let both = add(&graph, twice("both", left, right)).await;
        let top = port(&graph, both, READER).await;
        for thread in [a.remote(), Local::current().remote(), b.remote()] {
            threads.lock().unwrap().clear();
            let handle = top.handle();
            assert_eq!(on(&thread, async move |_| read_byte(&handle, 0).await).await, Ok(1));
            let home = home(&thread).await;
            assert_eq!(*threads.lock().unwrap(), [home; 3], "one, the other, and one again for the data");
        }
        assert_eq!([reads(&graph, one), reads(&graph, other)], [6, 3]);
    });
}

/// Two ways lead to one node: requests take both, and a drain of that node stops what is above it once.
#[test]
fn propagate_diamond() {
    run_control(|_| async {
        let (a, b) = (io_thread(), io_thread());
        let graph = graph();
        let below = add(&graph, mem("below", 1, &Arc::default())).await;
        let [left, right] = [
            add(&graph, park("left", below, &Arc::default(), true)).await,
            add(&graph, park("right", below, &Arc::default(), true)).await,
        ];
        let both = add(&graph, twice("both", left, right)).await;
        let top = port(&graph, both, READER).await;
        for (thread, done) in [(&a, 3), (&b, 9)] {
            assert_eq!(read_on(thread, top.handle()).await, Ok(1));
            assert_eq!(reads(&graph, below), done);
            drop(impatient(&graph).drain(&[below]).await.unwrap());
            assert_eq!(read_byte(&top.handle(), 0).await, Ok(1));
        }
    });
}

/// A job copies on one thread, while its source and its target have users on others. Nobody's thread follows anybody's,
/// and who comes new to either side asks nobody.
#[test]
fn propagate_mirror() {
    run_control(|_| async {
        let (a, b, c) = (io_thread(), io_thread(), io_thread());
        let (graph, threads) = (graph(), Threads::default());
        let disk = add(&graph, mem("disk", 1, &Arc::default())).await;
        let source = add(&graph, witness("source", disk, &threads)).await;
        let target = add(&graph, mem("target", 2, &Arc::default())).await;
        let [from, to] = [port(&graph, source, READER).await, port(&graph, target, WRITER).await];
        let job = TestJob::start(&a.remote(), from.handle(), to.handle());
        job.progress().await;
        let [guest, other] = [port(&graph, source, WRITER).await, port(&graph, target, READER).await];
        let handle = guest.handle();
        assert_eq!(on(&b.remote(), async move |_| write_bytes(&handle, 0, &[9]).await).await, Ok(()));
        job.progress().await;
        for thread in [&b, &c] {
            assert_eq!(read_on(thread, other.handle()).await, Ok(9));
        }
        job.complete();
        assert_eq!(job.ended().await, Ok(()));
        let (job_home, guest_home) = (home(&a.remote()).await, home(&b.remote()).await);
        let seen = threads.lock().unwrap();
        assert_eq!(seen.iter().filter(|at| **at == guest_home).count(), 1);
        assert!(seen.iter().all(|at| [job_home, guest_home].contains(at)));
    });
}
