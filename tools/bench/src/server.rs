//! A server under supervision: started in a directory of its own, waited for, watched, and killed in any case.
//!
//! Takes any program with the command line of `qemu-storage-daemon`. The nodes and exports are the caller's arguments; the
//! monitors are ours.

use std::fs::{self, File};
use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use crate::process::{CpuSample, Memory, pause_until};
use crate::qmp::Monitor;

/// A program that can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    path: PathBuf,
}

impl Program {
    /// The program at `path`, or found in `PATH` where it is a bare name.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its file name, for tables.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// Whether an export takes `iothread-vq-mapping`, which is our extension: QEMU's export has one iothread.
    #[must_use]
    pub fn maps_queues(&self) -> bool {
        self.name() != "qemu-storage-daemon"
    }

    /// First line of what it answers to `--version`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn version(&self) -> io::Result<String> {
        let output = Command::new(&self.path).arg("--version").output().map_err(|error| self.cannot_start(&error))?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("(no version)").to_owned())
    }

    fn cannot_start(&self, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("cannot start the server {}: {error}", self.path.display()))
    }
}

/// A running server. Dropping it kills the process and removes its directory.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
    name: String,
}

impl Server {
    /// Starts the program with two monitors and what `arguments` adds, and waits until it answers QMP.
    ///
    /// `arguments` is given the scratch directory, for socket paths.
    ///
    /// # Errors
    /// It does not start, ends, or says nothing within [`START_LIMIT`]; with its stderr.
    pub fn start(program: &Program, arguments: impl FnOnce(&Path) -> Vec<String>) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("trellis-bench-").tempdir()?;
        let log = File::create(directory.path().join("stderr"))?;
        let child = Command::new(&program.path)
            .args(arguments(directory.path()))
            .args(monitor_arguments(directory.path()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|error| program.cannot_start(&error))?;
        let mut server = Self { child, directory, name: program.name() };
        server.wait_until_ready()?;
        Ok(server)
    }

    /// Opens a session on monitor 0 or 1; each takes one session at a time. No answer may take longer than `limit`.
    ///
    /// # Errors
    /// The server's.
    pub fn monitor(&self, number: usize, limit: Duration) -> io::Result<Monitor> {
        Monitor::connect(&monitor_path(self.directory.path(), number), limit)
    }

    /// The scratch directory, where [`export_path`] puts the sockets.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time now.
    ///
    /// # Errors
    /// The server has ended.
    pub fn cpu(&self) -> io::Result<CpuSample> {
        CpuSample::take(self.pid())
    }

    /// Memory now.
    ///
    /// # Errors
    /// The server has ended.
    pub fn memory(&self) -> io::Result<Memory> {
        Memory::of(self.pid())
    }

    /// Kills the server if the answer is not dropped within `limit`: then a client that waits for an answer sees its
    /// socket closed. This is the time limit of everything that has none.
    #[must_use]
    pub fn watch(&self, limit: Duration) -> Watch<'_> {
        let pid = self.pid();
        let (stop, stopped) = mpsc::channel::<()>();
        let watcher = thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            if stopped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("killing the server {pid}: nothing was done within {} s", limit.as_secs());
                crate::sys::kill(pid);
            }
        });
        Watch { stop: Some(stop), watcher: watcher.ok(), _server: PhantomData }
    }

    /// Ends the server through `quit`; kills it where that takes longer than [`STOP_LIMIT`].
    ///
    /// # Errors
    /// It had to be killed, or did not end with 0; with its stderr.
    pub fn quit(mut self) -> io::Result<()> {
        // The answer may be lost: the server may be gone before it is read.
        let _ = self.monitor(0, STOP_LIMIT).and_then(|mut monitor| monitor.run("quit", json!({})));
        let child = &mut self.child;
        if !pause_until(STOP_LIMIT, || Ok(child.try_wait()?.is_some()))? {
            return Err(self.failure("did not end after quit"));
        }
        match self.child.wait()? {
            status if status.success() => Ok(()),
            status => Err(self.failure(&format!("ended with {status}"))),
        }
    }

    fn wait_until_ready(&mut self) -> io::Result<()> {
        let path = monitor_path(self.directory.path(), 0);
        let child = &mut self.child;
        let mut ended = None;
        let ready = pause_until(START_LIMIT, || {
            ended = child.try_wait()?;
            Ok(ended.is_some() || Monitor::connect(&path, START_LIMIT).is_ok())
        })?;
        match (ready, ended) {
            (true, None) => Ok(()),
            (_, Some(status)) => Err(self.failure(&format!("ended at start with {status}"))),
            (false, None) => Err(self.failure("does not answer QMP")),
        }
    }

    fn failure(&self, what: &str) -> io::Error {
        let stderr = fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default();
        io::Error::other(format!("{} {what}: {}", self.name, stderr.trim()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended is fine too.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A limit on the time until this is dropped; see [`Server::watch`]. Borrows the server, so that the process id cannot be
/// given to another process meanwhile.
#[derive(Debug)]
pub struct Watch<'a> {
    stop: Option<mpsc::Sender<()>>,
    watcher: Option<thread::JoinHandle<()>>,
    _server: PhantomData<&'a Server>,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(watcher) = self.watcher.take() {
            // A panicked watcher has nothing left to tell.
            let _ = watcher.join();
        }
    }
}

/// The queues of an export and the threads that serve them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// As the server likes it.
    Default,
    /// Every queue on the iothread `i0`.
    Shared,
    /// Every queue on the iothread `i1`, beside another export on `i0`.
    Second,
    /// Queue 0 on `i0`, queue 1 on `i1` (our extension).
    Split,
}

impl Threads {
    /// `--object` arguments that make the iothreads.
    #[must_use]
    pub fn objects(self) -> Vec<String> {
        let names: &[&str] = match self {
            Self::Default => &[],
            Self::Shared => &["i0"],
            Self::Second => &["i1"],
            Self::Split => &["i0", "i1"],
        };
        names.iter().flat_map(|name| option("object", &format!("iothread,id={name}"))).collect()
    }

    fn keys(self) -> &'static str {
        match self {
            Self::Default => "",
            Self::Shared => ",iothread=i0",
            Self::Second => ",iothread=i1",
            Self::Split => concat!(
                ",iothread-vq-mapping.0.iothread=i0,iothread-vq-mapping.0.vqs.0=0",
                ",iothread-vq-mapping.1.iothread=i1,iothread-vq-mapping.1.vqs.0=1"
            ),
        }
    }
}

/// `--export` of `node` as a vhost-user-blk device that listens at [`export_path`].
#[must_use]
pub fn export(directory: &Path, id: &str, node: &str, queues: usize, threads: Threads) -> Vec<String> {
    let path = export_path(directory, id);
    let value = format!(
        "vhost-user-blk,id={id},node-name={node},addr.type=unix,addr.path={},writable=on,num-queues={queues}{}",
        path.display(),
        threads.keys()
    );
    option("export", &value)
}

/// Where the export `id` of a server with this scratch directory listens.
#[must_use]
pub fn export_path(directory: &Path, id: &str) -> PathBuf {
    directory.join(format!("{id}.sock"))
}

/// `--name value` as two arguments.
#[must_use]
pub fn option(name: &str, value: &str) -> Vec<String> {
    vec![format!("--{name}"), value.to_owned()]
}

fn monitor_arguments(directory: &Path) -> Vec<String> {
    let monitor = |number: usize| {
        let path = monitor_path(directory, number);
        let chardev = format!("socket,id=q{number},path={},server=on,wait=off", path.display());
        [option("chardev", &chardev), option("monitor", &format!("chardev=q{number}"))].concat()
    };
    [monitor(0), monitor(1)].concat()
}

fn monitor_path(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("qmp{number}.sock"))
}

/// How long a server may take from its start to its first QMP answer.
pub const START_LIMIT: Duration = Duration::from_secs(10);

/// How long a server may take to end.
pub const STOP_LIMIT: Duration = Duration::from_secs(10);
