//! The requests inside one node that overlap matters to. Data only: who registers what is `pipeline/child.rs`, and
//! `passage.rs` for writes that go by ring entries.
//!
//! A *serialising* request (read-modify-write) excludes every overlapping one, a plain write only the serialising
//! ones. Each waits for those registered before it and for no other, so nobody waits in a circle, and
//! who is hurried can hurry all that he waits for.
//!
//! A plain write that has no future to wait in is not registered: its thread counts it, as a lane counts a root's
//! requests (`gate.rs`). While nobody serialises, that is a store to the thread's own cache line. A serialising
//! request says that it is there and waits until every count has been 0: for all counted writes, wherever they are; no
//! further one comes in meanwhile, they register instead. The word that says so and the counts form the same store/load
//! pair as a gate's: whoever comes second must see the other.
//!
//! `block-core/tests/schedules.rs` and `graph_loom.rs` explore it; each canary takes one of these rules away.

use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::haste::Haste;
use crate::base::shim::{AtomicU32, Mutex, MutexGuard, Ordering, fence};
use crate::base::{ByteRange, canary};

/// All tracked requests of a node, from every thread.
#[derive(Debug, Default)]
pub struct Tracked {
    /// Serialising requests that are registered.
    serialising: AtomicU32,
    state: Mutex<State>,
}

/// How many writes of one thread are inside one node without being registered. Written by that thread alone; on a
/// cache line of its own.
#[repr(align(128))]
#[derive(Debug, Default)]
pub struct WriteCount(AtomicU32);

#[derive(Debug, Default)]
struct State {
    next: u64,
    requests: Slab<Request>,
    writes: Vec<Arc<WriteCount>>,
}

#[derive(Debug)]
struct Request {
    order: u64,
    range: ByteRange,
    serialising: bool,
    haste: Arc<Haste>,
    waker: Option<Waker>,
}

/// A registered request; it leaves when this is dropped.
#[derive(Debug)]
pub struct Ticket<'n> {
    tracked: &'n Tracked,
    key: usize,
}

impl Tracked {
    /// Registers a request, and how to hurry it. It may go on when [`Ticket::poll_alone`] says so.
    pub fn enter(&self, range: ByteRange, serialising: bool, haste: &Arc<Haste>) -> Ticket<'_> {
        let mut state = self.lock();
        let order = state.next;
        state.next += 1;
        let key = state.requests.insert(Request { order, range, serialising, haste: haste.clone(), waker: None });
        if serialising {
            self.serialising.fetch_add(1, Ordering::AcqRel);
            if !canary("serialising_fence") {
                fence(Ordering::SeqCst);
            }
        }
        Ticket { tracked: self, key }
    }

    /// A count for the calling thread. What attaches while somebody serialises finds him: his registration and this are
    /// ordered by the mutex.
    pub fn attach(&self) -> Arc<WriteCount> {
        let count = Arc::<WriteCount>::default();
        self.lock().writes.push(count.clone());
        count
    }

    /// The thread is done with the node. Its count must be 0.
    pub fn detach(&self, count: &Arc<WriteCount>) {
        assert_eq!(count.0.load(Ordering::Relaxed), 0, "a node is left without writes");
        self.lock().writes.retain(|other| !Arc::ptr_eq(other, count));
    }

    /// Counts a plain write, which is inside from now on and until [`Tracked::wrote`]. False: it has to register.
    #[inline]
    pub fn try_write(&self, count: &WriteCount) -> bool {
        if self.serialising.load(Ordering::Acquire) != 0 {
            return false;
        }
        let to = count.0.load(Ordering::Relaxed) + 1;
        count.0.store(to, Ordering::Relaxed);
        // While the count stays above 0 whoever serialises has to wait for it anyway: only the first write of a busy
        // period needs to look again.
        if to > 1 {
            return true;
        }
        if !canary("write_fence") {
            fence(Ordering::SeqCst);
        }
        if self.serialising.load(Ordering::Acquire) == 0 {
            return true;
        }
        self.wrote(count);
        false
    }

    /// The write is over.
    #[inline]
    pub fn wrote(&self, count: &WriteCount) {
        let left = count.0.load(Ordering::Relaxed) - 1;
        count.0.store(left, Ordering::Release);
        if left == 0 {
            if !canary("wrote_fence") {
                fence(Ordering::SeqCst);
            }
            if self.serialising.load(Ordering::Relaxed) != 0 {
                self.wake_serialising();
            }
        }
    }

    #[cold]
    fn wake_serialising(&self) {
        let woken: Vec<Waker> = {
            let mut state = self.lock();
            let waiting = state.requests.iter_mut().filter(|(_, request)| request.serialising);
            waiting.filter_map(|(_, request)| request.waker.take()).collect()
        };
        woken.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket<'_> {
    /// Ready when no earlier request is in the way.
    pub fn poll_alone(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.tracked.lock();
        let blocked = state.blocks(&state.requests[self.key]);
        if canary("tracked_late_waker") {
            // Who leaves between the look and the registration wakes nobody.
            drop(state);
            state = self.tracked.lock();
        }
        state.requests[self.key].waker = blocked.then(|| cx.waker().clone());
        if blocked { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Hurries the earlier requests that are in the way.
    pub fn hurry_others(&self) {
        let others: Vec<_> = {
            let state = self.tracked.lock();
            let me = &state.requests[self.key];
            let in_the_way = state.requests.iter().filter(|(_, other)| other.blocks(me));
            in_the_way.map(|(_, other)| other.haste.clone()).collect()
        };
        others.iter().for_each(|other| other.hurry());
    }
}

impl State {
    fn blocks(&self, request: &Request) -> bool {
        let counted = || self.writes.iter().any(|count| count.0.load(Ordering::Acquire) != 0);
        (request.serialising && !canary("tracked_uncounted") && counted())
            || self.requests.iter().any(|(_, other)| other.blocks(request))
    }
}

impl Request {
    fn blocks(&self, later: &Self) -> bool {
        let first = self.order < later.order || (canary("tracked_circle") && self.order != later.order);
        let exclusive = self.serialising || (later.serialising && !canary("tracked_plain_first"));
        first && exclusive && self.range.overlaps(later.range)
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let woken: Vec<Waker> = {
            let mut state = self.tracked.lock();
            let gone = state.requests.remove(self.key);
            if gone.serialising {
                self.tracked.serialising.fetch_sub(1, Ordering::Release);
            }
            let freed = state.requests.iter_mut().filter(|(_, other)| gone.blocks(other));
            freed.filter_map(|(_, other)| other.waker.take()).collect()
        };
        woken.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(ticket: &Ticket<'_>) -> bool {
        ticket.poll_alone(&Context::from_waker(Waker::noop())).is_ready()
    }

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, len).unwrap()
    }

    #[test]
    fn plain_writes_do_not_wait_for_each_other() {
        let tracked = Tracked::default();
        let first = tracked.enter(range(0, 4096), false, &Arc::default());
        let second = tracked.enter(range(0, 4096), false, &Arc::default());
        assert!(free(&first) && free(&second));
    }

    #[test]
    fn a_serialising_request_waits_and_is_waited_for() {
        let tracked = Tracked::default();
        let before = tracked.enter(range(0, 512), false, &Arc::default());
        let rmw = tracked.enter(range(0, 4096), true, &Arc::default());
        let after = tracked.enter(range(3584, 512), false, &Arc::default());
        let elsewhere = tracked.enter(range(4096, 512), false, &Arc::default());
        assert!(free(&before) && free(&elsewhere));
        assert!(!free(&rmw) && !free(&after));
        drop(before);
        assert!(free(&rmw) && !free(&after));
        drop(rmw);
        assert!(free(&after));
    }

    #[test]
    fn counted_writes_and_serialising_requests_exclude_each_other() {
        let tracked = Tracked::default();
        let (one, two) = (tracked.attach(), tracked.attach());
        assert!(tracked.try_write(&one) && tracked.try_write(&one) && tracked.try_write(&two));
        let rmw = tracked.enter(range(0, 4096), true, &Arc::default());
        let plain = tracked.enter(range(8192, 512), false, &Arc::default());
        assert!(!free(&rmw) && free(&plain));
        assert!(!tracked.try_write(&two), "it has to register");
        tracked.wrote(&one);
        tracked.wrote(&two);
        assert!(!free(&rmw));
        tracked.wrote(&one);
        assert!(free(&rmw));
        let late = tracked.attach();
        assert!(!tracked.try_write(&late) && free(&rmw));
        drop(rmw);
        assert!(tracked.try_write(&late));
        tracked.wrote(&late);
        [one, two, late].iter().for_each(|count| tracked.detach(count));
    }

    #[test]
    fn the_last_counted_write_wakes_who_waits_for_it() {
        struct Told(AtomicU32);
        impl std::task::Wake for Told {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let (tracked, told) = (Tracked::default(), Arc::new(Told(0.into())));
        let count = tracked.attach();
        assert!(tracked.try_write(&count) && tracked.try_write(&count));
        let rmw = tracked.enter(range(0, 4096), true, &Arc::default());
        assert!(rmw.poll_alone(&Context::from_waker(&told.clone().into())).is_pending());
        tracked.wrote(&count);
        assert_eq!(told.0.load(Ordering::Relaxed), 0);
        tracked.wrote(&count);
        assert_eq!(told.0.load(Ordering::Relaxed), 1);
        assert!(free(&rmw));
    }
}
