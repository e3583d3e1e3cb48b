//! Where outsiders plug into the graph (QEMU: BlockBackend): an export or a job gets a root of its own over one node,
//! a lane on each of its threads, and news of resizes.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use crate::base::{ByteRange, IoError, Result};
use crate::graph::{
    Child, ChildId, DirectRequest, Extent, Geometry, JobCx, Lane, NewRoot, NodeId, OpKind, Passed, Permit, Perms, Root,
    Settled, ViewPin, WriteFlags,
};
use crate::rt::{IoBuf, Local};

/// How somebody plugs in.
#[derive(Clone, Debug)]
pub struct PortOptions {
    /// How messages call it ("export 'e0'").
    pub name: String,
    /// What it does, and what it bears from others.
    pub perms: Perms,
}

/// What the plugged-in side is told, on the control thread, after a change has been published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortNews {
    /// Size or limits are other than before.
    Resized(Geometry),
}

/// A root of its own over one node.
pub struct Port {
    id: NodeId,
    handle: PortHandle,
}

impl Port {
    /// Plugs in above `node`, if permissions and external locks allow it. `news` is called on the control thread.
    pub async fn attach(
        permit: &mut Permit,
        node: NodeId,
        options: PortOptions,
        news: Rc<dyn Fn(PortNews)>,
    ) -> Result<Self> {
        let geometry: Arc<Mutex<Option<Geometry>>> = Arc::default();
        let published = geometry.clone();
        let tell = Rc::new(move |now: Geometry| {
            *lock(&published) = Some(now);
            news(PortNews::Resized(now));
        });
        let new = NewRoot::new(options.name, options.perms, node, tell);
        let (id, root) = permit.add_root(new).await?;
        let now = permit.graph().node(node).map(|report| report.geometry);
        lock(&geometry).get_or_insert(now.expect("the node has a parent now, so it is there"));
        Ok(Self { id, handle: PortHandle { root, geometry } })
    }

    /// Unplugs: waits for what is in flight, and for other commands that keep the node, and takes the root out. All lanes
    /// must be gone or idle.
    pub async fn detach(self, permit: &mut Permit) {
        permit.remove_root(self.id).await;
    }

    /// For the threads that will use the port.
    pub fn handle(&self) -> PortHandle {
        self.handle.clone()
    }

    /// Size and limits of the node below, as last published.
    pub fn geometry(&self) -> Geometry {
        self.handle.geometry()
    }

    /// Its root, whose edge `root` leads to the node below.
    pub fn root(&self) -> NodeId {
        self.id
    }

    /// Requests inside; a snapshot.
    pub fn in_flight(&self) -> u32 {
        self.handle.root.in_flight()
    }
}

/// A port as other threads have it.
#[derive(Clone)]
pub struct PortHandle {
    root: Root,
    geometry: Arc<Mutex<Option<Geometry>>>,
}

impl PortHandle {
    /// A way in for the calling thread.
    pub fn lane(&self, local: &Rc<Local>) -> Rc<PortLane> {
        Rc::new(PortLane { lane: self.root.lane(local), failed: Cell::new(0) })
    }

    /// A job's way in: it works in steps, and a drain gets through between them.
    pub fn job(&self, local: &Rc<Local>) -> JobCx {
        JobCx::new(self.root.lane(local))
    }

    /// Size and limits of the node below, as last published.
    pub fn geometry(&self) -> Geometry {
        lock(&self.geometry).expect("set when the port was attached")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread's way through a port.
pub struct PortLane {
    lane: Rc<Lane>,
    failed: Cell<u64>,
}

impl PortLane {
    /// Lets a request in; `None` while the graph below is being changed.
    #[inline]
    pub fn try_enter(&self) -> Option<ViewPin> {
        self.lane.try_enter()
    }

    /// Waits until requests are let in.
    pub fn opened(&self) -> impl Future<Output = ()> {
        self.lane.opened()
    }

    /// True while requests of this lane are inside.
    pub fn is_busy(&self) -> bool {
        self.lane.is_busy()
    }

    /// Size and limits that bind a request which entered with `pin`.
    #[inline]
    pub fn geometry(&self, pin: &ViewPin) -> Geometry {
        top(pin).geometry()
    }

    /// The request without a future, from memory or by a ring entry; `None`: it takes the async path.
    #[inline]
    pub fn direct(&self, pin: &ViewPin, request: DirectRequest) -> Option<Passed> {
        let plan = top(pin).direct(request)?;
        pin.pass(plan, request)
    }

    /// A direct request ended with `result` (bytes, or a negative errno) instead of its full length.
    pub fn settle(&self, pin: &ViewPin, request: DirectRequest, result: i32) -> Settled {
        let settled = top(pin).settle(request, result);
        if matches!(settled, Settled::Failed(_)) {
            self.failed.set(self.failed.get() + 1);
        }
        settled
    }

    /// Fills `buf`.
    pub async fn read(&self, pin: &ViewPin, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        self.noted(top(pin).read(at, buf).await)
    }

    /// Writes `buf`.
    pub async fn write(&self, pin: &ViewPin, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        self.noted(top(pin).write(at, buf, flags).await)
    }

    /// Makes the range read as zeroes.
    pub async fn write_zeroes(&self, pin: &ViewPin, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        self.noted(top(pin).write_zeroes(at, flags).await)
    }

    /// The range is no longer needed.
    pub async fn discard(&self, pin: &ViewPin, at: ByteRange) -> Result<(), IoError> {
        self.noted(top(pin).discard(at).await)
    }

    /// Makes stable what was completed before.
    pub async fn flush(&self, pin: &ViewPin) -> Result<(), IoError> {
        self.noted(top(pin).flush().await)
    }

    /// A request that made no sense for a disk of this size was refused before it came here.
    pub fn refused(&self, pin: &ViewPin, kind: OpKind) {
        top(pin).count_invalid(kind);
    }

    /// Where the first bytes of the range live.
    pub async fn map(&self, pin: &ViewPin, at: ByteRange) -> Result<Extent, IoError> {
        top(pin).map(at).await
    }

    /// Requests that failed.
    pub fn failed(&self) -> u64 {
        self.failed.get()
    }

    fn noted(&self, result: Result<(), IoError>) -> Result<(), IoError> {
        if result.is_err() {
            self.failed.set(self.failed.get() + 1);
        }
        result
    }
}

#[inline]
fn top(pin: &ViewPin) -> Child<'_> {
    pin.cx().child(PORT)
}

/// The node that a port is plugged in above, from the port's own context: what a job's step begins with.
pub const PORT: ChildId = ChildId::FIRST;
