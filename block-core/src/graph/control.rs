//! The control task's side: the graph itself, and the permit with which one command changes it.
//!
//! A command plans, prepares what may fail or take long (opening, locks), drains what it is going to change, edits
//! and publishes in one synchronous step, and closes what it removed. Commands run side by side; those whose drains
//! overlap queue. A failure at any step undoes what came before.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::bitmaps::NodeBitmap;
use super::blockers::Blocked;
use super::drain::{Drained, PrivateRoot};
use super::driver::{Driver, DriverInfo, DynDriver};
use super::edit::{DrainedSet, GraphEdit, NewNode, NewRoot, Outcome, evaluate};
use super::geometry::Geometry;
use super::id::{ChildId, NodeId};
use super::lane::Root;
use super::node::EventSink;
use super::objects::Objects;
use super::options::NodeOptions;
use super::permission::{PermSet, Perms};
use super::shape::{Kind, NodeParts, Shape, Vertex, Vertices};
use super::stats::Totals;
use super::uses::UseGuard;
use super::view::{Placed, Slot, View};
use crate::base::{Error, IoError, Result, ResultExt};
use crate::rt::Local;
use crate::rt::sync::Notify;

/// The block graph. Lives on the control thread.
pub struct Graph {
    pub(super) shape: RefCell<Shape>,
    events: EventSink,
    /// What is being drained, one set a command.
    pub(super) drains: RefCell<Vec<Rc<BTreeSet<NodeId>>>>,
    /// Those of them whose commands wait for other commands' drains.
    pub(super) held_up: RefCell<Vec<Rc<BTreeSet<NodeId>>>>,
    /// Nodes whose locks are being changed.
    pub(super) locking: RefCell<BTreeSet<NodeId>>,
    /// Roots of the control task's own I/O, until they are empty.
    pub(super) private: RefCell<Vec<PrivateRoot>>,
    /// Something that a command may be waiting for has changed.
    pub(super) changed: Notify,
    names: Cell<u64>,
    objects: Objects,
    /// What is shut out from nodes.
    pub(super) blockers: RefCell<Vec<Rc<Blocked>>>,
}

/// What there is to say about a node without asking its driver.
#[derive(Clone, Debug)]
pub struct NodeReport {
    /// Where it is.
    pub id: NodeId,
    /// Its node-name.
    pub name: String,
    /// The common options in force.
    pub options: NodeOptions,
    /// Size and limits.
    pub geometry: Geometry,
    /// Its dirty bitmaps, the youngest first.
    pub bitmaps: Vec<NodeBitmap>,
    /// Its children by the names that QMP gives the edges.
    pub children: Vec<(Cow<'static, str>, NodeId)>,
    /// The child whose data are its own, if it is a filter.
    pub filtered: Option<NodeId>,
    /// Who uses it, as messages call them.
    pub parents: Vec<String>,
    /// Byte offset, if armed.
    pub write_threshold: Option<u64>,
    /// What went through it.
    pub totals: Totals,
    /// An operator added it by name.
    pub explicit: bool,
    /// What its users use and bear together.
    pub perms: Perms,
}

impl Graph {
    /// An empty graph. `events` is called on I/O threads and may not block.
    pub fn new(events: EventSink) -> Rc<Self> {
        Rc::new(Self {
            shape: RefCell::default(),
            events,
            drains: RefCell::default(),
            held_up: RefCell::default(),
            locking: RefCell::default(),
            private: RefCell::default(),
            changed: Notify::new(),
            names: Cell::new(0),
            objects: Objects::default(),
            blockers: RefCell::default(),
        })
    }

    /// The permit of one command. A command holds one, so that it cannot wait for itself.
    pub fn permit(self: &Rc<Self>) -> Permit {
        Permit { graph: self.clone(), deadline: DRAIN_DEADLINE }
    }

    /// What nodes may refer to by id.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Where events of nodes go.
    pub fn events(&self) -> EventSink {
        self.events.clone()
    }

    /// The node of this name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.shape.borrow().names.get(name).copied()
    }

    /// All nodes in the order in which they were added.
    pub fn nodes(&self) -> Vec<NodeReport> {
        let shape = self.shape.borrow();
        shape.vertices.iter().filter_map(|(id, vertex)| report(&shape, *id, vertex)).collect()
    }

    /// The same, to be looked at one by one: with others in between, some may be gone by then.
    pub fn node_ids(&self) -> Vec<NodeId> {
        let shape = self.shape.borrow();
        shape.vertices.iter().filter(|(_, vertex)| vertex.node().is_some()).map(|(id, _)| *id).collect()
    }

    /// The nodes that an operator added and that nothing stands on.
    pub fn unused(&self) -> Vec<NodeId> {
        let unused = |vertex: &Vertex| vertex.parents.is_empty() && vertex.node().is_some_and(|node| node.explicit);
        self.shape.borrow().vertices.iter().filter(|(_, vertex)| unused(vertex)).map(|(id, _)| *id).collect()
    }

    /// One node.
    pub fn node(&self, id: NodeId) -> Option<NodeReport> {
        let shape = self.shape.borrow();
        report(&shape, id, shape.vertex(id)?)
    }

    /// A node's own name for the child that QMP calls `name`, for an edit of that edge.
    pub fn child(&self, id: NodeId, name: &str) -> Option<ChildId> {
        self.shape.borrow().vertex(id)?.child_named(name)
    }

    /// Where the edge that QMP calls `name` leads: from a node, or from the root of an export.
    pub fn child_node(&self, id: NodeId, name: &str) -> Option<NodeId> {
        let shape = self.shape.borrow();
        let vertex = shape.vertex(id)?;
        Some(vertex.child_named(name)?.of(&vertex.edges).to)
    }

    /// How messages call a vertex.
    pub(super) fn described(&self, id: NodeId) -> String {
        self.vertex(id, Vertex::described).unwrap_or_default()
    }

    /// Arms or disarms the one-shot event on a write that ends past `threshold` bytes. False: no such node.
    pub fn set_write_threshold(&self, id: NodeId, threshold: Option<u64>) -> bool {
        let shape = self.shape.borrow();
        let node = shape.vertex(id).and_then(Vertex::node);
        node.inspect(|node| node.shared.set_threshold(threshold)).is_some()
    }

    /// What the driver says about a node. It may ask the kernel.
    pub async fn info(&self, id: NodeId) -> Option<DriverInfo> {
        let borrowed = Borrowed::of(&self.shape.borrow(), id)?;
        Some(borrowed.body.info().await)
    }

    /// Looks at a node's driver, if it is a `D`: for what only that driver offers.
    pub fn look_into<D: Driver, R>(&self, id: NodeId, look: impl FnOnce(&D) -> R) -> Option<R> {
        let borrowed = Borrowed::of(&self.shape.borrow(), id)?;
        borrowed.body.driver().downcast_ref().map(look)
    }

    /// A fresh name for a node that nobody named (`#block017`).
    pub fn automatic_name(&self) -> String {
        loop {
            let number = self.names.get();
            self.names.set(number + 1);
            let name = format!("#block{number:03}");
            if self.find(&name).is_none() {
                return name;
            }
        }
    }

    // ---- drains of several commands, side by side --------------------------------------------------------------

    /// Waits until no other command drains any of these or what is above them, and reserves them.
    pub(super) async fn reserve(&self, of: &[NodeId]) -> Rc<BTreeSet<NodeId>> {
        self.when(|| {
            let set = self.shape.borrow().above(of.iter().copied());
            let free = self.drains.borrow().iter().all(|other| other.is_disjoint(&set));
            free.then(|| {
                let set = Rc::new(set);
                self.drains.borrow_mut().push(set.clone());
                set
            })
        })
        .await
    }

    /// The same, until the value is dropped.
    pub(super) async fn reserved(self: &Rc<Self>, of: &[NodeId]) -> Reserved {
        Reserved { graph: self.clone(), set: self.reserve(of).await }
    }

    pub(super) fn release(&self, set: &Rc<BTreeSet<NodeId>>) {
        self.drains.borrow_mut().retain(|other| !Rc::ptr_eq(other, set));
        self.changed.notify_all();
    }

    pub(super) fn roots_in(&self, set: &BTreeSet<NodeId>) -> Vec<Root> {
        let shape = self.shape.borrow();
        set.iter().filter_map(|id| shape.vertex(*id)?.root().cloned()).collect()
    }

    /// Waits until `ready` gives something. It is asked again after every change of drains and locks.
    pub(super) async fn when<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            if let Some(value) = ready() {
                return value;
            }
            changed.await;
        }
    }

    // ---- edit and publish: the one exclusive step --------------------------------------------------------------

    /// Checks a change without making it.
    pub(super) fn preview<R>(
        &self,
        set: &BTreeSet<NodeId>,
        change: impl for<'d> FnOnce(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<R>,
    ) -> Result<(R, Outcome)> {
        evaluate(&self.shape.borrow(), &self.events, set, change)
    }

    /// Makes a change and publishes it. `own` is what the caller has drained.
    pub(super) fn commit<R>(
        self: &Rc<Self>,
        own: Option<&Rc<BTreeSet<NodeId>>>,
        change: impl for<'d> FnOnce(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<R>,
    ) -> Result<Committed<R>> {
        let none = Rc::default();
        let set = own.unwrap_or(&none);
        let (value, outcome) = self.preview(set, change)?;
        if self.collides(&outcome, own) {
            return Err(Error::new("Another command is changing the same part of the graph"));
        }
        if let Some(lacking) = self.first_lacking(&outcome) {
            return Err(Error::new(format!("What users of {lacking} need has not been prepared")));
        }
        Ok(self.publish(set, value, outcome))
    }

    fn publish<R>(self: &Rc<Self>, drained: &BTreeSet<NodeId>, value: R, outcome: Outcome) -> Committed<R> {
        // Invariant 1: what requests see changes only under drained roots.
        assert!(outcome.affected_roots.iter().all(|id| drained.contains(id) || outcome.new_roots.contains(id)));
        let mut shape = self.shape.borrow_mut();
        let gone: Vec<_> = outcome.touched.iter().filter(|(_, vertex)| vertex.is_none()).map(|(id, _)| *id).collect();
        let gone: Vec<_> = gone.into_iter().filter_map(|id| shape.vertex(id)?.root().cloned()).collect();
        let retired = outcome.touched.into_iter().filter_map(|(id, vertex)| place(&mut shape, id, vertex)).collect();
        let roots: Vec<_> = drained.iter().chain(&outcome.new_roots).copied().collect();
        for id in roots {
            let Some(root) = shape.vertex(id).and_then(Vertex::root) else { continue };
            root.gate().resume(Some(Arc::new(view_of(&*shape, id))));
            root.poke();
        }
        for root in gone {
            // Threads may keep their lanes; the nodes are not kept with them.
            root.gate().retire(Arc::new(View::new(Vec::new(), PermSet::NONE)));
            root.poke();
        }
        drop(shape);
        outcome.news.iter().for_each(|(news, geometry)| news(*geometry));
        self.changed.notify_all();
        Committed { value, graph: self.clone(), relock: outcome.relock, retired }
    }

    pub(super) fn private_view(&self, node: NodeId) -> View {
        let shape = self.shape.borrow();
        view_from(&*shape, Some(node), PermSet::ALL)
    }
}

fn report(shape: &Shape, id: NodeId, vertex: &Vertex) -> Option<NodeReport> {
    let node = vertex.node()?;
    Some(NodeReport {
        id,
        name: vertex.name.clone(),
        options: node.options,
        geometry: shape.geometry_now(vertex)?,
        bitmaps: node.bitmaps.iter().cloned().collect(),
        children: vertex.edges.iter().map(|edge| (edge.name.clone(), edge.to)).collect(),
        filtered: node.body.filtered().map(|child| child.of(&vertex.edges).to),
        parents: vertex.parents.iter().filter_map(|id| Some(shape.vertex(*id)?.described())).collect(),
        write_threshold: node.shared.threshold(),
        totals: node.shared.totals(),
        explicit: node.explicit,
        perms: vertex.perms,
    })
}

/// Puts a touched vertex in its place; gives what has to be closed if it was removed.
fn place(shape: &mut Shape, id: NodeId, vertex: Option<Vertex>) -> Option<NodeParts> {
    match vertex {
        Some(vertex) => {
            if vertex.node().is_some() {
                shape.names.insert(vertex.name.clone(), id);
            }
            shape.vertices.insert(id, vertex);
            None
        }
        None => match shape.vertices.remove(&id)?.kind {
            Kind::Node(parts) => {
                if shape.names.get(&parts.shared.name) == Some(&id) {
                    shape.names.remove(&parts.shared.name);
                }
                Some(parts)
            }
            Kind::Root { .. } => None,
        },
    }
}

fn view_of(shape: &impl Vertices, root: NodeId) -> View {
    let vertex = shape.vertex(root).expect("a view is made for a root in the graph");
    view_from(shape, vertex.edges.iter().map(|edge| edge.to), vertex.perms.uses)
}

/// The slots of everything below `tops`, breadth first, with slot 0 for the root.
pub(super) fn view_from(shape: &impl Vertices, tops: impl IntoIterator<Item = NodeId>, uses: PermSet) -> View {
    let mut order: Vec<NodeId> = Vec::new();
    let mut slots: BTreeMap<NodeId, u32> = BTreeMap::new();
    let mut slot_of = |id: NodeId, order: &mut Vec<NodeId>| {
        *slots.entry(id).or_insert_with(|| {
            order.push(id);
            u32::try_from(order.len()).expect("a graph has fewer than 2^32 nodes")
        })
    };
    let edges = tops.into_iter().map(|id| slot_of(id, &mut order)).collect();
    let mut view = vec![Slot { node: None, edges }];
    let mut next = 0;
    while let Some(id) = order.get(next).copied() {
        next += 1;
        let vertex = shape.vertex(id).expect("an edge leads to a vertex");
        let parts = vertex.node().expect("nothing leads to a root");
        let edges = vertex.edges.iter().map(|edge| slot_of(edge.to, &mut order)).collect();
        view.push(Slot { node: Some(placed(parts)), edges });
    }
    View::new(view, uses)
}

fn placed(parts: &NodeParts) -> Placed {
    Placed {
        body: parts.body.clone(),
        shared: parts.shared.clone(),
        options: parts.options,
        geometry: parts.geometry,
        bitmaps: parts.recording(),
        kept: parts.kept(),
        _guard: parts.guard.clone(),
    }
}

/// A node's body, held by the control task across a pause point: closing the node waits for it, as for a view.
pub(super) struct Borrowed {
    pub(super) body: Arc<dyn DynDriver>,
    _guard: UseGuard,
}

impl Borrowed {
    pub(super) fn of(shape: &Shape, id: NodeId) -> Option<Self> {
        Some(Self::from(shape.vertex(id)?.node()?))
    }

    pub(super) fn from(parts: &NodeParts) -> Self {
        Self { body: parts.body.clone(), _guard: parts.guard.clone() }
    }
}

/// Nodes, and what is above them, that no other command drains or changes meanwhile.
pub(super) struct Reserved {
    graph: Rc<Graph>,
    set: Rc<BTreeSet<NodeId>>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.graph.release(&self.set);
    }
}

// ---- what a command does -------------------------------------------------------------------------------------------

/// A drain that has not ended after this long is given up, unless the command says otherwise.
const DRAIN_DEADLINE: Duration = Duration::from_secs(60);
/// Before a root is taken out once more.
const PAUSE: Duration = Duration::from_millis(100);

/// One running command's right to change the graph.
pub struct Permit {
    graph: Rc<Graph>,
    deadline: Duration,
}

impl Permit {
    /// The graph that it is for.
    pub fn graph(&self) -> &Rc<Graph> {
        &self.graph
    }

    /// How long this command's drains may take before they are given up.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Stops the roots above `nodes`, hurries what is inside, and waits until they are empty. Dropping the future or
    /// what it gives lets requests in again. After the deadline it gives up, and nothing has changed.
    pub async fn drain(&mut self, nodes: &[NodeId]) -> Result<Drained<'_>> {
        Drained::begin(&self.graph, nodes, self.deadline).await
    }

    /// Changes what no request can walk: adds nodes, removes what nothing uses. Needs no drain; waits for external
    /// locks and for drains of other commands that are in the way.
    pub async fn apply<R>(&mut self, change: impl Fn(&mut GraphEdit<'_>) -> Result<R>) -> Result<R> {
        let locks = self.graph.prepared(None, |edit, _| change(edit)).await?;
        let committed = self.graph.commit(None, |edit, _| change(edit))?;
        // With what it brought: a new node may be removed again before this command is over.
        drop(change);
        drop(locks);
        Ok(committed.close(self).await)
    }

    /// Adds a root over `new.node`.
    pub(crate) async fn add_root(&mut self, new: NewRoot) -> Result<(NodeId, Root)> {
        self.apply(move |edit| edit.add_root(&new)).await
    }

    /// Drains a root and takes it out. This is not given up, however long other commands keep what is below: a root
    /// that nobody owns any more would keep its node, with locks and all, for ever.
    pub(crate) async fn remove_root(&mut self, id: NodeId) {
        while let Err(error) = self.try_remove_root(id).await {
            tracing::warn!("{} is still in the graph: {}; trying again", self.graph.described(id), error.full());
            Local::current().sleep(PAUSE).await;
        }
    }

    async fn try_remove_root(&mut self, id: NodeId) -> Result<()> {
        let drained = self.drain(&[id]).await?;
        let leaving = drained.preview(|edit, set| edit.remove_root(set.owner(id)?))?;
        drained.calm(leaving.calmed).await;
        let committed = drained.write(|edit, set| edit.remove_root(set.owner(id)?))?;
        committed.close(self).await;
        Ok(())
    }

    /// Has `work` done by a user of the node that is there for as long as it takes: permissions and file locks follow from
    /// that, as they do with any other user.
    pub(super) async fn as_user<R>(
        &mut self,
        name: &'static str,
        perms: Perms,
        node: NodeId,
        work: impl AsyncFnOnce(&mut Self, NodeId) -> Result<R>,
    ) -> Result<R> {
        let (user, _) = self.add_root(NewRoot::new(name.into(), perms, node, Rc::new(|_| ()))).await?;
        let result = work(self, user).await;
        self.remove_root(user).await;
        result
    }

    /// Adds one opened node.
    pub async fn add(&mut self, node: NewNode) -> Result<NodeId> {
        self.apply(move |edit| edit.add(node.clone())).await
    }

    /// Takes a node out that nobody uses, with the inline children that only it used. What was written is flushed
    /// first: if that fails, this fails, once. The nodes are closed before this returns, so that their files and locks
    /// are free.
    pub async fn remove(&mut self, id: NodeId) -> Result<()> {
        let mut family = self.graph.family(id);
        let drained = loop {
            let drained = self.drain(&family).await?;
            let now = drained.graph().family(id);
            if now == family {
                break drained;
            }
            // Another command gave the node other children while this one waited.
            family = now;
        };
        drained.check_unused(id)?;
        let finished = drained.finished(id, &family).await;
        if let Err(error) = finished
            && !drained.graph().knows_loss(id, error)
        {
            return Err(error).doing(|| format!("Could not flush {} before removing it", drained.described(id)));
        }
        let leaving = drained.preview(|edit, _| edit.remove(id))?;
        drained.calm(leaving.calmed).await;
        let committed = drained.write(|edit, _| edit.remove(id))?;
        committed.close(self).await;
        Ok(())
    }
}

impl Drained<'_> {
    /// What a node and those that go with it keep in memory alone is written, and stable.
    async fn finished(&self, id: NodeId, family: &[NodeId]) -> Result<(), IoError> {
        let mut result = Ok(());
        for id in family {
            result = result.and(self.own_io(*id).with(async |child| child.finish().await).await);
        }
        result.and(self.own_io(id).with(async |child| child.flush().await).await)
    }
}

impl Graph {
    /// Whoever wants a node gone is told once that what was written to it may be lost, and not kept from it for ever.
    fn knows_loss(&self, id: NodeId, error: IoError) -> bool {
        let told_before = self.vertex(id, |vertex| vertex.node().is_some_and(|node| node.shared.tell_loss()));
        error == IoError::FlushLatched || told_before == Some(true)
    }

    /// A node and the inline children that go with it, parents before children. What lies below a child that was added
    /// by name is none of its business.
    pub(super) fn family(&self, id: NodeId) -> Vec<NodeId> {
        let shape = self.shape.borrow();
        let inline = |id: &NodeId| shape.vertex(*id).and_then(Vertex::node).is_some_and(|node| !node.explicit);
        let children = |id: &NodeId| shape.vertex(*id).into_iter().flat_map(|vertex| &vertex.edges).map(|edge| edge.to);
        let mut family = BTreeSet::new();
        let mut queue = vec![id];
        while let Some(id) = queue.pop() {
            if family.insert(id) {
                queue.extend(children(&id).filter(inline));
            }
        }
        shape.below([id]).into_iter().filter(|id| family.contains(id)).collect()
    }

    /// These and all that they lead to, parents before their children.
    pub(super) fn below(&self, of: Vec<NodeId>) -> Vec<NodeId> {
        self.shape.borrow().below(of)
    }

    /// These and all that lead to them.
    pub(super) fn above(&self, of: &[NodeId]) -> BTreeSet<NodeId> {
        self.shape.borrow().above(of.iter().copied())
    }

    pub(super) fn vertices<T>(&self, mut look: impl FnMut(NodeId, &Vertex) -> T) -> Vec<T> {
        self.shape.borrow().vertices.iter().map(|(id, vertex)| look(*id, vertex)).collect()
    }

    pub(super) fn vertex<T>(&self, id: NodeId, look: impl FnOnce(&Vertex) -> T) -> Option<T> {
        self.shape.borrow().vertex(id).map(look)
    }

    pub(super) fn borrow_body(&self, id: NodeId) -> Option<Borrowed> {
        Borrowed::of(&self.shape.borrow(), id)
    }
}

/// A published change. What it removed still has to be closed, outside the change.
#[must_use = "a removed node still has to be closed, outside the change"]
pub struct Committed<R> {
    value: R,
    graph: Rc<Graph>,
    relock: Vec<NodeId>,
    retired: Vec<NodeParts>,
}

impl<R> Committed<R> {
    /// How many nodes the change removed.
    pub fn removed(&self) -> usize {
        self.retired.len()
    }

    /// Gives back locks that nobody needs any more and closes the removed nodes, as soon as no view names them. Takes
    /// the command's permit: a drain that lasts would hold up what it waits for.
    pub async fn close(self, _permit: &mut Permit) -> R {
        let locks = self.graph.claim_locks(self.relock.into_iter().collect()).await;
        locks.give_back().await;
        for parts in self.retired {
            close_node(parts).await;
        }
        self.value
    }
}

async fn close_node(parts: NodeParts) {
    let NodeParts { body, shared, guard, .. } = parts;
    drop(guard);
    poll_fn(|cx| shared.uses.poll_unused(cx)).await;
    body.close().await;
}
