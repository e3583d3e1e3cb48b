//! A throttle group: the limits that its members share, whichever nodes and threads they are. What the group decides is
//! in `line.rs`, the lock around it in `turnstile.rs`; here are the clock and the wait.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::bucket::Direction;
use super::limits::{Limits, Rates};
use super::line::MemberId;
use super::turnstile::{Asking, Look, Turnstile};
use crate::rt::{Local, Sleep};

/// Limits that several nodes share.
#[derive(Debug)]
pub struct ThrottleGroup {
    /// The group's time is counted from here.
    began: Instant,
    /// Which directions have limits: [`READS`], [`WRITES`]. Requests that none is for touch nothing else.
    limited: AtomicU8,
    turnstile: Turnstile,
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
            turnstile: Turnstile::new(limits),
            joined: AtomicU64::new(0),
            members: AtomicU64::new(0),
        })
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.turnstile.limits()
    }

    /// Other limits, at once, for those who wait too.
    pub fn set_limits(&self, limits: Limits) {
        self.turnstile.set_limits(limits, || self.now());
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

    fn now(&self) -> Duration {
        self.began.elapsed()
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
        let mut wait = Wait { group: &self.group, asking: Asking::new(self.id, direction, bytes) };
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
    group: &'m ThrottleGroup,
    asking: Asking,
}

impl Wait<'_> {
    fn poll(&mut self, local: &Rc<Local>, sleep: &mut Option<Sleep>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let group = self.group;
            let until = match group.turnstile.look(&mut self.asking, || group.now(), cx.waker()) {
                Look::Passes => return Poll::Ready(()),
                Look::Waits(until) => until.and_then(|until| group.began.checked_add(until)),
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
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.group.turnstile.leave(&mut self.asking, || self.group.now());
    }
}
