//! Where log lines go: to the journal if systemd reads our stderr, else to stderr. What is logged is a filter's matter.
//!
//! A `queue` lies between: nothing here waits for whoever reads the log. `journal` makes the journal's datagrams.
//!
//! Text that others gave us (names, paths) is escaped by the formatter, so that it cannot forge lines or colours.

mod journal;
mod queue;

use std::cell::Cell;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Where log lines go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogTarget {
    /// To the journal if stderr is connected to it, else to stderr.
    #[default]
    Auto,
    /// To stderr, for people.
    Stderr,
    /// To stderr, one JSON object a line.
    Json,
    /// To the journal, with fields.
    Journald,
    /// Nowhere.
    Off,
}

impl LogTarget {
    /// Reads the argument of `--log`.
    pub fn from_word(word: &str) -> Result<Self, String> {
        Ok(match word {
            "auto" => Self::Auto,
            "stderr" => Self::Stderr,
            "json" => Self::Json,
            "journald" => Self::Journald,
            "off" => Self::Off,
            _ => return Err("expected auto, stderr, json, journald or off".to_owned()),
        })
    }
}

/// Starts logging. `traces` are the arguments of `-T`; without any, the variable `TRELLIS_LOG` counts, or warnings and
/// notes of our own.
pub fn start(target: LogTarget, traces: &[String]) -> Result<(), String> {
    let (filter, unknown) = filter(traces)?;
    let registry = tracing_subscriber::registry().with(filter);
    let target = match target {
        LogTarget::Auto if is_journal() => LogTarget::Journald,
        LogTarget::Auto => LogTarget::Stderr,
        other => other,
    };
    let started = match target {
        LogTarget::Off => return Ok(()),
        LogTarget::Auto | LogTarget::Stderr => {
            let layer = tracing_subscriber::fmt::layer().with_target(false).with_ansi(std::io::stderr().is_terminal());
            registry.with(layer.with_writer(to_stderr()?)).try_init()
        }
        LogTarget::Json => registry.with(tracing_subscriber::fmt::layer().json().with_writer(to_stderr()?)).try_init(),
        LogTarget::Journald => registry.with(journal::Journal::start()?).try_init(),
    };
    started.map_err(|error| error.to_string())?;
    flush_before_panics();
    for trace in unknown {
        tracing::warn!("-T {trace}: there is no such trace point here, and nothing more is logged for it");
    }
    Ok(())
}

/// Gives whoever reads the log a moment to take what waits for them; before the process ends, or lets go of its stderr.
pub(crate) fn flush() -> bool {
    queue::flush(FLUSH_LIMIT)
}

/// Tells people why we end, behind all that was logged. Where stderr cannot be written, or nobody reads it, it is lost.
pub(crate) fn complain(sentence: &str) {
    if flush() {
        write_all(format!("trellisd: {sentence}\n").as_bytes());
    }
}

fn to_stderr() -> Result<impl Fn() -> queue::Writer, String> {
    let writer = queue::start(write_all).map_err(|error| format!("cannot start the log's thread: {error}"))?;
    Ok(move || writer.clone())
}

/// Past the standard library's lock, which a thread that logs may hold while it waits.
fn write_all(mut line: &[u8]) {
    while !line.is_empty() {
        match rustix::io::write(std::io::stderr(), line) {
            Ok(count) => line = &line[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => wait_for_stderr(),
            Err(_) => return,
        }
    }
}

/// Whoever shares our stderr may have made it non-blocking.
fn wait_for_stderr() {
    let stderr = std::io::stderr();
    let _ = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None);
}

/// What was logged before a broken invariant is worth most.
fn flush_before_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        flush();
        usual(panic);
    }));
}

/// Thins out what others can make us log: true once a second, with the number of times that it was false before.
#[derive(Debug, Default)]
pub(crate) struct Rarely {
    last: Cell<Option<Instant>>,
    skipped: Cell<u64>,
}

impl Rarely {
    /// Whether to log this time, and how often it was not logged since.
    pub(crate) fn now(&self) -> Option<u64> {
        if self.last.get().is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.skipped.set(self.skipped.get() + 1);
            return None;
        }
        self.last.set(Some(Instant::now()));
        Some(self.skipped.take())
    }
}

/// Whether the argument of `-T` is a question.
pub fn asks_for_help(trace: &str) -> bool {
    matches!(word(trace), "help" | "?")
}

/// What is logged, and the traces that name nothing here.
fn filter(traces: &[String]) -> Result<(EnvFilter, Vec<&str>), String> {
    let base = std::env::var("TRELLIS_LOG").unwrap_or_else(|_| DEFAULT_FILTER.to_owned());
    let mut filter = EnvFilter::try_new(renamed(&base)).map_err(|error| format!("TRELLIS_LOG: {error}"))?;
    let mut unknown = Vec::new();
    for trace in traces {
        match directive(trace)? {
            Some(text) => {
                let directive = text.parse().map_err(|error| format!("--trace {trace}: {error}"))?;
                filter = filter.add_directive(directive);
            }
            None => unknown.push(trace.as_str()),
        }
    }
    Ok((filter, unknown))
}

/// A filter as it was written, or none where it is a pattern for trace points that only qemu-storage-daemon has. What would
/// have an effect there that it cannot have here is refused.
fn directive(trace: &str) -> Result<Option<String>, String> {
    let word = word(trace);
    if word.contains(',') || word.starts_with("events=") || word.starts_with("file=") {
        return Err(format!("--trace {trace}: only [enable=]FILTER is understood here"));
    }
    let is_ours = |prefix: &str| ROOTS.iter().any(|root| prefix.starts_with(root));
    Ok(match word.split_once('*') {
        Some(("", "")) => Some("trace".to_owned()),
        // A prefix of a target is the nearest that there is.
        Some((prefix, "")) if is_ours(prefix) => Some(format!("{}=trace", renamed(prefix))),
        Some(_) => None,
        None => Some(renamed(word)),
    })
}

fn word(trace: &str) -> &str {
    trace.strip_prefix("enable=").unwrap_or(trace)
}

/// The program is called `trellisd`, and the library that it is made of `daemon`.
fn renamed(filter: &str) -> String {
    let target = |part: &str| match part.strip_prefix("trellisd") {
        Some(rest) if rest.is_empty() || rest.starts_with([':', '=', '[']) => format!("daemon{rest}"),
        _ => part.to_owned(),
    };
    filter.split(',').map(target).collect::<Vec<_>>().join(",")
}

/// systemd says in `JOURNAL_STREAM` which device and inode its pipe to the journal is; stderr may have been replaced.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

const DEFAULT_FILTER: &str = "info";
/// Where targets begin.
const ROOTS: [&str; 3] = ["trellisd", "daemon", "block_core"];
/// What `-T help` prints.
pub const TRACE_HELP: &str = "\
-T [enable=]FILTER logs more. FILTER is [TARGET=]LEVEL, with LEVEL one of error, warn, info, debug and trace.
A target is a part of the program, and covers all that it consists of:

  trellisd                   the program itself
  trellisd::control          QMP clients
  trellisd::export           exports and their guests
  block_core                 all that moves bytes
  block_core::graph          changes of the block graph
  block_core::pipeline       requests
  block_core::drivers        protocols, formats and filters
  block_core::rt             threads and io_uring
";
/// For a slow reader of the log at the end.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_others_patterns_refused() {
        let read = |trace| directive(trace).unwrap();
        assert_eq!(read("enable=trellisd=debug").as_deref(), Some("daemon=debug"));
        assert_eq!(read("trellisd::control=debug").as_deref(), Some("daemon::control=debug"));
        assert_eq!(read("*").as_deref(), Some("trace"));
        assert_eq!(read("block_core::gr*").as_deref(), Some("block_core::gr=trace"));
        assert_eq!((read("blk_*"), read("blk_*_complete")), (None, None));
        assert!(directive("enable=x,file=y").is_err());
        assert!(filter(&["a=nonsense".to_owned()]).is_err());
        assert!(filter(&["block_core=debug".to_owned()]).is_ok());
    }

    /// A filter by the name of the program has an effect, and the targets that are listed are there.
    #[test]
    fn targets_are_what_the_help_says() {
        assert!(module_path!().starts_with(&renamed("trellisd")));
        let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
        let targets = TRACE_HELP.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
        for target in targets.filter_map(|target| target.split_once("::")) {
            let folder = if target.0 == "trellisd" { "daemon" } else { "block-core" };
            let module = top.join(folder).join("src").join(target.1);
            assert!(module.is_dir(), "{target:?}");
        }
    }
}
