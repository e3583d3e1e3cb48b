//! The server under test in a scratch directory of its own, watched through /proc: for tests that look for what it
//! leaves behind.

use crate::qmp::Qmp;
use crate::server::Server;
use crate::vhost_user::wire::pause;
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Collects the command line of a server to come.
#[derive(Debug)]
pub struct Builder {
    dir: TempDir,
    args: Vec<String>,
}

impl Builder {
    /// A path inside the server's scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an empty image of `size` bytes called `name`, and a `file` node `node` on it with `options` added.
    #[must_use]
    pub fn image(self, node: &str, size: u64, options: &str) -> Self {
        let path = self.path(node).with_extension("img");
        let image = File::create(&path).expect("the scratch directory takes files");
        image.set_len(size).expect("an empty image needs no space");
        let options = format!("driver=file,node-name={node},filename={}{options}", path.display());
        self.arg("--blockdev", &options)
    }

    /// Exports `node` as `id` on a socket of that name, with `options` added.
    #[must_use]
    pub fn export(self, id: &str, node: &str, options: &str) -> Self {
        let socket = self.path(id).with_extension("sock");
        let options = format!(
            "type=vhost-user-blk,id={id},node-name={node},addr.type=unix,addr.path={}{options}",
            socket.display()
        );
        self.arg("--export", &options)
    }

    /// Adds an option and its value.
    #[must_use]
    pub fn arg(mut self, option: &str, value: &str) -> Self {
        self.args.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// Starts the server and waits until its control socket answers, which it does after everything else stands.
    pub fn start(self) -> Watched {
        let arguments: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let server = Server::start(self.dir.path(), &arguments);
        let monitor = Mutex::new(server.qmp());
        Watched { server, monitor, dir: self.dir }
    }
}

/// A running server in a scratch directory in memory.
#[derive(Debug)]
pub struct Watched {
    server: Server,
    monitor: Mutex<Qmp>,
    dir: TempDir,
}

impl Watched {
    /// An empty command line, with a scratch directory in memory.
    pub fn builder() -> Builder {
        let dir = tempfile::Builder::new().prefix("trellis-").tempdir_in("/dev/shm");
        Builder { dir: dir.expect("/dev/shm takes directories"), args: Vec::new() }
    }

    /// The socket of export `id`.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.dir.path().join(id).with_extension("sock")
    }

    /// The image behind node `node`, see [`Builder::image`].
    pub fn image(&self, node: &str) -> PathBuf {
        self.dir.path().join(node).with_extension("img")
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Whether the process runs.
    pub fn alive(&mut self) -> bool {
        self.server.ended().is_none()
    }

    /// Open descriptors.
    pub fn fds(&self) -> usize {
        fs::read_dir(self.proc("fd")).map_or(0, Iterator::count)
    }

    /// Threads, those that the kernel works for it with among them.
    pub fn threads(&self) -> usize {
        fs::read_dir(self.proc("task")).map_or(0, Iterator::count)
    }

    /// Mappings of memory files, which is what front-ends share; stacks and heaps are not counted.
    pub fn shared_maps(&self) -> usize {
        let maps = fs::read_to_string(self.proc("maps")).unwrap_or_default();
        maps.lines().filter(|line| line.contains("/memfd:trellis-test")).count()
    }

    /// Anonymous memory in use, KiB.
    pub fn rss_anon_kib(&self) -> u64 {
        self.status_kib("RssAnon:")
    }

    /// Address space in use, KiB.
    pub fn address_space_kib(&self) -> u64 {
        self.status_kib("VmSize:")
    }

    /// Processor time used so far, in ticks of 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(self.proc("stat")).unwrap_or_default();
        // The name in parentheses may hold anything; user and system time are the 12th and 13th word after it.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let words = after_name.split_whitespace();
        words.skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum()
    }

    /// What the server has printed.
    pub fn log(&self) -> String {
        self.server.said()
    }

    /// Runs a QMP command that must succeed, on a connection that stays open, and gives what it returns.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Value {
        self.monitor().execute(command, arguments)
    }

    /// Sends a whole QMP message on the connection that stays open, and gives the whole reply.
    pub fn qmp_raw(&self, message: &Value) -> Value {
        self.monitor().ask(message)
    }

    /// A test that failed on another thread does not keep this one from its own failure.
    fn monitor(&self) -> MutexGuard<'_, Qmp> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scratch directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// How the process ended, if it does so within `limit`.
    pub fn ends_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            let ended = self.server.ended();
            if ended.is_some() || Instant::now() >= end {
                return ended;
            }
            pause(Duration::from_millis(10));
        }
    }

    fn status_kib(&self, name: &str) -> u64 {
        let text = fs::read_to_string(self.proc("status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.pid()))
    }
}
