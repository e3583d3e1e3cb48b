//! Timers of one thread: a heap of deadlines, and a slab of those who wait. A cancelled one stays in the heap until its
//! time, or until most of the heap is such.

use super::Local;
use slab::Slab;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Ends at a point in time, never before it. Dropping it cancels it.
#[must_use = "a sleep does nothing unless it is awaited"]
pub struct Sleep {
    local: Rc<Local>,
    deadline: Instant,
    key: Option<usize>,
}

impl Sleep {
    pub(super) fn new(local: Rc<Local>, deadline: Instant) -> Self {
        Self { local, deadline, key: None }
    }

    /// When it ends.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.deadline <= self.local.batch_time() {
            return Poll::Ready(());
        }
        let mut timers = self.local.timers().borrow_mut();
        let key = match self.key {
            Some(key) => timers.renew(key, self.deadline, cx.waker()),
            None => timers.insert(self.deadline, cx.waker().clone()),
        };
        drop(timers);
        self.key = Some(key);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.local.timers().borrow_mut().cancel(key);
        }
    }
}

/// `None` where `work` takes longer than `limit`.
pub async fn within<T>(local: &Local, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let mut work = pin!(work);
    let mut clock = pin!(local.sleep(limit));
    poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => clock.as_mut().poll(cx).map(|()| None),
    })
    .await
}

/// Who waits until when. Knows no clock: the loop brings the time.
#[derive(Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u64, usize)>>,
    waiting: Slab<Waiting>,
    made: u64,
}

struct Waiting {
    /// Tells a slot's owner from one that had it before.
    number: u64,
    /// `None` once fired, until the sleeper notices.
    waker: Option<Waker>,
}

impl Timers {
    pub(super) fn insert(&mut self, deadline: Instant, waker: Waker) -> usize {
        self.made += 1;
        let key = self.waiting.insert(Waiting { number: self.made, waker: Some(waker) });
        self.heap.push(Reverse((deadline, self.made, key)));
        key
    }

    /// Another poll of the same sleep: only its waker may be new.
    fn renew(&mut self, key: usize, deadline: Instant, waker: &Waker) -> usize {
        match &mut self.waiting[key].waker {
            Some(old) => old.clone_from(waker),
            // It fired, yet the time that its task sees is older than the deadline: wait again.
            None => {
                self.waiting.remove(key);
                return self.insert(deadline, waker.clone());
            }
        }
        key
    }

    pub(super) fn cancel(&mut self, key: usize) {
        self.waiting.remove(key);
        if self.heap.len() > 2 * self.waiting.len() + SLACK {
            let waiting = &self.waiting;
            self.heap.retain(|Reverse((_, number, key))| alive(waiting, *key, *number));
        }
    }

    /// The earliest deadline that somebody waits for.
    pub(super) fn next(&mut self) -> Option<Instant> {
        while let Some(Reverse((deadline, number, key))) = self.heap.peek() {
            if alive(&self.waiting, *key, *number) {
                return Some(*deadline);
            }
            self.heap.pop();
        }
        None
    }

    /// The waker of one sleep that is over at `now`; call until `None`.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Waker> {
        if self.next()? > now {
            return None;
        }
        let Reverse((_, _, key)) = self.heap.pop()?;
        self.waiting[key].waker.take()
    }
}

fn alive(waiting: &Slab<Waiting>, key: usize, number: u64) -> bool {
    waiting.get(key).is_some_and(|waiting| waiting.number == number && waiting.waker.is_some())
}

/// Dead entries that are not worth a clean-up.
const SLACK: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64, zero: Instant) -> Instant {
        zero + Duration::from_millis(ms)
    }

    fn expired(timers: &mut Timers, now: Instant) -> usize {
        std::iter::from_fn(|| timers.expire(now)).count()
    }

    #[test]
    fn they_end_in_order_and_never_early() {
        let (mut timers, zero) = (Timers::default(), Instant::now());
        for ms in [30, 10, 20] {
            timers.insert(at(ms, zero), Waker::noop().clone());
        }
        assert_eq!(timers.next(), Some(at(10, zero)));
        assert_eq!(expired(&mut timers, at(9, zero)), 0);
        assert_eq!(expired(&mut timers, at(20, zero)), 2);
        assert_eq!(timers.next(), Some(at(30, zero)));
    }

    #[test]
    fn a_cancelled_one_neither_fires_nor_keeps_its_slot_from_the_next() {
        let (mut timers, zero) = (Timers::default(), Instant::now());
        let key = timers.insert(at(10, zero), Waker::noop().clone());
        timers.cancel(key);
        assert_eq!(timers.insert(at(50, zero), Waker::noop().clone()), key);
        assert_eq!(expired(&mut timers, at(49, zero)), 0);
        assert_eq!(expired(&mut timers, at(50, zero)), 1);
    }

    #[test]
    fn many_cancelled_ones_leave_no_heap_behind() {
        let (mut timers, zero) = (Timers::default(), Instant::now());
        for _ in 0..10_000 {
            let key = timers.insert(at(1000, zero), Waker::noop().clone());
            timers.cancel(key);
        }
        assert!(timers.heap.len() <= SLACK + 1);
        assert_eq!(timers.next(), None);
    }
}
