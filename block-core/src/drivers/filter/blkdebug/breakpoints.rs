//! Requests that wait at an event until a test lets them go on.
//!
//! A breakpoint catches one request. A caught request goes on when it is resumed, when its breakpoint's name is removed,
//! or when its root is drained: nothing waits here for ever.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::graph::{DebugEvent, Pause};

/// The breakpoints of a node. Usable from any thread.
#[derive(Default)]
pub struct Breakpoints {
    state: Mutex<State>,
    /// There may be one that is set: what requests look at.
    is_set: AtomicBool,
}

#[derive(Default)]
struct State {
    next: u64,
    set: Vec<(DebugEvent, String)>,
    /// By number, so in the order in which they were caught.
    suspended: BTreeMap<u64, Suspended>,
    /// Those who wait for a request to be caught.
    watching: Vec<Waker>,
}

struct Suspended {
    tag: String,
    resumed: bool,
    waker: Option<Waker>,
}

impl Breakpoints {
    /// The next request that comes to `event` waits there, under the name `tag`.
    pub fn set(&self, event: DebugEvent, tag: &str) {
        let mut state = self.lock();
        state.set.push((event, tag.to_owned()));
        self.is_set.store(true, Relaxed);
    }

    /// Takes the breakpoints of this name away and lets go what they caught. False where there was neither.
    pub fn remove(&self, tag: &str) -> bool {
        let mut state = self.lock();
        let before = state.set.len();
        state.set.retain(|(_, set)| set != tag);
        self.is_set.store(!state.set.is_empty(), Relaxed);
        let caught = state.suspended.values_mut().filter(|request| request.tag == tag && !request.resumed);
        let resumed = caught.map(Suspended::resume).count();
        before != state.set.len() || resumed > 0
    }

    /// Lets the request go on that has waited longest under this name. False where there is none.
    pub fn resume(&self, tag: &str) -> bool {
        let mut state = self.lock();
        let first = state.suspended.values_mut().find(|request| request.tag == tag && !request.resumed);
        first.map(Suspended::resume).is_some()
    }

    /// A request waits under this name.
    pub fn is_suspended(&self, tag: &str) -> bool {
        self.lock().is_suspended(tag)
    }

    /// Waits until a request waits under this name.
    pub async fn suspended(&self, tag: &str) {
        poll_fn(|task| {
            let mut state = self.lock();
            if state.is_suspended(tag) {
                return Poll::Ready(());
            }
            state.watching.push(task.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// One is set.
    pub(super) fn is_set(&self) -> bool {
        self.is_set.load(Relaxed)
    }

    /// A request comes to `event`: what it has to wait for.
    pub(super) fn hit(self: &Arc<Self>, event: DebugEvent) -> Option<Pause> {
        if !self.is_set() {
            return None;
        }
        let mut state = self.lock();
        let place = state.set.iter().position(|(set, _)| *set == event)?;
        let (_, tag) = state.set.remove(place);
        self.is_set.store(!state.set.is_empty(), Relaxed);
        let number = state.next;
        state.next += 1;
        state.suspended.insert(number, Suspended { tag, resumed: false, waker: None });
        state.watching.drain(..).for_each(Waker::wake);
        let caught = Caught { breakpoints: self.clone(), number };
        Some(Box::pin(async move { poll_fn(|task| caught.poll_resumed(task)).await }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_suspended(&self, tag: &str) -> bool {
        self.suspended.values().any(|request| request.tag == tag && !request.resumed)
    }
}

impl Suspended {
    fn resume(&mut self) {
        self.resumed = true;
        self.waker.take().into_iter().for_each(Waker::wake);
    }
}

/// A request's place among the suspended, until it goes on.
struct Caught {
    breakpoints: Arc<Breakpoints>,
    number: u64,
}

impl Caught {
    fn poll_resumed(&self, task: &Context<'_>) -> Poll<()> {
        let mut state = self.breakpoints.lock();
        let me = state.suspended.get_mut(&self.number).expect("it is there as long as this value");
        me.waker = Some(task.waker().clone());
        if me.resumed { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Caught {
    fn drop(&mut self) {
        self.breakpoints.lock().suspended.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goes_on(pause: &mut Pause) -> bool {
        pause.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn a_breakpoint_catches_one_request_until_it_is_resumed() {
        let breakpoints = Arc::<Breakpoints>::default();
        assert!(breakpoints.hit(DebugEvent::Pwritev).is_none());
        breakpoints.set(DebugEvent::Pwritev, "a");
        assert!(breakpoints.hit(DebugEvent::ReadAio).is_none());
        let mut pause = breakpoints.hit(DebugEvent::Pwritev).unwrap();
        assert!(!breakpoints.is_set() && breakpoints.hit(DebugEvent::Pwritev).is_none());
        assert!(breakpoints.is_suspended("a") && !breakpoints.is_suspended("b"));
        assert!(!goes_on(&mut pause) && !breakpoints.resume("b"));
        assert!(breakpoints.resume("a") && !breakpoints.resume("a"));
        assert!(goes_on(&mut pause));
    }

    #[test]
    fn removing_a_name_lets_all_of_it_go() {
        let breakpoints = Arc::<Breakpoints>::default();
        for event in [DebugEvent::Pwritev, DebugEvent::ReadAio, DebugEvent::L2Load] {
            breakpoints.set(event, "a");
        }
        let mut first = breakpoints.hit(DebugEvent::Pwritev).unwrap();
        let mut second = breakpoints.hit(DebugEvent::ReadAio).unwrap();
        assert!(breakpoints.remove("a") && !breakpoints.remove("a"));
        assert!(goes_on(&mut first) && goes_on(&mut second) && !breakpoints.is_set());
    }

    #[test]
    fn who_stops_waiting_is_forgotten() {
        let breakpoints = Arc::<Breakpoints>::default();
        breakpoints.set(DebugEvent::Pwritev, "a");
        drop(breakpoints.hit(DebugEvent::Pwritev));
        assert!(!breakpoints.is_suspended("a") && !breakpoints.resume("a"));
    }
}
