//! When to poll before sleeping, and for how long: a learned budget, decided from measured gaps alone. No clock, no ring.
//!
//! Three kinds of waits are learned apart. With nothing in flight we wait for the guest's next request: a poll saves it a
//! kick and us a wake-up. With one operation in flight its latency is all there is, and a wake-up would add to it. With
//! many in flight the device is busy anyway: a poll pays only where it costs less processor than a wake-up (about 1 us of
//! the default limit), and a sleep makes better batches. Where devices are slow on average they are not polled for at all:
//! the time is spent elsewhere; a guest still is, where it is so quick that a poll costs less processor than a sleep.
//!
//! The limit is meant for few requests. A guest that comes with many at a time is worth a longer wait, since one wake-up
//! less is one less for all of them, and two that are quick and sleep in turn pay two for each burst: neither ever finds the
//! other awake. So the limit counts for each eight requests of a burst, up to four times.

/// How an IOThread polls and submits. The defaults are QEMU's; all can be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollParams {
    /// Longest poll before a sleep, in nanoseconds; four times as long after a burst of requests. 0 turns polling off.
    pub poll_max_ns: u64,
    /// Factor by which the budget grows; 0 means 2.
    pub poll_grow: u64,
    /// Divisor by which the budget shrinks; 0 means back to nothing.
    pub poll_shrink: u64,
    /// Ring entries after which a batch is submitted early; 0 means no limit but the ring's.
    pub aio_max_batch: u64,
}

impl Default for PollParams {
    fn default() -> Self {
        Self { poll_max_ns: 32_768, poll_grow: 0, poll_shrink: 0, aio_max_batch: 0 }
    }
}

impl PollParams {
    /// No polling at all: the control thread's.
    pub(super) const OFF: Self = Self { poll_max_ns: 0, poll_grow: 0, poll_shrink: 0, aio_max_batch: 0 };
}

/// What a thread with nothing to do is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// The next request: nothing is in flight.
    Guest,
    /// The completion of one operation.
    One,
    /// Completions, of several operations.
    Many,
}

impl Awaited {
    const COUNT: usize = 3;

    pub(super) fn of(in_flight: usize) -> Self {
        match in_flight {
            0 => Self::Guest,
            1 => Self::One,
            _ => Self::Many,
        }
    }
}

/// The learned state of one thread.
pub(super) struct Polling {
    params: PollParams,
    /// By kind of wait.
    budgets: [Budget; Awaited::COUNT],
    /// Average of the waits for devices, in eighths of nanoseconds; a wait for the guest counts as none.
    device_wait: u64,
    /// Requests since the last wait for the guest that was longer than a cheap poll.
    burst: u32,
}

/// What one kind of wait is allowed now.
#[derive(Clone, Copy)]
struct Limit {
    /// The longest poll, in nanoseconds.
    ns: u64,
    /// Such a poll costs about what a sleep does.
    cheap: bool,
    /// Polls are tried now and then, whatever the gaps look like.
    probes: bool,
}

/// How long to poll, for one kind of wait.
#[derive(Default)]
struct Budget {
    ns: u64,
    /// The last eight polls, a bit each: 1 for one that ended without success.
    misses: u8,
    /// Polls since the history was cleared.
    polls: u8,
    /// Waits to go without a poll.
    pause: u32,
    /// The last such pause: the next one is twice as long.
    last_pause: u32,
    /// Waits since there was a poll, or a probe.
    unpolled: u32,
    /// Probes in a row that found nothing.
    probes: u32,
}

impl Polling {
    pub(super) fn new(params: PollParams) -> Self {
        Self { params, budgets: Default::default(), device_wait: 0, burst: 0 }
    }

    /// New limits: what was learned under the old ones is forgotten.
    pub(super) fn set_params(&mut self, params: PollParams) {
        *self = Self::new(params);
    }

    /// So many requests were taken before the wait that comes now.
    pub(super) fn served(&mut self, requests: u32) {
        self.burst = self.burst.saturating_add(requests);
    }

    /// How long to poll now, in nanoseconds; 0 is "sleep at once". Never above `poll_max_ns`, but for bursts.
    pub(super) fn budget(&self, awaited: Awaited) -> u64 {
        self.budgets[awaited as usize].ns.min(self.limit(awaited).ns)
    }

    fn limit(&self, awaited: Awaited) -> Limit {
        let max = self.params.poll_max_ns;
        let slow = self.device_wait / 8 > max / SLOW_SHARE;
        let ns = match awaited {
            Awaited::Guest if slow => max.min(CHEAP_NS),
            Awaited::Guest => max.saturating_mul(u64::from(self.burst / A_FEW).clamp(1, LONGEST)),
            Awaited::One | Awaited::Many if slow => 0,
            Awaited::One => max / 2,
            Awaited::Many => max / 32,
        };
        Limit { ns, cheap: slow, probes: awaited == Awaited::Guest }
    }

    /// A wait is over. `gap_ns`: from the last work to the event; `polled_ns`: the budget that was used, 0 where none.
    pub(super) fn waited(&mut self, awaited: Awaited, gap_ns: u64, polled_ns: u64) {
        let max = self.params.poll_max_ns;
        let sample = match awaited {
            Awaited::Guest => 0,
            // Cut: one slow flush among fast reads must not turn polling off for long.
            Awaited::One | Awaited::Many => gap_ns.min(2 * max),
        };
        self.device_wait = self.device_wait - self.device_wait / 8 + sample;
        let limit = self.limit(awaited);
        self.budgets[awaited as usize].learn(gap_ns, polled_ns, limit, self.params);
        if awaited == Awaited::Guest && gap_ns > CHEAP_NS {
            self.burst = 0;
        }
    }
}

impl Budget {
    fn learn(&mut self, gap_ns: u64, polled_ns: u64, limit: Limit, params: PollParams) {
        self.pause = self.pause.saturating_sub(1);
        if polled_ns > 0 {
            self.remember(gap_ns > polled_ns);
        }
        if self.misses.count_ones() >= MOSTLY {
            return self.give_up();
        }
        if gap_ns > limit.ns {
            // A cheap poll that misses once among hits has cost little.
            if !limit.cheap || polled_ns == 0 {
                self.shrink(params.poll_shrink);
            }
            if limit.probes && limit.ns > 0 {
                self.probe(limit.ns);
            }
        } else if gap_ns > self.ns && self.pause == 0 {
            self.grow(params.poll_grow, limit.ns);
        }
    }

    fn remember(&mut self, missed: bool) {
        self.misses = self.misses << 1 | u8::from(missed);
        self.unpolled = 0;
        if !missed {
            self.probes = 0;
        }
        self.polls = self.polls.saturating_add(1);
        if self.polls >= 8 && self.misses == 0 {
            self.last_pause = 0;
        }
    }

    /// Mostly in vain: not soon again.
    fn give_up(&mut self) {
        let pause = (self.last_pause * 2).clamp(PAUSE, LONGEST_PAUSE);
        *self = Self { pause, last_pause: pause, probes: self.probes, ..Self::default() };
    }

    /// Has the next wait polled for in spite of what the gaps look like, seldom, and more seldom while that is in vain.
    ///
    /// Of a sleep only its end is seen, and waking a halted processor takes as long as the whole limit: a guest that is
    /// back after 1 us looks slow then, and would for ever, since nobody polls for it.
    fn probe(&mut self, limit: u64) {
        self.unpolled = self.unpolled.saturating_add(1);
        if self.ns > 0 || self.pause > 0 || self.unpolled < PROBE << self.probes.min(LONGEST_PROBE) {
            return;
        }
        self.ns = limit;
        self.probes = self.probes.saturating_add(1);
    }

    fn grow(&mut self, factor: u64, limit: u64) {
        let factor = if factor == 0 { 2 } else { factor };
        let grown = if self.ns == 0 { FIRST_NS.max(limit / 8) } else { self.ns.saturating_mul(factor) };
        self.ns = grown.min(limit);
    }

    fn shrink(&mut self, divisor: u64) {
        self.ns = self.ns.checked_div(divisor).unwrap_or(0);
    }
}

/// Devices that keep us waiting longer than this part of `poll_max_ns` (8 us of the default) on average are slow.
const SLOW_SHARE: u64 = 4;
/// A poll of this length costs about what going to sleep and being woken does.
const CHEAP_NS: u64 = 8_000;
/// So many requests in a row are worth one limit.
const A_FEW: u32 = 8;
/// The most limits: 131 us by default, which is longer than it takes to wake a halted processor in a virtual machine.
const LONGEST: u64 = 4;
/// The first budget, in nanoseconds; an eighth of the limit where that is more, so that it is not given up on the way there.
const FIRST_NS: u64 = 4_000;
/// So many misses among eight polls turn polling off for a while.
const MOSTLY: u32 = 5;
/// The first such while, in waits.
const PAUSE: u32 = 32;
/// The longest.
const LONGEST_PAUSE: u32 = 4096;
/// Waits until the first probe; then twice as many each time.
const PROBE: u32 = 32;
/// So often at the most, until it is every 4096th wait.
const LONGEST_PROBE: u32 = 7;

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a gap as the loop would: polls for the budget, then sleeps. Returns the nanoseconds burnt.
    fn play(polling: &mut Polling, awaited: Awaited, gap_ns: u64) -> u64 {
        let budget = polling.budget(awaited);
        polling.waited(awaited, gap_ns, budget);
        budget.min(gap_ns)
    }

    fn burnt(polling: &mut Polling, waits: &[(Awaited, u64)], rounds: usize) -> u64 {
        (0..rounds).flat_map(|_| waits).map(|(awaited, gap)| play(polling, *awaited, *gap)).sum()
    }

    #[test]
    fn a_quick_guest_is_polled_for() {
        let mut polling = Polling::new(PollParams::default());
        assert_eq!(polling.budget(Awaited::Guest), 0, "nothing is known yet");
        burnt(&mut polling, &[(Awaited::Guest, 10_000)], 4);
        assert!(polling.budget(Awaited::Guest) >= 10_000);
        assert_eq!(play(&mut polling, Awaited::Guest, 10_000), 10_000, "the poll catches it");
    }

    #[test]
    fn the_budget_never_passes_the_limit() {
        for (max, burst) in [(0, 0), (1, 0), (5_000, 0), (32_768, 0), (0, 100), (1, 100), (32_768, 100)] {
            let most = if burst > 0 { LONGEST * max } else { max };
            let mut polling = Polling::new(PollParams { poll_max_ns: max, poll_grow: 1000, ..PollParams::default() });
            for gap in (0..100_000).step_by(777) {
                polling.served(burst);
                play(&mut polling, Awaited::Guest, gap);
                play(&mut polling, Awaited::One, gap / 30);
                play(&mut polling, Awaited::Many, gap / 30);
                for (awaited, most) in [(Awaited::Guest, most), (Awaited::One, max / 2), (Awaited::Many, max / 32)] {
                    assert!(polling.budget(awaited) <= most);
                }
            }
        }
    }

    #[test]
    fn a_guest_that_comes_with_many_is_waited_for_longer() {
        const GAP: u64 = 100_000;
        let caught = |requests| {
            let mut polling = Polling::new(PollParams::default());
            let waits = std::iter::repeat_with(|| {
                polling.served(requests);
                play(&mut polling, Awaited::Guest, GAP)
            });
            waits.take(500).filter(|polled| *polled == GAP).count()
        };
        assert_eq!([0, 1, 31].map(caught), [0; 3]);
        assert!(caught(32) > 400, "{}", caught(32));
    }

    #[test]
    fn a_burst_ends_with_a_wait() {
        let mut polling = Polling::new(PollParams::default());
        polling.served(20);
        play(&mut polling, Awaited::Guest, CHEAP_NS);
        polling.served(20);
        assert_eq!(polling.limit(Awaited::Guest).ns, 4 * 32_768, "the guest came back at once: the same burst");
        play(&mut polling, Awaited::Guest, CHEAP_NS + 1);
        polling.served(15);
        assert_eq!(polling.limit(Awaited::Guest).ns, 32_768);
        polling.served(u32::MAX);
        assert_eq!([Awaited::One, Awaited::Many].map(|awaited| polling.limit(awaited).ns), [16_384, 1024]);
    }

    #[test]
    fn without_polling_nothing_is_counted() {
        let mut polling = Polling::new(PollParams { poll_max_ns: 0, ..PollParams::default() });
        burnt(&mut polling, &[(Awaited::Guest, 10_000)], 10_000);
        let budget = &polling.budgets[Awaited::Guest as usize];
        assert_eq!((budget.unpolled, budget.probes), (0, 0), "counters that nothing resets would overflow");
    }

    #[test]
    fn an_idle_guest_costs_nothing() {
        let mut polling = Polling::new(PollParams::default());
        burnt(&mut polling, &[(Awaited::Guest, 5_000)], 10);
        burnt(&mut polling, &[(Awaited::Guest, 1_000_000)], 1);
        assert_eq!(burnt(&mut polling, &[(Awaited::Guest, 1_000_000)], 30), 0);
        let day_ns = burnt(&mut polling, &[(Awaited::Guest, 1_000_000_000)], 86_400);
        assert!(day_ns > 0 && day_ns < 1_500_000, "{day_ns} ns of a day");
    }

    #[test]
    fn a_quick_guest_is_found_though_waking_us_takes_long() {
        const WAKING: u64 = 40_000;
        for (gap, slow_device) in [(1_000, false), (20_000, false), (1_000, true)] {
            let mut polling = Polling::new(PollParams::default());
            let mut caught = 0;
            for _ in 0..500 {
                if slow_device {
                    play(&mut polling, Awaited::One, 22_000 + WAKING);
                }
                let budget = polling.budget(Awaited::Guest);
                caught += u32::from(gap <= budget);
                polling.waited(Awaited::Guest, if gap <= budget { gap } else { gap + WAKING }, budget);
            }
            assert!(caught > 200, "{caught} of 500 with a gap of {gap} ns");
        }
    }

    #[test]
    fn shrink_divides_where_it_is_given() {
        let mut polling = Polling::new(PollParams { poll_shrink: 2, ..PollParams::default() });
        burnt(&mut polling, &[(Awaited::Guest, 30_000)], 8);
        let before = polling.budget(Awaited::Guest);
        play(&mut polling, Awaited::Guest, 1_000_000);
        assert_eq!(polling.budget(Awaited::Guest), before / 2);
    }

    #[test]
    fn a_slow_device_turns_polling_off() {
        let mut polling = Polling::new(PollParams::default());
        let slow_disk = [(Awaited::One, 22_000), (Awaited::Guest, 20_000)];
        burnt(&mut polling, &slow_disk, 20);
        let tries = burnt(&mut polling, &slow_disk, 1000);
        assert!(tries <= 420_000, "{tries} ns of 42 ms, for a guest that is never back so soon");
        let queue_of_32 = [(Awaited::Many, 7_000)];
        burnt(&mut polling, &queue_of_32, 20);
        assert_eq!(burnt(&mut polling, &queue_of_32, 1000), 0);
    }

    #[test]
    fn a_quick_device_is_polled_for_at_depth_one() {
        let mut polling = Polling::new(PollParams::default());
        let quick = [(Awaited::One, 7_000), (Awaited::Guest, 3_000)];
        burnt(&mut polling, &quick, 20);
        assert_eq!(burnt(&mut polling, &quick, 1), 10_000, "both waits end in a poll");
    }

    #[test]
    fn it_comes_back_when_the_device_is_fast_again() {
        let mut polling = Polling::new(PollParams::default());
        burnt(&mut polling, &[(Awaited::Many, 1_000_000)], 100);
        burnt(&mut polling, &[(Awaited::Guest, 5_000)], 40);
        assert!(polling.budget(Awaited::Guest) >= 5_000);
    }

    #[test]
    fn a_flush_among_fast_reads_costs_few_polls() {
        let mut polling = Polling::new(PollParams::default());
        burnt(&mut polling, &[(Awaited::Guest, 5_000)], 10);
        play(&mut polling, Awaited::One, 2_000_000);
        burnt(&mut polling, &[(Awaited::Guest, 5_000)], 10);
        assert!(polling.budget(Awaited::Guest) >= 5_000);
    }

    #[test]
    fn mostly_missing_is_given_up_for_longer_and_longer() {
        // A budget that does not grow, and gaps just above it: each poll is in vain.
        let mut polling = Polling::new(PollParams { poll_grow: 1, ..PollParams::default() });
        let early = burnt(&mut polling, &[(Awaited::Guest, 6_000)], 100);
        burnt(&mut polling, &[(Awaited::Guest, 6_000)], 10_000);
        let late = burnt(&mut polling, &[(Awaited::Guest, 6_000)], 100);
        assert!(early > 0 && late <= early / 2, "{early} ns, then {late} ns");
        // Gaps that fit bring it back in the end.
        burnt(&mut polling, &[(Awaited::Guest, 3_000)], 5_000);
        assert_eq!(burnt(&mut polling, &[(Awaited::Guest, 3_000)], 100), 300_000);
    }
}
