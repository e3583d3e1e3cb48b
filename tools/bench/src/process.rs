//! What the kernel says about a process: its CPU time, its memory, and how busy everybody else was.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::sys::process_cpu;

/// CPU time of a process and of the whole machine at one moment.
#[derive(Clone, Debug)]
pub struct CpuSample {
    at: Instant,
    thread_ns: BTreeMap<String, u64>,
    process: Duration,
    own: Duration,
    machine_ticks: u64,
}

/// What happened between two samples.
#[derive(Clone, Copy, Debug)]
pub struct CpuUse {
    /// CPUs that the process used (1.0 = one CPU all the time).
    pub process: f64,
    /// CPUs that this process, the client, used.
    pub own: f64,
    /// CPUs that neither the process nor this one used, but somebody did. Good to about 1 %.
    pub others: f64,
}

impl CpuSample {
    /// Looks at process `pid` now.
    ///
    /// # Errors
    /// The process is gone, or /proc cannot be read.
    pub fn take(pid: u32) -> io::Result<Self> {
        Ok(Self {
            at: Instant::now(),
            thread_ns: thread_times(pid)?,
            process: process_cpu(pid)?,
            own: process_cpu(std::process::id())?,
            machine_ticks: machine_ticks()?,
        })
    }

    /// What was used from `self` to `later`.
    #[must_use]
    pub fn until(&self, later: &Self) -> CpuUse {
        let seconds = (later.at - self.at).as_secs_f64();
        let process = self.scheduled_to(later).max(later.process.saturating_sub(self.process)).as_secs_f64() / seconds;
        let own = later.own.saturating_sub(self.own).as_secs_f64() / seconds;
        let machine = (later.machine_ticks - self.machine_ticks) as f64 / TICKS_PER_SECOND / seconds;
        CpuUse { process, own, others: (machine - own - process).max(0.0) }
    }

    /// By the threads' schedstat, which forgets those that ended in between; the process's CPU clock does not.
    fn scheduled_to(&self, later: &Self) -> Duration {
        let before = |thread: &String| self.thread_ns.get(thread).copied().unwrap_or(0);
        Duration::from_nanos(later.thread_ns.iter().map(|(thread, ns)| ns.saturating_sub(before(thread))).sum())
    }
}

/// Memory of a process, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Everything resident, the client's shared memory included.
    pub rss_kib: u64,
    /// Resident and its own: heap and stacks.
    pub anon_kib: u64,
}

impl Memory {
    /// Looks at process `pid` now.
    ///
    /// # Errors
    /// The process is gone, or /proc says something unknown.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status"))?)
    }

    fn parse(status: &str) -> io::Result<Self> {
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|rest| rest.split_whitespace().next())
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| io::Error::other(format!("/proc/PID/status has no {name}")))
        };
        Ok(Self { rss_kib: field("VmRSS:")?, anon_kib: field("RssAnon:")? })
    }
}

/// Sleeps. A benchmark waits on the clock; nobody else needs this thread.
#[expect(clippy::disallowed_methods, reason = "no executor here: a client's main thread has nothing else to do")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Asks `ready` every few milliseconds; `false` when `limit` passed first.
///
/// # Errors
/// The first that `ready` answers.
pub fn pause_until(limit: Duration, mut ready: impl FnMut() -> io::Result<bool>) -> io::Result<bool> {
    let end = Instant::now() + limit;
    loop {
        if ready()? {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        pause(Duration::from_millis(5));
    }
}

/// First field of every thread's schedstat: nanoseconds on a CPU.
fn thread_times(pid: u32) -> io::Result<BTreeMap<String, u64>> {
    let mut times = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        // A thread may end between the listing and the look.
        let Ok(text) = fs::read_to_string(entry.path().join("schedstat")) else { continue };
        let on_cpu = text.split_whitespace().next().and_then(|ns| ns.parse().ok());
        let on_cpu = on_cpu.ok_or_else(|| io::Error::other("schedstat does not begin with a number"))?;
        times.insert(entry.file_name().to_string_lossy().into_owned(), on_cpu);
    }
    Ok(times)
}

/// User, nice, system, irq, softirq and steal of the first line of /proc/stat.
fn machine_ticks() -> io::Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let fields: Vec<u64> =
        stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields[..] else {
        return Err(io::Error::other("/proc/stat has fewer fields than known"));
    };
    Ok(user + nice + system + irq + softirq + steal)
}

/// USER_HZ, the same on every Linux that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::{CpuSample, Memory};
    use std::time::{Duration, Instant};

    #[test]
    fn a_busy_process_uses_a_cpu() {
        let before = CpuSample::take(std::process::id()).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            std::hint::spin_loop();
        }
        let used = before.until(&CpuSample::take(std::process::id()).unwrap());
        assert!(used.process > 0.1, "{used:?}");
    }

    #[test]
    fn memory_is_read_by_name_not_by_line() {
        let status = "Name:\tx\nRssAnon:\t  20 kB\nVmRSS:\t  100 kB\n";
        assert_eq!(Memory::parse(status).unwrap(), Memory { rss_kib: 100, anon_kib: 20 });
        assert!(Memory::parse("VmRSS:\t1 kB\n").is_err());
    }
}
