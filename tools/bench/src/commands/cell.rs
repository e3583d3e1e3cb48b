//! One cell of the comparison: what is asked, what is aimed at, and the interleaved rounds that answer it.

use std::io;
use std::time::Duration;

use trellis_bench::client::load::{self, Moment, Outcome, Pattern, STALL, Wait, Workload};
use trellis_bench::process::{CpuUse, Memory};
use trellis_bench::server::{Program, Server, Threads, export, export_path};
use trellis_bench::storage::Storage;

use super::{Pair, least, median, order};

/// The kinds of disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    Null,
    Shm,
    Real,
    Inline,
}

/// What varies between cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) disk: Disk,
    pub(super) wait: Wait,
    pub(super) queues: usize,
    /// The subject's; the peer's queues always share a thread.
    pub(super) threads: Threads,
    pub(super) depth: u32,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    pub(super) rounds: usize,
    pub(super) duration: Duration,
    pub(super) pattern: Pattern,
    pub(super) block: usize,
    pub(super) seed: u64,
}

/// One visit of the client to one server.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) outcome: Outcome,
    pub(super) cpu: CpuUse,
    pub(super) memory: Memory,
}

/// All rounds of a cell: the subject's samples and the peer's.
#[derive(Clone, Debug)]
pub(super) struct Rounds {
    pub(super) samples: [Vec<Sample>; 2],
}

impl Disk {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Shm => "shm",
            Self::Real => "disk",
            Self::Inline => "inline",
        }
    }
}

impl Cell {
    /// Every cell, those with one queue first, since others are compared with them.
    pub(super) fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for disk in [Disk::Null, Disk::Shm, Disk::Inline, Disk::Real] {
            for wait in [Wait::Sleep, Wait::Spin] {
                for (queues, threads) in [(1, Threads::Shared), (2, Threads::Shared), (2, Threads::Split)] {
                    for depth in [1, 32, 128] {
                        cells.push(Self { disk, wait, queues, threads, depth });
                    }
                }
            }
        }
        cells
    }

    /// A name that a person can type part of.
    pub(super) fn name(&self) -> String {
        let wait = match self.wait {
            Wait::Sleep => "sleep",
            Wait::Spin => "spin",
        };
        let split = if self.threads == Threads::Split { "-split" } else { "" };
        format!("{}-{wait}-q{}{split}-d{}", self.disk.name(), self.queues, self.depth)
    }

    /// The same cell with one queue.
    pub(super) fn with_one_queue(&self) -> Self {
        Self { queues: 1, threads: Threads::Shared, ..*self }
    }

    /// Runs every round of both servers. Every visit has a fresh process, the only one then: what luck a process has with
    /// its threads and processors must not decide a whole cell.
    pub(super) fn run(&self, pair: &Pair, storage: &Storage, effort: Effort) -> io::Result<Rounds> {
        let mut rounds = Rounds { samples: [Vec::new(), Vec::new()] };
        for round in 0..effort.rounds {
            for side in order(round) {
                rounds.samples[side].push(self.visit(&self.start(pair, side, storage)?, effort, round)?);
            }
        }
        Ok(rounds)
    }

    fn start(&self, pair: &Pair, side: usize, storage: &Storage) -> io::Result<Server> {
        let program: &Program = pair.both()[side];
        let threads = if side == 0 && program.maps_queues() { self.threads } else { Threads::Shared };
        Server::start(program, |directory| {
            [threads.objects(), storage.node(), export(directory, "e", "disk", self.queues, threads)].concat()
        })
    }

    fn visit(&self, server: &Server, effort: Effort, round: usize) -> io::Result<Sample> {
        let workload = Workload {
            pattern: effort.pattern,
            wait: self.wait,
            queues: self.queues,
            depth: self.depth,
            block: effort.block,
            seed: effort.seed + round as u64,
            warm_up: effort.duration / 10,
            duration: effort.duration,
        };
        let _watch = server.watch(effort.duration * 2 + STALL * 2);
        let mut samples = Vec::new();
        let outcome = load::run(&export_path(server.directory(), "e"), &workload, |moment: Moment| {
            samples.push((moment, server.cpu()?));
            Ok(())
        })?;
        if outcome.errors > 0 {
            return Err(io::Error::other(format!("{} of {} requests failed", outcome.errors, outcome.ios)));
        }
        let [(Moment::Begin, begin), (Moment::End, end)] = &samples[..] else {
            return Err(io::Error::other("the workload did not sample both ends"));
        };
        Ok(Sample { outcome, cpu: begin.until(end), memory: server.memory()? })
    }
}

impl Sample {
    /// Nanoseconds of server CPU for each request.
    pub(super) fn cpu_ns_per_io(&self) -> f64 {
        self.cpu.process * 1e9 / self.outcome.iops()
    }

    /// Nanoseconds of client CPU for each request: of a sleeping client, how near its own limit was.
    pub(super) fn client_ns_per_io(&self) -> f64 {
        self.cpu.own * 1e9 / self.outcome.iops()
    }
}

impl Rounds {
    /// A figure of server 0 (subject) or 1 (peer), in the median of the rounds.
    pub(super) fn median(&self, side: usize, figure: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples[side].iter().map(figure))
    }

    /// Subject by peer, pair by pair: the median and the least.
    pub(super) fn ratio(&self, figure: impl Fn(&Sample) -> f64) -> (f64, f64) {
        let ratios: Vec<f64> =
            self.samples[0].iter().zip(&self.samples[1]).map(|(a, b)| figure(a) / figure(b)).collect();
        (median(ratios.iter().copied()), least(ratios.iter().copied()))
    }
}

/// What issue 1 of the plan asks of a cell, in median ratios to the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Aims {
    /// IOPS at least this many times the peer's.
    pub(super) iops: Option<f64>,
    /// CPU for each request at most this many times the peer's.
    pub(super) cpu: Option<f64>,
    /// IOPS at least this many times the subject's own with one queue.
    pub(super) own_single: Option<f64>,
}

impl Aims {
    pub(super) fn of(cell: &Cell) -> Self {
        let at_least = |iops| Self { iops: Some(iops), ..Self::default() };
        match (cell.queues, cell.threads, cell.disk, cell.depth, cell.wait) {
            (1, _, Disk::Null, 32, _) => Self { cpu: Some(0.35), ..at_least(2.5) },
            (1, _, Disk::Inline, 32, Wait::Sleep) => Self { cpu: Some(0.6), ..at_least(1.8) },
            (1, _, Disk::Real, _, _) => Self { cpu: Some(0.9), ..at_least(0.95) },
            (1, _, _, 1, _) => at_least(0.95),
            (2, Threads::Shared, ..) => Self { own_single: Some(0.95), ..Self::default() },
            (2, Threads::Split, ..) => at_least(2.0),
            _ => Self::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Aims, Cell};

    #[test]
    fn names_are_unique_and_the_aims_are_those_of_the_plan() {
        let cells = Cell::all();
        let mut names: Vec<String> = cells.iter().map(Cell::name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 72);
        let aim = |name: &str| Aims::of(cells.iter().find(|cell| cell.name() == name).unwrap());
        assert_eq!(aim("null-spin-q1-d32").iops, Some(2.5));
        assert_eq!(aim("inline-sleep-q1-d32").cpu, Some(0.6));
        assert_eq!(aim("inline-spin-q1-d32"), Aims::default());
        assert_eq!(aim("disk-sleep-q1-d1").cpu, Some(0.9));
        assert_eq!(aim("null-sleep-q2-d32").own_single, Some(0.95));
        assert_eq!(aim("null-sleep-q2-split-d32").iops, Some(2.0));
    }
}
