//! The daemon under test: started with a scratch directory of its own, watched through /proc, killed at the end.
//!
//! `TRELLIS_SERVER` names another program to test, for example a `qemu-storage-daemon`; its command line is the same.

use crate::vhost_user::PATIENCE;
use crate::vhost_user::wire::pause;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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

    /// Starts the server and waits until its monitor greets, which it does after everything else stands.
    pub fn start(self) -> Server {
        let monitor = self.path("qmp.sock");
        let chardev = format!("socket,id=monitor,path={},server=on,wait=off", monitor.display());
        let this = self.arg("--chardev", &chardev).arg("--monitor", "chardev=monitor");
        let log = File::create(this.path("stderr.log")).expect("the scratch directory takes files");
        let program = program();
        let child = Command::new(&program)
            .args(&this.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file of ours can be duplicated"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|e| panic!("starting {}: {e}", program.display()));
        let mut server = Server { child, dir: this.dir, monitor: None };
        server.monitor = Some(server.first_monitor(&monitor));
        server
    }
}

/// A running daemon; dropping it kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dir: TempDir,
    monitor: Option<Monitor>,
}

impl Server {
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

    /// The scratch directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the process to end; how it ended, `None` where it still runs after `patience`.
    pub fn ends_within(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let end = Instant::now() + patience;
        while Instant::now() < end {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            pause(Duration::from_millis(5));
        }
        None
    }

    /// Open descriptors.
    pub fn fds(&self) -> usize {
        fs::read_dir(self.proc("fd")).map_or(0, Iterator::count)
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
        fs::read_to_string(self.dir.path().join("stderr.log")).unwrap_or_default()
    }

    /// Runs a QMP command that must succeed, and gives what it returns.
    pub fn qmp(&mut self, command: &str, arguments: &Value) -> Value {
        let reply = self.qmp_raw(&json!({ "execute": command, "arguments": arguments }));
        reply.get("return").unwrap_or_else(|| panic!("{command} failed: {reply}")).clone()
    }

    /// Sends any object to the monitor and gives its reply, whichever kind it is.
    pub fn qmp_raw(&mut self, message: &Value) -> Value {
        self.monitor.as_mut().expect("a started server has a monitor").ask(message)
    }

    fn first_monitor(&mut self, path: &Path) -> Monitor {
        let end = Instant::now() + START;
        loop {
            if let Ok(monitor) = Monitor::connect(path) {
                return monitor;
            }
            assert!(self.alive(), "the server ended at its start");
            assert!(Instant::now() < end, "the server's monitor does not greet within {START:?}");
            pause(Duration::from_millis(5));
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

impl Drop for Server {
    fn drop(&mut self) {
        let status = self.child.try_wait();
        // Both fail only where the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let start = log.char_indices().rev().nth(4000).map_or(0, |(at, _)| at);
            eprintln!("--- server: {status:?}; the end of what it said:\n{}\n---", &log[start..]);
        }
    }
}

/// A monitor connection: one command at a time, events kept for whoever asks.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects, reads the greeting and leaves capability negotiation.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(4 * PATIENCE))?;
        let mut monitor = Self { reader: BufReader::new(stream), events: Vec::new() };
        monitor.next_value()?;
        monitor.try_ask(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    /// Sends `message` and gives its reply.
    pub fn ask(&mut self, message: &Value) -> Value {
        self.try_ask(message).unwrap_or_else(|e| panic!("no reply to {message}: {e}"))
    }

    /// The events that came before the last reply, oldest first.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    fn try_ask(&mut self, message: &Value) -> io::Result<Value> {
        writeln!(self.reader.get_mut(), "{message}")?;
        loop {
            let value = self.next_value()?;
            if value.get("event").is_none() {
                return Ok(value);
            }
            self.events.push(value);
        }
    }

    fn next_value(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}

/// The program under test.
pub(crate) fn program() -> PathBuf {
    let program = std::env::var_os("TRELLIS_SERVER").map_or_else(beside_the_test, PathBuf::from);
    assert!(
        program.is_file(),
        "there is no server to test at {}: build it (`cargo build -p trellisd`) or name another in TRELLIS_SERVER",
        program.display()
    );
    program
}

/// `trellisd` in the target directory that this test was built into (the test itself is in its `deps`).
fn beside_the_test() -> PathBuf {
    let test = std::env::current_exe().expect("Linux knows the running program");
    test.ancestors().nth(2).expect("tests run from TARGET/PROFILE/deps").join("trellisd")
}

/// How long a server may take to stand.
const START: Duration = Duration::from_secs(20);
