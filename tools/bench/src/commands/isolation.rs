//! `isolation`: a command that waits for a slow chain must not stall another monitor, nor another export.
//!
//! Export A stands on a null node that takes 4 s for a request, and one is in flight. Monitor 1 runs a command on A's chain,
//! which has to wait for it; monitor 2 adds and removes unrelated nodes; a client measures export B. Quiet rounds (B alone)
//! and disturbed ones take turns.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use trellis_bench::client::load::{self, Outcome, Pattern, Wait, Workload};
use trellis_bench::client::{Connection, Request, Shape, wait_any};
use trellis_bench::process::pause;
use trellis_bench::qmp::Monitor;
use trellis_bench::server::{Program, Server, Threads, export, export_path, option};

use super::{Pair, median, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Pairs of a quiet and a disturbed round
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// The command on A's chain
    #[arg(long, value_enum, default_value = "blockdev-reopen")]
    waiting: Waiting,
    /// Leave the peer out: it only says how bad it can be
    #[arg(long)]
    subject_only: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Waiting {
    BlockdevReopen,
    BlockResize,
    /// A filter is put in below A's node
    InsertFilter,
    /// Another node is put in above A's node; the peer has no such command
    Replace,
    /// The same in a transaction
    Transaction,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    println!(
        "{} pairs, a request of {} s in flight on A, waiting command {}\n",
        arguments.pairs,
        SLOW.as_secs(),
        arguments.waiting.name()
    );
    println!("{HEADINGS}");
    let programs = if arguments.subject_only { vec![&pair.subject] } else { pair.both().to_vec() };
    let mut failed = false;
    for program in programs {
        for depth in [1, 8] {
            match measure(program, depth, arguments) {
                Ok(figures) => println!("{}", figures.line(&program.name(), depth)),
                Err(error) => {
                    // The peer may abort here, which is an answer; the subject may not.
                    println!("| {} | {depth} | failed: {error} |", program.name());
                    failed |= *program == pair.subject;
                }
            }
        }
    }
    if failed { Err(io::Error::other("the subject failed; the table says how")) } else { Ok(()) }
}

/// Medians over the pairs, except the longest, which is over all.
struct Figures {
    quiet_us: f64,
    disturbed_us: f64,
    limit_us: f64,
    command_p50_ms: f64,
    command_max_ms: f64,
    commands: usize,
    waited_ms: f64,
}

struct Disturbed {
    outcome: Outcome,
    commands_ms: Vec<f64>,
    waited_ms: f64,
}

fn measure(program: &Program, depth: u32, arguments: &Arguments) -> io::Result<Figures> {
    let server = Server::start(program, arguments_of_server)?;
    let (mut quiet_us, mut disturbed_us) = (Vec::new(), Vec::new());
    let (mut commands_ms, mut waited_ms) = (Vec::new(), Vec::new());
    for number in 0..arguments.pairs {
        let seed = number as u64;
        let _watch = server.watch(LIMIT * 2);
        quiet_us.push(measure_b(&server, depth, seed)?.quantile_us(0.999));
        let disturbed = disturb(&server, depth, seed, arguments.waiting)?;
        disturbed_us.push(disturbed.outcome.quantile_us(0.999));
        commands_ms.extend(disturbed.commands_ms);
        waited_ms.push(disturbed.waited_ms);
    }
    let limits = quiet_us.iter().map(|quiet| f64::max(1.5 * quiet, quiet + 200.0));
    let excess = disturbed_us.iter().zip(limits).map(|(disturbed, limit)| disturbed - limit);
    let disturbed = median(disturbed_us.iter().copied());
    Ok(Figures {
        quiet_us: median(quiet_us.iter().copied()),
        disturbed_us: disturbed,
        limit_us: disturbed - median(excess),
        command_max_ms: commands_ms.iter().copied().fold(0.0, f64::max),
        commands: commands_ms.len(),
        command_p50_ms: median(commands_ms),
        waited_ms: median(waited_ms),
    })
}

impl Figures {
    fn line(&self, name: &str, depth: u32) -> String {
        let waited = if self.waited_ms < SLOW.as_secs_f64() * 500.0 { " (it hardly waited!)" } else { "" };
        format!(
            "| {name} | {depth} | {:.1} | {:.1} | {:.1} | {:.2} | {:.1} | {} | {:.0}{waited} | B p99.9 {}; p50 ≤ 10 ms {}; max ≤ 100 ms {} |",
            self.quiet_us,
            self.disturbed_us,
            self.limit_us,
            self.command_p50_ms,
            self.command_max_ms,
            self.commands,
            self.waited_ms,
            verdict(self.disturbed_us <= self.limit_us),
            verdict(self.command_p50_ms <= 10.0),
            verdict(self.command_max_ms <= 100.0),
        )
    }
}

fn disturb(server: &Server, depth: u32, seed: u64, waiting: Waiting) -> io::Result<Disturbed> {
    let mut slow = Connection::open(&export_path(server.directory(), "a"), SHAPE_A)?;
    let mut first = server.monitor(0, LIMIT)?;
    let mut second = server.monitor(1, LIMIT)?;
    let begin = Instant::now();
    request_a(&mut slow)?;
    thread::scope(|scope| {
        let waiter = scope.spawn(move || wait_for_a(&mut first, waiting));
        let changer = scope.spawn(move || change_others(&mut second, begin + WARM_UP + MEASURED));
        let outcome = measure_b(server, depth, seed);
        // The order lets a failed thread's error win over what it caused elsewhere.
        let waited_ms = joined(waiter.join())?;
        let commands_ms = joined(changer.join())?;
        finish_a(&mut slow)?;
        Ok(Disturbed { outcome: outcome?, commands_ms, waited_ms })
    })
}

fn measure_b(server: &Server, depth: u32, seed: u64) -> io::Result<Outcome> {
    let workload = Workload {
        pattern: Pattern::RandRead,
        wait: Wait::Sleep,
        queues: 1,
        depth,
        block: 4096,
        seed,
        warm_up: WARM_UP,
        duration: MEASURED,
    };
    load::run(&export_path(server.directory(), "b"), &workload, |_| Ok(()))
}

/// Runs the waiting command and answers its milliseconds. That the peer refuses it at its end does not matter here.
fn wait_for_a(monitor: &mut Monitor, waiting: Waiting) -> io::Result<f64> {
    pause(Duration::from_millis(50));
    let start = Instant::now();
    let (command, arguments) = waiting.command();
    match monitor.run(command, arguments) {
        Err(error) if error.kind() != io::ErrorKind::Other => Err(error),
        Ok(_) | Err(_) => Ok(start.elapsed().as_secs_f64() * 1000.0),
    }
}

/// Adds and removes an unrelated node until `end`; answers each command's milliseconds.
fn change_others(monitor: &mut Monitor, end: Instant) -> io::Result<Vec<f64>> {
    pause(Duration::from_millis(100));
    let mut times = Vec::new();
    while Instant::now() < end {
        let node = json!({ "driver": "null-co", "node-name": "other", "size": 1 << 20 });
        for (command, arguments) in [("blockdev-add", node), ("blockdev-del", json!({ "node-name": "other" }))] {
            let start = Instant::now();
            monitor.run(command, arguments)?;
            times.push(start.elapsed().as_secs_f64() * 1000.0);
        }
        // An operator's script, not a flood that would take B's processor.
        pause(Duration::from_millis(5));
    }
    Ok(times)
}

fn request_a(connection: &mut Connection) -> io::Result<()> {
    for queue in &mut connection.queues {
        queue.submit(Request::Read { offset: 0, buffer: 0..4096 }, 0)?;
        queue.kick()?;
    }
    Ok(())
}

fn finish_a(connection: &mut Connection) -> io::Result<()> {
    if wait_any(&mut connection.queues, LIMIT)? {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the slow request was never answered"))
}

impl Waiting {
    fn name(self) -> &'static str {
        self.command().0
    }

    fn command(self) -> (&'static str, Value) {
        match self {
            Self::BlockdevReopen => {
                let same = json!({ "driver": "raw", "node-name": "a", "file": "slow", "size": SIZE_A });
                ("blockdev-reopen", json!({ "options": [same] }))
            }
            Self::BlockResize => ("block_resize", json!({ "node-name": "a", "size": SIZE_A })),
            Self::InsertFilter => {
                let below = json!({ "driver": "raw", "node-name": "a", "file": "filter", "size": SIZE_A });
                ("blockdev-reopen", json!({ "options": [below] }))
            }
            Self::Replace => ("x-blockdev-replace", replace()),
            Self::Transaction => {
                let action = json!({ "type": "x-blockdev-replace", "data": replace() });
                ("transaction", json!({ "actions": [action] }))
            }
        }
    }
}

/// A's export is led to the node above A's; the second time it is there already, which waits as long.
fn replace() -> Value {
    json!({ "parent-type": "export", "export-id": "a", "new-child": "above" })
}

/// A on `i0`, B on `i1`: what they share is only the control side.
fn arguments_of_server(directory: &Path) -> Vec<String> {
    let latency = SLOW.as_nanos();
    [
        Threads::Split.objects(),
        option("blockdev", &format!("null-co,node-name=slow,size={SIZE_A},latency-ns={latency}")),
        option("blockdev", &format!("raw,node-name=a,file=slow,size={SIZE_A}")),
        option("object", "throttle-group,id=unlimited"),
        option("blockdev", "throttle,node-name=filter,throttle-group=unlimited,file=slow"),
        option("blockdev", "throttle,node-name=above,throttle-group=unlimited,file=a"),
        option("blockdev", "null-co,node-name=b,size=1073741824,read-zeroes=off"),
        export(directory, "a", "a", 1, Threads::Shared),
        export(directory, "b", "b", 1, Threads::Second),
    ]
    .concat()
}

fn joined<T>(result: thread::Result<io::Result<T>>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::Error::other("a client thread panicked")))
}

const SHAPE_A: Shape = Shape { queues: 1, depth: 1, buffer_len: 4096 };
const SIZE_A: u64 = 1 << 30;
/// What a request on A takes.
const SLOW: Duration = Duration::from_secs(4);
const WARM_UP: Duration = Duration::from_millis(200);
/// With the warm-up shorter than `SLOW`, so that the request is in flight all the time.
const MEASURED: Duration = Duration::from_millis(3500);
/// For one answer of a server that may hang.
const LIMIT: Duration = Duration::from_secs(30);

const HEADINGS: &str = "\
| server | B depth | B p99.9 quiet µs | disturbed µs | limit µs | add/del p50 ms | max ms | commands | waiting command ms | aims |
|---|---|---|---|---|---|---|---|---|---|";
