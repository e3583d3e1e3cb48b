//! The lock around a group's lines, and how requests wait in front of them. The time is brought along: whose clock it is,
//! and who sleeps by it, is in `group.rs`.
//!
//! `block-core/tests/schedules.rs` explores it; each canary takes one of its wake-ups away.

use std::sync::PoisonError;
use std::task::Waker;
use std::time::Duration;

use super::limits::Limits;
use super::line::{Lines, MemberId, Place};
use crate::base::canary;
use crate::base::shim::{Mutex, MutexGuard};

pub use super::bucket::Direction;

/// See the module's head.
#[derive(Debug)]
pub struct Turnstile(Mutex<Lines>);

/// A request in front of a turnstile.
#[derive(Debug)]
pub struct Asking {
    member: MemberId,
    direction: Direction,
    bytes: u64,
    /// `None`: it has not asked yet, or it has passed.
    place: Option<Place>,
}

impl Asking {
    /// A member's request that has not asked yet.
    pub fn new(member: MemberId, direction: Direction, bytes: u64) -> Self {
        Self { member, direction, bytes, place: None }
    }
}

/// What a request sees when it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It has passed.
    Passes,
    /// It is woken, or looks again at this time.
    Waits(Option<Duration>),
}

impl Turnstile {
    /// Nobody has passed, nobody waits.
    pub fn new(limits: Limits) -> Self {
        Self(Mutex::new(Lines::new(limits)))
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.lock().limits()
    }

    /// Other limits, at once, for those who wait too.
    pub fn set_limits(&self, limits: Limits, now: impl FnOnce() -> Duration) {
        self.change(now, |lines, now| lines.set_limits(limits, now));
    }

    /// Asks, or looks whether the answer has come.
    pub fn look(&self, asking: &mut Asking, now: impl FnOnce() -> Duration, waker: &Waker) -> Look {
        let (passes, alarm, woken) = {
            let mut lines = self.lock();
            let now = now();
            if asking.place.is_none() && lines.pass(asking.direction, asking.bytes, now) {
                return Look::Passes;
            }
            let join = || lines.join(asking.member, asking.direction, asking.bytes);
            let place = *asking.place.get_or_insert_with(join);
            let woken = lines.settle(now);
            (!lines.sleeps(place, waker), lines.alarm(place), woken)
        };
        if !canary("throttle_unheard") {
            woken.into_iter().for_each(Waker::wake);
        }
        if passes {
            asking.place = None;
            return Look::Passes;
        }
        Look::Waits(alarm)
    }

    /// Gives up, if it has not passed: it takes nothing from the others.
    pub fn leave(&self, asking: &mut Asking, now: impl FnOnce() -> Duration) {
        let Some(place) = asking.place.take() else { return };
        if canary("throttle_no_handover") {
            // Where it was the first, nobody looks at the clock any more.
            return self.lock().leave(place);
        }
        self.change(now, |lines, _| lines.leave(place));
    }

    fn change(&self, now: impl FnOnce() -> Duration, change: impl FnOnce(&mut Lines, Duration)) {
        let woken = {
            let mut lines = self.lock();
            let now = now();
            change(&mut lines, now);
            lines.settle(now)
        };
        woken.into_iter().for_each(Waker::wake);
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // Decisions do not panic half-way: the state is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
