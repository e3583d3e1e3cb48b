//! Grace periods: when has everybody left a node who might still use what he found there before?
//!
//! A format that sets a cluster free may not use it for anything else while a request is on its way to it that looked
//! before. Such requests take no lock and leave no trace, so nobody can ask them. But each is inside a lane, and a lane
//! belongs to one thread: a period *asks* each busy lane at the node, by a message to its thread, to put a new pin in the
//! place of the one that it hands out (`lane.rs`). Who comes in later holds the new pin and looks later; who was inside
//! holds the old one. The period is over when nobody is at the node any more under an old pin: no ring entry is under way,
//! and no driver's work on the node is at a place where it knows something. A request pays nothing for this.
//!
//! A lane that nobody is in is not asked. That it is empty and what was changed before the period form the store/load
//! pair of `gate.rs`: whoever comes second sees the other. Model-checked with it; each canary takes a piece away.

use std::future::poll_fn;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use super::gate::LaneCount;
use super::lane::turn;
use super::node::NodeShared;
use crate::base::canary;
use crate::base::shim::{AtomicUsize, Mutex, MutexGuard, Ordering, fence};
use crate::rt::Remote;

/// A period at one node, from the moment when it was begun.
#[derive(Clone, Debug)]
pub struct Grace(Arc<Period>);

/// Somebody whom a period waits for, as long as this lives.
#[derive(Debug)]
pub struct Share(Arc<Period>);

#[derive(Debug)]
struct Period {
    shares: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
}

impl Grace {
    /// Begins a period that waits for those in `lanes`: `ask` gets each that is busy, with a share to keep until its
    /// requests of now are over.
    pub fn begin<'l, T: 'l>(lanes: impl Iterator<Item = (&'l LaneCount, T)>, mut ask: impl FnMut(T, Share)) -> Self {
        let begun = Share(Arc::new(Period { shares: AtomicUsize::new(1), waiting: Mutex::new(Vec::new()) }));
        if !canary("grace_fence") {
            fence(Ordering::SeqCst);
        }
        for (_, lane) in lanes.filter(|(count, _)| count.is_busy()) {
            ask(lane, begun.clone());
        }
        Self(begun.0.clone())
    }

    /// True once nobody is waited for.
    pub fn is_over(&self) -> bool {
        // The canary sees that all have gone, and not what they did before.
        let order = if canary("grace_early") { Ordering::Relaxed } else { Ordering::Acquire };
        self.0.shares.load(order) == 0
    }

    /// Ready once nobody is waited for.
    pub fn poll_over(&self, cx: &Context<'_>) -> Poll<()> {
        // The canary looks first: who leaves between the two wakes nobody.
        let looked_too_early = canary("grace_late_waker").then(|| self.is_over());
        let mut waiting = self.0.lock();
        if !waiting.iter().any(|known| known.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        drop(waiting);
        if looked_too_early.unwrap_or_else(|| self.is_over()) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Waits until nobody is waited for. Whoever waits for this inside the node must not be one of those
    /// ([`IoCx::aside`](super::IoCx::aside)).
    pub async fn over(&self) {
        poll_fn(|cx| self.poll_over(cx)).await;
    }
}

impl Clone for Share {
    fn clone(&self) -> Self {
        // Nobody can have seen 0: this one is counted.
        self.0.shares.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.0.shares.fetch_sub(1, Ordering::AcqRel) == 1 {
            let waiting = std::mem::take(&mut *self.0.lock());
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

impl Period {
    fn lock(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lanes whose view has a node, from every thread and root.
#[derive(Debug, Default)]
pub(crate) struct Visitors(Mutex<Vec<Visitor>>);

#[derive(Clone)]
struct Visitor {
    lane: u64,
    count: Arc<LaneCount>,
    thread: Remote,
}

impl Visitors {
    /// The lane has a view with the node from now on. What attaches during a period looks after it was begun: the mutex
    /// orders them.
    pub(super) fn attach(&self, lane: u64, count: &Arc<LaneCount>, thread: &Remote) {
        self.lock().push(Visitor { lane, count: count.clone(), thread: thread.clone() });
    }

    /// One view less of the lane's has the node, and nobody is at it under that.
    pub(super) fn detach(&self, lane: u64) {
        let mut all = self.lock();
        let gone = all.iter().position(|visitor| visitor.lane == lane);
        all.swap_remove(gone.expect("it was attached"));
    }

    /// Begins a period at `node`, whose visitors these are.
    pub(super) fn grace(&self, node: &Arc<NodeShared>) -> Grace {
        // Shares that cannot be delivered are dropped, and nobody is inside the lanes of a thread that has ended.
        let mut asked = Vec::new();
        let grace = {
            let all = self.lock();
            Grace::begin(all.iter().map(|visitor| (&*visitor.count, visitor)), |visitor, share| {
                asked.push((visitor.clone(), share));
            })
        };
        for (Visitor { lane, thread, .. }, share) in asked {
            let node = node.clone();
            thread.send(move |_| turn(lane, &node, &share));
        }
        grace
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Visitor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Visitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Visitor").field("lane", &self.lane).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_waits_for_busy_lanes_alone() {
        let gate = super::super::gate::Gate::new(());
        let (busy, idle) = (gate.attach(), gate.attach());
        gate.enter(&busy, 1).expect("the gate is open");
        let mut asked = Vec::new();
        let lanes = [(&*busy, 1), (&*idle, 2)];
        let grace = Grace::begin(lanes.into_iter(), |lane, share| asked.push((lane, share)));
        assert_eq!(asked.iter().map(|(lane, _)| *lane).collect::<Vec<_>>(), [1]);
        let second = asked[0].1.clone();
        drop(asked);
        assert!(!grace.is_over());
        drop(second);
        assert!(grace.is_over());
        gate.leave(&busy, 0);
        let none = Grace::begin(lanes.into_iter(), |_, _| panic!("nobody is inside"));
        assert!(none.is_over());
        [busy, idle].iter().for_each(|lane| gate.detach(lane));
    }
}
