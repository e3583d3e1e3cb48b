//! The arithmetic of throttling: leaky buckets. The time is brought along; nothing here waits.
//!
//! A request may pass as soon as no bucket is over-full, and then fills all that it counts in, whatever its size. So a
//! request that is larger than a bucket passes too, and those after it wait for what it spilled.

use std::time::Duration;

use super::limits::{Limits, Rate, Rates};

/// Which limits a request counts in, besides the total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }

    fn of(self, rates: Rates) -> Rate {
        match self {
            Self::Read => rates.read,
            Self::Write => rates.write,
        }
    }
}

/// What has passed, against what may.
#[derive(Debug)]
pub(super) struct Meter {
    limits: Limits,
    iops: Buckets,
    bps: Buckets,
    /// Up to when the buckets have leaked.
    leaked: Duration,
}

impl Meter {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, iops: Buckets::default(), bps: Buckets::default(), leaked: Duration::ZERO }
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// Other limits from `now` on. What has passed before counts as far as the new buckets hold it: a change neither
    /// gives everybody a new burst nor lets anybody pay for what was allowed before.
    pub(super) fn set_limits(&mut self, limits: Limits, now: Duration) {
        self.leak(now);
        self.limits = limits;
        self.iops.cut(limits.iops);
        self.bps.cut(limits.bps);
    }

    /// Lets time pass, up to `now`. A clock that stands still or is read out of order lets none pass.
    pub(super) fn leak(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.leaked);
        self.leaked = self.leaked.max(now);
        self.iops.leak(self.limits.iops, passed);
        self.bps.leak(self.limits.bps, passed);
    }

    /// How long the next request of this direction has to wait.
    pub(super) fn wait(&self, direction: Direction) -> Duration {
        self.iops.wait(self.limits.iops, direction).max(self.bps.wait(self.limits.bps, direction))
    }

    /// A request of this many bytes passes.
    pub(super) fn pass(&mut self, direction: Direction, bytes: u64) {
        let requests = match self.limits.iops_size {
            size if size > 0 && bytes > size => u128::from(bytes) * UNIT / u128::from(size),
            _ => UNIT,
        };
        self.iops.fill(direction, requests);
        self.bps.fill(direction, u128::from(bytes) * UNIT);
    }
}

/// Parts of a unit that are counted: with nanoseconds as the clock, a rate leaks whole numbers of them.
const UNIT: u128 = 1_000_000_000;

#[derive(Debug, Default)]
struct Buckets {
    total: Bucket,
    read: Bucket,
    write: Bucket,
}

impl Buckets {
    fn leak(&mut self, rates: Rates, passed: Duration) {
        self.total.leak(rates.total, passed);
        self.read.leak(rates.read, passed);
        self.write.leak(rates.write, passed);
    }

    fn cut(&mut self, rates: Rates) {
        self.total.cut(rates.total);
        self.read.cut(rates.read);
        self.write.cut(rates.write);
    }

    fn wait(&self, rates: Rates, direction: Direction) -> Duration {
        let own = match direction {
            Direction::Read => &self.read,
            Direction::Write => &self.write,
        };
        self.total.wait(rates.total).max(own.wait(direction.of(rates)))
    }

    fn fill(&mut self, direction: Direction, parts: u128) {
        let own = match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        };
        own.fill(parts);
        self.total.fill(parts);
    }
}

/// How full, in parts of units.
#[derive(Debug, Default)]
struct Bucket {
    /// Leaks at the rate, holds what a burst may let through.
    level: u128,
    /// Leaks at the rate of a burst that lasts longer than a second.
    burst_level: u128,
}

impl Bucket {
    /// Where nothing is limited everything leaks at once, so that a limit that comes later starts with an empty bucket.
    fn leak(&mut self, rate: Rate, passed: Duration) {
        let left = |level: u128, rate: u64| match rate {
            0 => 0,
            rate => level.saturating_sub(passed.as_nanos().saturating_mul(u128::from(rate))),
        };
        self.level = left(self.level, rate.rate);
        self.burst_level = left(self.burst_level, rate.burst);
    }

    fn cut(&mut self, rate: Rate) {
        self.level = self.level.min(capacity(rate));
        self.burst_level = self.burst_level.min(tenth(rate.burst));
    }

    fn wait(&self, rate: Rate) -> Duration {
        let lasting = until(self.level, capacity(rate), rate.rate);
        if rate.burst_seconds == 1 {
            return lasting;
        }
        lasting.max(until(self.burst_level, tenth(rate.burst), rate.burst))
    }

    fn fill(&mut self, parts: u128) {
        self.level = self.level.saturating_add(parts);
        self.burst_level = self.burst_level.saturating_add(parts);
    }
}

/// What fits: a whole burst; where there are none, what passes in a tenth of a second.
fn capacity(rate: Rate) -> u128 {
    match rate.burst {
        0 => tenth(rate.rate),
        burst => u128::from(burst) * u128::from(rate.burst_seconds) * UNIT,
    }
}

fn tenth(rate: u64) -> u128 {
    u128::from(rate) * UNIT / 10
}

/// When a level will have come down to what fits.
fn until(level: u128, fits: u128, rate: u64) -> Duration {
    if rate == 0 {
        return Duration::ZERO;
    }
    let nanos = level.saturating_sub(fits).div_ceil(u128::from(rate));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iops(total: Rate) -> Meter {
        Meter::new(Limits { iops: Rates { total, ..Rates::default() }, ..Limits::default() })
    }

    /// How many requests of `bytes` pass in `time`, if there is always one that wants to.
    fn passed(meter: &mut Meter, bytes: u64, from: Duration, time: Duration) -> u64 {
        let (mut now, mut count) = (from, 0);
        loop {
            meter.leak(now);
            now += meter.wait(Direction::Read);
            if now > from + time {
                return count;
            }
            meter.leak(now);
            assert_eq!(meter.wait(Direction::Read), Duration::ZERO, "the wait was long enough");
            meter.pass(Direction::Read, bytes);
            count += 1;
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_rate_is_kept_exactly() {
        for rate in [1, 7, 100, 1234] {
            let mut meter = iops(Rate { rate, ..Rate::default() });
            let count = passed(&mut meter, 4096, Duration::ZERO, 100 * SECOND);
            // What fits the bucket comes at once, and one more.
            let most = 100 * rate + rate / 10 + 1;
            assert!((most - 1..=most).contains(&count), "{count} of {most}");
        }
    }

    #[test]
    fn a_burst_comes_at_once_and_once() {
        let mut meter = iops(Rate { rate: 100, burst: 500, burst_seconds: 1 });
        assert_eq!(passed(&mut meter, 512, Duration::ZERO, Duration::ZERO), 501);
        assert_eq!(passed(&mut meter, 512, Duration::ZERO, 10 * SECOND), 1000);
        // After a pause it is there again.
        assert_eq!(passed(&mut meter, 512, 100 * SECOND, Duration::ZERO), 501);
    }

    #[test]
    fn a_long_burst_keeps_its_own_rate() {
        let mut meter = iops(Rate { rate: 100, burst: 1000, burst_seconds: 10 });
        let first = passed(&mut meter, 512, Duration::ZERO, 5 * SECOND);
        assert!((5000..=5101).contains(&first), "{first} in the burst");
        passed(&mut meter, 512, 5 * SECOND, 15 * SECOND);
        let later = passed(&mut meter, 512, 20 * SECOND, 10 * SECOND);
        assert!((999..=1001).contains(&later), "{later} after it");
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_paid_for() {
        let bps = Rates { total: Rate { rate: 1000, ..Rate::default() }, ..Rates::default() };
        let mut meter = Meter::new(Limits { bps, ..Limits::default() });
        meter.pass(Direction::Write, 1 << 20);
        assert_eq!(meter.wait(Direction::Read), Duration::from_millis((1 << 20) - 100));
    }

    #[test]
    fn a_large_request_counts_as_several() {
        let read = Rate { rate: 10, ..Rate::default() };
        let iops = Rates { read, ..Rates::default() };
        let mut meter = Meter::new(Limits { iops, iops_size: 4096, ..Limits::default() });
        meter.pass(Direction::Read, 512);
        assert_eq!(meter.wait(Direction::Read), Duration::ZERO);
        meter.pass(Direction::Read, 6144);
        assert_eq!(meter.wait(Direction::Read), Duration::from_millis(150));
        assert_eq!(meter.wait(Direction::Write), Duration::ZERO, "writes have no limit");
    }

    #[test]
    fn other_limits_give_no_new_burst_and_leave_no_debt() {
        let mut meter = iops(Rate { rate: 1_000_000, ..Rate::default() });
        passed(&mut meter, 512, Duration::ZERO, SECOND);
        let slow = Limits {
            iops: Rates { total: Rate { rate: 10, ..Rate::default() }, ..Rates::default() },
            ..Limits::default()
        };
        meter.set_limits(slow, SECOND);
        assert_eq!(meter.wait(Direction::Read), Duration::ZERO);
        meter.pass(Direction::Read, 512);
        assert_eq!(meter.wait(Direction::Read), Duration::from_millis(100));
        meter.set_limits(Limits::default(), SECOND);
        assert_eq!(meter.wait(Direction::Read), Duration::ZERO);
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let most = 1_000_000_000_000_000;
        for rate in [
            Rate { rate: most, burst: most, burst_seconds: 1 },
            Rate { rate: 1, burst: 1, burst_seconds: u32::MAX },
            Rate { rate: 1, burst: most / u64::from(u32::MAX), burst_seconds: u32::MAX },
            Rate { rate: 1, ..Rate::default() },
        ] {
            let mut meter = iops(rate);
            meter.limits.bps = meter.limits.iops;
            meter.limits.iops_size = 1;
            meter.pass(Direction::Write, 1 << 63);
            assert!(meter.wait(Direction::Write) > Duration::from_secs(3600));
            meter.leak(Duration::MAX);
            assert_eq!(meter.wait(Direction::Write), Duration::ZERO);
            meter.leak(Duration::ZERO);
        }
    }
}
