//! The graph as the control task keeps it: vertices, edges both ways, names. Requests never see it; they have views.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use super::bitmaps::NodeBitmap;
use super::driver::{DynDriver, End};
use super::geometry::Geometry;
use super::id::NodeId;
use super::lane::Root;
use super::node::NodeShared;
use super::options::NodeOptions;
use super::permission::{Perms, Role};
use super::uses::UseGuard;

/// More levels than this are refused: requests recurse down the graph.
pub(crate) const MAX_DEPTH: usize = 64;
/// More vertices than this are refused.
pub(crate) const MAX_VERTICES: usize = 65_536;

/// Tells whoever plugged a root in that the size or the limits of what is below have changed.
pub(crate) type News = Rc<dyn Fn(Geometry)>;

#[derive(Clone)]
pub(crate) struct Vertex {
    /// The node-name, or how messages call a root.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) edges: Vec<Edge>,
    /// One entry an edge that leads here.
    pub(crate) parents: Vec<NodeId>,
    /// What the parents use and share together.
    pub(crate) perms: Perms,
}

#[derive(Clone)]
pub(crate) enum Kind {
    Root { root: Root, news: News },
    Node(NodeParts),
}

#[derive(Clone)]
pub(crate) struct NodeParts {
    pub(crate) body: Arc<dyn DynDriver>,
    pub(crate) shared: Arc<NodeShared>,
    pub(crate) options: NodeOptions,
    pub(crate) geometry: Geometry,
    pub(crate) bitmaps: Vec<NodeBitmap>,
    /// What external locks it holds at the least; shared by all copies.
    pub(crate) held: Rc<Cell<Perms>>,
    /// Its size is one that it shall have, and not yet its driver's.
    pub(crate) is_supposed: bool,
    /// Added by name by an operator, not as somebody's inline child.
    pub(crate) explicit: bool,
    /// See [`NewNode::withheld`](super::edit::NewNode::withheld).
    pub(crate) withheld: bool,
    /// Whoever has a copy, across a pause point too, holds up the closing of the node. Declared last: see [`UseGuard`].
    pub(crate) guard: UseGuard,
}

#[derive(Clone, Debug)]
pub(crate) struct Edge {
    pub(crate) name: Cow<'static, str>,
    pub(crate) to: NodeId,
    pub(crate) role: Role,
    pub(crate) perms: Perms,
    /// How many want it to stay as it is; shared by all copies of the edge.
    pub(crate) frozen: Rc<Cell<u32>>,
}

impl Edge {
    pub(crate) fn new(name: Cow<'static, str>, to: NodeId, role: Role) -> Self {
        Self { name, to, role, perms: Perms::IDLE, frozen: Rc::default() }
    }
}

impl Vertex {
    pub(crate) fn node(&self) -> Option<&NodeParts> {
        match &self.kind {
            Kind::Node(parts) => Some(parts),
            Kind::Root { .. } => None,
        }
    }

    pub(crate) fn root(&self) -> Option<&Root> {
        match &self.kind {
            Kind::Root { root, .. } => Some(root),
            Kind::Node(_) => None,
        }
    }

    /// How messages call it.
    pub(crate) fn described(&self) -> String {
        match &self.kind {
            Kind::Root { .. } => self.name.clone(),
            Kind::Node(_) => format!("node '{}'", self.name),
        }
    }
}

/// All vertices. `NodeId`s rise with time, so the map is in order of creation.
#[derive(Default)]
pub(crate) struct Shape {
    pub(crate) vertices: BTreeMap<NodeId, Vertex>,
    pub(crate) names: HashMap<String, NodeId>,
}

/// Anything that vertices can be looked up in: the shape, or an edit over it.
pub(crate) trait Vertices {
    fn vertex(&self, id: NodeId) -> Option<&Vertex>;

    /// A node's size and limits as they are now: its end may have moved since they were published.
    fn geometry_now(&self, vertex: &Vertex) -> Option<Geometry> {
        let published = vertex.node()?.geometry;
        Some(Geometry { size: self.moving_end(vertex).unwrap_or(published.size), ..published })
    }

    /// See [`Child::moving_end`](super::cx::Child::moving_end).
    fn moving_end(&self, vertex: &Vertex) -> Option<u64> {
        let node = vertex.node()?;
        if node.is_supposed {
            return Some(node.geometry.size);
        }
        match node.body.end() {
            End::Fixed => None,
            End::At(end) => Some(end),
            End::Of(child) => self.moving_end(self.vertex(child.of(&vertex.edges).to)?),
        }
    }

    /// These vertices and all that lead to them.
    fn above(&self, of: impl IntoIterator<Item = NodeId>) -> BTreeSet<NodeId> {
        closure(of, |id| self.vertex(id).map(|vertex| vertex.parents.clone()).unwrap_or_default())
    }

    /// These vertices and all that they lead to, parents before their children.
    fn below(&self, of: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for id in of {
            self.descend(id, &mut seen, &mut order);
        }
        order.reverse();
        order
    }

    /// Depth first; children are pushed before their parents.
    fn descend(&self, id: NodeId, seen: &mut BTreeSet<NodeId>, order: &mut Vec<NodeId>) {
        let Some(vertex) = self.vertex(id) else { return };
        if !seen.insert(id) {
            return;
        }
        for edge in &vertex.edges {
            self.descend(edge.to, seen, order);
        }
        order.push(id);
    }

    /// Levels from here down, this one included.
    fn depth(&self, id: NodeId) -> usize {
        let mut depths: BTreeMap<NodeId, usize> = BTreeMap::new();
        for id in self.below([id]).into_iter().rev() {
            let children = self.vertex(id).into_iter().flat_map(|vertex| &vertex.edges);
            let deepest = children.filter_map(|edge| depths.get(&edge.to)).max().copied().unwrap_or(0);
            depths.insert(id, deepest + 1);
        }
        depths.get(&id).copied().unwrap_or(0)
    }
}

fn closure(of: impl IntoIterator<Item = NodeId>, next: impl Fn(NodeId) -> Vec<NodeId>) -> BTreeSet<NodeId> {
    let mut queue: VecDeque<NodeId> = of.into_iter().collect();
    let mut set = BTreeSet::new();
    while let Some(id) = queue.pop_front() {
        if set.insert(id) {
            queue.extend(next(id));
        }
    }
    set
}

impl Vertices for Shape {
    fn vertex(&self, id: NodeId) -> Option<&Vertex> {
        self.vertices.get(&id)
    }
}
