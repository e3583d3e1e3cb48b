//! One change of the graph, made on a copy of the vertices that it touches, checked as a whole, and then either
//! published or dropped. Nothing in here waits.
//!
//! An edge, a configuration or a root that requests could be using is changed only with the proof that its owner is
//! drained: [`Owner`], which lives no longer than the change it was asked in.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::Arc;

use super::driver::{Body, Driver, DynDriver, End};
use super::geometry::{Geometry, Limits};
use super::id::{ChildId, NodeId};
use super::lane::Root;
use super::node::{EventSink, NodeShared};
use super::options::{DiscardMode, NodeOptions};
use super::permission::{PermSet, Perms, Role};
use super::shape::{Edge, Kind, MAX_DEPTH, MAX_VERTICES, News, NodeParts, Shape, Vertex, Vertices};
use super::view::View;
use crate::base::{Error, Result};

/// A node that is not in the graph yet. Dropping it drops its driver.
#[derive(Clone)]
pub struct NewNode {
    id: NodeId,
    name: String,
    options: NodeOptions,
    explicit: bool,
    withheld: bool,
    body: Arc<dyn DynDriver>,
    edges: Edges,
    /// See [`NodeParts`].
    held: Rc<Cell<Perms>>,
}

/// The edges of a node that is being made.
#[derive(Clone, Default)]
pub struct Edges(Vec<(Cow<'static, str>, NodeId, Role)>);

impl Edges {
    /// An edge to `to`; `name` is what QMP calls it (`file`, `backing`).
    pub fn to(&mut self, name: impl Into<Cow<'static, str>>, to: NodeId, role: Role) -> ChildId {
        self.0.push((name.into(), to, role));
        ChildId(u32::try_from(self.0.len() - 1).expect("a node has few children"))
    }

    pub(crate) fn leads_to(&self, child: ChildId) -> NodeId {
        child.of(&self.0).1
    }
}

impl NewNode {
    /// A node named `name`; `make` declares its edges and gives the opened driver with its first configuration.
    pub fn new<D: Driver>(name: String, options: NodeOptions, make: impl FnOnce(&mut Edges) -> (D, D::Conf)) -> Self {
        let mut edges = Edges::default();
        let (driver, conf) = make(&mut edges);
        let body = Arc::new(Body { driver: Arc::new(driver), conf });
        let held = Rc::new(Cell::new(Perms::IDLE));
        Self { id: NodeId::fresh(), name, options, explicit: true, withheld: false, body, edges, held }
    }

    /// Where it will be, for the edges of those that are added after it in the same change.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The common options in force.
    pub(crate) fn options(&self) -> NodeOptions {
        self.options
    }

    pub(super) fn body(&self) -> &Arc<dyn DynDriver> {
        &self.body
    }

    pub(super) fn children(&self) -> impl Iterator<Item = NodeId> {
        self.edges.0.iter().map(|(_, to, _)| *to)
    }

    /// The node is somebody's inline child: it goes when its last parent goes.
    pub fn inline(self) -> Self {
        Self { explicit: false, ..self }
    }

    /// Nobody may use the node until [`Change::publish`](super::change::Change::publish) has put it where it belongs: whoever
    /// made it can take it away again with its image.
    pub fn withheld(self) -> Self {
        Self { withheld: true, ..self }
    }
}

/// A root that is not in the graph yet.
pub(crate) struct NewRoot {
    id: NodeId,
    name: String,
    perms: Perms,
    node: NodeId,
    news: News,
}

impl NewRoot {
    /// A root over `node` that messages call `name`. `news` is told of other sizes and limits.
    pub(crate) fn new(name: String, perms: Perms, node: NodeId, news: News) -> Self {
        Self { id: NodeId::fresh(), name, perms, node, news }
    }
}

type Brand<'d> = PhantomData<fn(&'d ()) -> &'d ()>;

/// Proof, inside one change, of what is drained.
#[derive(Clone, Copy)]
pub struct DrainedSet<'d> {
    set: &'d BTreeSet<NodeId>,
    brand: Brand<'d>,
}

/// Proof that one vertex is drained: no request is inside any root above it.
#[derive(Clone, Copy)]
pub struct Owner<'d> {
    pub(super) id: NodeId,
    brand: Brand<'d>,
}

impl<'d> DrainedSet<'d> {
    /// The proof for one vertex; an error where this drain does not cover it.
    pub fn owner(self, id: NodeId) -> Result<Owner<'d>> {
        if !self.set.contains(&id) {
            return Err(Error::new("The change needs a node that is not drained"));
        }
        Ok(Owner { id, brand: self.brand })
    }
}

/// See the module's head.
pub struct GraphEdit<'d> {
    pub(super) base: &'d Shape,
    events: &'d EventSink,
    /// Copies of the vertices that this change touches; `None`: removed.
    pub(super) touched: BTreeMap<NodeId, Option<Vertex>>,
    /// Vertices whose users' needs may have changed.
    pub(super) perms_dirty: BTreeSet<NodeId>,
    /// Vertices whose own geometry may have changed.
    pub(super) geometry_dirty: BTreeSet<NodeId>,
    /// Vertices that requests see differently than before.
    pub(super) seen_differently: BTreeSet<NodeId>,
    /// Sizes in bytes that nodes are to have and do not have yet, see [`Permit::resize`](super::control::Permit::resize).
    pub(super) supposed: BTreeMap<NodeId, u64>,
    /// Nodes that have noted where their ends have moved to, see [`Self::catch_up`].
    pub(super) caught_up: BTreeSet<NodeId>,
    new_roots: Vec<NodeId>,
    /// Nodes that an edge has led to and leads to no more.
    cut_off: Vec<NodeId>,
    /// Those of them for which another node has come, with that one.
    pub(super) replaced: Vec<(NodeId, NodeId)>,
    brand: Brand<'d>,
}

impl Vertices for GraphEdit<'_> {
    fn moving_end(&self, vertex: &Vertex) -> Option<u64> {
        match vertex.node()?.body.end() {
            End::Fixed => None,
            End::At(end) => Some(end),
            End::Of(child) => {
                let to = child.of(&vertex.edges).to;
                self.supposed.get(&to).copied().or_else(|| self.moving_end(self.vertex(to)?))
            }
        }
    }

    fn vertex(&self, id: NodeId) -> Option<&Vertex> {
        match self.touched.get(&id) {
            Some(touched) => touched.as_ref(),
            None => self.base.vertex(id),
        }
    }
}

impl<'d> GraphEdit<'d> {
    /// Adds a node. Its name must be free and its children must exist.
    pub fn add(&mut self, new: NewNode) -> Result<NodeId> {
        if self.find(&new.name).is_some() {
            return Err(Error::new(format!("Duplicate nodes with node-name='{}'", new.name)));
        }
        let shared = Arc::new(NodeShared::new(new.name.clone(), self.events.clone()));
        let placeholder = Geometry { size: 0, limits: Limits::ANY };
        let guard = shared.uses.guard();
        let (body, options, explicit, withheld) = (new.body, new.options, new.explicit, new.withheld);
        let bitmaps = body.bitmaps();
        let parts = NodeParts {
            body,
            shared,
            options,
            geometry: placeholder,
            bitmaps,
            held: new.held,
            is_supposed: false,
            explicit,
            withheld,
            guard,
        };
        let id = self.insert(new.id, new.name, Kind::Node(parts), new.edges.0)?;
        self.geometry_dirty.insert(id);
        if self.depth(id) > MAX_DEPTH {
            return Err(Error::new(format!("The graph may not be deeper than {MAX_DEPTH} nodes")));
        }
        Ok(id)
    }

    pub(crate) fn add_root(&mut self, new: &NewRoot) -> Result<(NodeId, Root)> {
        let root = Root::new(new.name.clone(), Arc::new(View::new(Vec::new(), PermSet::NONE)));
        let kind = Kind::Root { root: root.clone(), news: new.news.clone() };
        let id = self.insert(new.id, new.name.clone(), kind, vec![("root".into(), new.node, Role::Filtered)])?;
        let vertex = self.vertex_mut(id)?;
        vertex.edges[0].perms = new.perms;
        vertex.perms = new.perms;
        self.new_roots.push(id);
        Ok((id, root))
    }

    fn insert(
        &mut self,
        id: NodeId,
        name: String,
        kind: Kind,
        edges: Vec<(Cow<'static, str>, NodeId, Role)>,
    ) -> Result<NodeId> {
        if self.base.vertices.len() + self.touched.len() >= MAX_VERTICES {
            return Err(Error::new(format!("There may not be more than {MAX_VERTICES} nodes and exports")));
        }
        for (_, child, _) in &edges {
            self.vertex_mut(*child)?.parents.push(id);
            self.perms_dirty.insert(*child);
        }
        let edges = edges.into_iter().map(|(name, to, role)| Edge::new(name, to, role)).collect();
        self.touched.insert(id, Some(Vertex { name, kind, edges, parents: Vec::new(), perms: Perms::IDLE }));
        self.perms_dirty.insert(id);
        Ok(id)
    }

    /// The same driver under a new configuration and new common options: reopen, resize.
    pub(crate) fn reconfigure(
        &mut self,
        owner: Owner<'d>,
        new: Arc<dyn DynDriver>,
        options: NodeOptions,
    ) -> Result<()> {
        self.catch_up(owner.id)?;
        let vertex = self.vertex_mut(owner.id)?;
        let Kind::Node(parts) = &mut vertex.kind else { return Err(no_such_node()) };
        assert!(Arc::ptr_eq(&parts.body.driver(), &new.driver()), "a configuration belongs to its driver");
        parts.body = new;
        parts.options = options;
        self.perms_dirty.insert(owner.id);
        self.geometry_dirty.insert(owner.id);
        self.seen_differently.insert(owner.id);
        Ok(())
    }

    /// Takes a node out. Whatever leads to it has to lead elsewhere at the end of the change, or the change fails.
    pub fn remove(&mut self, id: NodeId) -> Result<()> {
        if self.vertex(id).is_none_or(|vertex| vertex.node().is_none()) {
            return Err(no_such_node());
        }
        self.take_out(id)
    }

    /// Takes a drained root out.
    pub(crate) fn remove_root(&mut self, owner: Owner<'d>) -> Result<()> {
        assert!(self.vertex(owner.id).is_some_and(|vertex| vertex.root().is_some()), "only roots are removed so");
        self.take_out(owner.id)
    }

    fn take_out(&mut self, id: NodeId) -> Result<()> {
        let children: Vec<_> = self.vertex_mut(id)?.edges.iter().map(|edge| edge.to).collect();
        for child in children {
            self.unlink(child, id)?;
        }
        self.touched.insert(id, None);
        Ok(())
    }

    /// Who in the graph has this node-name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        let added = self.touched.iter().find_map(|(id, vertex)| {
            let vertex = vertex.as_ref()?;
            (vertex.node().is_some() && vertex.name == name).then_some(*id)
        });
        added.or_else(|| self.base.names.get(name).copied().filter(|id| self.vertex(*id).is_some()))
    }

    pub(super) fn unlink(&mut self, child: NodeId, parent: NodeId) -> Result<()> {
        let parents = &mut self.vertex_mut(child)?.parents;
        let at = parents.iter().position(|id| *id == parent).expect("edges are kept both ways");
        parents.swap_remove(at);
        self.perms_dirty.insert(child);
        self.cut_off.push(child);
        Ok(())
    }

    pub(super) fn vertex_mut(&mut self, id: NodeId) -> Result<&mut Vertex> {
        if !self.touched.contains_key(&id) {
            let copy = self.base.vertex(id).ok_or_else(no_such_node)?.clone();
            self.touched.insert(id, Some(copy));
        }
        self.touched.get_mut(&id).and_then(Option::as_mut).ok_or_else(no_such_node)
    }

    /// An earlier step of the same edit gave the node another configuration.
    pub(super) fn is_reconfigured(&self, id: NodeId) -> bool {
        let before = self.base.vertex(id).and_then(Vertex::node);
        let now = self.vertex(id).and_then(Vertex::node);
        before.zip(now).is_some_and(|(before, now)| !Arc::ptr_eq(&before.body, &now.body))
    }

    pub(super) fn body(&self, id: NodeId) -> Result<Arc<dyn DynDriver>> {
        Ok(self.vertex(id).and_then(Vertex::node).ok_or_else(no_such_node)?.body.clone())
    }

    pub(super) fn name(&self, id: NodeId) -> &str {
        self.vertex(id).map(|vertex| &*vertex.name).unwrap_or_default()
    }

    pub(super) fn described(&self, id: NodeId) -> String {
        self.vertex(id).map(Vertex::described).unwrap_or_default()
    }
}

/// See [`Limits::backed`].
fn is_backed(vertex: &Vertex, children: &[Geometry]) -> bool {
    let filtered = vertex.node().and_then(|node| node.body.filtered());
    filtered.is_some_and(|child| child.of(children).limits.backed)
        || vertex.edges.iter().any(|edge| edge.role == Role::Cow)
}

/// What parents may count on: a node that ignores discards frees nothing, whatever is below it.
fn under_options(geometry: Geometry, options: NodeOptions) -> Geometry {
    let frees = options.discard == DiscardMode::Unmap;
    let own = geometry.limits;
    let limits = Limits { discard: own.discard && frees, unmap_zeroes: own.unmap_zeroes && frees, ..own };
    Geometry { limits, ..geometry }
}

pub(super) fn no_such_node() -> Error {
    Error::new("There is no such node")
}

// ---- the check of the whole ------------------------------------------------------------------------------------

/// A change that has been checked as a whole and that nobody has seen yet.
pub(crate) struct Outcome {
    pub(crate) touched: BTreeMap<NodeId, Option<Vertex>>,
    /// Nodes that stay and whose users now use or bear something else.
    pub(crate) relock: Vec<NodeId>,
    /// Roots above something that requests see differently.
    pub(crate) affected_roots: BTreeSet<NodeId>,
    pub(crate) new_roots: Vec<NodeId>,
    /// What has to be seen to before requests see the change.
    pub(crate) leaving: Leaving,
    /// Roots that have to be told, with what they stand on now.
    pub(crate) news: Vec<(News, Geometry)>,
}

/// Nodes that some of their users leave.
#[derive(Default)]
pub(crate) struct Leaving {
    /// Those that were written, and that are used no more where another one has come, with that one.
    pub(crate) replaced: Vec<(NodeId, NodeId)>,
    /// Those that users could make grow, and no longer can.
    pub(crate) calmed: Vec<NodeId>,
    /// Nodes that go.
    pub(crate) removed: Vec<NodeId>,
}

/// Runs a change on a copy and checks the result: links, permissions, geometry.
pub(crate) fn evaluate<'d, R>(
    base: &'d Shape,
    events: &'d EventSink,
    set: &'d BTreeSet<NodeId>,
    change: impl FnOnce(&mut GraphEdit<'d>, DrainedSet<'d>) -> Result<R>,
) -> Result<(R, Outcome)> {
    let mut edit = GraphEdit {
        base,
        events,
        touched: BTreeMap::new(),
        perms_dirty: BTreeSet::new(),
        geometry_dirty: BTreeSet::new(),
        seen_differently: BTreeSet::new(),
        supposed: BTreeMap::new(),
        caught_up: BTreeSet::new(),
        new_roots: Vec::new(),
        cut_off: Vec::new(),
        replaced: Vec::new(),
        brand: PhantomData,
    };
    let value = change(&mut edit, DrainedSet { set, brand: PhantomData })?;
    edit.remove_orphans()?;
    edit.check_removed()?;
    edit.check_withheld()?;
    edit.check_activity()?;
    edit.refresh_permissions()?;
    edit.refresh_geometry()?;
    edit.check_tails()?;
    Ok((value, edit.finish()))
}

impl GraphEdit<'_> {
    /// An inline child goes when its last parent goes.
    fn remove_orphans(&mut self) -> Result<()> {
        let mut next = 0;
        while let Some(id) = self.cut_off.get(next).copied() {
            next += 1;
            let orphaned =
                |vertex: &Vertex| vertex.parents.is_empty() && vertex.node().is_some_and(|node| !node.explicit);
            if self.vertex(id).is_some_and(orphaned) {
                self.take_out(id)?;
            }
        }
        Ok(())
    }

    fn check_removed(&self) -> Result<()> {
        for (id, _) in self.touched.iter().filter(|(_, vertex)| vertex.is_none()) {
            let user = self.touched.values().flatten().find(|vertex| vertex.edges.iter().any(|edge| edge.to == *id));
            let user = user.or_else(|| {
                let parents = self.base.vertex(*id).map(|vertex| &vertex.parents[..]).unwrap_or_default();
                parents.iter().filter(|id| !self.touched.contains_key(id)).find_map(|id| self.base.vertex(*id))
            });
            if let Some(user) = user {
                let name = self.base.vertex(*id).map(Vertex::described).unwrap_or_default();
                return Err(Error::new(format!("{name} is in use by {}", user.described())));
            }
        }
        Ok(())
    }

    /// Whoever begins to use a node touches it.
    fn check_withheld(&self) -> Result<()> {
        let is_withheld = |vertex: &Vertex| vertex.node().is_some_and(|node| node.withheld);
        let mut withheld = self.touched.values().flatten().filter(|vertex| is_withheld(vertex));
        match withheld.find(|vertex| !vertex.parents.is_empty()) {
            None => Ok(()),
            Some(vertex) => {
                let name = &vertex.name;
                Err(Error::new(format!("Node '{name}' is busy: it is being made the overlay of another node")))
            }
        }
    }

    /// Nobody active stands on something inactive.
    fn check_activity(&self) -> Result<()> {
        let touched = self.touched.iter().filter_map(|(id, vertex)| Some((*id, vertex.as_ref()?)));
        for (id, vertex) in touched {
            for edge in &vertex.edges {
                self.check_active(vertex, edge)?;
            }
            for parent in vertex.parents.iter().filter_map(|parent| self.vertex(*parent)) {
                for edge in parent.edges.iter().filter(|edge| edge.to == id) {
                    self.check_active(parent, edge)?;
                }
            }
        }
        Ok(())
    }

    fn check_active(&self, parent: &Vertex, edge: &Edge) -> Result<()> {
        let is_active = |vertex: &Vertex| vertex.node().map(|node| node.options.active);
        let child = self.vertex(edge.to).ok_or_else(no_such_node)?;
        if edge.role == Role::Reference || is_active(parent) != Some(true) || is_active(child) != Some(false) {
            return Ok(());
        }
        let (child, parent, edge) = (&child.name, &parent.name, &edge.name);
        Err(Error::new(format!("Inactive '{child}' can't be a {edge} child of active '{parent}'")))
    }

    /// From the changed nodes up, children first.
    fn refresh_geometry(&mut self) -> Result<()> {
        let dirty = std::mem::take(&mut self.geometry_dirty);
        let mut changed = dirty.clone();
        let above = self.above(dirty);
        let order: Vec<_> =
            self.below(above.iter().copied()).into_iter().rev().filter(|id| above.contains(id)).collect();
        for id in order {
            let vertex = self.vertex(id).ok_or_else(no_such_node)?;
            let Some(node) = vertex.node() else { continue };
            if !changed.contains(&id) && !vertex.edges.iter().any(|edge| changed.contains(&edge.to)) {
                continue;
            }
            let children = self.child_geometries(vertex);
            let own = node.body.geometry(&children)?;
            let limits = Limits { backed: is_backed(vertex, &children), ..own.limits };
            let geometry = under_options(Geometry { limits, ..own }, node.options);
            if geometry != node.geometry {
                let Kind::Node(node) = &mut self.vertex_mut(id)?.kind else { unreachable!("it was a node above") };
                node.geometry = geometry;
                node.resize_bitmaps()?;
                changed.insert(id);
                self.seen_differently.insert(id);
            }
        }
        Ok(())
    }

    fn child_geometries(&self, vertex: &Vertex) -> Vec<Geometry> {
        let of = |id: NodeId| {
            let now = self.geometry_now(self.vertex(id)?)?;
            Some(Geometry { size: self.supposed.get(&id).copied().unwrap_or(now.size), ..now })
        };
        vertex.edges.iter().filter_map(|edge| of(edge.to)).collect()
    }

    fn finish(self) -> Outcome {
        let above = self.above(self.seen_differently.iter().copied());
        let is_root = |id: &NodeId| self.vertex(*id).is_some_and(|vertex| vertex.root().is_some());
        let affected_roots = above.into_iter().filter(is_root).collect();
        let news = self.news(&affected_roots);
        let relock = self.touched.iter().filter_map(|(id, vertex)| {
            let perms = vertex.as_ref()?.node().map(|_| vertex.as_ref().map(|vertex| vertex.perms))?;
            let before = self.base.vertex(*id).map(|vertex| vertex.perms);
            (perms != Some(before.unwrap_or(Perms::IDLE))).then_some(*id)
        });
        let relock = relock.collect();
        let written = |id: &NodeId| {
            let writes = PermSet::WRITE | PermSet::WRITE_UNCHANGED;
            self.base.vertex(*id).is_some_and(|vertex| !(vertex.perms.uses & writes).is_empty())
        };
        let replaced = self.replaced.iter().copied().filter(|(old, _)| written(old)).collect();
        let calmed = self.touched.iter().filter(|(id, now)| self.is_calmed(**id, now.as_ref())).map(|(id, _)| *id);
        let gone = |id: &NodeId| self.base.vertex(*id).is_some_and(|vertex| vertex.node().is_some());
        let removed = self.touched.iter().filter(|(id, now)| now.is_none() && gone(id)).map(|(id, _)| *id).collect();
        let leaving = Leaving { replaced, calmed: calmed.collect(), removed };
        Outcome { relock, affected_roots, news, leaving, new_roots: self.new_roots, touched: self.touched }
    }

    /// A node that stays, and that nobody can make grow any more by writing.
    fn is_calmed(&self, id: NodeId, now: Option<&Vertex>) -> bool {
        let grows =
            |vertex: &Vertex| vertex.node().is_some() && vertex.perms.uses.contains(PermSet::WRITE | PermSet::RESIZE);
        self.base.vertex(id).is_some_and(grows) && now.is_some_and(|now| !grows(now))
    }

    /// Roots that stand on something of another size or with other limits than before.
    fn news(&self, roots: &BTreeSet<NodeId>) -> Vec<(News, Geometry)> {
        let told = roots.iter().filter_map(|id| {
            let vertex = self.vertex(*id)?;
            let Kind::Root { news, .. } = &vertex.kind else { return None };
            let top = vertex.edges.first()?.to;
            let now = self.vertex(top)?.node()?.geometry;
            let stood_on = self.base.vertex(*id).and_then(|root| root.edges.first());
            let before = stood_on.and_then(|edge| self.base.vertex(edge.to)?.node()).map(|node| node.geometry);
            (before != Some(now)).then(|| (news.clone(), now))
        });
        told.collect()
    }
}
