//! What a user of the graph does in tests: plugs in, reads and writes, waits for others, works as a job.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use block_core::base::{ByteRange, IoError};
use block_core::graph::{Change, Graph, IoCx, JobCx, NodeId, OpKind, PermSet, Perms, Role, ViewPin, WriteFlags};
use block_core::port::{PORT, Port, PortHandle, PortLane, PortOptions};
use block_core::rt::{IoBuf, IoThread, Local, PollParams, Remote};

pub const WRITER: Perms = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };
pub const READER: Perms = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };

pub fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

pub async fn port(graph: &Rc<Graph>, node: NodeId, perms: Perms) -> Port {
    let options = PortOptions { name: "test port".into(), perms };
    Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.unwrap()
}

/// Waits outside as long as the graph below is being changed.
pub async fn entered(lane: &PortLane) -> ViewPin {
    loop {
        match lane.try_enter() {
            Some(pin) => return pin,
            None => lane.opened().await,
        }
    }
}

pub async fn read_byte(handle: &PortHandle, at: u64) -> Result<u8, IoError> {
    read_through(&handle.lane(&Local::current()), at).await
}

pub async fn read_through(lane: &PortLane, at: u64) -> Result<u8, IoError> {
    let pin = entered(lane).await;
    let buf = IoBuf::alloc(1, 1)?;
    lane.read(&pin, range(at, 1), buf.clone()).await?;
    Ok(buf.to_vec()[0])
}

pub async fn write_bytes(handle: &PortHandle, at: u64, bytes: &[u8]) -> Result<(), IoError> {
    let lane = handle.lane(&Local::current());
    let pin = entered(&lane).await;
    lane.write(&pin, range(at, bytes.len() as u64), IoBuf::from_slice(bytes)?, WriteFlags::default()).await
}

/// Points an edge elsewhere: a command of its own.
pub async fn lead(graph: &Rc<Graph>, parent: NodeId, edge: &'static str, to: NodeId) {
    let change = Change::Repoint { parent, child: edge.into(), to: Some((to, Role::Filtered)) };
    graph.permit().transact(vec![Box::new(change)]).await.unwrap();
}

/// Requests find the port shut.
pub fn is_stopped(port: &Port) -> bool {
    port.handle().lane(&Local::current()).try_enter().is_none()
}

/// Reads that went through a node.
pub fn reads(graph: &Graph, node: NodeId) -> u64 {
    graph.node(node).unwrap().totals.ops[OpKind::Read as usize].ops
}

pub fn io_thread() -> IoThread {
    IoThread::spawn("test", PollParams::default()).unwrap()
}

/// Runs `work` beside the test; what it gives is in the cell when it is over.
pub fn beside<T: 'static>(work: impl Future<Output = T> + 'static) -> Rc<RefCell<Option<T>>> {
    let over = Rc::new(RefCell::new(None));
    let told = over.clone();
    Local::current().spawn(async move { *told.borrow_mut() = Some(work.await) });
    over
}

pub async fn until(what: impl Fn() -> bool) {
    for _ in 0..5000 {
        if what() {
            return;
        }
        a_moment().await;
    }
    panic!("it does not happen");
}

pub async fn a_moment() {
    Local::current().sleep(Duration::from_millis(1)).await;
}

/// Long enough for what must not happen to happen.
pub async fn a_while() {
    Local::current().sleep(Duration::from_millis(10)).await;
}

/// A job that copies the first byte of its source to its target, again and again, until it is told to complete or
/// fails. Then it makes the target stable; whether that succeeds or not, it ends with a flush of its source.
pub struct TestJob(Arc<JobState>);

#[derive(Default)]
struct JobState {
    steps: AtomicU64,
    complete: AtomicBool,
    home: Mutex<Option<ThreadId>>,
    outcome: Mutex<Option<Result<(), IoError>>>,
}

impl TestJob {
    pub fn start(on: &Remote, source: PortHandle, target: PortHandle) -> Self {
        let state = Arc::<JobState>::default();
        let told = state.clone();
        on.spawn(move |local| async move {
            *told.home.lock().unwrap() = Some(std::thread::current().id());
            let outcome = told.run(source.job(&local), target.job(&local)).await;
            *told.outcome.lock().unwrap() = Some(outcome);
        });
        Self(state)
    }

    /// Has it complete when it comes to a pause point.
    pub fn complete(&self) {
        self.0.complete.store(true, Ordering::Release);
    }

    pub fn outcome(&self) -> Option<Result<(), IoError>> {
        *self.0.outcome.lock().unwrap()
    }

    pub async fn ended(&self) -> Result<(), IoError> {
        until(|| self.outcome().is_some()).await;
        self.outcome().unwrap()
    }

    pub fn home(&self) -> Option<ThreadId> {
        *self.0.home.lock().unwrap()
    }

    /// Waits until it has done a whole step that begins after this.
    pub async fn progress(&self) {
        let before = self.steps();
        until(|| self.steps() > before + 2).await;
    }

    /// Panics if it works on beyond the step that it is in.
    pub async fn rests(&self) {
        let before = self.steps();
        a_while().await;
        assert!(self.steps() <= before + 1, "the job works while its node is drained");
    }

    fn steps(&self) -> u64 {
        self.0.steps.load(Ordering::Acquire)
    }
}

impl JobState {
    async fn run(&self, mut source: JobCx, mut target: JobCx) -> Result<(), IoError> {
        let copied = self.copy(&mut source, &mut target).await;
        let prepared = if copied.is_ok() { flush(&mut target).await } else { copied };
        flush(&mut source).await?;
        prepared
    }

    async fn copy(&self, source: &mut JobCx, target: &mut JobCx) -> Result<(), IoError> {
        let (at, buf) = (range(0, 1), IoBuf::alloc(1, 1)?);
        while !self.complete.load(Ordering::Acquire) {
            source.step(async |cx| cx.child(PORT).read(at, buf.clone()).await).await?;
            let write = async |cx: IoCx<'_>| {
                self.steps.fetch_add(1, Ordering::Release);
                cx.child(PORT).write(at, buf.clone(), WriteFlags::default()).await
            };
            target.step(write).await?;
            source.pause_point().await;
        }
        Ok(())
    }
}

async fn flush(job: &mut JobCx) -> Result<(), IoError> {
    job.step(async |cx| cx.child(PORT).flush().await).await
}
