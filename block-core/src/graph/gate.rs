//! A root's gate: may a request come in, and when is nobody inside? With `uses.rs`, `tracked.rs` and `grace.rs` the only
//! file of the graph with memory orderings; all are model-checked (`block-core/tests/graph_loom.rs`, `block-core/tests/schedules.rs`).
//!
//! Each thread counts its own requests in its own *lane*; only that thread writes the lane, so counting is a plain
//! store. The STOPPED bit and the lanes form the classic store/load pair: whoever comes second must see the other.
//!
//! Each canary takes one piece of the protocol away; the models must then fail.

use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use crate::base::canary;
use crate::base::shim::{AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, fence};

const STOPPED: u64 = 1;
const VERSION: u64 = 2;

/// How many requests one thread has inside one root. Written by that thread alone; on a cache line of its own.
#[repr(align(128))]
#[derive(Debug)]
pub struct LaneCount(AtomicU32);

impl LaneCount {
    /// Requests are inside. What they did is seen by who sees that they have left.
    pub(super) fn is_busy(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }
}

/// See the module's head. `V` is what is published: a view of the graph.
#[derive(Debug)]
pub struct Gate<V> {
    /// `version << 1 | STOPPED`: one load answers "may I come in?" and "is my cached view current?".
    state: AtomicU64,
    lanes: Mutex<Vec<Arc<LaneCount>>>,
    view: Mutex<V>,
    /// Who wait until nobody is inside; woken by the last request of a lane.
    drainers: Wakers,
    /// Requests that wait outside; woken by `resume`.
    outside: Wakers,
    /// Requests inside that wait for something slow; woken by `stop`.
    parked: Wakers,
}

impl<V: Clone> Gate<V> {
    /// An open gate, at version 1.
    pub fn new(view: V) -> Self {
        Self {
            state: AtomicU64::new(VERSION),
            lanes: Mutex::new(Vec::new()),
            view: Mutex::new(view),
            drainers: Wakers::default(),
            outside: Wakers::default(),
            parked: Wakers::default(),
        }
    }

    /// A lane for the calling thread. One that attaches during a drain finds STOPPED set: the drainer's look at the
    /// list and this push are ordered by the mutex.
    pub fn attach(&self) -> Arc<LaneCount> {
        let lane = Arc::new(LaneCount(AtomicU32::new(0)));
        lock(&self.lanes).push(lane.clone());
        lane
    }

    /// The thread is done with the root. Its lane must be empty.
    pub fn detach(&self, lane: &Arc<LaneCount>) {
        assert_eq!(lane.0.load(Ordering::Relaxed), 0, "a lane is left empty");
        lock(&self.lanes).retain(|other| !Arc::ptr_eq(other, lane));
    }

    /// Raises the lane's count to `to`; `Some(version)` means that the request is in. On `None` the caller takes the
    /// count back with [`Gate::leave`].
    #[inline]
    pub fn enter(&self, lane: &LaneCount, to: u32) -> Option<u64> {
        lane.0.store(to, Ordering::Relaxed);
        // While the lane stays above 0 the drainer has to wait for it anyway: only the first request of a busy
        // period needs the fence.
        if to == 1 && !canary("enter_fence") {
            fence(Ordering::SeqCst);
        }
        let state = self.state.load(Ordering::Acquire);
        (state & STOPPED == 0).then_some(state)
    }

    /// Raises the count of a lane that is not empty, for work that a request inside forks: it needs no admission.
    #[inline]
    pub fn fork(&self, lane: &LaneCount, to: u32) {
        assert!(to > 1, "only a request inside can fork");
        lane.0.store(to, Ordering::Relaxed);
    }

    /// Lowers the lane's count to `to`.
    #[inline]
    pub fn leave(&self, lane: &LaneCount, to: u32) {
        lane.0.store(to, Ordering::Release);
        if to == 0 {
            if !canary("leave_fence") {
                fence(Ordering::SeqCst);
            }
            if self.state.load(Ordering::Relaxed) & STOPPED != 0 {
                self.drainers.wake_all();
            }
        }
    }

    /// The view that is published now.
    pub fn view(&self) -> V {
        lock(&self.view).clone()
    }

    /// The version of the published view, as [`Gate::enter`] gives it.
    #[inline]
    pub fn version(&self) -> u64 {
        self.state.load(Ordering::Acquire) & !STOPPED
    }

    /// True while nobody may come in.
    #[inline]
    pub fn is_stopped(&self) -> bool {
        self.state.load(Ordering::Acquire) & STOPPED != 0
    }

    /// Requests inside, over all lanes; a snapshot for messages.
    pub fn inside(&self) -> u32 {
        lock(&self.lanes).iter().map(|lane| lane.0.load(Ordering::Relaxed)).sum()
    }

    /// Ready as long as the root is stopped. A level, not an edge: it registers first, then looks, so a request that
    /// parks late is not forgotten.
    pub fn poll_hurried(&self, key: &mut Option<usize>, cx: &Context<'_>) -> Poll<()> {
        // The canary looks first: a stop between the two hurries nobody.
        let looked_too_early = canary("late_parker").then(|| self.is_stopped());
        self.parked.register(key, cx.waker());
        if looked_too_early.unwrap_or_else(|| self.is_stopped()) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Ready as long as the root is open.
    pub fn poll_open(&self, key: &mut Option<usize>, cx: &Context<'_>) -> Poll<()> {
        self.outside.register(key, cx.waker());
        if self.is_stopped() { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Forgets a registration of [`Gate::poll_hurried`].
    pub fn forget_hurried(&self, key: &mut Option<usize>) {
        self.parked.forget(key);
    }

    /// Forgets a registration of [`Gate::poll_empty`].
    pub fn forget_empty(&self, key: &mut Option<usize>) {
        self.drainers.forget(key);
    }

    /// Forgets a registration of [`Gate::poll_open`].
    pub fn forget_open(&self, key: &mut Option<usize>) {
        self.outside.forget(key);
    }

    /// Lets nobody in any more, and hurries who is inside.
    pub fn stop(&self) {
        self.state.fetch_or(STOPPED, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.parked.wake_all();
    }

    /// Ready when nobody is inside. The gate is stopped.
    pub fn poll_empty(&self, key: &mut Option<usize>, cx: &Context<'_>) -> Poll<()> {
        if canary("lower_flag") {
            // The known-bad protocol: the flag is down while its owner looks, so who leaves then wakes nobody.
            self.state.fetch_and(!STOPPED, Ordering::AcqRel);
        }
        self.drainers.register(key, cx.waker());
        let empty = lock(&self.lanes).iter().all(|lane| lane.0.load(Ordering::Acquire) == 0);
        if canary("lower_flag") {
            self.state.fetch_or(STOPPED, Ordering::AcqRel);
            fence(Ordering::SeqCst);
        }
        if empty { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Publishes what is new, if anything, and *then* lets requests in again.
    pub fn resume(&self, new: Option<V>) {
        let mut state = self.state.load(Ordering::Relaxed) & !STOPPED;
        if canary("open_before_publish") && new.is_some() {
            self.state.store(state + VERSION, Ordering::Release);
        }
        let old = new.map(|view| {
            state += VERSION;
            std::mem::replace(&mut *lock(&self.view), view)
        });
        self.state.store(state, Ordering::Release);
        self.outside.wake_all();
        // Outside the lock: dropping the last view wakes whoever closes nodes.
        drop(old);
    }
}

impl<V> Gate<V> {
    /// The root has left the graph: nobody comes in any more, and idle lanes that look find `last`, which names no node.
    /// The gate is stopped and empty.
    pub fn retire(&self, last: V) {
        let old = std::mem::replace(&mut *lock(&self.view), last);
        self.state.fetch_add(VERSION, Ordering::AcqRel);
        drop(old);
    }
}

/// Wakers that forget their dead: a key belongs to its registrant until it is given back.
#[derive(Debug)]
struct Wakers(Mutex<Slab<Option<Waker>>>);

impl Default for Wakers {
    fn default() -> Self {
        Self(Mutex::new(Slab::new()))
    }
}

impl Wakers {
    fn register(&self, key: &mut Option<usize>, waker: &Waker) {
        let mut all = lock(&self.0);
        match *key {
            Some(key) => all[key] = Some(waker.clone()),
            None => *key = Some(all.insert(Some(waker.clone()))),
        }
    }

    fn forget(&self, key: &mut Option<usize>) {
        if let Some(key) = key.take() {
            lock(&self.0).remove(key);
        }
    }

    #[cold]
    fn wake_all(&self) {
        let woken: Vec<_> = lock(&self.0).iter_mut().filter_map(|(_, waker)| waker.take()).collect();
        woken.into_iter().for_each(Waker::wake);
    }
}

/// A panic while one of these locks is held ends the process; a poisoned lock is only ever seen by unwinding tests.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Wake for Counting {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A command that gave up has left a root, for which it waits as well as the next drain.
    #[test]
    fn all_who_wait_for_an_empty_gate_are_woken() {
        let gate = Gate::new(());
        let lane = gate.attach();
        gate.enter(&lane, 1).unwrap();
        gate.stop();
        let wakers = [(); 3].map(|()| Arc::new(Counting::default()));
        let mut keys = [None; 3];
        for (key, waker) in keys.iter_mut().zip(&wakers) {
            assert!(gate.poll_empty(key, &Context::from_waker(&waker.clone().into())).is_pending());
        }
        gate.forget_empty(&mut keys[2]);
        gate.leave(&lane, 0);
        assert_eq!(wakers.map(|waker| waker.0.load(Ordering::Relaxed)), [1, 1, 0]);
        assert!(gate.poll_empty(&mut keys[0], &Context::from_waker(Waker::noop())).is_ready());
    }
}
