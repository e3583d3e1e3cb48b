//! Who waits for a throttle group's buckets, and who is next. State and decisions only: the time is brought along, and
//! wakers are given back to be woken outside the lock.
//!
//! Each direction has a line. In it members take turns, request by request; inside a member, first come is first served.
//! Where both directions may go on they take turns too. Only the first of a line has to look at the clock: it is told
//! until when, and whoever changes that answer to an earlier time, or makes somebody else the first, wakes it.

use std::collections::{BTreeMap, VecDeque};
use std::task::Waker;
use std::time::Duration;

use super::bucket::{Direction, Meter};
use super::limits::Limits;

/// A user of a group: a throttle node.
pub(super) type MemberId = u64;

/// A request's place in its line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    direction: Direction,
    at: Key,
}

/// The member, and the number of the request among all.
type Key = (MemberId, u64);

/// The lines in front of the buckets.
#[derive(Debug)]
pub(super) struct Lines {
    meter: Meter,
    reads: Line,
    writes: Line,
    /// Whose turn it is if both directions may go on.
    turn: Direction,
    joined: u64,
}

#[derive(Debug, Default)]
struct Line {
    waiting: BTreeMap<Key, Waiter>,
    /// The members that have requests here, in the order of their turns.
    turns: VecDeque<MemberId>,
    /// Who has last been told to look at the clock, and until when it may sleep.
    told: Option<(Key, Duration)>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    /// `None`: it is awake, and is going to look.
    waker: Option<Waker>,
}

impl Lines {
    pub(super) fn new(limits: Limits) -> Self {
        let (reads, writes) = (Line::default(), Line::default());
        Self { meter: Meter::new(limits), reads, writes, turn: Direction::Read, joined: 0 }
    }

    pub(super) fn limits(&self) -> Limits {
        self.meter.limits()
    }

    pub(super) fn set_limits(&mut self, limits: Limits, now: Duration) {
        self.meter.set_limits(limits, now);
    }

    /// Lets a request pass if nobody waits and nothing keeps it back.
    pub(super) fn pass(&mut self, direction: Direction, bytes: u64, now: Duration) -> bool {
        if !self.reads.turns.is_empty() || !self.writes.turns.is_empty() {
            return false;
        }
        self.meter.leak(now);
        let passes = self.meter.wait(direction).is_zero();
        if passes {
            self.meter.pass(direction, bytes);
        }
        passes
    }

    /// A place for a request that looks next.
    pub(super) fn join(&mut self, member: MemberId, direction: Direction, bytes: u64) -> Place {
        let at = (member, self.joined);
        self.joined += 1;
        self.line(direction).add(at, Waiter { bytes, waker: None });
        Place { direction, at }
    }

    /// The request is still in its line; until it is woken it is going to sleep.
    pub(super) fn sleeps(&mut self, place: Place, waker: &Waker) -> bool {
        let waiter = self.line(place.direction).waiting.get_mut(&place.at);
        waiter.map(|waiter| waiter.waker = Some(waker.clone())).is_some()
    }

    /// When the request has to look again by itself; `None`: it is woken when there is something to see.
    pub(super) fn alarm(&self, place: Place) -> Option<Duration> {
        let line = match place.direction {
            Direction::Read => &self.reads,
            Direction::Write => &self.writes,
        };
        line.told.filter(|(who, _)| *who == place.at).map(|(_, until)| until)
    }

    /// The request gives up its place, if it still has one.
    pub(super) fn leave(&mut self, place: Place) {
        self.line(place.direction).remove(place.at);
    }

    /// Lets go all who may go by now, and sees to it that the first of each line knows how long it has to wait. To be
    /// called after every other change; who is given back is to be woken.
    pub(super) fn settle(&mut self, now: Duration) -> Vec<Waker> {
        self.meter.leak(now);
        let mut woken = Vec::new();
        while let Some(direction) = self.may_go() {
            let waiter = self.line(direction).take_first();
            self.meter.pass(direction, waiter.bytes);
            self.turn = direction.other();
            woken.extend(waiter.waker);
        }
        for direction in [Direction::Read, Direction::Write] {
            let until = now.saturating_add(self.meter.wait(direction));
            woken.extend(self.line(direction).tell_first(until));
        }
        woken
    }

    /// Which direction's first may go on.
    fn may_go(&self) -> Option<Direction> {
        [self.turn, self.turn.other()].into_iter().find(|direction| {
            let line = match direction {
                Direction::Read => &self.reads,
                Direction::Write => &self.writes,
            };
            !line.turns.is_empty() && self.meter.wait(*direction).is_zero()
        })
    }

    fn line(&mut self, direction: Direction) -> &mut Line {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }
}

impl Line {
    fn add(&mut self, at: Key, waiter: Waiter) {
        if !self.has(at.0) {
            self.turns.push_back(at.0);
        }
        self.waiting.insert(at, waiter);
    }

    fn remove(&mut self, at: Key) {
        if self.waiting.remove(&at).is_some() && !self.has(at.0) {
            self.turns.retain(|member| *member != at.0);
        }
    }

    /// Takes out who is next; its member's turn comes again after all others'.
    fn take_first(&mut self) -> Waiter {
        let at = self.first().expect("somebody is in a line that may go on");
        let waiter = self.waiting.remove(&at).expect("the first of a line is in it");
        self.turns.pop_front();
        if self.has(at.0) {
            self.turns.push_back(at.0);
        }
        waiter
    }

    /// Wakes the first, unless it knows already, or will look before that.
    fn tell_first(&mut self, until: Duration) -> Option<Waker> {
        let first = self.first();
        let told = std::mem::replace(&mut self.told, first.map(|first| (first, until)));
        let knows = told.is_some_and(|(who, sleeps)| Some(who) == first && sleeps <= until);
        if knows { None } else { self.waiting.get_mut(&first?)?.waker.take() }
    }

    fn first(&self) -> Option<Key> {
        self.of(*self.turns.front()?)
    }

    fn has(&self, member: MemberId) -> bool {
        self.of(member).is_some()
    }

    /// The member's oldest request here.
    fn of(&self, member: MemberId) -> Option<Key> {
        self.waiting.range((member, 0)..=(member, u64::MAX)).next().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{Rate, Rates};
    use super::*;
    use Direction::{Read, Write};

    fn ten_a_second() -> Limits {
        Limits { iops: Rates { total: Rate { rate: 10, ..Rate::default() }, ..Rates::default() }, ..Limits::default() }
    }

    /// Lines whose bucket is full at 0.
    fn full() -> Lines {
        let mut lines = Lines::new(ten_a_second());
        while lines.pass(Read, 512, Duration::ZERO) {}
        lines
    }

    fn wants(lines: &mut Lines, member: MemberId, direction: Direction) -> Place {
        let place = lines.join(member, direction, 512);
        assert!(lines.sleeps(place, Waker::noop()));
        place
    }

    fn waits(lines: &mut Lines, place: Place) -> bool {
        lines.sleeps(place, Waker::noop())
    }

    /// Who goes, in this order, in `count` tenths of a second.
    fn gone(lines: &mut Lines, places: &[Place], count: u32) -> Vec<usize> {
        let mut gone = Vec::new();
        for tenth in 1..=count {
            let now = Duration::from_millis(100) * tenth;
            let before: Vec<_> = places.iter().map(|place| waits(lines, *place)).collect();
            lines.settle(now);
            let left = (0..places.len()).filter(|at| before[*at] && !waits(lines, places[*at]));
            gone.extend(left.collect::<Vec<_>>());
        }
        gone
    }

    #[test]
    fn members_take_turns_and_each_keeps_its_order() {
        let mut lines = full();
        let places: Vec<_> = [1, 1, 1, 2, 2, 3].map(|member| wants(&mut lines, member, Read)).into();
        assert_eq!(gone(&mut lines, &places, 7), [0, 3, 5, 1, 4, 2]);
    }

    #[test]
    fn directions_take_turns_whichever_looks_first() {
        let mut lines = full();
        let places: Vec<_> = [Write, Write, Write, Read, Read].map(|direction| wants(&mut lines, 1, direction)).into();
        assert_eq!(gone(&mut lines, &places, 5), [3, 0, 4, 1, 2]);
    }

    #[test]
    fn a_limit_of_reads_keeps_no_write_waiting() {
        let rates = Rates { read: Rate { rate: 10, ..Rate::default() }, ..Rates::default() };
        let mut lines = Lines::new(Limits { iops: rates, ..Limits::default() });
        while lines.pass(Read, 512, Duration::ZERO) {}
        let read = wants(&mut lines, 1, Read);
        let write = wants(&mut lines, 1, Write);
        lines.settle(Duration::ZERO);
        assert!(waits(&mut lines, read) && !waits(&mut lines, write));
    }

    #[test]
    fn only_the_first_looks_at_the_clock_and_the_next_is_woken_when_it_leaves() {
        let mut lines = full();
        let (first, second) = (wants(&mut lines, 1, Read), wants(&mut lines, 1, Read));
        assert_eq!(lines.settle(Duration::ZERO).len(), 1);
        assert_eq!(lines.alarm(first), Some(Duration::from_millis(100)));
        assert_eq!(lines.alarm(second), None);
        waits(&mut lines, first);
        assert!(lines.settle(Duration::from_millis(50)).is_empty(), "it knows already");
        lines.leave(first);
        assert_eq!(lines.settle(Duration::from_millis(50)).len(), 1);
        assert_eq!(lines.alarm(second), Some(Duration::from_millis(100)));
    }

    #[test]
    fn other_limits_wake_who_has_to_wait_for_less() {
        let mut lines = full();
        let places = [wants(&mut lines, 1, Read), wants(&mut lines, 2, Read)];
        lines.settle(Duration::ZERO);
        waits(&mut lines, places[0]);
        let mut faster = ten_a_second();
        faster.iops.total.rate = 20;
        lines.set_limits(faster, Duration::ZERO);
        assert_eq!(
            lines.settle(Duration::ZERO).len(),
            2,
            "the first fits the larger bucket, the second is the first now"
        );
        assert!(!waits(&mut lines, places[0]));
        lines.set_limits(Limits::default(), Duration::ZERO);
        lines.settle(Duration::ZERO);
        assert!(!waits(&mut lines, places[1]));
        assert!(lines.pass(Read, 512, Duration::ZERO));
    }

    #[test]
    fn nobody_overtakes_those_who_wait() {
        let mut lines = full();
        let place = wants(&mut lines, 1, Read);
        assert!(!lines.pass(Read, 512, Duration::from_secs(9)));
        lines.leave(place);
        assert!(lines.pass(Read, 512, Duration::from_secs(9)));
    }
}
