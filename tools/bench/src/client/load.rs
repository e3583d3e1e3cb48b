//! A measured workload: a fixed number of requests in flight for a fixed time, each one timed.
//!
//! A sleeping client has one thread for each queue, as a guest has a CPU for each; a spinning one serves all its queues from
//! one thread, so that it cannot take more than one CPU from the server. Requests are timed once per visit to the ring, not
//! once each: what a visit finds, it found at the same moment.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::{Connection, Queue, Request, Shape, wait_any};

/// What order and direction the requests have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Ascending reads, each queue in its own part of the disk.
    Read,
    /// Ascending writes, each queue in its own part of the disk.
    Write,
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
}

/// How the client learns of answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// On the call eventfd, as a guest does.
    Sleep,
    /// By looking at the used ring without pause; interrupts are off.
    Spin,
}

/// The whole workload. Equal values make equal sequences of offsets.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Order and direction.
    pub pattern: Pattern,
    /// Sleeping or spinning.
    pub wait: Wait,
    /// Queues used.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: u32,
    /// Bytes of each request, a multiple of 512.
    pub block: usize,
    /// Of the random offsets.
    pub seed: u64,
    /// Runs before anything is counted.
    pub warm_up: Duration,
    /// Runs counted.
    pub duration: Duration,
}

/// What was measured between warm-up and end, summed over the queues.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Requests answered.
    pub ios: u64,
    /// Of them, answered with an error.
    pub errors: u64,
    /// How long was measured.
    pub elapsed: Duration,
    /// Notifications sent.
    pub kicks: u64,
    /// Notifications received.
    pub interrupts: u64,
    /// Nanoseconds from submission to the visit that found the answer.
    pub latency: Histogram<u64>,
}

impl Outcome {
    /// Requests per second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.ios as f64 / self.elapsed.as_secs_f64()
    }

    /// Microseconds under which the given share (0 to 1) of the requests stayed.
    #[must_use]
    pub fn quantile_us(&self, share: f64) -> f64 {
        self.latency.value_at_quantile(share) as f64 / 1000.0
    }
}

/// A sample is due: the counted time begins, or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Warm-up is over.
    Begin,
    /// The counted time is over.
    End,
}

/// Attaches to `socket`, runs the workload, and calls `sample` on this thread at both ends of the counted time.
///
/// # Errors
/// Attaching failed, the server stopped answering for [`STALL`], or `sample` failed.
pub fn run(
    socket: &Path,
    workload: &Workload,
    mut sample: impl FnMut(Moment) -> io::Result<()>,
) -> io::Result<Outcome> {
    let shape = Shape { queues: workload.queues, depth: workload.depth, buffer_len: workload.block };
    let connection = Connection::open(socket, shape)?;
    let begin = Instant::now() + workload.warm_up;
    let window = Window { begin, end: begin + workload.duration };
    let blocks = connection.capacity / workload.block as u64;
    if blocks < workload.queues as u64 {
        return Err(io::Error::other("the disk is smaller than one block for each queue"));
    }
    let tallies = thread::scope(|scope| {
        let drivers: Vec<_> = groups(connection.queues, workload.wait)
            .into_iter()
            .map(|queues| scope.spawn(move || Driver::new(queues, *workload, blocks).drive(window)))
            .collect();
        pause_until(window.begin);
        let began = sample(Moment::Begin);
        pause_until(window.end);
        let ended = sample(Moment::End);
        let tallies: io::Result<Vec<Tally>> = drivers.into_iter().map(join).collect();
        began.and(ended).and(tallies)
    })?;
    Ok(sum(&tallies, workload.duration))
}

/// A server that answers nothing for this long has failed.
pub const STALL: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
struct Window {
    begin: Instant,
    end: Instant,
}

struct Tally {
    ios: u64,
    errors: u64,
    kicks: u64,
    interrupts: u64,
    latency: Histogram<u64>,
}

/// Queues served by one thread, and where each request slot stands.
struct Driver {
    queues: Vec<Queue>,
    workload: Workload,
    blocks: u64,
    submitted: Vec<Vec<Instant>>,
    cursors: Vec<u64>,
    random: Random,
    tally: Tally,
}

impl Driver {
    fn new(queues: Vec<Queue>, workload: Workload, blocks: u64) -> Self {
        let first = queues.first().map_or(0, Queue::index) as u64;
        let submitted = queues.iter().map(|_| vec![Instant::now(); workload.depth as usize]).collect();
        let cursors = queues.iter().map(|queue| blocks / workload.queues as u64 * queue.index() as u64).collect();
        let random = Random::new(workload.seed ^ first << 32);
        Self { queues, workload, blocks, submitted, cursors, random, tally: Tally::new() }
    }

    fn drive(mut self, window: Window) -> io::Result<Tally> {
        self.fill()?;
        self.visit_until(window.begin, false)?;
        let before = self.notifications()?;
        self.visit_until(window.end, true)?;
        let after = self.notifications()?;
        self.tally.kicks = after.0 - before.0;
        self.tally.interrupts = after.1 - before.1;
        self.finish()?;
        Ok(self.tally)
    }

    fn fill(&mut self) -> io::Result<()> {
        let now = Instant::now();
        for queue in 0..self.queues.len() {
            for slot in 0..self.workload.depth {
                self.submit(queue, slot, now)?;
            }
            self.queues[queue].kick()?;
        }
        Ok(())
    }

    /// Keeps every slot busy until `end`.
    fn visit_until(&mut self, end: Instant, counted: bool) -> io::Result<()> {
        let mut answers = Vec::with_capacity(self.workload.depth as usize);
        let mut silent_since = Instant::now();
        let mut visits = 0_u64;
        loop {
            self.await_answers()?;
            let mut found = 0;
            for queue in 0..self.queues.len() {
                answers.clear();
                self.queues[queue].reap(&mut answers);
                if answers.is_empty() {
                    continue;
                }
                found += answers.len() as u64;
                let now = Instant::now();
                for &(slot, status) in &answers {
                    if counted {
                        self.tally.count(now - self.submitted[queue][slot as usize], status);
                    }
                    self.submit(queue, slot, now)?;
                }
                self.queues[queue].kick()?;
            }
            visits += 1;
            if found == 0 && !visits.is_multiple_of(VISITS_PER_CLOCK) && self.workload.wait == Wait::Spin {
                std::hint::spin_loop();
                continue;
            }
            let now = Instant::now();
            if found > 0 {
                silent_since = now;
            }
            if now >= end {
                return Ok(());
            }
            if now - silent_since > STALL {
                return Err(stalled());
            }
        }
    }

    fn await_answers(&mut self) -> io::Result<()> {
        match self.workload.wait {
            Wait::Spin => Ok(()),
            Wait::Sleep if wait_any(&mut self.queues, STALL)? => Ok(()),
            Wait::Sleep => Err(stalled()),
        }
    }

    /// Takes the last answers without sending more, so that the server is idle when we leave.
    fn finish(&mut self) -> io::Result<()> {
        let mut pending = self.queues.len() * self.workload.depth as usize;
        let mut answers = Vec::new();
        while pending > 0 {
            if !wait_any(&mut self.queues, STALL)? {
                return Err(stalled());
            }
            self.queues.iter_mut().for_each(|queue| queue.reap(&mut answers));
            pending -= answers.len();
            answers.clear();
        }
        Ok(())
    }

    fn submit(&mut self, queue: usize, slot: u32, now: Instant) -> io::Result<()> {
        let block = self.workload.block;
        let offset = self.next_block(queue) * block as u64;
        let start = slot as usize * block;
        let buffer = start..start + block;
        let request = match self.workload.pattern {
            Pattern::Read | Pattern::RandRead => Request::Read { offset, buffer },
            Pattern::Write | Pattern::RandWrite => Request::Write { offset, buffer },
        };
        self.submitted[queue][slot as usize] = now;
        self.queues[queue].submit(request, slot)
    }

    fn next_block(&mut self, queue: usize) -> u64 {
        match self.workload.pattern {
            Pattern::RandRead | Pattern::RandWrite => self.random.below(self.blocks),
            Pattern::Read | Pattern::Write => {
                let block = self.cursors[queue];
                self.cursors[queue] = (block + 1) % self.blocks;
                block
            }
        }
    }

    fn notifications(&mut self) -> io::Result<(u64, u64)> {
        let mut sums = (0, 0);
        for queue in &mut self.queues {
            sums.0 += queue.kicks();
            sums.1 += queue.interrupts()?;
        }
        Ok(sums)
    }
}

impl Tally {
    fn new() -> Self {
        Self { ios: 0, errors: 0, kicks: 0, interrupts: 0, latency: empty_histogram() }
    }

    fn count(&mut self, took: Duration, status: i32) {
        self.ios += 1;
        self.errors += u64::from(status != 0);
        self.latency.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// A small generator with a seed (SplitMix64): equal seeds, equal workloads.
#[derive(Clone, Copy, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts the sequence that belongs to `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number from 0 to `bound - 1`. Panics for a bound of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below 0");
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ mixed >> 31) % bound
    }
}

fn groups(queues: Vec<Queue>, wait: Wait) -> Vec<Vec<Queue>> {
    match wait {
        Wait::Sleep => queues.into_iter().map(|queue| vec![queue]).collect(),
        Wait::Spin => vec![queues],
    }
}

fn sum(tallies: &[Tally], elapsed: Duration) -> Outcome {
    let mut outcome = Outcome { ios: 0, errors: 0, elapsed, kicks: 0, interrupts: 0, latency: empty_histogram() };
    for tally in tallies {
        outcome.ios += tally.ios;
        outcome.errors += tally.errors;
        outcome.kicks += tally.kicks;
        outcome.interrupts += tally.interrupts;
        // Both histograms have the same bounds, so nothing can fall outside.
        outcome.latency += &tally.latency;
    }
    outcome
}

fn empty_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("constant bounds are valid")
}

fn join(driver: thread::ScopedJoinHandle<'_, io::Result<Tally>>) -> io::Result<Tally> {
    driver.join().unwrap_or_else(|_| Err(io::Error::other("a client thread panicked")))
}

fn stalled() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer for {} s", STALL.as_secs()))
}

fn pause_until(moment: Instant) {
    crate::process::pause(moment.saturating_duration_since(Instant::now()));
}

/// A spinning client looks at the clock this seldom while it finds nothing: the look costs more than the visit.
const VISITS_PER_CLOCK: u64 = 16;

/// Longer latencies count as this long (one minute).
const LONGEST_NS: u64 = 60_000_000_000;

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn equal_seeds_make_equal_workloads_and_different_ones_do_not() {
        let draw = |seed| -> Vec<u64> {
            let mut random = Random::new(seed);
            (0..8).map(|_| random.below(1000)).collect()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert!(draw(9).iter().all(|&n| n < 1000));
    }
}
