//! Drivers that tests can look into: memory, and a filter that parks requests.
#![allow(
    dead_code,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "each test file uses a part, with small numbers"
)]

pub mod overlay;
pub mod user;

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use block_core::base::{ByteRange, Error, IoError, Result};
use block_core::graph::{
    ChildId, Driver, DriverInfo, Extent, Geometry, Graph, IoCx, Limits, NewNode, NodeEvent, NodeId, NodeOptions,
    OpKind, PermSet, Permit, Perms, Place, Preallocation, ReopenRequest, Role, WriteFlags,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::rt::IoBuf;
use block_core::rt::sync::yield_now;
use std::rc::Rc;

/// What a test sees of a [`Mem`] node.
#[derive(Default)]
pub struct Seen {
    pub closed: AtomicBool,
    pub flushes: AtomicU64,
    pub writes: AtomicU64,
    /// Bytes that the last change of the size left; 0: there was none.
    pub resized: AtomicU64,
    /// Bytes in the largest request.
    pub largest: AtomicU64,
    /// The next this many reads fail.
    pub fail_reads: AtomicU64,
    /// Zeroing frees space, as the limits of a [`Mem::freeing`] promise.
    pub frees: AtomicBool,
    pub flush_error: Mutex<Option<IoError>>,
    pub read_error: Mutex<Option<IoError>>,
    pub write_error: Mutex<Option<IoError>>,
}

/// Bytes in memory. Its size is configuration, its closing can be seen.
pub struct Mem {
    bytes: Mutex<Vec<u8>>,
    seen: Arc<Seen>,
    limits: Limits,
    locks: Option<Arc<SlowLocks>>,
}

/// What a node holds of the outside world. Taking and giving back wait at the valve.
pub struct SlowLocks {
    pub valve: Arc<Valve>,
    pub held: Mutex<Perms>,
}

impl SlowLocks {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { valve: Arc::default(), held: Mutex::new(Perms::IDLE) })
    }

    pub fn uses(&self) -> PermSet {
        self.held.lock().unwrap().uses
    }
}

impl Mem {
    pub fn new(bytes: Vec<u8>, seen: &Arc<Seen>) -> Self {
        Self::aligned(bytes, seen, 1)
    }

    pub fn aligned(bytes: Vec<u8>, seen: &Arc<Seen>, align: u32) -> Self {
        let limits = Limits { request_alignment: align, ..Limits::ANY };
        Self { bytes: Mutex::new(bytes), seen: seen.clone(), limits, locks: None }
    }

    pub fn taking(self, max_transfer: u64) -> Self {
        Self { limits: Limits { max_transfer, ..self.limits }, ..self }
    }

    /// Promises that zeroing can free space. Whether it does is in `seen.frees`.
    pub fn freeing(self) -> Self {
        Self { limits: Limits { unmap_zeroes: true, ..self.limits }, ..self }
    }

    fn check(&self, at: ByteRange) {
        assert!(at.is_aligned(u64::from(self.limits.request_alignment)), "{at:?} came unaligned to the driver");
        assert!(at.len() <= self.limits.max_transfer, "{at:?} is more than the driver takes at once");
        self.seen.largest.fetch_max(at.len(), Ordering::Relaxed);
    }
}

impl Driver for Mem {
    type Conf = u64;

    fn geometry(&self, size: &u64, _: &[Geometry]) -> Result<Geometry> {
        Ok(Geometry { size: *size, limits: self.limits })
    }

    async fn read(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        self.check(at);
        yield_now().await;
        let fails = self.seen.fail_reads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if fails.is_ok() {
            return Err(IoError::Os(5));
        }
        self.seen.read_error.lock().unwrap().map_or(Ok(()), Err)?;
        let bytes = self.bytes.lock().unwrap();
        buf.write_at(0, &bytes[at.start() as usize..at.end() as usize]);
        Ok(())
    }

    async fn write(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf, _: WriteFlags) -> Result<(), IoError> {
        self.check(at);
        self.seen.writes.fetch_add(1, Ordering::Relaxed);
        yield_now().await;
        self.seen.write_error.lock().unwrap().map_or(Ok(()), Err)?;
        let mut bytes = self.bytes.lock().unwrap();
        buf.read_at(0, &mut bytes[at.start() as usize..at.end() as usize]);
        Ok(())
    }

    async fn write_zeroes(&self, _: &u64, _: IoCx<'_>, at: ByteRange, _: WriteFlags) -> Result<(), IoError> {
        if !self.seen.frees.load(Ordering::Relaxed) {
            return Err(IoError::Unsupported);
        }
        self.bytes.lock().unwrap()[at.start() as usize..at.end() as usize].fill(0);
        Ok(())
    }

    async fn discard(&self, _: &u64, _: IoCx<'_>, _: ByteRange) -> Result<(), IoError> {
        Ok(())
    }

    async fn flush(&self, _: &u64, _: IoCx<'_>) -> Result<(), IoError> {
        self.seen.flushes.fetch_add(1, Ordering::Relaxed);
        self.seen.flush_error.lock().unwrap().map_or(Ok(()), Err)
    }

    async fn map(&self, _: &u64, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Here })
    }

    async fn truncate(&self, _: &u64, _: IoCx<'_>, size: u64, _: Preallocation) -> Result<u64> {
        self.bytes.lock().unwrap().resize(size as usize, 0);
        self.seen.resized.store(size, Ordering::Relaxed);
        Ok(size)
    }

    async fn reopen(&self, size: &u64, _: ReopenRequest<'_>) -> Result<u64> {
        Ok(*size)
    }

    async fn tighten(&self, _: &u64, perms: Perms) -> Result<()> {
        let Some(locks) = &self.locks else { return Ok(()) };
        locks.valve.passed().await;
        let mut held = locks.held.lock().unwrap();
        *held = held.and(perms);
        Ok(())
    }

    async fn relax(&self, _: &u64, perms: Perms) {
        let Some(locks) = &self.locks else { return };
        locks.valve.passed().await;
        let mut held = locks.held.lock().unwrap();
        *held = Perms { uses: held.uses & perms.uses, shares: held.shares | perms.shares };
    }

    async fn info(&self, _: &u64) -> DriverInfo {
        DriverInfo { driver: "mem", ..DriverInfo::default() }
    }

    async fn close(self) {
        self.seen.closed.store(true, Ordering::Release);
    }
}

/// A valve that tests open and shut; requests park at it. It says nothing about draining but `unless_hurried`.
#[derive(Default)]
pub struct Valve {
    shut: AtomicBool,
    parked: Mutex<Vec<Waker>>,
}

impl Valve {
    pub fn shut() -> Arc<Self> {
        Arc::new(Self { shut: AtomicBool::new(true), parked: Mutex::default() })
    }

    pub fn open(&self) {
        self.shut.store(false, Ordering::Release);
        self.parked.lock().unwrap().drain(..).for_each(Waker::wake);
    }

    /// Lets pass who comes from now on; who is parked stays until it opens.
    pub fn open_for_others(&self) {
        self.shut.store(false, Ordering::Release);
    }

    pub fn close(&self) {
        self.shut.store(true, Ordering::Release);
    }

    pub fn parked(&self) -> usize {
        self.parked.lock().unwrap().len()
    }

    pub async fn passed(&self) {
        poll_fn(|task| {
            if !self.shut.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            self.parked.lock().unwrap().push(task.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// A filter whose requests wait at a valve.
pub struct Park {
    file: ChildId,
    valve: Arc<Valve>,
    /// Requests leave the valve when their root is drained.
    hurries: bool,
}

impl Filter for Park {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn before(&self, _: &(), cx: IoCx<'_>, _: Request) -> Result<(), IoError> {
        let opened = poll_fn(|task| {
            self.valve.parked.lock().unwrap().push(task.waker().clone());
            if self.valve.shut.load(Ordering::Acquire) { Poll::Pending } else { Poll::Ready(()) }
        });
        if self.hurries {
            let _ = cx.unless_hurried(opened).await;
        } else {
            opened.await;
        }
        Ok(())
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "park", ..DriverInfo::default() }
    }
}

/// A filter with two children: what is read from the first is read from the second too, and has to be the same.
pub struct Twice {
    file: ChildId,
    other: ChildId,
}

impl Filter for Twice {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn before(&self, _: &(), cx: IoCx<'_>, request: Request) -> Result<(), IoError> {
        if request.kind != OpKind::Read {
            return Ok(());
        }
        let buf = || IoBuf::alloc(request.at.len() as usize, 1);
        let (one, other) = (buf()?, buf()?);
        cx.child(self.file).read(request.at, one.clone()).await?;
        cx.child(self.other).read(request.at, other.clone()).await?;
        if one.to_vec() == other.to_vec() { Ok(()) } else { Err(IoError::Os(5)) }
    }

    async fn reopen(&self, _: &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, _: &()) -> DriverInfo {
        DriverInfo { driver: "twice", ..DriverInfo::default() }
    }
}

/// A graph whose events go nowhere.
pub fn graph() -> Rc<Graph> {
    Graph::new(Arc::new(|_: NodeEvent| ()))
}

/// A memory node filled with `fill`.
pub fn mem(name: &str, fill: u8, seen: &Arc<Seen>) -> NewNode {
    let (bytes, seen) = (vec![fill; 65536], seen.clone());
    NewNode::new(name.into(), NodeOptions::default(), |_| (Mem::new(bytes, &seen), 65536))
}

/// A memory node of one sector.
pub fn tiny(name: &str) -> NewNode {
    let mem = Mem::new(vec![0; 512], &Arc::default());
    NewNode::new(name.into(), NodeOptions::default(), |_| (mem, 512))
}

/// A memory node whose external locks take their time.
pub fn slow(name: &str, locks: &Arc<SlowLocks>) -> NewNode {
    NewNode::new(name.into(), NodeOptions::default(), |_| {
        let mem = Mem::new(vec![0; 65536], &Arc::default());
        (Mem { locks: Some(locks.clone()), ..mem }, 65536)
    })
}

/// A filter named `name` above `below`.
pub fn park(name: &str, below: NodeId, valve: &Arc<Valve>, hurries: bool) -> NewNode {
    NewNode::new(name.into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(Park { file, valve: valve.clone(), hurries }), ())
    })
}

/// A filter named `name` with the children `file` and `other`.
pub fn twice(name: &str, file: NodeId, other: NodeId) -> NewNode {
    NewNode::new(name.into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", file, Role::Filtered);
        let other = edges.to("other", other, Role::Filtered);
        (Filtered(Twice { file, other }), ())
    })
}

/// Adds a node with a permit of its own.
pub async fn add(graph: &Rc<Graph>, node: NewNode) -> NodeId {
    graph.permit().add(node).await.unwrap()
}

/// The permit of a command that gives up soon.
pub fn impatient(graph: &Rc<Graph>) -> Permit {
    let mut permit = graph.permit();
    permit.set_deadline(std::time::Duration::from_millis(50));
    permit
}
