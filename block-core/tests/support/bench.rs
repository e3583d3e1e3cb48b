//! A node as tests use it: added through the catalog, with a port above it, and requests on an I/O thread of its own.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use block_core::base::{ByteRange, IoError, Result};
use block_core::catalog::{self, BlockdevOptions};
use block_core::graph::{Graph, NodeId, PermSet, Perms, ViewPin, WriteFlags};
use block_core::port::{Port, PortHandle, PortLane, PortOptions};
use block_core::rt::sync::{Receiver, oneshot};
use block_core::rt::{IoBuf, IoThread, PollParams};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde_json::{Value, json};

pub(crate) const READER: Perms = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };

/// Uses everything a guest's disk does, and bears what a guest's disk bears.
pub(crate) fn writer() -> Perms {
    Perms {
        uses: PermSet::CONSISTENT_READ | PermSet::WRITE,
        shares: PermSet::ALL.without(PermSet::WRITE | PermSet::RESIZE),
    }
}

pub(crate) fn parsed(options: Value) -> BlockdevOptions {
    qmp::schema::from_value(options).unwrap()
}

/// `blockdev-add`; the error as an operator sees it.
pub(crate) async fn add(graph: &Rc<Graph>, options: Value) -> Result<NodeId, String> {
    let options = qmp::schema::from_value(options).map_err(|error: qmp::Error| error.desc)?;
    catalog::add(&mut graph.permit(), options).await.map_err(|error| error.full())
}

/// `blockdev-reopen`; the error as an operator sees it.
pub(crate) async fn reopen(graph: &Rc<Graph>, options: &[Value]) -> Result<(), String> {
    let options = options.iter().map(|one| parsed(one.clone())).collect();
    catalog::reopen(&mut graph.permit(), options).await.map_err(|error| error.full())
}

pub(crate) async fn attach(graph: &Rc<Graph>, node: NodeId, perms: Perms) -> Result<Port, String> {
    let options = PortOptions { name: "test".into(), perms };
    Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.map_err(|error| error.full())
}

pub(crate) fn io_thread() -> IoThread {
    IoThread::spawn("bench", PollParams::default()).unwrap()
}

/// Runs `work` on the thread, with a lane of its own, and waits for it.
pub(crate) async fn on<T: Send + 'static>(
    thread: &IoThread,
    handle: &PortHandle,
    work: impl AsyncFnOnce(Rc<PortLane>) -> T + Send + 'static,
) -> T {
    started(thread, handle, work).await.expect("the I/O thread got through")
}

/// Starts `work` on the thread, with a lane of its own.
pub(crate) fn started<T: Send + 'static>(
    thread: &IoThread,
    handle: &PortHandle,
    work: impl AsyncFnOnce(Rc<PortLane>) -> T + Send + 'static,
) -> Receiver<T> {
    let (done, result) = oneshot();
    let handle = handle.clone();
    thread.remote().spawn(move |local| async move {
        let value = work(handle.lane(&local)).await;
        let _ = done.send(value);
    });
    result
}

/// Enters as soon as requests are let in.
pub(crate) async fn enter(lane: &PortLane) -> ViewPin {
    loop {
        match lane.try_enter() {
            Some(pin) => return pin,
            None => lane.opened().await,
        }
    }
}

pub(crate) fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// A buffer that no alignment fits.
pub(crate) fn crooked(len: u64) -> IoBuf {
    let len = usize::try_from(len).unwrap();
    IoBuf::alloc(len + 1, 4096).unwrap().slice(1, len as u64)
}

pub(crate) async fn read(lane: &PortLane, at: ByteRange) -> Result<Vec<u8>, IoError> {
    let buf = crooked(at.len());
    buf.fill(0xee);
    lane.read(&enter(lane).await, at, buf.clone()).await?;
    Ok(buf.to_vec())
}

pub(crate) async fn write(lane: &PortLane, start: u64, bytes: &[u8], flags: WriteFlags) -> Result<(), IoError> {
    let at = range(start, bytes.len() as u64);
    let buf = crooked(at.len());
    buf.write_at(0, bytes);
    lane.write(&enter(lane).await, at, buf, flags).await
}

pub(crate) async fn flush(lane: &PortLane) -> Result<(), IoError> {
    lane.flush(&enter(lane).await).await
}

/// A file of `size` bytes of `fill`.
pub(crate) fn image(dir: &Path, name: &str, size: usize, fill: u8) -> String {
    let path = dir.join(name);
    std::fs::write(&path, vec![fill; size]).unwrap();
    path.to_str().unwrap().to_owned()
}

pub(crate) fn file(name: &str, path: &str) -> Value {
    json!({ "driver": "file", "node-name": name, "filename": path })
}

/// The value with more members.
pub(crate) fn with(mut value: Value, more: &Value) -> Value {
    let members = value.as_object_mut().unwrap();
    members.extend(more.as_object().unwrap().clone());
    value
}

/// A loop device, gone with the value. Needs root and the loop module, as the guest tests do.
pub(crate) struct Loop {
    pub(crate) path: String,
}

impl Loop {
    pub(crate) fn over(file: &str) -> Self {
        Self::with_sectors(file, "512")
    }

    /// Its blocks have this many bytes.
    pub(crate) fn with_sectors(file: &str, bytes: &str) -> Self {
        let made = Command::new("losetup").args(["--find", "--show", "--sector-size", bytes, file]).output();
        let made = made.expect("losetup is installed");
        let refused = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "these tests need loop devices and the right to use them: {refused}");
        Self { path: String::from_utf8(made.stdout).unwrap().trim().to_owned() }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.path]).status();
    }
}

/// A block device whose writes fail from a certain moment on: its file is sealed memory.
pub(crate) struct Failing {
    memory: OwnedFd,
    pub(crate) device: Loop,
}

impl Failing {
    pub(crate) fn new() -> Self {
        let memory = memfd_create("disk", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
        let device = Loop::over(&format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()));
        Self { memory, device }
    }

    pub(crate) fn fail(&self) {
        fcntl_add_seals(&self.memory, SealFlags::WRITE).unwrap();
    }
}
