//! `isolation`: a command that waits for a slow chain must not stall another monitor, nor another export.
//!
//! Export A stands on a null node that takes 4 s for a request, and one is in flight. Monitor 1 runs a command on A's chain,
//! most of which have to wait for it; monitor 2 adds and removes unrelated nodes; a client measures export B. Quiet rounds
//! (B alone) and disturbed ones take turns, and so do the servers. All commands that change the graph, one after the other,
//! take half an hour; `--pairs 1 --depths 8 --slow 2 --subject-only` is a look.

mod waiting;

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;
use trellis_bench::client::load::{self, Outcome, Pattern, Wait, Workload};
use trellis_bench::client::{Connection, Request, Shape, wait_any};
use trellis_bench::process::pause;
use trellis_bench::qmp::Monitor;
use trellis_bench::server::{Program, Server, export_path};

use self::waiting::Waiting;
use super::{Pair, median, order, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Pairs of a quiet and a disturbed round
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// The commands on A's chain [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    waiting: Vec<Waiting>,
    /// B's queue depths
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8])]
    depths: Vec<u32>,
    /// Seconds that A's request takes, 1 to 20
    #[arg(long, default_value_t = 4.0, value_parser = slow)]
    slow: f64,
    /// Leave the peer out: it only says how bad it can be
    #[arg(long)]
    subject_only: bool,
}

fn slow(text: &str) -> Result<f64, String> {
    let seconds = text.parse().map_err(|error| format!("{error}"))?;
    if (1.0..=20.0).contains(&seconds) { Ok(seconds) } else { Err("not between 1 and 20".to_owned()) }
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    println!("{} pairs, a request of {} s in flight on A; ours / the peer's\n", arguments.pairs, arguments.slow);
    println!("{HEADINGS}");
    let commands = if arguments.waiting.is_empty() { Waiting::value_variants() } else { &arguments.waiting };
    let mut failed = false;
    for waiting in commands {
        for depth in &arguments.depths {
            let case = Case { waiting: *waiting, depth: *depth, slow: Duration::from_secs_f64(arguments.slow) };
            failed |= !case.measure(pair, arguments);
        }
    }
    if failed { Err(io::Error::other("the subject failed or refused a command; the table says how")) } else { Ok(()) }
}

/// One row.
struct Case {
    waiting: Waiting,
    /// Of B's queue.
    depth: u32,
    /// What a request on A takes.
    slow: Duration,
}

impl Case {
    /// Prints the row; false: the subject failed, or refused the command.
    fn measure(&self, pair: &Pair, arguments: &Arguments) -> bool {
        let programs = if arguments.subject_only { vec![&pair.subject] } else { pair.both().to_vec() };
        let mut sides: Vec<_> = programs.into_iter().map(|program| Side::start(program, self)).collect();
        for number in 0..arguments.pairs {
            for side in order(number) {
                if let Some(side) = sides.get_mut(side) {
                    side.add_pair(self, number);
                }
            }
        }
        let figures: Vec<_> = sides.into_iter().map(Side::figures).collect();
        println!("{}", self.row(&figures));
        figures[0].as_ref().is_ok_and(|subject| subject.refused.is_none())
    }

    fn row(&self, figures: &[io::Result<Figures>]) -> String {
        let cell = |of: &dyn Fn(&Figures) -> String| {
            let sides = figures.iter().map(|side| side.as_ref().map_or("–".to_owned(), of));
            sides.collect::<Vec<_>>().join(" / ")
        };
        let cells = [
            cell(&|side| format!("{:.0}", side.quiet_us)),
            cell(&|side| format!("{:.0}", side.disturbed_us)),
            cell(&|side| format!("{:.0}", side.limit_us)),
            cell(&|side| format!("{:.2}", side.command_p50_ms)),
            cell(&|side| format!("{:.1}", side.command_max_ms)),
            cell(&|side| side.commands.to_string()),
            cell(&Figures::waited),
            figures[0].as_ref().map_or_else(|error| format!("failed: {error}"), |side| self.verdicts(side)),
        ];
        // The peer may abort here, or hang, which is an answer.
        let peer = figures.get(1).and_then(|peer| peer.as_ref().err());
        let peer = peer.map_or_else(String::new, |error| format!("; the peer: {error}").replace('\n', " "));
        format!("| {} | {} | {}{peer} |", self.waiting.name(), self.depth, cells.join(" | "))
    }

    fn verdicts(&self, side: &Figures) -> String {
        let waited = !self.waiting.waits() || side.waited_ms >= self.slow.as_secs_f64() * 500.0;
        format!(
            "B p99.9 {}; p50 ≤ 10 ms {}; max ≤ 100 ms {}{}",
            verdict(side.disturbed_us <= side.limit_us),
            verdict(side.command_p50_ms <= 10.0),
            verdict(side.command_max_ms <= 100.0),
            if waited { "" } else { "; it hardly waited, so this shows nothing: MISS" }
        )
    }

    /// For one answer of a server that may hang.
    fn limit(&self) -> Duration {
        self.slow * 4 + Duration::from_secs(10)
    }

    /// With the warm-up shorter than A's request takes, so that it is in flight all the time.
    fn measured(&self) -> Duration {
        self.slow - Duration::from_millis(500)
    }
}

/// One server, and what it has shown so far.
struct Side {
    server: io::Result<Server>,
    pairs: Vec<(Outcome, Disturbed)>,
}

impl Side {
    fn start(program: &Program, case: &Case) -> Self {
        let server = Server::start(program, |directory| case.waiting.server_arguments(directory, case.slow));
        Self { server, pairs: Vec::new() }
    }

    /// A failure ends it.
    fn add_pair(&mut self, case: &Case, number: usize) {
        let Ok(server) = &self.server else { return };
        let pair = {
            let _watch = server.watch(case.limit() * 2);
            measure_b(server, case, number as u64).and_then(|quiet| Ok((quiet, disturb(server, case, number)?)))
        };
        match pair {
            Ok(pair) => self.pairs.push(pair),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                self.server = Err(io::Error::other(format!("no answer within {} s", case.limit().as_secs())));
            }
            Err(error) => self.server = Err(error),
        }
    }

    fn figures(self) -> io::Result<Figures> {
        self.server?;
        let p999 = |outcome: &Outcome| outcome.quantile_us(0.999);
        let disturbed = median(self.pairs.iter().map(|(_, disturbed)| p999(&disturbed.outcome)));
        let excess = self.pairs.iter().map(|(quiet, disturbed)| {
            let quiet = p999(quiet);
            p999(&disturbed.outcome) - f64::max(1.5 * quiet, quiet + 200.0)
        });
        let commands_ms: Vec<f64> =
            self.pairs.iter().flat_map(|(_, disturbed)| &disturbed.commands_ms).copied().collect();
        Ok(Figures {
            quiet_us: median(self.pairs.iter().map(|(quiet, _)| p999(quiet))),
            disturbed_us: disturbed,
            limit_us: disturbed - median(excess),
            command_max_ms: commands_ms.iter().copied().fold(0.0, f64::max),
            commands: commands_ms.len(),
            command_p50_ms: median(commands_ms),
            waited_ms: median(self.pairs.iter().map(|(_, disturbed)| disturbed.waited_ms)),
            refused: self.pairs.into_iter().find_map(|(_, disturbed)| disturbed.refused),
        })
    }
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
    refused: Option<String>,
}

impl Figures {
    fn waited(&self) -> String {
        let refused = self.refused.as_ref().map_or_else(String::new, |why| format!(" (refused: {why})"));
        format!("{:.0}{refused}", self.waited_ms)
    }
}

struct Disturbed {
    outcome: Outcome,
    commands_ms: Vec<f64>,
    waited_ms: f64,
    /// Why the command on A was refused, if it was.
    refused: Option<String>,
}

fn disturb(server: &Server, case: &Case, number: usize) -> io::Result<Disturbed> {
    let mut slow = Connection::open(&export_path(server.directory(), "a"), SHAPE_A)?;
    let mut first = server.monitor(0, case.limit())?;
    let mut second = server.monitor(1, case.limit())?;
    let begin = Instant::now();
    request_a(&mut slow, case.waiting)?;
    thread::scope(|scope| {
        let waiter = scope.spawn(move || wait_for_a(&mut first, case.waiting, number));
        let changer = scope.spawn(move || change_others(&mut second, begin + WARM_UP + case.measured()));
        let outcome = measure_b(server, case, number as u64);
        // The order lets a failed thread's error win over what it caused elsewhere.
        let (waited_ms, refused) = joined(waiter.join())?;
        let commands_ms = joined(changer.join())?;
        finish_a(&mut slow, case.limit())?;
        Ok(Disturbed { outcome: outcome?, commands_ms, waited_ms, refused })
    })
}

fn measure_b(server: &Server, case: &Case, seed: u64) -> io::Result<Outcome> {
    let workload = Workload {
        pattern: Pattern::RandRead,
        wait: Wait::Sleep,
        queues: 1,
        depth: case.depth,
        block: 4096,
        seed,
        warm_up: WARM_UP,
        duration: case.measured(),
    };
    load::run(&export_path(server.directory(), "b"), &workload, |_| Ok(()))
}

/// Runs the commands on A; answers their milliseconds, and why one was refused.
fn wait_for_a(monitor: &mut Monitor, waiting: Waiting, round: usize) -> io::Result<(f64, Option<String>)> {
    pause(Duration::from_millis(50));
    let start = Instant::now();
    let mut refused = None;
    for (command, arguments) in waiting.commands(round) {
        match monitor.run(command, arguments) {
            Err(error) if error.kind() != io::ErrorKind::Other => return Err(error),
            Err(error) => refused = refused.or(Some(error.to_string())),
            Ok(_) => {}
        }
    }
    Ok((start.elapsed().as_secs_f64() * 1000.0, refused))
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

fn request_a(connection: &mut Connection, waiting: Waiting) -> io::Result<()> {
    for queue in &mut connection.queues {
        let (offset, buffer) = (0, 0..4096);
        let writes = waiting.writes();
        let request = if writes { Request::Write { offset, buffer } } else { Request::Read { offset, buffer } };
        queue.submit(request, 0)?;
        queue.kick()?;
    }
    Ok(())
}

fn finish_a(connection: &mut Connection, limit: Duration) -> io::Result<()> {
    if wait_any(&mut connection.queues, limit)? {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the slow request was never answered"))
}

fn joined<T>(result: thread::Result<io::Result<T>>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::Error::other("a client thread panicked")))
}

const SHAPE_A: Shape = Shape { queues: 1, depth: 1, buffer_len: 4096 };
const WARM_UP: Duration = Duration::from_millis(200);
const HEADINGS: &str = "\
| command on A | B's depth | B p99.9 quiet µs | disturbed µs | limit µs | add/del p50 ms | max ms | commands | command on A ms | aims |
|---|---|---|---|---|---|---|---|---|---|";
