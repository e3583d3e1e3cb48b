//! "Fault at every N": a scenario runs again and again, each time with another call failing, until none is left to fail.
//!
//! A [`Subject`] is a way of having a disk; a scenario (`scenarios.rs`, or a test's own) is a function over a [`Scene`],
//! whose steps never panic: they tell the [`Model`] how they ended. After each run the disk has to hold what the model
//! allows, the errors must have been reported where the fault could not be made good, and nothing may be left over: no
//! node, no descriptor, no lock; and a clean open has to work. A test file declares `allowed`, `bench` and this.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block_core::base::{ByteRange, IoError};
use block_core::codec::SecretBytes;
use block_core::codec::secret::{Encoding, Secret};
use block_core::drivers::filter::throttle::{Limits, ThrottleGroup, ThrottleLimits};
use block_core::graph::{Extent, Graph, NodeId, NodeReport, PermSet, Perms, Place, Preallocation, WriteFlags};
use block_core::port::{Port, PortHandle, PortLane};
use block_core::rt::fault::{Fault, Faults, Plan, Site};
use block_core::rt::{IoThread, run_control};
use nix::fcntl::{FcntlArg, fcntl};
use serde_json::Value;
use tempfile::TempDir;

use crate::allowed::{Model, SECTOR, Work};
use crate::bench::{self, add, attach, enter, io_thread, on, range, with};

/// Bytes of the disk at the beginning of each scenario.
pub const SIZE: u64 = 64 << 10;

/// A way of having a disk.
pub struct Subject {
    /// How messages call it.
    pub name: String,
    /// A folder for its files.
    pub dir: TempDir,
    /// Makes the files anew: an empty disk of [`SIZE`] bytes.
    pub prepare: Box<dyn Fn(&Path)>,
    /// What `blockdev-add` is given. The node is called `subject`.
    pub options: Value,
    /// Nodes to stand between that one and its user, which no catalog has.
    pub above: Option<Above>,
    /// `block_resize` works.
    pub resizes: bool,
    /// Tables are kept in memory: what no flush made stable may be lost with a flush that failed, and a write of a table is
    /// made again before anybody has to know that it failed.
    pub buffers: bool,
    /// What failed once there is made good by copies elsewhere.
    pub heals: fn(&[Site]) -> bool,
    /// Its blocks: a short transfer that is no multiple of them fails, rather than being continued.
    pub block: u64,
    /// Looks at the files of a disk that is closed; an error says what is wrong (`qemu-img check`).
    pub check: fn(&Path) -> Result<(), String>,
}

/// Puts nodes above the one that the options make; gives them, top first. Where one cannot be made it leaves none.
pub type Above =
    Box<dyn for<'g> Fn(&'g Rc<Graph>, NodeId) -> Pin<Box<dyn Future<Output = Result<Vec<NodeId>, String>> + 'g>>>;

/// The faults that are tried, each at every call.
pub const PLANS: [(Fault, bool); 10] = [
    (Fault::Errno(libc::EIO), false),
    (Fault::Errno(libc::EIO), true),
    (Fault::Errno(libc::ENOSPC), false),
    (Fault::Errno(libc::ENOSPC), true),
    (Fault::Errno(libc::EOPNOTSUPP), false),
    (Fault::Errno(libc::EOPNOTSUPP), true),
    (Fault::Errno(libc::EINTR), false),
    (Fault::Errno(libc::EAGAIN), false),
    (Fault::Short, false),
    (Fault::Short, true),
];

/// Runs the scenario with each fault at each call; gives how many faults there were, or what is wrong.
pub fn at_every_call(subject: &Subject, scenario: impl AsyncFn(&mut Scene<'_>)) -> Result<u64, String> {
    with_plans(subject, &PLANS, scenario)
}

/// The same with some of the faults.
pub fn with_plans(
    subject: &Subject,
    plans: &[(Fault, bool)],
    scenario: impl AsyncFn(&mut Scene<'_>),
) -> Result<u64, String> {
    let faults = Faults::default();
    let _entered = faults.enter();
    let thread = io_thread();
    let mut points = 0;
    for (fault, lasting) in plans.iter().copied() {
        for nth in 1.. {
            assert!(nth < 10_000, "{}: the scenario does not come to an end", subject.name);
            let plan = Plan { nth, fault, lasting };
            let struck = run_control(async |_| Scene::run(subject, &faults, plan, &thread, &scenario).await);
            match struck {
                Ok(0) => break,
                Ok(_) => points += 1,
                Err(wrong) => return Err(format!("{}, {plan:?}: {wrong}", subject.name)),
            }
        }
    }
    Ok(points)
}

/// A disk while a scenario runs.
pub struct Scene<'a> {
    /// Where the disk is.
    pub graph: Rc<Graph>,
    /// What it may hold.
    pub model: Model,
    subject: &'a Subject,
    faults: &'a Faults,
    plan: Plan,
    thread: &'a IoThread,
    /// The nodes, top first, and their user.
    open: Option<(Vec<NodeId>, Port)>,
    struck: Vec<Site>,
    /// What the disk may have grown to besides, in bytes.
    sizes: Vec<u64>,
    /// Steps that said that they failed.
    failed: Vec<String>,
    /// What should not be.
    wrong: Vec<String>,
}

impl<'a> Scene<'a> {
    async fn run(
        subject: &'a Subject,
        faults: &'a Faults,
        plan: Plan,
        thread: &'a IoThread,
        scenario: &impl AsyncFn(&mut Scene<'_>),
    ) -> Result<usize, String> {
        (subject.prepare)(subject.dir.path());
        let model = Model::new(plan.nth, SIZE);
        let mut scene = Self {
            graph: graph(),
            model,
            subject,
            faults,
            plan,
            thread,
            open: None,
            struck: Vec::new(),
            sizes: Vec::new(),
            failed: Vec::new(),
            wrong: Vec::new(),
        };
        scene.open().await;
        scene.write(range(0, SIZE), WriteFlags::default()).await;
        scene.flush().await;
        scene.close().await;
        scene.nothing_failed("before the scenario")?;
        scenario(&mut scene).await;
        scene.disarm();
        scene.judge_errors()?;
        scene.judge_disk().await?;
        Ok(scene.struck.len())
    }

    /// What fails in this run.
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// From now on the plan is in force.
    pub fn arm(&self) {
        self.faults.arm(self.plan);
    }

    /// Nothing fails any more.
    pub fn disarm(&mut self) {
        self.struck.extend(self.faults.disarm());
    }

    /// The node of the options, while it is open.
    pub fn node(&self) -> Option<NodeReport> {
        self.open.as_ref().and_then(|(nodes, _)| self.graph.node(*nodes.last()?))
    }

    /// The folder of the disk's files, and of others that a scenario needs.
    pub fn dir(&self) -> &Path {
        self.subject.dir.path()
    }

    /// What the disk is opened with.
    pub fn options(&self) -> Value {
        self.subject.options.clone()
    }

    /// Notes how a step of the scenario's own ended.
    pub fn note<T, E: std::fmt::Debug>(&mut self, step: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.failed.push(format!("{step}: {error:?}"))).ok()
    }

    /// Notes what should not be, where `holds` is false.
    pub fn expect(&mut self, holds: bool, what: &str) {
        if !holds {
            self.wrong.push(what.to_owned());
        }
    }

    /// `blockdev-add`, and a user that writes.
    pub async fn open(&mut self) {
        let added = add(&self.graph, self.options()).await;
        let Some(node) = self.note("open", added) else { return };
        let mut nodes = vec![node];
        if let Some(above) = &self.subject.above {
            let above = above(&self.graph, node).await;
            let Some(above) = self.note("open above", above) else { return self.remove(nodes).await };
            nodes.splice(0..0, above);
        }
        let attached = attach(&self.graph, nodes[0], user()).await;
        match self.note("use", attached) {
            Some(port) => self.open = Some((nodes, port)),
            None => self.remove(nodes).await,
        }
    }

    /// The user goes, then the node.
    pub async fn close(&mut self) {
        let Some((nodes, port)) = self.open.take() else { return };
        port.detach(&mut self.graph.permit()).await;
        self.remove(nodes).await;
    }

    async fn remove(&mut self, nodes: Vec<NodeId>) {
        for node in nodes {
            let removed = self.graph.permit().remove(node).await;
            if self.note("remove", removed).is_none() {
                // That something may be lost is said once.
                let removed = self.graph.permit().remove(node).await;
                self.note("remove again", removed);
            }
        }
    }

    /// Writes stamps.
    pub async fn write(&mut self, at: ByteRange, flags: WriteFlags) {
        let Some(handle) = self.handle() else { return };
        let (op, bytes) = self.model.begin(Work::Write, at);
        let work = async move |lane: Rc<_>| bench::write(&lane, at.start(), &bytes, flags).await;
        let result = on(self.thread, &handle, work).await;
        self.model.end(op, result.is_ok(), flags.fua);
        self.note("write", result);
    }

    /// Makes zeroes.
    pub async fn write_zeroes(&mut self, at: ByteRange, flags: WriteFlags) {
        let Some(handle) = self.handle() else { return };
        let (op, _) = self.model.begin(Work::Zeroes, at);
        let work = async move |lane: Rc<PortLane>| lane.write_zeroes(&enter(&lane).await, at, flags).await;
        let result = on(self.thread, &handle, work).await;
        self.model.end(op, result.is_ok(), flags.fua);
        self.note("write zeroes", result);
    }

    /// Gives space back.
    pub async fn discard(&mut self, at: ByteRange) {
        let Some(handle) = self.handle() else { return };
        let (op, _) = self.model.begin(Work::Discard, at);
        let work = async move |lane: Rc<PortLane>| lane.discard(&enter(&lane).await, at).await;
        let result = on(self.thread, &handle, work).await;
        self.model.end(op, result.is_ok(), false);
        self.note("discard", result);
    }

    /// Makes stable.
    pub async fn flush(&mut self) {
        let Some(handle) = self.handle() else { return };
        let flush = self.model.begin_flush();
        let result = on(self.thread, &handle, async |lane| bench::flush(&lane).await).await;
        if self.note("flush", result).is_some() {
            self.model.end_flush(flush);
        }
    }

    /// Reads everything; what comes must be allowed.
    pub async fn read(&mut self) {
        let Some(handle) = self.handle() else { return };
        let all = range(0, self.model.size());
        let result = on(self.thread, &handle, async move |lane| bench::read(&lane, all).await).await;
        if let Some(bytes) = self.note("read", result) {
            self.wrong.extend(self.model.wrong_now(&bytes).iter().map(|wrong| format!("a read: {wrong}")));
        }
    }

    /// Reads everything; what comes must be what a crash may have left.
    async fn read_after_crash(&mut self) {
        let Some(handle) = self.handle() else { return };
        let all = range(0, self.model.size());
        let result = on(self.thread, &handle, async move |lane| bench::read(&lane, all).await).await;
        if let Some(bytes) = self.note("read", result) {
            let wrong = self.model.wrong_after_crash(&bytes);
            self.wrong.extend(wrong.iter().map(|wrong| format!("a read after a flush that failed: {wrong}")));
        }
    }

    /// Asks where everything lives; what is said to be zero has to be.
    pub async fn map(&mut self) {
        let Some(handle) = self.handle() else { return };
        let size = self.model.size();
        let holes = on(self.thread, &handle, async move |lane| holes(&lane, size).await).await;
        let Some(holes) = self.note("map", holes) else { return };
        let no_zeroes = self.model.wrong_now(&[]);
        let lies =
            no_zeroes.iter().filter(|wrong| holes.iter().any(|hole| hole.contains(&(wrong.sector * SECTOR as u64))));
        self.wrong.extend(lies.map(|wrong| format!("a hole that is none: {wrong}")));
    }

    /// `block_resize`, where there is such a thing.
    pub async fn resize(&mut self, size: u64, how: Preallocation) {
        let Some((nodes, _)) = self.open.as_ref().filter(|_| self.subject.resizes) else { return };
        let node = nodes[0];
        self.model.begin_resize(size);
        let resized = self.graph.permit().resize(node, size, how).await;
        self.model.end_resize(resized.is_ok());
        if self.note("resize", resized).is_none() && self.plan.lasting {
            // The way back may have failed too.
            self.sizes.push(size);
        }
    }

    /// `blockdev-reopen` with more options than it was opened with.
    pub async fn reopen(&mut self, more: &Value) {
        if self.open.is_none() {
            return;
        }
        let reopened = bench::reopen(&self.graph, &[with(self.options(), more)]).await;
        self.note("reopen", reopened);
    }

    fn handle(&self) -> Option<PortHandle> {
        self.open.as_ref().map(|(_, port)| port.handle())
    }

    // ---- what has to hold afterwards ---------------------------------------------------------------------------

    fn nothing_failed(&self, when: &str) -> Result<(), String> {
        match self.failed.iter().chain(&self.wrong).next() {
            Some(first) => Err(format!("{when}: {first}")),
            None => Ok(()),
        }
    }

    /// What cannot be made good is reported, what can be is not.
    fn judge_errors(&self) -> Result<(), String> {
        if let Some(wrong) = self.wrong.first() {
            return Err(wrong.clone());
        }
        let Plan { fault, lasting, .. } = self.plan;
        let moves_data = self.struck.iter().all(|site| *site != Site::Call);
        let harmless = match fault {
            Fault::Errno(libc::EINTR) => !lasting,
            Fault::Errno(libc::EAGAIN) => !lasting && moves_data,
            Fault::Errno(_) => self.struck.is_empty() || (!lasting && (self.subject.heals)(&self.struck)),
            Fault::Short => self.subject.block == 1,
            Fault::Lie => false,
        };
        if harmless {
            return self.nothing_failed(&format!("{} faults that can be made good", self.struck.len()));
        }
        let lost = matches!(fault, Fault::Errno(libc::EIO | libc::ENOSPC))
            && self.struck.iter().any(|site| matches!(site, Site::Read | Site::Write | Site::Sync));
        if lost && self.failed.is_empty() && !self.subject.buffers {
            Err(format!("errors of {:?} were swallowed", self.struck))
        } else {
            Ok(())
        }
    }

    async fn judge_disk(&mut self) -> Result<(), String> {
        self.failed.clear();
        self.read().await;
        self.close().await;
        // The last flush may tell of a failure before.
        self.failed.retain(|failed| !failed.starts_with("remove:"));
        self.nothing_failed("after the faults")?;
        self.judge_leftovers()?;
        (self.subject.check)(self.dir())?;
        self.graph = graph();
        self.open().await;
        let size = self.node().map(|node| node.geometry.size);
        self.sizes.push(self.model.size());
        self.expect(
            size.is_some_and(|size| self.sizes.contains(&size)),
            &format!("{size:?} bytes, not {:?}", self.sizes),
        );
        if self.subject.buffers && self.struck.contains(&Site::Sync) {
            self.read_after_crash().await;
        } else {
            self.read().await;
        }
        self.write(range(0, self.model.size()), WriteFlags::default()).await;
        self.flush().await;
        self.read().await;
        self.close().await;
        self.nothing_failed("a clean open")?;
        (self.subject.check)(self.dir())
    }

    fn judge_leftovers(&self) -> Result<(), String> {
        let nodes: Vec<_> = self.graph.nodes().into_iter().map(|node| node.name).collect();
        if !nodes.is_empty() {
            return Err(format!("nodes that are left: {nodes:?}"));
        }
        let mut files = named(&self.subject.options);
        files.extend(std::fs::read_dir(self.dir()).unwrap().map(|entry| entry.unwrap().path()));
        let open = still_open(&files);
        if !open.is_empty() {
            return Err(format!("files that are still open: {open:?}"));
        }
        match files.iter().find(|path| stays_locked(path)) {
            Some(path) => Err(format!("a lock is left on {}", path.display())),
            None => Ok(()),
        }
    }
}

/// What a node says to be zero.
async fn holes(lane: &PortLane, size: u64) -> Result<Vec<Range<u64>>, IoError> {
    let (mut holes, mut at) = (Vec::new(), 0);
    while at < size {
        let Extent { len, place } = lane.map(&enter(lane).await, range(at, size - at)).await?;
        if matches!(place, Place::Zero { .. }) {
            holes.push(at..at + len);
        }
        at += len;
    }
    Ok(holes)
}

/// With a throttle group called `free`, and a secret called `word`.
pub fn graph() -> Rc<Graph> {
    let graph = Graph::new(Arc::new(|_| ()));
    graph.objects().insert("free", ThrottleGroup::new(ThrottleLimits::default().over(Limits::default()).unwrap()));
    let word = Secret::new(SecretBytes::new(b"word".to_vec()), Encoding::Raw).unwrap();
    graph.objects().insert("word", Arc::new(word));
    graph
}

/// One who writes, and bears that the size changes, which is writing too.
fn user() -> Perms {
    Perms { uses: PermSet::CONSISTENT_READ | PermSet::WRITE, shares: PermSet::ALL }
}

/// The files that options name.
fn named(options: &Value) -> Vec<PathBuf> {
    let Value::Object(members) = options else { return Vec::new() };
    let here = members.get("filename").and_then(Value::as_str).map(PathBuf::from);
    here.into_iter().chain(members.values().flat_map(named)).collect()
}

/// Which of them this process has open.
fn still_open(files: &[PathBuf]) -> Vec<PathBuf> {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).filter(|to| files.contains(to)).collect()
}

/// A program that another test starts has our descriptors, and so our locks, for a moment.
fn stays_locked(path: &Path) -> bool {
    let begun = Instant::now();
    while is_locked(path) {
        if begun.elapsed() > Duration::from_secs(1) {
            return true;
        }
        std::thread::yield_now();
    }
    false
}

/// Somebody tells others to keep off (the bytes that QEMU uses for it, and all others).
fn is_locked(path: &Path) -> bool {
    let whole = |kind: i32| i16::try_from(kind).unwrap();
    let (kind, from) = (whole(libc::F_WRLCK), whole(libc::SEEK_SET));
    let mut lock = libc::flock { l_type: kind, l_whence: from, l_start: 0, l_len: 0, l_pid: 0 };
    let file = File::open(path).unwrap();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    i32::from(lock.l_type) != libc::F_UNLCK
}
