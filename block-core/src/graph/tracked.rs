//! The requests inside one node that overlap matters to. Data only: who registers what is `pipeline/child.rs`.
//!
//! A *serialising* request (read-modify-write) excludes every overlapping one, a plain write only the serialising
//! ones. Each waits for those registered before it and for no other, so nobody waits in a circle, and who is hurried can
//! hurry all that he waits for.
//! `block-core/tests/schedules.rs` explores it; each canary takes one of these rules away.

use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::haste::Haste;
use crate::base::shim::{Mutex, MutexGuard};
use crate::base::{ByteRange, canary};

/// All tracked requests of a node, from every thread.
#[derive(Debug, Default)]
pub struct Tracked(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    requests: Slab<Request>,
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
        Ticket { tracked: self, key }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket<'_> {
    /// Ready when no earlier request is in the way.
    pub fn poll_alone(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.tracked.lock();
        let me = &state.requests[self.key];
        let blocked = state.requests.iter().any(|(_, other)| other.blocks(me));
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
}
