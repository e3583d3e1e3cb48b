//! A small image format in memory: which clusters it has is a table, their bytes lie in a memory node of its own, and
//! what it has not got is its backing node's. What depends on layers is tested with it.

use std::collections::HashSet;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use block_core::base::{ByteRange, Error, IoError, Result, align_down, is_aligned};
use block_core::graph::{
    ChildChange, ChildId, DriverInfo, Extent, Geometry, Graph, IoCx, Limits, NewNode, NodeId, NodeOptions, Perms,
    Place, Preallocation, ReopenRequest, Role, WriteFlags,
};
use block_core::pipeline::{Access, Format, Mapped, Ticket};
use block_core::rt::IoBuf;

use super::{Mem, Seen};

/// An overlay with its table and its store, both of which tests can look into.
pub struct NewOverlay {
    /// Bytes in a cluster.
    pub cluster: u64,
    /// Bytes in the node.
    pub size: u64,
    pub backing: Option<NodeId>,
    pub options: NodeOptions,
}

impl NewOverlay {
    /// 64 KiB in clusters of 4 KiB.
    pub fn above(backing: Option<NodeId>) -> Self {
        Self { cluster: 4096, size: 65536, backing, options: NodeOptions::default() }
    }

    /// Adds a store named `NAME-store` and gives the overlay, not added yet, for an edit.
    pub async fn prepare(self, graph: &Rc<Graph>, name: &str) -> (NewNode, Arc<Table>) {
        let (node, table, _) = self.prepare_seen(graph, name).await;
        (node, table)
    }

    /// The same, and what the store sees.
    pub async fn prepare_seen(self, graph: &Rc<Graph>, name: &str) -> (NewNode, Arc<Table>, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        let room = self.size.next_multiple_of(self.cluster) * 2;
        let store = NewNode::new(format!("{name}-store"), NodeOptions::default(), |_| {
            (Mem::new(vec![0xee; room as usize], &seen), room)
        });
        let store = super::add(graph, store).await;
        let table = self.table();
        (self.over(name, store, &table), table, seen)
    }

    /// An empty table for it.
    pub fn table(&self) -> Arc<Table> {
        Arc::new(Table::new(self.cluster, self.size.div_ceil(self.cluster)))
    }

    /// The overlay above a store that is there already, which may hold what the table says.
    pub fn over(&self, name: &str, store: NodeId, table: &Arc<Table>) -> NewNode {
        NewNode::new(name.into(), self.options, |edges| {
            let store = edges.to("store", store, Role::Metadata);
            let backing = self.backing.map(|backing| edges.to("backing", backing, Role::Cow));
            (Mapped(Overlay { store, table: table.clone(), kept_in: None }), Shape { size: self.size, backing })
        })
    }

    /// The same with a table that each flush makes stable, in the first sector of `place`.
    pub fn kept(&self, name: &str, store: NodeId, place: NodeId, table: &Arc<Table>) -> NewNode {
        NewNode::new(name.into(), self.options, |edges| {
            let store = edges.to("store", store, Role::Metadata);
            let kept_in = Some(edges.to("table", place, Role::Metadata));
            let backing = self.backing.map(|backing| edges.to("backing", backing, Role::Cow));
            (Mapped(Overlay { store, table: table.clone(), kept_in }), Shape { size: self.size, backing })
        })
    }

    /// Adds both.
    pub async fn add(self, graph: &Rc<Graph>, name: &str) -> (NodeId, Arc<Table>) {
        let (node, table) = self.prepare(graph, name).await;
        (super::add(graph, node).await, table)
    }
}

/// What the overlay has of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing: it is the backing node's.
    Absent,
    /// It reads as zeroes.
    Zero,
    /// Its bytes, in the store, at the same place.
    Data,
}

/// What the overlay has of each cluster, and who is changing that.
pub struct Table {
    cluster: u64,
    state: Mutex<State>,
}

struct State {
    clusters: Vec<Cluster>,
    held: HashSet<u64>,
    waiting: Vec<Waker>,
    compressed: Vec<ByteRange>,
    told_active: Vec<bool>,
}

impl Table {
    fn new(cluster: u64, count: u64) -> Self {
        let clusters = vec![Cluster::Absent; count as usize];
        let (held, waiting, compressed, told_active) = Default::default();
        let state = State { clusters, held, waiting, compressed, told_active };
        Self { cluster, state: Mutex::new(state) }
    }

    /// What the overlay has of cluster `number`.
    pub fn at(&self, number: u64) -> Cluster {
        self.state.lock().unwrap().clusters[number as usize]
    }

    /// As the sector in which it is kept has it.
    fn to_bytes(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        for (byte, cluster) in bytes.iter_mut().zip(&self.state.lock().unwrap().clusters) {
            *byte = *cluster as u8;
        }
        bytes
    }

    /// What such a sector says.
    pub fn learn(&self, bytes: &[u8]) {
        for (cluster, byte) in self.state.lock().unwrap().clusters.iter_mut().zip(bytes) {
            *cluster = [Cluster::Absent, Cluster::Zero, Cluster::Data][usize::from(*byte)];
        }
    }

    /// How many clusters are not the backing node's.
    pub fn allocated(&self) -> usize {
        self.state.lock().unwrap().clusters.iter().filter(|cluster| **cluster != Cluster::Absent).count()
    }

    /// The compressed writes so far.
    pub fn compressed(&self) -> Vec<ByteRange> {
        self.state.lock().unwrap().compressed.clone()
    }

    /// What the format was told when the node became active or inactive.
    pub fn told_active(&self) -> Vec<bool> {
        self.state.lock().unwrap().told_active.clone()
    }

    fn set(&self, number: u64, cluster: Cluster) {
        self.state.lock().unwrap().clusters[number as usize] = cluster;
    }

    /// The whole cluster that a byte is in.
    fn around(&self, at: u64) -> ByteRange {
        ByteRange::new(align_down(at, self.cluster), self.cluster).unwrap()
    }

    /// The first bytes of the range of which the overlay has the same.
    fn run(&self, at: ByteRange) -> (Cluster, u64) {
        let state = self.state.lock().unwrap();
        let first = at.start() / self.cluster;
        let kind = state.clusters[first as usize];
        let same = state.clusters[first as usize..].iter().take_while(|cluster| **cluster == kind).count() as u64;
        (kind, ((first + same) * self.cluster - at.start()).min(at.len()))
    }

    /// Waits until nobody else changes the cluster.
    async fn hold(&self, number: u64) -> Held<'_> {
        poll_fn(|cx| {
            let mut state = self.state.lock().unwrap();
            if state.held.insert(number) {
                return Poll::Ready(());
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        Held { table: self, number }
    }
}

/// A cluster that nobody else changes.
struct Held<'t> {
    table: &'t Table,
    number: u64,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let woken = {
            let mut state = self.table.state.lock().unwrap();
            state.held.remove(&self.number);
            std::mem::take(&mut state.waiting)
        };
        woken.into_iter().for_each(Waker::wake);
    }
}

/// The format.
pub struct Overlay {
    store: ChildId,
    table: Arc<Table>,
    kept_in: Option<ChildId>,
}

/// Its configuration.
#[derive(Clone, Copy)]
pub struct Shape {
    size: u64,
    backing: Option<ChildId>,
}

impl Overlay {
    fn extent(&self, shape: &Shape, at: ByteRange) -> Extent {
        let (cluster, len) = self.table.run(at);
        let place = match (cluster, shape.backing) {
            (Cluster::Data, _) => Place::Data { child: self.store, offset: at.start() },
            (Cluster::Zero, _) => Place::Zero { allocated: true },
            (Cluster::Absent, Some(backing)) => Place::Below(backing),
            (Cluster::Absent, None) => Place::Zero { allocated: false },
        };
        Extent { len, place }
    }

    /// Copies what a new cluster has around `part`.
    async fn fill_around(&self, shape: &Shape, cx: IoCx<'_>, part: ByteRange) -> Result<(), IoError> {
        let whole = self.table.around(part.start());
        let ends = [ByteRange::between(whole.start(), part.start()), ByteRange::between(part.end(), whole.end())];
        for end in ends.into_iter().flatten().filter(|end| !end.is_empty()) {
            let buf = self.old(shape, cx, end).await?;
            cx.child(self.store).write(end, buf, WriteFlags::default()).await?;
        }
        Ok(())
    }

    /// What a cluster without data of its own reads as.
    async fn old(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange) -> Result<IoBuf, IoError> {
        let buf = IoBuf::alloc(at.len() as usize, 512)?;
        buf.fill(0);
        let absent = self.table.run(at).0 == Cluster::Absent;
        let backing = shape.backing.filter(|_| absent).map(|backing| cx.child(backing));
        if let Some(backing) = backing
            && let Some(inside) = ByteRange::whole(backing.size()).intersection(at)
        {
            backing.read(inside, buf.slice(0, inside.len())).await?;
        }
        Ok(buf)
    }

    /// Whole clusters read as zeroes.
    async fn zero(&self, at: ByteRange) -> Result<(), IoError> {
        if !at.is_aligned(self.table.cluster) {
            return Err(IoError::Unsupported);
        }
        for cluster in at.pieces(self.table.cluster) {
            let number = cluster.start() / self.table.cluster;
            let _held = self.table.hold(number).await;
            self.table.set(number, Cluster::Zero);
        }
        Ok(())
    }
}

/// Room for a part of one cluster, around which the rest is in place already.
pub struct Room<'t> {
    held: Held<'t>,
    extent: Extent,
}

impl Ticket for Room<'_> {
    fn extent(&self) -> Extent {
        self.extent
    }

    async fn commit(self) -> Result<(), IoError> {
        self.held.table.set(self.held.number, Cluster::Data);
        Ok(())
    }
}

impl Format for Overlay {
    type Conf = Shape;
    type Ticket<'t> = Room<'t>;

    fn geometry(&self, shape: &Shape, children: &[Geometry]) -> Result<Geometry> {
        let limits = self.store.of(children).limits.passed_on();
        // What is to be stable needs its table too, and so a flush.
        let fua = limits.fua && self.kept_in.is_none();
        Ok(Geometry {
            size: shape.size,
            limits: Limits { compressed_cluster: self.table.cluster as u32, fua, ..limits },
        })
    }

    fn map_now(&self, shape: &Shape, at: ByteRange, _: Access) -> Option<Extent> {
        Some(self.extent(shape, at))
    }

    async fn map(&self, shape: &Shape, _: IoCx<'_>, at: ByteRange, _: Access) -> Result<Extent, IoError> {
        Ok(self.extent(shape, at))
    }

    async fn allocate<'t>(&'t self, shape: &'t Shape, cx: IoCx<'t>, at: ByteRange) -> Result<Room<'t>, IoError> {
        let whole = self.table.around(at.start());
        let part = whole.intersection(at).ok_or(IoError::OutOfRange)?;
        let held = self.table.hold(whole.start() / self.table.cluster).await;
        if self.table.at(held.number) != Cluster::Data {
            self.fill_around(shape, cx, part).await?;
        }
        let place = Place::Data { child: self.store, offset: part.start() };
        Ok(Room { held, extent: Extent { len: part.len(), place } })
    }

    async fn write_compressed(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        _: WriteFlags,
    ) -> Result<(), IoError> {
        self.table.state.lock().unwrap().compressed.push(at);
        for cluster in at.pieces(self.table.cluster) {
            let room = self.allocate(shape, cx, cluster).await?;
            let part = buf.slice(cluster.start() - at.start(), cluster.len());
            cx.child(self.store).write(cluster, part, WriteFlags::default()).await?;
            room.commit().await?;
        }
        Ok(())
    }

    async fn write_zeroes(&self, _: &Shape, _: IoCx<'_>, at: ByteRange, _: WriteFlags) -> Result<(), IoError> {
        self.zero(at).await
    }

    async fn discard(&self, _: &Shape, _: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        self.zero(at).await
    }

    async fn flush(&self, _: &Shape, cx: IoCx<'_>) -> Result<(), IoError> {
        let Some(kept_in) = self.kept_in else { return cx.child(self.store).flush().await };
        // One after the other, or an older table could be written over a newer one.
        let _held = self.table.hold(u64::MAX).await;
        let table = self.table.to_bytes();
        cx.child(self.store).flush().await?;
        let at = ByteRange::new(0, 512).unwrap();
        cx.child(kept_in).write(at, IoBuf::from_slice(&table)?, WriteFlags::default()).await?;
        cx.child(kept_in).flush().await
    }

    /// Whole clusters, as many as the store has room for; what is new reads as zeroes.
    async fn truncate(&self, old: &Shape, cx: IoCx<'_>, size: u64, _: Preallocation) -> Result<Shape> {
        let cluster = self.table.cluster;
        if !is_aligned(old.size, cluster) || !is_aligned(size, cluster) || size > cx.child(self.store).size() {
            return Err(Error::new("The overlay cannot have this size"));
        }
        self.table.state.lock().unwrap().clusters.resize((size / cluster) as usize, Cluster::Zero);
        Ok(Shape { size, ..*old })
    }

    /// Only the backing node comes and goes.
    fn with_children(&self, shape: &Shape, change: ChildChange<'_>) -> Result<Option<Shape>> {
        let backing = match change {
            ChildChange::Comes("backing", child) => Some(child),
            ChildChange::Goes("backing", _) => None,
            _ => return Ok(None),
        };
        Ok(Some(Shape { backing, ..*shape }))
    }

    async fn reopen(&self, shape: &Shape, _: ReopenRequest<'_>) -> Result<Shape> {
        Ok(*shape)
    }

    async fn set_active(&self, shape: &Shape, common: NodeOptions, _: Perms) -> Result<Option<Shape>> {
        self.table.state.lock().unwrap().told_active.push(common.active);
        Ok(Some(*shape))
    }

    async fn info(&self, _: &Shape) -> DriverInfo {
        DriverInfo { driver: "overlay", ..DriverInfo::default() }
    }
}
