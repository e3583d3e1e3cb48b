//! `snapshots`: fifty overlays are put above a served qcow2 image, one after another, while a client keeps it busy.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use trellis_bench::client::load::{self, Outcome, Pattern, Wait, Workload};
use trellis_bench::process::pause;
use trellis_bench::qmp::Monitor;
use trellis_bench::server::{Program, Server, Threads, export, export_path};

use super::qcow2::Image;
use super::{Pair, median, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Snapshots in a row
    #[arg(long, default_value_t = 50)]
    snapshots: usize,
    /// Milliseconds between one and the next
    #[arg(long, default_value_t = 20)]
    pause: u64,
    /// Leave the peer out
    #[arg(long)]
    subject_only: bool,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    println!("{HEADINGS}");
    let programs = if arguments.subject_only { vec![&pair.subject] } else { pair.both().to_vec() };
    let mut failed = false;
    for program in programs {
        for (name, pattern) in [("randread", Pattern::RandRead), ("randwrite", Pattern::RandWrite)] {
            match measure(program, pattern, arguments) {
                Ok(figures) => println!("{}", figures.line(&program.name(), name)),
                Err(error) => {
                    // The peer may abort or hang here, which is an answer; the subject may not.
                    println!("| {} | {name} | failed: {error} |", program.name());
                    failed |= *program == pair.subject;
                }
            }
        }
    }
    if failed { Err(io::Error::other("the subject failed; the table says how")) } else { Ok(()) }
}

struct Figures {
    /// Milliseconds of each `blockdev-snapshot`, and of the `blockdev-add` before it.
    snapshots_ms: Vec<f64>,
    adds_ms: Vec<f64>,
    outcome: Outcome,
}

impl Figures {
    fn line(&self, server: &str, pattern: &str) -> String {
        let most = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
        let (p50, worst) = (median(self.snapshots_ms.iter().copied()), self.outcome.quantile_us(1.0) / 1000.0);
        format!(
            "| {server} | {pattern} | {} | {p50:.2} | {:.1} | {:.2} | {} | {} | {:.0} | {worst:.1} | errors 0 {}; p50 ≤ 5 ms {}; worst I/O ≤ 50 ms {} |",
            self.snapshots_ms.len(),
            most(&self.snapshots_ms),
            median(self.adds_ms.iter().copied()),
            self.outcome.ios,
            self.outcome.errors,
            self.outcome.quantile_us(0.999),
            verdict(self.outcome.errors == 0),
            verdict(p50 <= 5.0),
            verdict(worst <= 50.0),
        )
    }
}

fn measure(program: &Program, pattern: Pattern, arguments: &Arguments) -> io::Result<Figures> {
    let base = Image::full()?;
    let overlays: Vec<Image> = (0..arguments.snapshots).map(|_| Image::empty(base.size)).collect::<io::Result<_>>()?;
    let server = Server::start(program, |directory| {
        let threads = Threads::Shared;
        [threads.objects(), base.node(), export(directory, "e", "disk", 1, threads)].concat()
    })?;
    let _watch = server.watch(LIMIT);
    let mut monitor = server.monitor(0, LIMIT)?;
    let workload = Workload {
        pattern,
        wait: Wait::Sleep,
        queues: 1,
        depth: 32,
        block: 4096,
        seed: 1,
        warm_up: Duration::from_millis(200),
        duration: MEASURED,
    };
    let (over, between) = (AtomicBool::new(false), Duration::from_millis(arguments.pause));
    thread::scope(|scope| {
        let operator = scope.spawn(|| take(&mut monitor, &overlays, between, &over));
        let outcome = load::run(&export_path(server.directory(), "e"), &workload, |_| Ok(()));
        over.store(true, Ordering::Relaxed);
        let times = operator.join().unwrap_or_else(|_| Err(io::Error::other("the operator's thread panicked")));
        let (snapshots_ms, adds_ms) = times?;
        if snapshots_ms.len() < overlays.len() {
            return Err(io::Error::other(format!("only {} snapshots in {MEASURED:?}", snapshots_ms.len())));
        }
        Ok(Figures { snapshots_ms, adds_ms, outcome: outcome? })
    })
}

/// Milliseconds of each snapshot, and of the node that is added for it.
fn take(
    monitor: &mut Monitor,
    overlays: &[Image],
    between: Duration,
    over: &AtomicBool,
) -> io::Result<(Vec<f64>, Vec<f64>)> {
    pause(Duration::from_millis(300));
    let (mut snapshots, mut adds) = (Vec::new(), Vec::new());
    let mut node = "disk".to_owned();
    for (number, overlay) in overlays.iter().enumerate() {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("overlay{number}");
        let file = json!({ "driver": "file", "filename": overlay.path });
        let options = json!({ "driver": "qcow2", "node-name": name, "file": file, "backing": null });
        adds.push(timed(monitor, "blockdev-add", options)?);
        snapshots.push(timed(monitor, "blockdev-snapshot", json!({ "node": node, "overlay": name }))?);
        node = name;
        pause(between);
    }
    Ok((snapshots, adds))
}

fn timed(monitor: &mut Monitor, command: &str, arguments: serde_json::Value) -> io::Result<f64> {
    let start = Instant::now();
    monitor.run(command, arguments)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// How long the client works.
const MEASURED: Duration = Duration::from_secs(6);
/// For a server that may hang.
const LIMIT: Duration = Duration::from_secs(30);

const HEADINGS: &str = "\
| server | load | snapshots | p50 ms | max ms | add p50 ms | I/Os | errors | p99.9 µs | worst ms | aims |
|---|---|---|---|---|---|---|---|---|---|---|";
