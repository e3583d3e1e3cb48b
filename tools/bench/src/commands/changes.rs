//! `changes`: a filter is put in below an export and taken out again, many times, while a client keeps two queues busy.
//!
//! Both servers do it with `blockdev-reopen`, which leads the `file` of the served node to the filter and back.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};
use trellis_bench::client::load::{self, Outcome, Pattern, Wait, Workload};
use trellis_bench::process::pause;
use trellis_bench::qmp::Monitor;
use trellis_bench::server::{Program, Server, Threads, export, export_path, option};
use trellis_bench::storage::Storage;

use super::{Pair, median, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Insertions and removals, counted together
    #[arg(long, default_value_t = 2000)]
    changes: usize,
    /// Rounds; a server that fails one is not asked again
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Leave the peer out
    #[arg(long)]
    subject_only: bool,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    let storage = Storage::file(Path::new("/dev/shm"), SIZE)?;
    println!("{HEADINGS}");
    let programs = if arguments.subject_only { vec![&pair.subject] } else { pair.both().to_vec() };
    let mut failed = false;
    for program in programs {
        match measure(program, &storage, arguments) {
            Ok(figures) => println!("{}", figures.line(&program.name())),
            Err(error) => {
                // The peer may abort or hang here, which is an answer; the subject may not.
                println!("| {} | failed: {error} |", program.name());
                failed |= *program == pair.subject;
            }
        }
    }
    if failed { Err(io::Error::other("the subject failed; the table says how")) } else { Ok(()) }
}

/// Medians over the rounds; errors are a sum, and the worst request is the worst of all.
struct Figures {
    changes: usize,
    change_p50_ms: f64,
    change_max_ms: f64,
    p999_us: f64,
    worst_us: f64,
    ios: u64,
    errors: u64,
}

fn measure(program: &Program, storage: &Storage, arguments: &Arguments) -> io::Result<Figures> {
    let (mut changes_ms, mut outcomes) = (Vec::new(), Vec::new());
    for round in 0..arguments.rounds {
        let server = Server::start(program, |directory| nodes(directory, storage))?;
        let _watch = server.watch(LIMIT);
        let (times, outcome) = disturb(&server, arguments.changes, round as u64)?;
        changes_ms.extend(times);
        outcomes.push(outcome);
    }
    Ok(Figures {
        changes: changes_ms.len(),
        change_max_ms: changes_ms.iter().copied().fold(0.0, f64::max),
        change_p50_ms: median(changes_ms),
        p999_us: median(outcomes.iter().map(|outcome| outcome.quantile_us(0.999))),
        worst_us: outcomes.iter().map(|outcome| outcome.quantile_us(1.0)).fold(0.0, f64::max),
        ios: outcomes.iter().map(|outcome| outcome.ios).sum(),
        errors: outcomes.iter().map(|outcome| outcome.errors).sum(),
    })
}

impl Figures {
    fn line(&self, name: &str) -> String {
        format!(
            "| {name} | {} | {:.3} | {:.1} | {} | {} | {:.0} | {:.0} | errors 0 {}; worst ≤ 20 ms {}; p99.9 ≤ 5 ms {}; p50 ≤ 1 ms {} |",
            self.changes,
            self.change_p50_ms,
            self.change_max_ms,
            self.ios,
            self.errors,
            self.p999_us,
            self.worst_us,
            verdict(self.errors == 0),
            verdict(self.worst_us <= 20_000.0),
            verdict(self.p999_us <= 5_000.0),
            verdict(self.change_p50_ms <= 1.0),
        )
    }
}

/// Milliseconds of each change, and what the client saw meanwhile.
fn disturb(server: &Server, changes: usize, seed: u64) -> io::Result<(Vec<f64>, Outcome)> {
    let mut monitor = server.monitor(0, LIMIT)?;
    let options = options(&mut monitor)?;
    let workload = Workload {
        pattern: Pattern::RandRead,
        wait: Wait::Sleep,
        queues: 2,
        depth: 32,
        block: 4096,
        seed,
        warm_up: Duration::from_millis(200),
        duration: MEASURED,
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let changer = scope.spawn(|| change(&mut monitor, &options, changes, &over));
        let outcome = load::run(&export_path(server.directory(), "e"), &workload, |_| Ok(()));
        over.store(true, Ordering::Relaxed);
        let times = changer.join().unwrap_or_else(|_| Err(io::Error::other("the operator's thread panicked")))?;
        Ok((times, outcome?))
    })
}

fn change(monitor: &mut Monitor, options: &Value, changes: usize, over: &AtomicBool) -> io::Result<Vec<f64>> {
    pause(Duration::from_millis(300));
    let mut times = Vec::new();
    for number in 0..changes {
        // The filter stays at the end where it was at the start: changes come in pairs.
        if over.load(Ordering::Relaxed) && number.is_multiple_of(2) {
            break;
        }
        let mut reopened = options.clone();
        reopened["file"] = if number.is_multiple_of(2) { "filter".into() } else { "file".into() };
        let start = Instant::now();
        monitor.run("blockdev-reopen", json!({ "options": [reopened] }))?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(times)
}

/// What the served node has to be reopened with, but for its `file`.
fn options(monitor: &mut Monitor) -> io::Result<Value> {
    let nodes = monitor.run("query-named-block-nodes", json!({ "flat": true }))?;
    let disk = nodes.as_array().and_then(|nodes| nodes.iter().find(|node| node["node-name"] == "disk"));
    let direct = disk.ok_or_else(|| io::Error::other("the served node is not listed"))?["cache"]["direct"].clone();
    Ok(json!({ "driver": "raw", "node-name": "disk", "cache": { "direct": direct } }))
}

fn nodes(directory: &Path, storage: &Storage) -> Vec<String> {
    let threads = Threads::Shared;
    [
        threads.objects(),
        storage.node(),
        option("object", "throttle-group,id=unlimited"),
        option("blockdev", "throttle,node-name=filter,throttle-group=unlimited,file=file"),
        export(directory, "e", "disk", 2, threads),
    ]
    .concat()
}

const SIZE: u64 = 256 << 20;
/// How long the client works; changes that are not done by then are not made.
const MEASURED: Duration = Duration::from_secs(6);
/// For a round of a server that may hang.
const LIMIT: Duration = Duration::from_secs(60);

const HEADINGS: &str = "\
| server | changes | change p50 ms | max ms | I/Os | errors | p99.9 µs | worst µs | aims |
|---|---|---|---|---|---|---|---|---|";
