//! The graph against a `Vec<u8>`: users on one and on two I/O threads read, write, zero, discard and flush at random, while
//! the control task changes what is below them at random: filters come and go, nodes are replaced, overlays are appended
//! and stand on other nodes, nodes are reopened, transactions fail. Between the batches the size changes too, and
//! everything is read. None of it may be seen in the bytes.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]
#![expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;
#[path = "support/random.rs"]
mod random;
mod support;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bench::{enter, flush, io_thread, on, parsed, range, read, started, with, write};
use block_core::base::{ByteRange, Error, IoError};
use block_core::catalog;
use block_core::drivers::filter::throttle::{Limits, ThrottleGroup, ThrottleLimits};
use block_core::graph::{
    Change, ChildId, DetectZeroes, DiscardMode, DriverInfo, Graph, IoCx, NewNode, NodeId, NodeOptions, PermSet, Perms,
    Place, Preallocation, Reopen, ReopenRequest, Role, Step, WriteFlags,
};
use block_core::pipeline::{Filter, Filtered, Request};
use block_core::port::{Port, PortLane};
use block_core::rt::{IoThread, run_control};
use random::Random;
use serde_json::{Value, json};
use support::overlay::NewOverlay;
use support::{Mem, Seen, graph};

/// Bytes at the beginning, and those that are always there: users stay inside.
const SIZE: u64 = 192 << 10;
const WORKED: u64 = 128 << 10;
const LARGEST: u64 = 256 << 10;
/// A graph is built anew after this many batches, since overlays only become more.
const BATCHES: u64 = 6;
const USERS: usize = 3;
const REQUESTS: u64 = 40;

// ---- users -----------------------------------------------------------------------------------------------------

/// One who owns every `USERS`-th stripe, knows what is in it, and works there.
struct User {
    bytes: Vec<u8>,
    random: Random,
    stripe: u64,
    number: u64,
    of: u64,
}

impl User {
    /// A part of a stripe of its own.
    fn somewhere(&mut self) -> ByteRange {
        let stripes = WORKED / self.stripe / self.of;
        let stripe = self.random.below(stripes) * self.of + self.number;
        let unit = [1, 512, 4096][self.random.below(3) as usize].min(self.stripe);
        let start = self.random.below(self.stripe / unit);
        let len = 1 + self.random.below(self.stripe / unit - start);
        range(stripe * self.stripe + start * unit, len * unit)
    }

    async fn work(mut self, lane: &PortLane) -> Result<Self, String> {
        for _ in 0..REQUESTS {
            let at = self.somewhere();
            let kind = self.random.below(8);
            let done = self.request(lane, kind, at).await;
            done.map_err(|wrong| format!("user {}, request {kind} at {at:?}: {wrong}", self.number))?;
        }
        Ok(self)
    }

    async fn request(&mut self, lane: &PortLane, kind: u64, at: ByteRange) -> Result<(), String> {
        let here = at.start() as usize..at.end() as usize;
        let flags = WriteFlags {
            fua: self.random.below(4) == 0,
            may_unmap: self.random.below(2) == 0,
            ..WriteFlags::default()
        };
        let failed = |error: IoError| format!("{error:?}");
        match kind {
            0..3 => {
                let first = self.random.next();
                let bytes: Vec<u8> = (0..at.len()).map(|byte| (first ^ (byte * 7)) as u8).collect();
                write(lane, at.start(), &bytes, flags).await.map_err(failed)?;
                self.bytes[here].copy_from_slice(&bytes);
            }
            3 => {
                lane.write_zeroes(&enter(lane).await, at, flags).await.map_err(failed)?;
                self.bytes[here].fill(0);
            }
            4 => {
                lane.discard(&enter(lane).await, at).await.map_err(failed)?;
                let now = read(lane, at).await.map_err(failed)?;
                if !now.iter().zip(&self.bytes[here.clone()]).all(|(now, old)| *now == 0 || now == old) {
                    return Err("a discard left something else".into());
                }
                self.bytes[here].copy_from_slice(&now);
            }
            5 => flush(lane).await.map_err(failed)?,
            6 => {
                let extent = lane.map(&enter(lane).await, at).await.map_err(failed)?;
                let said = &self.bytes[here][..extent.len as usize];
                if matches!(extent.place, Place::Zero { .. }) && said.iter().any(|byte| *byte != 0) {
                    return Err("it is said to be zero".into());
                }
            }
            _ => differs(&read(lane, at).await.map_err(failed)?, &self.bytes[here])?,
        }
        Ok(())
    }
}

fn differs(seen: &[u8], expected: &[u8]) -> Result<(), String> {
    match seen.iter().zip(expected).position(|(one, other)| one != other) {
        Some(at) => Err(format!("byte {at} is {:#x}, not {:#x}", seen[at], expected[at])),
        None => Ok(()),
    }
}

// ---- what is below them ----------------------------------------------------------------------------------------

/// A node that all requests pass.
#[derive(Clone)]
struct Layer {
    id: NodeId,
    name: String,
    /// What a filter was made with, but for its child; nothing for an overlay and for the disk.
    options: Option<Value>,
    /// What stands beside it and goes with it.
    beside: Option<NodeId>,
    is_overlay: bool,
}

/// The graph, and how it is changed.
struct Scene {
    graph: Rc<Graph>,
    port: Port,
    /// From the top down to the disk.
    path: Vec<Layer>,
    random: Random,
    made: u64,
    /// How often each kind of change was made, and refused.
    done: BTreeMap<&'static str, (u64, u64)>,
}

impl Scene {
    async fn new(seed: u64) -> Self {
        let graph = graph();
        let limits = ThrottleLimits { iops_total: Some(1_000_000), ..ThrottleLimits::default() };
        graph.objects().insert("group", ThrottleGroup::new(limits.over(Limits::default()).unwrap()));
        let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
        let mem = Mem::new(vec![0; SIZE as usize], &Arc::<Seen>::default());
        let disk = support::add(&graph, NewNode::new("disk".into(), options, |_| (mem, SIZE))).await;
        let perms = Perms { uses: PermSet::CONSISTENT_READ | PermSet::WRITE, shares: PermSet::ALL };
        let port = bench::attach(&graph, disk, perms).await.unwrap();
        let path = vec![Layer { id: disk, name: "disk".into(), options: None, beside: None, is_overlay: false }];
        Self { graph, port, path, random: Random(seed), made: 0, done: BTreeMap::new() }
    }

    fn below(&mut self, end: usize) -> usize {
        self.random.below(end as u64) as usize
    }

    fn fresh(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}", self.made)
    }

    fn note(&mut self, what: &'static str, done: bool) {
        let (made, refused) = self.done.entry(what).or_default();
        *if done { made } else { refused } += 1;
    }

    /// Any change but one of the size.
    async fn change(&mut self) -> Result<(), String> {
        match self.random.below(12) {
            0..3 => self.insert().await,
            3..5 => self.remove().await,
            5 => self.exchange().await,
            6 => self.append().await,
            7 => self.stand_elsewhere().await,
            8 => self.reopen().await,
            9 => self.reopen_disk().await,
            10 => self.abort().await,
            _ => self.insert_two().await,
        }
    }

    /// A new filter above what is there; it is used by nobody yet.
    async fn filter_above(&mut self, below: &str) -> Result<Layer, String> {
        let kinds = [
            "throttle",
            "copy-on-read",
            "blkdebug",
            "blkdebug",
            "raw",
            "blklogwrites",
            "copy-before-write",
            "compress",
        ];
        let kind = kinds[self.below(kinds.len())];
        let name = self.fresh(kind);
        let (more, beside) = match kind {
            "throttle" => (json!({ "throttle-group": "group" }), None),
            "blkdebug" if self.random.below(2) == 0 => (json!({ "align": 4096, "max-transfer": 8192 }), None),
            "blklogwrites" => {
                let log = self.beside("log", 16 << 20).await;
                (json!({ "log": log.0 }), Some(log.1))
            }
            "copy-before-write" => {
                let target = self.beside("target", self.port.geometry().size).await;
                (json!({ "target": target.0 }), Some(target.1))
            }
            _ => (json!({}), None),
        };
        let base = json!({ "driver": kind, "node-name": name, "discard": "unmap" });
        let options = with(base, &more);
        match bench::add(&self.graph, with(options.clone(), &json!({ child_of(kind): below }))).await {
            Ok(id) => Ok(Layer { id, name, options: Some(options), beside, is_overlay: false }),
            Err(error) => {
                if let Some(beside) = beside {
                    self.gone(beside).await?;
                }
                Err(error)
            }
        }
    }

    async fn beside(&mut self, what: &str, size: u64) -> (String, NodeId) {
        let name = self.fresh(what);
        let mem = Mem::new(vec![0; size as usize], &Arc::<Seen>::default());
        let node = NewNode::new(name.clone(), NodeOptions::default(), |_| (mem, size));
        (name, support::add(&self.graph, node).await)
    }

    async fn gone(&self, node: NodeId) -> Result<(), String> {
        self.graph.permit().remove(node).await.map_err(|error| error.full())
    }

    async fn drop_layer(&self, layer: &Layer) -> Result<(), String> {
        self.gone(layer.id).await?;
        match layer.beside {
            Some(beside) => self.gone(beside).await,
            None => Ok(()),
        }
    }

    async fn insert(&mut self) -> Result<(), String> {
        let at = self.below(self.path.len());
        let below = self.path[at].clone();
        let Ok(filter) = self.filter_above(&below.name).await else {
            self.note("insert", false);
            return Ok(());
        };
        let inserted = self.graph.permit().insert_filter(filter.id, below.id).await.is_ok();
        self.note("insert", inserted);
        if inserted {
            self.path.insert(at, filter);
            return Ok(());
        }
        self.drop_layer(&filter).await
    }

    /// Two filters come at one moment.
    async fn insert_two(&mut self) -> Result<(), String> {
        let at = self.below(self.path.len());
        let below = self.path[at].clone();
        let Ok(one) = self.filter_above(&below.name).await else { return Ok(()) };
        let Ok(two) = self.filter_above(&one.name).await else { return self.drop_layer(&one).await };
        let swap: [Box<dyn Step>; 2] = [
            Box::new(Change::Replace { from: below.id, to: one.id }),
            Box::new(Change::Replace { from: one.id, to: two.id }),
        ];
        let done = self.graph.permit().transact(swap.into()).await.is_ok();
        self.note("two filters in a transaction", done);
        if done {
            self.path.splice(at..at, [two, one]);
            return Ok(());
        }
        self.drop_layer(&two).await?;
        self.drop_layer(&one).await
    }

    fn a_filter(&mut self) -> Option<usize> {
        let filters: Vec<_> = (0..self.path.len()).filter(|at| self.path[*at].options.is_some()).collect();
        (!filters.is_empty()).then(|| filters[self.below(filters.len())])
    }

    async fn remove(&mut self) -> Result<(), String> {
        let Some(at) = self.a_filter() else { return Ok(()) };
        let removed = self.graph.permit().remove_filter(self.path[at].id).await.is_ok();
        self.note("remove", removed);
        if removed {
            let filter = self.path.remove(at);
            self.drop_layer(&filter).await?;
        }
        Ok(())
    }

    /// A filter is replaced by another one over the same node.
    async fn exchange(&mut self) -> Result<(), String> {
        let Some(at) = self.a_filter() else { return Ok(()) };
        let below = self.path[at + 1].name.clone();
        let Ok(new) = self.filter_above(&below).await else { return Ok(()) };
        let replaced = self.graph.permit().replace_node(self.path[at].id, new.id).await.is_ok();
        self.note("replace", replaced);
        let unused = if replaced { std::mem::replace(&mut self.path[at], new) } else { new };
        self.drop_layer(&unused).await
    }

    async fn append(&mut self) -> Result<(), String> {
        let overlays = self.path.iter().filter(|layer| layer.is_overlay).count();
        let at = self.below(self.path.len());
        let base = self.path[at].clone();
        let size = self.graph.node(base.id).unwrap().geometry.size;
        if overlays == 5 || !size.is_multiple_of(4096) {
            return Ok(());
        }
        let name = self.fresh("overlay");
        let options = NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() };
        let (id, _) = NewOverlay { cluster: 4096, size, backing: None, options }.add(&self.graph, &name).await;
        let appended = self.graph.permit().append(id, base.id).await.is_ok();
        self.note("append", appended);
        if appended {
            self.path.insert(at, Layer { id, name, options: None, beside: None, is_overlay: true });
            return Ok(());
        }
        // Another overlay stands on the base already.
        let store = self.graph.find(&format!("{name}-store")).unwrap();
        self.gone(id).await?;
        self.gone(store).await
    }

    /// An overlay gets another backing node, which has the same bytes: the same behind a filter.
    async fn stand_elsewhere(&mut self) -> Result<(), String> {
        let overlays: Vec<_> = (0..self.path.len()).filter(|at| self.path[*at].is_overlay).collect();
        if overlays.is_empty() {
            return Ok(());
        }
        let at = overlays[self.below(overlays.len())];
        let below = self.path[at + 1].name.clone();
        let Ok(filter) = self.filter_above(&below).await else { return Ok(()) };
        let done = self.graph.permit().set_backing(self.path[at].id, Some(filter.id)).await.is_ok();
        self.note("set backing", done);
        if done {
            self.path.insert(at + 1, filter);
            return Ok(());
        }
        self.drop_layer(&filter).await
    }

    /// Up to all filters at once.
    async fn reopen(&mut self) -> Result<(), String> {
        let mut list = Vec::new();
        for at in 0..self.path.len().saturating_sub(1) {
            let below = self.path[at + 1].name.clone();
            let zeroes = ["off", "on", "unmap"][self.below(3)];
            let Some(options) = self.path[at].options.clone().filter(|_| self.random.below(2) == 0) else { continue };
            let child = child_of(options["driver"].as_str().unwrap());
            list.push(parsed(with(options, &json!({ child: below, "detect-zeroes": zeroes }))));
        }
        if !list.is_empty() {
            let done = catalog::reopen(&mut self.graph.permit(), list).await;
            self.note("reopen", done.is_ok());
            done.map_err(|error| error.full())?;
        }
        Ok(())
    }

    /// The disk is no driver of the catalog's.
    async fn reopen_disk(&mut self) -> Result<(), String> {
        let zeroes = [DetectZeroes::Off, DetectZeroes::On][self.below(2)];
        let common = NodeOptions { discard: DiscardMode::Unmap, detect_zeroes: zeroes, ..NodeOptions::default() };
        let disk = self.path.last().unwrap().id;
        let step = Reopen { node: disk, options: Box::new(()), common, children: Vec::new() }.step();
        let done = self.graph.permit().transact(vec![step]).await;
        self.note("reopen the disk", done.is_ok());
        done.map_err(|error| error.full())
    }

    /// All would be lost: everybody is led to an empty disk. But the next step cannot be made.
    async fn abort(&mut self) -> Result<(), String> {
        let (_, empty) = self.beside("empty", LARGEST).await;
        let at = self.below(self.path.len());
        let from = self.path[at].id;
        let steps: [Box<dyn Step>; 2] =
            [Box::new(Change::Replace { from, to: empty }), Box::new(Change::AddChild { parent: empty, child: from })];
        let error = self.graph.permit().transact(steps.into()).await.unwrap_err().full();
        assert!(error.contains("does not support adding a child"), "{error}");
        self.note("abort", true);
        self.gone(empty).await
    }

    /// Some nodes will not have it: then nothing has changed.
    async fn resize(&mut self, bytes: &mut Vec<u8>) -> Result<(), String> {
        let size = WORKED + self.random.below((LARGEST - WORKED) / 512 + 1) * 512;
        let size = if self.random.below(4) == 0 { size } else { size & !4095 };
        let resized = self.graph.permit().resize(self.path[0].id, size, Preallocation::Off).await;
        self.note("resize", resized.is_ok());
        if resized.is_ok() {
            bytes.resize(size as usize, 0);
        }
        let now = self.port.geometry().size;
        if now == bytes.len() as u64 { Ok(()) } else { Err(format!("{now} bytes after {resized:?}")) }
    }

    async fn close(self) -> Result<(), String> {
        let Self { graph, port, path, .. } = self;
        port.detach(&mut graph.permit()).await;
        let beside = path.iter().filter_map(|layer| layer.beside);
        let stores = path.iter().filter_map(|layer| graph.find(&format!("{}-store", layer.name)));
        for node in path.iter().map(|layer| layer.id).chain(beside).chain(stores) {
            graph.permit().remove(node).await.map_err(|error| error.full())?;
        }
        let left: Vec<_> = graph.nodes().into_iter().map(|node| node.name).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("nodes that are left: {left:?}")) }
    }
}

fn child_of(driver: &str) -> &'static str {
    if driver == "blkdebug" { "image" } else { "file" }
}

// ---- a run -----------------------------------------------------------------------------------------------------

/// A node that a canary slips in at the top, after the first batch.
type Canary = fn(NodeId) -> NewNode;

async fn run(
    seed: u64,
    threads: &[IoThread],
    canary: Option<Canary>,
) -> Result<BTreeMap<&'static str, (u64, u64)>, String> {
    let mut scene = Scene::new(seed).await;
    let mut bytes = vec![0; SIZE as usize];
    for batch in 0..BATCHES {
        if let Some(canary) = canary.filter(|_| batch == 1) {
            let (top, node) = (scene.path[0].id, canary(scene.path[0].id));
            let id = support::add(&scene.graph, node).await;
            scene.graph.permit().replace_node(top, id).await.unwrap();
        }
        work_while_it_changes(&mut scene, threads, &mut bytes).await?;
        for _ in 0..2 {
            scene.resize(&mut bytes).await?;
            scene.change().await?;
            let whole = range(0, bytes.len() as u64);
            let seen = on(&threads[0], &scene.port.handle(), async move |lane| read(&lane, whole).await).await;
            let seen = seen.map_err(|error| format!("{error:?}"))?;
            differs(&seen, &bytes).map_err(|wrong| format!("after batch {batch}: {wrong}"))?;
        }
    }
    let done = std::mem::take(&mut scene.done);
    if canary.is_none() {
        scene.close().await?;
    }
    Ok(done)
}

async fn work_while_it_changes(scene: &mut Scene, threads: &[IoThread], bytes: &mut [u8]) -> Result<(), String> {
    let of = threads.len() * USERS;
    let stripe = [1024, 4096, 16384][scene.below(3)];
    let over = Arc::new(AtomicUsize::new(0));
    let mut users = Vec::new();
    for number in 0..of {
        let random = Random(scene.random.next() | 1);
        let user = User { bytes: bytes.to_vec(), random, stripe, number: number as u64, of: of as u64 };
        let told = over.clone();
        let work = async move |lane: Rc<PortLane>| {
            let result = user.work(&lane).await;
            told.fetch_add(1, Ordering::Release);
            result
        };
        users.push(started(&threads[number % threads.len()], &scene.port.handle(), work));
    }
    while over.load(Ordering::Acquire) < of {
        scene.change().await?;
    }
    for user in users {
        let user = user.await.expect("the I/O thread got through")?;
        for start in (0..WORKED / stripe).filter(|at| at % user.of == user.number).map(|at| (at * stripe) as usize) {
            let own = start..start + stripe as usize;
            bytes[own.clone()].copy_from_slice(&user.bytes[own]);
        }
    }
    Ok(())
}

fn all_is_well(number: usize, seeds: std::ops::Range<u64>) {
    let threads: Vec<_> = (0..number).map(|_| io_thread()).collect();
    let mut sum: BTreeMap<_, (u64, u64)> = BTreeMap::new();
    for seed in seeds {
        let done = run_control(async |_| run(seed, &threads, None).await);
        for (what, (made, refused)) in done.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}")) {
            let all = sum.entry(what).or_default();
            *all = (all.0 + made, all.1 + refused);
        }
    }
    eprintln!("{number} threads: changes made and refused: {sum:?}");
    assert_eq!(sum.len(), 10, "a kind of change was never tried");
    assert!(sum.values().all(|(made, _)| *made > 20), "a kind of change hardly ever happened");
}

#[test]
fn one_thread_sees_no_change_of_the_graph() {
    all_is_well(1, 1..31);
}

#[test]
fn two_threads_see_no_change_of_the_graph() {
    all_is_well(2, 31..61);
}

// ---- the harness can fail ---------------------------------------------------------------------------------------

/// A filter that once in a while says that it has written what it has not.
struct Forgetful {
    file: ChildId,
    writes: AtomicUsize,
}

impl Filter for Forgetful {
    type Conf = ();

    fn child(&self) -> ChildId {
        self.file
    }

    async fn write(
        &self,
        (): &(),
        cx: IoCx<'_>,
        at: ByteRange,
        buf: block_core::rt::IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        if self.writes.fetch_add(1, Ordering::Relaxed) % 8 == 7 {
            return Ok(());
        }
        cx.child(self.file).write(at, buf, flags).await
    }

    async fn before(&self, (): &(), _: IoCx<'_>, _: Request) -> Result<(), IoError> {
        Ok(())
    }

    async fn reopen(&self, (): &(), _: ReopenRequest<'_>) -> Result<(), Error> {
        Ok(())
    }

    fn info(&self, (): &()) -> DriverInfo {
        DriverInfo { driver: "forgetful", ..DriverInfo::default() }
    }
}

fn forgetful(below: NodeId) -> NewNode {
    NewNode::new("forgetful".into(), NodeOptions::default(), |edges| {
        let file = edges.to("file", below, Role::Filtered);
        (Filtered(Forgetful { file, writes: AtomicUsize::new(0) }), ())
    })
}

/// A disk that is none of theirs.
fn another_disk(_: NodeId) -> NewNode {
    let mem = Mem::new(vec![0; LARGEST as usize], &Arc::<Seen>::default());
    NewNode::new("another".into(), NodeOptions::default(), |_| (mem, SIZE))
}

#[test]
fn a_filter_that_forgets_and_a_node_with_other_bytes_are_caught() {
    let threads = [io_thread()];
    for canary in [forgetful as Canary, another_disk] {
        let wrong = run_control(async |_| run(1, &threads, Some(canary)).await.unwrap_err());
        assert!(wrong.contains("byte") || wrong.contains("said to be zero") || wrong.contains("discard"), "{wrong}");
    }
}
