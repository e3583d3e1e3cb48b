//! Where log lines go: to the journal if systemd reads our stderr, else to stderr. What is logged is a filter's matter.
//!
//! Text that others gave us (names, paths) is escaped by the formatter, so that it cannot forge lines or colours.

use std::cell::Cell;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

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
    let filter = filter(traces)?;
    let registry = tracing_subscriber::registry().with(filter);
    let stderr = || tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let target = match target {
        LogTarget::Auto if is_journal() => LogTarget::Journald,
        LogTarget::Auto => LogTarget::Stderr,
        other => other,
    };
    let started = match target {
        LogTarget::Off => return Ok(()),
        LogTarget::Auto | LogTarget::Stderr => {
            registry.with(stderr().with_target(false).with_ansi(std::io::stderr().is_terminal())).try_init()
        }
        LogTarget::Json => registry.with(stderr().json()).try_init(),
        LogTarget::Journald => {
            let journal = tracing_journald::layer().map_err(|error| format!("cannot reach the journal: {error}"))?;
            registry.with(journal.with_syslog_identifier("trellisd".to_owned())).try_init()
        }
    };
    started.map_err(|error| error.to_string())
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

fn filter(traces: &[String]) -> Result<EnvFilter, String> {
    let base = std::env::var("TRELLIS_LOG").unwrap_or_else(|_| DEFAULT_FILTER.to_owned());
    let mut filter = EnvFilter::try_new(&base).map_err(|error| format!("TRELLIS_LOG: {error}"))?;
    for trace in traces {
        let directive = directive(trace)?.parse().map_err(|error| format!("--trace {trace}: {error}"))?;
        filter = filter.add_directive(directive);
    }
    Ok(filter)
}

/// A filter as it was written. What only qemu-storage-daemon's own trace points understand is refused.
fn directive(trace: &str) -> Result<String, String> {
    let word = trace.strip_prefix("enable=").unwrap_or(trace);
    if word.contains(',') || word.starts_with("events=") || word.starts_with("file=") {
        return Err(format!("--trace {trace}: only [enable=]FILTER is understood here"));
    }
    Ok(match word.split_once('*') {
        // QEMU's patterns name trace points; a prefix of a target is the nearest that there is.
        Some(("", "")) => "trace".to_owned(),
        Some((prefix, "")) => format!("{prefix}=trace"),
        _ => word.to_owned(),
    })
}

/// systemd says in `JOURNAL_STREAM` which device and inode its pipe to the journal is; stderr may have been replaced.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

const DEFAULT_FILTER: &str = "info";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_others_patterns_refused() {
        assert_eq!(directive("enable=trellisd=debug").unwrap(), "trellisd=debug");
        assert_eq!(directive("*").unwrap(), "trace");
        assert_eq!(directive("blk_*").unwrap(), "blk_=trace");
        assert!(directive("enable=x,file=y").is_err());
        assert!(filter(&["a=nonsense".to_owned()]).is_err());
        assert!(filter(&["block_core=debug".to_owned()]).is_ok());
    }
}
