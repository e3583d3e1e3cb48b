//! A throttle group: the limits that its members share, whichever nodes and threads they are. What the group decides is
//! in `line.rs`; here are the lock around it, the clock, and the wait.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::bucket::Direction;
use super::limits::{Limits, Rates};
use super::line::{Lines, MemberId, Place};
use crate::rt::{Local, Sleep};

/// Limits that several nodes share.
#[derive(Debug)]
pub struct ThrottleGroup {
    /// The group's time is counted from here.
    began: Instant,
    /// Which directions have limits: [`READS`], [`WRITES`]. Requests that none is for touch nothing else.
    limited: AtomicU8,
    lines: Mutex<Lines>,
    joined: AtomicU64,
    members: AtomicU64,
}

const READS: u8 = 1;
const WRITES: u8 = 2;

impl ThrottleGroup {
    /// A group that nobody has joined.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            limited: AtomicU8::new(limited(limits)),
            lines: Mutex::new(Lines::new(limits)),
            joined: AtomicU64::new(0),
            members: AtomicU64::new(0),
        })
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.lock().limits()
    }

    /// Other limits, at once, for those who wait too.
    pub fn set_limits(&self, limits: Limits) {
        self.change(|lines, now| lines.set_limits(limits, now));
        self.limited.store(limited(limits), Relaxed);
    }

    /// A node is a member as long as it keeps this.
    pub fn join(self: &Arc<Self>) -> Member {
        self.members.fetch_add(1, Relaxed);
        Member { group: self.clone(), id: self.joined.fetch_add(1, Relaxed) }
    }

    /// A node is a member.
    pub fn is_used(&self) -> bool {
        self.members.load(Relaxed) > 0
    }

    fn change(&self, change: impl FnOnce(&mut Lines, Duration)) {
        let woken = {
            let mut lines = self.lock();
            let now = self.began.elapsed();
            change(&mut lines, now);
            lines.settle(now)
        };
        woken.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // Decisions do not panic half-way: the state is whole.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn limited(limits: Limits) -> u8 {
    let has = |of: fn(&Rates) -> u64| of(&limits.iops) > 0 || of(&limits.bps) > 0;
    let total = has(|rates| rates.total.rate);
    let flag = |limited: bool, flag: u8| if total || limited { flag } else { 0 };
    flag(has(|rates| rates.read.rate), READS) | flag(has(|rates| rates.write.rate), WRITES)
}

/// A node's membership.
#[derive(Debug)]
pub struct Member {
    group: Arc<ThrottleGroup>,
    id: MemberId,
}

impl Member {
    /// Nothing keeps requests of this direction back.
    #[inline]
    pub(super) fn is_free(&self, direction: Direction) -> bool {
        let flag = match direction {
            Direction::Read => READS,
            Direction::Write => WRITES,
        };
        self.group.limited.load(Relaxed) & flag == 0
    }

    /// Waits until the group lets a request of this many bytes pass. One that is dropped before has not passed, and
    /// takes nothing from the others.
    pub(super) async fn admitted(&self, local: &Rc<Local>, direction: Direction, bytes: u64) {
        let mut wait = Wait { member: self, direction, bytes, place: None };
        let mut sleep = None;
        poll_fn(|cx| wait.poll(local, &mut sleep, cx)).await;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.members.fetch_sub(1, Relaxed);
    }
}

/// A request in front of the group.
struct Wait<'m> {
    member: &'m Member,
    direction: Direction,
    bytes: u64,
    /// `None`: it has not asked yet, or it has passed.
    place: Option<Place>,
}

/// What a request sees when it looks.
enum Look {
    Passes,
    /// It is woken, or looks again at this time.
    Waits(Option<Instant>),
}

impl Wait<'_> {
    fn poll(&mut self, local: &Rc<Local>, sleep: &mut Option<Sleep>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let until = match self.look(cx) {
                Look::Passes => return Poll::Ready(()),
                Look::Waits(until) => until,
            };
            if sleep.as_ref().map(Sleep::deadline) != until {
                *sleep = until.map(|until| local.sleep_until(until));
            }
            let Some(alarm) = sleep else { return Poll::Pending };
            if pin!(alarm).poll(cx).is_pending() {
                return Poll::Pending;
            }
            *sleep = None;
        }
    }

    /// Asks, or looks whether the answer has come.
    fn look(&mut self, cx: &Context<'_>) -> Look {
        let group = &self.member.group;
        let (passes, alarm, woken) = {
            let mut lines = group.lock();
            let now = group.began.elapsed();
            if self.place.is_none() && lines.pass(self.direction, self.bytes, now) {
                return Look::Passes;
            }
            let place = *self.place.get_or_insert_with(|| lines.join(self.member.id, self.direction, self.bytes));
            let woken = lines.settle(now);
            (!lines.sleeps(place, cx.waker()), lines.alarm(place), woken)
        };
        woken.into_iter().for_each(Waker::wake);
        if passes {
            self.place = None;
            return Look::Passes;
        }
        Look::Waits(alarm.and_then(|alarm| group.began.checked_add(alarm)))
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.member.group.change(|lines, _| lines.leave(place));
        }
    }
}
