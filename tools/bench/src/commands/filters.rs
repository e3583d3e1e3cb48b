//! `filters`: what a chain of filters that have nothing to do costs a request.
//!
//! Each server serves the bare node and the chain in turn: throttle without limits, copy-on-read over a node that has all
//! its data, blkdebug without rules, and raw, on raw on a file in `/dev/shm`. What counts is the CPU time that the chain
//! adds.

use std::io;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use trellis_bench::client::load::{self, Moment, Pattern, STALL, Wait, Workload};
use trellis_bench::process::CpuUse;
use trellis_bench::server::{Program, Server, Threads, export, export_path, option};
use trellis_bench::storage::Storage;

use super::{Pair, median, order, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Rounds of each server with and without the chain
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each visit
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    let storage = Storage::file(Path::new("/dev/shm"), SIZE)?;
    println!("{HEADINGS}");
    for (name, pattern) in [("randread", Pattern::RandRead), ("randwrite", Pattern::RandWrite)] {
        let [subject, peer] = measure(pair, &storage, pattern, arguments)?;
        let share = subject.added_ns / subject.bare_ns;
        println!("{}", subject.line(&pair.subject.name(), name));
        println!("{}", peer.line(&pair.peer.name(), name));
        println!(
            "| | {name} | | | | | ≤ 25 % above the bare node {}; less than the peer adds {} |",
            verdict(share <= 0.25),
            verdict(subject.added_ns < peer.added_ns)
        );
    }
    Ok(())
}

/// Medians over the rounds.
struct Figures {
    bare_ns: f64,
    chain_ns: f64,
    added_ns: f64,
    iops: f64,
}

impl Figures {
    fn line(&self, server: &str, pattern: &str) -> String {
        let share = 100.0 * self.added_ns / self.bare_ns;
        format!(
            "| {server} | {pattern} | {:.0} | {:.0} | {:.0} ({share:.0} %) | {:.2} | |",
            self.bare_ns, self.chain_ns, self.added_ns, self.iops
        )
    }
}

/// CPU nanoseconds of the server for each request, and requests a second.
type Visit = (f64, f64);

fn measure(pair: &Pair, storage: &Storage, pattern: Pattern, arguments: &Arguments) -> io::Result<[Figures; 2]> {
    let mut visits: [Vec<[Visit; 2]>; 2] = Default::default();
    for round in 0..arguments.rounds {
        for side in order(round) {
            let program = pair.both()[side];
            let visit = |node| visit_node(program, storage, node, pattern, arguments.seconds, round as u64);
            // Which of the two comes first alternates with the round too.
            let both = if round.is_multiple_of(2) {
                [visit("disk")?, visit("top")?]
            } else {
                let chain = visit("top")?;
                [visit("disk")?, chain]
            };
            visits[side].push(both);
        }
    }
    Ok(visits.map(|rounds| {
        let figure = |of: fn(&[Visit; 2]) -> f64| median(rounds.iter().map(of));
        Figures {
            bare_ns: figure(|[bare, _]| bare.0),
            chain_ns: figure(|[_, chain]| chain.0),
            added_ns: figure(|[bare, chain]| chain.0 - bare.0),
            iops: figure(|[bare, chain]| chain.1 / bare.1),
        }
    }))
}

fn visit_node(
    program: &Program,
    storage: &Storage,
    node: &str,
    pattern: Pattern,
    seconds: f64,
    seed: u64,
) -> io::Result<Visit> {
    let server = Server::start(program, |directory| {
        let threads = Threads::Shared;
        [threads.objects(), storage.node(), chain(), export(directory, "e", node, 1, threads)].concat()
    })?;
    let duration = Duration::from_secs_f64(seconds);
    let _watch = server.watch(duration * 2 + STALL * 2);
    let (wait, warm_up) = (Wait::Sleep, duration / 10);
    let workload = Workload { pattern, wait, queues: 1, depth: 32, block: 4096, seed, warm_up, duration };
    let mut samples = Vec::new();
    let outcome = load::run(&export_path(server.directory(), "e"), &workload, |_: Moment| {
        samples.push(server.cpu()?);
        Ok(())
    })?;
    if outcome.errors > 0 {
        return Err(io::Error::other(format!("{} of {} requests failed", outcome.errors, outcome.ios)));
    }
    let [begin, end] = &samples[..] else { return Err(io::Error::other("the workload did not sample both ends")) };
    let used: CpuUse = begin.until(end);
    Ok((used.process * 1e9 / outcome.iops(), outcome.iops()))
}

/// The filters, on top of the node `disk`.
fn chain() -> Vec<String> {
    [
        option("object", "throttle-group,id=unlimited"),
        option("blockdev", "raw,node-name=raw,file=disk"),
        option("blockdev", "blkdebug,node-name=debug,image=raw"),
        option("blockdev", "copy-on-read,node-name=cor,file=debug"),
        option("blockdev", "throttle,node-name=top,throttle-group=unlimited,file=cor"),
    ]
    .concat()
}

const SIZE: u64 = 256 << 20;

const HEADINGS: &str = "\
| server | pattern | bare CPU ns/IO | chain CPU ns/IO | added (share) | IOPS ratio | aims |
|---|---|---|---|---|---|---|";
