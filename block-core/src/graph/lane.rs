//! One thread's way into one root: the count of its requests, its cached view, and the pin that a request holds.
//!
//! A lane, and whatever it hands out, stays on its thread (`!Send`), so that no driver can keep one.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::mem::take;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use super::cx::IoCx;
use super::gate::{Gate, LaneCount};
use super::grace::Share;
use super::haste::Haste;
use super::node::NodeShared;
use super::stats::Counters;
use super::tracked::WriteCount;
use super::view::{Placed, View};
use crate::rt::{Counted, Hold, Local, Remote};

/// What a root is to the threads that use it. Sent to them by whoever made the root.
#[derive(Clone)]
pub struct Root(Arc<RootShared>);

pub(crate) struct RootShared {
    pub(crate) name: String,
    pub(crate) gate: Gate<Arc<View>>,
    threads: Mutex<Vec<(u64, Remote)>>,
}

impl Root {
    pub(crate) fn new(name: String, view: Arc<View>) -> Self {
        Self(Arc::new(RootShared { name, gate: Gate::new(view), threads: Mutex::default() }))
    }

    pub(crate) fn gate(&self) -> &Gate<Arc<View>> {
        &self.0.gate
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// How operators know it ("export 'e0'").
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Requests inside, over all threads; a snapshot.
    pub fn in_flight(&self) -> u32 {
        self.0.gate.inside()
    }

    /// Waits until nobody is inside. The gate is stopped.
    pub(crate) async fn emptied(&self) {
        let mut wait = Registered { root: &self.0, key: None, forget: Gate::forget_empty };
        poll_fn(|cx| self.0.gate.poll_empty(&mut wait.key, cx)).await;
    }

    /// The calling thread's lane. A thread may have several; each counts for itself.
    pub fn lane(&self, local: &Rc<Local>) -> Rc<Lane> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Relaxed);
        let count = self.0.gate.attach();
        let me = Me { lane: id, count: count.clone(), thread: local.remote() };
        // Before it looks at the view: a poke that comes between would miss it, and the old view would stay.
        self.threads().push((id, local.remote()));
        let lane = Rc::new_cyclic(|weak| Lane {
            root: self.0.clone(),
            count,
            inside: Cell::new(0),
            pinned: RefCell::new(Rc::new(Pinned::new(&self.0.gate, &me))),
            turned: RefCell::default(),
            local: local.clone(),
            me,
            weak: weak.clone(),
        });
        LANES.with_borrow_mut(|lanes| lanes.insert(id, Rc::downgrade(&lane)));
        lane
    }

    /// Tells idle threads that there is a new view: what they have cached would keep removed nodes from closing.
    pub(crate) fn poke(&self) {
        for (id, thread) in self.threads().iter() {
            let id = *id;
            thread.send(move |_| forget_old(id));
        }
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<(u64, Remote)>> {
        self.0.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// This thread's lanes, for pokes.
    static LANES: RefCell<HashMap<u64, Weak<Lane>>> = RefCell::default();
}

fn forget_old(id: u64) {
    let lane = LANES.with_borrow(|lanes| lanes.get(&id).and_then(Weak::upgrade));
    if let Some(lane) = lane {
        lane.forget_old();
    }
}

/// A period has begun at `node`: the lane tells who was there before from who comes later.
pub(super) fn turn(id: u64, node: &Arc<NodeShared>, share: &Share) {
    let lane = LANES.with_borrow(|lanes| lanes.get(&id).and_then(Weak::upgrade));
    if let Some(lane) = lane {
        lane.turn(node, share);
    }
}

/// See the module's head.
pub struct Lane {
    root: Arc<RootShared>,
    count: Arc<LaneCount>,
    inside: Cell<u32>,
    pinned: RefCell<Rc<Pinned>>,
    /// Pins that were handed out before a period began, and may still be held.
    turned: RefCell<Vec<Weak<Pinned>>>,
    local: Rc<Local>,
    me: Me,
    weak: Weak<Self>,
}

/// What nodes know of a lane.
struct Me {
    lane: u64,
    count: Arc<LaneCount>,
    thread: Remote,
}

/// A view with what this thread counts for each of its nodes.
pub(crate) struct Pinned {
    version: u64,
    pub(crate) view: Arc<View>,
    counts: Rc<[Option<Counts>]>,
    lane: u64,
    /// Ring entries under way, of whatever nodes.
    in_kernel: Cell<u32>,
    /// For each slot: how often a driver works on the node just now.
    here: Box<[Cell<u32>]>,
    /// Periods at slots that have to wait for what is done under this pin.
    awaited: RefCell<Vec<(u32, Share)>>,
}

/// What one thread counts for one node under one root.
struct Counts {
    done: Arc<Counters>,
    /// Direct writes under way, where the node keeps writes apart.
    writes: Option<Arc<WriteCount>>,
}

impl Counts {
    fn new(node: &Placed, me: &Me) -> Self {
        node.shared.visitors.attach(me.lane, &me.count, &me.thread);
        let writes = node.tracks().then(|| node.shared.tracked.attach());
        Self { done: node.shared.stats.counters(), writes }
    }
}

impl Pinned {
    fn new(gate: &Gate<Arc<View>>, me: &Me) -> Self {
        // The version first: a newer view under an older version is refreshed again, never the other way round.
        let version = gate.version();
        let view = gate.view();
        let counts = view.nodes().map(|node| node.map(|node| Counts::new(node, me))).collect();
        Self::with(version, view, counts, me.lane)
    }

    fn with(version: u64, view: Arc<View>, counts: Rc<[Option<Counts>]>, lane: u64) -> Self {
        let here = counts.iter().map(|_| Cell::new(0)).collect();
        Self { version, view, counts, lane, in_kernel: Cell::new(0), here, awaited: RefCell::default() }
    }

    /// The same for those who come in from now on.
    fn again(&self) -> Self {
        Self::with(self.version, self.view.clone(), self.counts.clone(), self.lane)
    }

    /// A period at `node` waits for what is done there under this pin.
    fn await_for(&self, node: &Arc<NodeShared>, share: &Share) {
        let found =
            (0..).zip(self.view.nodes()).find(|(_, placed)| placed.is_some_and(|at| Arc::ptr_eq(&at.shared, node)));
        if let Some((slot, _)) = found.filter(|(slot, _)| !self.is_quiet(*slot)) {
            self.awaited.borrow_mut().push((slot, share.clone()));
        }
    }

    fn is_quiet(&self, slot: u32) -> bool {
        self.in_kernel.get() == 0 && self.here[slot as usize].get() == 0
    }

    /// Something is over; who waits for it is told.
    #[cold]
    fn tell(&self) {
        let all = take(&mut *self.awaited.borrow_mut());
        let (over, left): (Vec<_>, Vec<_>) = all.into_iter().partition(|(slot, _)| self.is_quiet(*slot));
        *self.awaited.borrow_mut() = left;
        // Wakes others, so not before all is in its place.
        drop(over);
    }

    #[inline]
    fn is_awaited(&self) -> bool {
        !self.awaited.borrow().is_empty()
    }

    #[inline]
    fn counts(&self, slot: u32) -> &Counts {
        self.counts[slot as usize].as_ref().expect("only slot 0 is no node")
    }

    #[inline]
    pub(crate) fn counters(&self, slot: u32) -> &Counters {
        &self.counts(slot).done
    }

    /// Direct writes under way at a node that keeps writes apart.
    #[inline]
    pub(crate) fn writes(&self, slot: u32) -> &WriteCount {
        self.counts(slot).writes.as_ref().expect("a plan says that the node keeps writes apart")
    }
}

impl Counted for Pinned {
    #[inline]
    fn up(&self) {
        self.in_kernel.set(self.in_kernel.get() + 1);
    }

    #[inline]
    fn down(&self) {
        let left = self.in_kernel.get() - 1;
        self.in_kernel.set(left);
        if left == 0 && self.is_awaited() {
            self.tell();
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // The last of those that count in the same place.
        let Some(counts) = Rc::get_mut(&mut self.counts) else { return };
        for (node, counts) in self.view.nodes().zip(counts) {
            if let (Some(node), Some(counts)) = (node, counts) {
                node.shared.stats.retire(&counts.done);
                node.shared.visitors.detach(self.lane);
                counts.writes.iter().for_each(|writes| node.shared.tracked.detach(writes));
            }
        }
    }
}

/// A driver at work on a node: see [`IoCx::here`].
pub(crate) struct Here<'g> {
    pinned: &'g Pinned,
    slot: u32,
}

impl<'g> Here<'g> {
    fn new(pinned: &'g Pinned, slot: u32) -> Self {
        let here = &pinned.here[slot as usize];
        here.set(here.get() + 1);
        Self { pinned, slot }
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        let here = &self.pinned.here[self.slot as usize];
        here.set(here.get() - 1);
        if here.get() == 0 && self.pinned.is_awaited() {
            self.pinned.tell();
        }
    }
}

/// One who waits aside of a node: see [`IoCx::aside`].
pub(crate) struct Away<'g> {
    /// `None`: it was not there (the control task's own work on a drained node).
    from: Option<(&'g Pinned, u32)>,
}

impl<'g> Away<'g> {
    fn new(pinned: &'g Pinned, slot: u32) -> Self {
        let from = (pinned.here[slot as usize].get() > 0).then_some((pinned, slot));
        drop(from.map(|(pinned, slot)| Here { pinned, slot }));
        Self { from }
    }
}

impl Drop for Away<'_> {
    fn drop(&mut self) {
        if let Some((pinned, slot)) = self.from {
            let here = &pinned.here[slot as usize];
            here.set(here.get() + 1);
        }
    }
}

impl Lane {
    /// Lets a request in and pins the view; `None` while the root is drained.
    #[inline]
    pub fn try_enter(&self) -> Option<ViewPin> {
        let inside = self.inside.get() + 1;
        self.inside.set(inside);
        let Some(version) = self.root.gate.enter(&self.count, inside) else {
            self.left();
            return None;
        };
        let mut pinned = self.pinned.borrow().clone();
        if pinned.version != version {
            drop(pinned);
            pinned = self.refresh();
        }
        Some(ViewPin { pinned, haste: OnceCell::new(), counted: self.counted() })
    }

    /// Lets a request in as soon as the root is open.
    pub async fn enter(&self) -> ViewPin {
        loop {
            if let Some(pin) = self.try_enter() {
                return pin;
            }
            self.opened().await;
        }
    }

    /// Waits until the root is open.
    pub async fn opened(&self) {
        let mut wait = Registered { root: &self.root, key: None, forget: Gate::forget_open };
        poll_fn(|cx| self.root.gate.poll_open(&mut wait.key, cx)).await;
    }

    /// True while requests of this lane are inside.
    pub fn is_busy(&self) -> bool {
        self.inside.get() != 0
    }

    /// The thread that this lane belongs to.
    pub fn local(&self) -> &Rc<Local> {
        &self.local
    }

    /// The published view is new only if nobody was inside when it was published, so nobody but the caller is.
    #[cold]
    fn refresh(&self) -> Rc<Pinned> {
        assert_eq!(self.inside.get(), 1, "a view changes only while its root is empty");
        let pinned = Rc::new(Pinned::new(&self.root.gate, &self.me));
        let old = self.pinned.replace(pinned.clone());
        drop(old);
        pinned
    }

    fn forget_old(&self) {
        let outdated = self.inside.get() == 0 && self.pinned.borrow().version != self.root.gate.version();
        if outdated {
            let old = self.pinned.replace(Rc::new(Pinned::new(&self.root.gate, &self.me)));
            drop(old);
        }
    }

    fn turn(&self, node: &Arc<NodeShared>, share: &Share) {
        if self.inside.get() == 0 {
            return;
        }
        // Somebody is inside, so the view is the one that is published.
        let again = Rc::new(self.pinned.borrow().again());
        let before = self.pinned.replace(again);
        let mut turned = self.turned.borrow_mut();
        turned.push(Rc::downgrade(&before));
        turned.retain(|pinned| pinned.strong_count() > 0);
        turned.iter().filter_map(Weak::upgrade).for_each(|pinned| pinned.await_for(node, share));
    }

    #[inline]
    fn counted(&self) -> CountedIn {
        CountedIn(self.weak.upgrade().expect("who calls a lane holds it"))
    }

    #[inline]
    fn left(&self) {
        let inside = self.inside.get() - 1;
        self.inside.set(inside);
        self.root.gate.leave(&self.count, inside);
    }
}

impl Counted for Lane {
    #[inline]
    fn up(&self) {
        let inside = self.inside.get() + 1;
        self.inside.set(inside);
        self.root.gate.fork(&self.count, inside);
    }

    #[inline]
    fn down(&self) {
        self.left();
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.root.gate.detach(&self.count);
        let mut threads = self.root.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|(id, _)| *id != self.me.lane);
        LANES.with_borrow_mut(|lanes| lanes.remove(&self.me.lane));
    }
}

/// One request's place in its lane's count.
struct CountedIn(Rc<Lane>);

impl Drop for CountedIn {
    #[inline]
    fn drop(&mut self) {
        self.0.left();
    }
}

/// A request inside a root: it is counted, and the view that it entered with stays.
pub struct ViewPin {
    /// Dropped before the count goes down: who sees an empty root sees no pinned view.
    pinned: Rc<Pinned>,
    /// Made when somebody might wait for this request.
    haste: OnceCell<Arc<Haste>>,
    counted: CountedIn,
}

impl ViewPin {
    /// The way down.
    #[inline]
    pub fn cx(&self) -> IoCx<'_> {
        IoCx::new(self, 0)
    }

    /// The lane that it entered through.
    #[inline]
    pub fn lane(&self) -> &Rc<Lane> {
        &self.counted.0
    }

    /// A second request under the same root, for work that outlives this one. It needs no admission: this request is
    /// inside, so the root is not empty.
    pub fn fork(&self) -> Self {
        self.lane().up();
        let haste = OnceCell::from(self.haste().clone());
        Self { pinned: self.pinned.clone(), haste, counted: CountedIn(self.lane().clone()) }
    }

    /// Another request that begins now, under the same view. Unlike a fork it is hurried for itself.
    pub fn another(&self) -> Self {
        self.lane().up();
        // Not this one's pin: a period may wait for that.
        let pinned = self.lane().pinned.borrow().clone();
        assert_eq!(pinned.version, self.pinned.version, "a view changes only while its root is empty");
        Self { pinned, haste: OnceCell::new(), counted: CountedIn(self.lane().clone()) }
    }

    /// For a ring entry: counted until its completion has arrived, whatever becomes of the request.
    #[inline]
    pub fn hold(&self) -> Hold {
        Hold::within(self.lane().clone(), self.pinned.clone())
    }

    #[inline]
    pub(crate) fn pinned(&self) -> &Pinned {
        &self.pinned
    }

    #[inline]
    pub(crate) fn node(&self, slot: u32) -> &NodeShared {
        &self.pinned.view.placed(slot).shared
    }

    pub(crate) fn gate(&self) -> &Gate<Arc<View>> {
        &self.lane().root.gate
    }

    pub(super) fn here(&self, slot: u32) -> Here<'_> {
        Here::new(&self.pinned, slot)
    }

    pub(super) fn away(&self, slot: u32) -> Away<'_> {
        Away::new(&self.pinned, slot)
    }

    /// This request's, and that of what it forks.
    pub(crate) fn haste(&self) -> &Arc<Haste> {
        self.haste.get_or_init(Arc::default)
    }

    pub(crate) fn hurry_wait(&self) -> Registered<'_> {
        Registered { root: &self.lane().root, key: None, forget: Gate::forget_hurried }
    }
}

/// A waker registered with a gate; forgotten when the wait is over, however it ends.
pub(crate) struct Registered<'g> {
    root: &'g RootShared,
    pub(crate) key: Option<usize>,
    forget: fn(&Gate<Arc<View>>, &mut Option<usize>),
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        (self.forget)(&self.root.gate, &mut self.key);
    }
}
