//! A request's context: the proof that it is inside, and its only way to nodes.
//!
//! An [`IoCx`] knows *which* node it is at, and a [`ChildId`] indexes that node's own edges: there is no look-up by
//! name, and no way to a node outside the pinned view.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use super::driver::End;
use super::geometry::Geometry;
use super::grace::Grace;
use super::haste::Haste;
use super::id::ChildId;
use super::lane::{Away, Here, Lane, ViewPin};
use super::options::NodeOptions;
use super::permission::PermSet;
use super::stats::Counters;
use super::tracked::{Ticket, Tracked};
use super::view::Placed;
use crate::base::{ByteRange, IoError};
use crate::rt::{Engine, Hold, Local, Op};

/// See the module's head.
#[derive(Clone, Copy)]
pub struct IoCx<'g> {
    pin: &'g ViewPin,
    at: u32,
}

/// A child as this request may use it. It lives no longer than the request's context, and has one already.
///
/// Reading and writing are in `pipeline/`.
#[derive(Clone, Copy)]
pub struct Child<'g> {
    cx: IoCx<'g>,
    /// The request comes straight from its root.
    from_root: bool,
}

impl<'g> IoCx<'g> {
    #[inline]
    pub(super) fn new(pin: &'g ViewPin, at: u32) -> Self {
        Self { pin, at }
    }

    /// A child of the node that this request is at.
    #[inline]
    pub fn child(self, id: ChildId) -> Child<'g> {
        let slot = self.pin.pinned().view.edge(self.at, id);
        Child { cx: IoCx { at: slot, ..self }, from_root: self.at == 0 }
    }

    /// How many children the node that this request is at has.
    pub fn children(self) -> u32 {
        self.pin.pinned().view.children(self.at)
    }

    /// The common options of the node that this request is at.
    #[inline]
    pub(crate) fn options(self) -> NodeOptions {
        self.pin.pinned().view.placed(self.at).options
    }

    /// Waits for `work`, or gives `None` as soon as somebody wants this request out of the graph.
    ///
    /// A parked request belongs to its root, not to the node where it is parked: a shared node lets only the drained
    /// root's go, and those that they have to wait for.
    pub async fn unless_hurried<T>(self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        let mut wait = self.pin.hurry_wait();
        poll_fn(|cx| match work.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => {
                let by_root = self.pin.gate().poll_hurried(&mut wait.key, cx);
                let by_others = self.pin.haste().poll_hurried(cx);
                if by_root.is_ready() || by_others.is_ready() { Poll::Ready(None) } else { Poll::Pending }
            }
        })
        .await
    }

    /// Waits for `work`, which other requests have to do, whatever their roots. As soon as somebody wants this request
    /// out of the graph, `hurry` is called, once: it has to hurry those others, and who comes later must not be in the
    /// way of `work`.
    pub(crate) async fn handing_on<T>(self, work: impl Future<Output = T>, hurry: impl FnOnce()) -> T {
        let mut work = pin!(work);
        if let Some(value) = self.unless_hurried(work.as_mut()).await {
            return value;
        }
        hurry();
        work.await
    }

    /// Registers this request with those that overlap matters to, and waits until none is in the way.
    pub(crate) async fn alone(self, tracked: &Tracked, range: ByteRange, serialising: bool) -> Ticket<'_> {
        let ticket = tracked.enter(range, serialising, self.haste());
        self.handing_on(poll_fn(|cx| ticket.poll_alone(cx)), || ticket.hurry_others()).await;
        ticket
    }

    /// The driver works on the node that this request is at, as long as the value lives: it may know something of it that
    /// is not true any more. Periods wait for that ([`IoCx::grace`]).
    pub(crate) fn here(self) -> Here<'g> {
        self.pin.here(self.at)
    }

    /// Waits for `work` without being at the node meanwhile: no period waits for this request. What was known of the node
    /// before is worth nothing afterwards, unless something else keeps it true. One request does one thing at a time at a
    /// node that uses this.
    pub async fn aside<T>(self, work: impl Future<Output = T>) -> T {
        let _away: Away<'_> = self.pin.away(self.at);
        work.await
    }

    /// Begins a period at the node that this request is at: over when nobody uses any more what he found there before.
    pub fn grace(self) -> Grace {
        let node = &self.pin.pinned().view.placed(self.at).shared;
        node.visitors.grace(node)
    }

    /// For those who will wait for this request.
    pub(crate) fn haste(self) -> &'g Arc<Haste> {
        self.pin.haste()
    }

    /// A second request under the same root, for work that outlives this one (read-ahead, write-back).
    pub fn fork(self) -> Forked {
        Forked { pin: self.pin.fork(), at: self.at }
    }

    /// For work of the kernel that goes on even if the request is dropped: no period is over before it is.
    pub(crate) fn hold(self) -> Hold {
        self.pin.hold()
    }

    /// An operation of the kernel, on this thread's ring. It counts as inside until it has completed, even if the
    /// future is dropped. The result is what the kernel says: a count, or a negative errno.
    pub async fn submit(self, engine: Engine, op: Op) -> i32 {
        self.local().submit(engine, op, Some(self.pin.hold())).await
    }

    /// The thread that this request runs on: its timers and clock.
    pub fn local(self) -> &'g Rc<Local> {
        self.lane().local()
    }

    fn lane(self) -> &'g Rc<Lane> {
        self.pin.lane()
    }
}

impl<'g> Child<'g> {
    /// The node-name.
    pub fn name(self) -> &'g str {
        &self.placed().shared.name
    }

    /// Limits of the child, and the size that it had when the graph was last changed.
    #[inline]
    pub fn geometry(self) -> Geometry {
        self.placed().geometry
    }

    /// Size in bytes, as it is now.
    pub fn size(self) -> u64 {
        self.moving_end().unwrap_or(self.placed().geometry.size)
    }

    /// The end of a node whose writers may move it while requests run, in bytes.
    pub fn moving_end(self) -> Option<u64> {
        match self.placed().body.end() {
            End::Fixed => None,
            End::At(end) => Some(end),
            End::Of(child) => self.cx.child(child).moving_end(),
        }
    }

    /// A child of this node, for who follows what [`Child::map`] says.
    pub fn below(self, id: ChildId) -> Self {
        self.cx.child(id)
    }

    #[inline]
    pub(crate) fn cx(self) -> IoCx<'g> {
        self.cx
    }

    #[inline]
    pub(crate) fn slot(self) -> u32 {
        self.cx.at
    }

    #[inline]
    pub(crate) fn placed(self) -> &'g Placed {
        self.cx.pin.pinned().view.placed(self.cx.at)
    }

    /// A request has ended with an error that is the storage's. Only where users come in it is told: what they see
    /// counts, and they see it once.
    pub(crate) fn tell_failure(self, write: bool, error: IoError) {
        if self.from_root && error != IoError::Unsupported {
            self.placed().shared.tell_failure(write, error);
        }
    }

    #[inline]
    pub(crate) fn options(self) -> NodeOptions {
        self.placed().options
    }

    #[inline]
    pub(crate) fn counters(self) -> &'g Counters {
        self.cx.pin.pinned().counters(self.cx.at)
    }

    /// The root's own permissions bind its own requests; between nodes the graph has seen to it.
    #[inline]
    pub(crate) fn may(self, wanted: PermSet) -> bool {
        !self.from_root || self.cx.pin.pinned().view.uses().contains(wanted)
    }
}

/// A request that outlives the one which forked it.
pub struct Forked {
    pin: ViewPin,
    at: u32,
}

impl Forked {
    /// The context, at the node where it was forked.
    pub fn cx(&self) -> IoCx<'_> {
        IoCx { pin: &self.pin, at: self.at }
    }
}
