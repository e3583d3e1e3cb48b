//! The changes of the graph's shape that commands are made of, each a [`Step`] of a transaction.

use std::borrow::Cow;

use super::blockers::Operation;
use super::control::{Graph, Permit};
use super::drain::Drained;
use super::driver::ChildChange;
use super::edit::{DrainedSet, GraphEdit};
use super::id::{ChildId, NodeId};
use super::permission::Role;
use super::shape::{Kind, NodeParts, Vertices};
use super::transaction::{Pending, Step};
use crate::base::{Error, Result};

/// One change of the shape.
#[derive(Clone, Debug)]
pub enum Change {
    /// All that leads to `from` shall lead to `to`, but for `to` itself and for what only refers to `from` by name.
    Replace {
        /// What is replaced. It stays in the graph.
        from: NodeId,
        /// What takes its place.
        to: NodeId,
    },
    /// One edge that is there shall lead elsewhere.
    Lead {
        /// Where the edge starts: a node, or the root of an export.
        parent: NodeId,
        /// What QMP calls it.
        child: Cow<'static, str>,
        /// Where it shall lead.
        to: NodeId,
    },
    /// One edge shall lead elsewhere, come, or go.
    Repoint {
        /// Where the edge starts.
        parent: NodeId,
        /// What QMP calls it.
        child: Cow<'static, str>,
        /// Where it shall lead, and as what if it is new. `None`: nowhere.
        to: Option<(NodeId, Role)>,
    },
    /// A node with any number of children (quorum) gets one more.
    AddChild {
        /// The node.
        parent: NodeId,
        /// Its new child; nobody uses it yet.
        child: NodeId,
    },
    /// A node with any number of children loses one.
    RemoveChild {
        /// The node.
        parent: NodeId,
        /// What QMP calls the edge.
        child: Cow<'static, str>,
    },
}

impl Change {
    /// `overlay`, which nobody uses and which has no backing node, shall stand on `base`, and all users of `base` shall use
    /// it: two steps of a transaction.
    pub fn append(overlay: NodeId, base: NodeId) -> Vec<Box<dyn Step>> {
        let put = Self::Replace { from: base, to: overlay };
        vec![Box::new(Standing { overlay, base, publishes: false }), Box::new(put)]
    }

    /// The same for who made the overlay, and withheld it from others until then.
    pub fn publish(overlay: NodeId, base: NodeId) -> Vec<Box<dyn Step>> {
        let put = Self::Replace { from: base, to: overlay };
        vec![Box::new(Standing { overlay, base, publishes: true }), Box::new(put)]
    }
}

impl Step for Change {
    fn drains(&self, graph: &Graph) -> Result<Vec<NodeId>> {
        match self {
            Self::Replace { from, .. } => {
                graph.check_operation(*from, Operation::Replace)?;
                Ok(vec![*from])
            }
            Self::Lead { parent, child, .. } | Self::Repoint { parent, child, .. } => {
                if let Some(node) = graph.child_node(*parent, child) {
                    graph.check_operation(node, Operation::Replace)?;
                }
                Ok(vec![*parent])
            }
            Self::AddChild { parent, .. } | Self::RemoveChild { parent, .. } => Ok(vec![*parent]),
        }
    }

    fn lets_go(&self) -> bool {
        matches!(self, Self::RemoveChild { .. })
    }

    fn prepare<'a>(&'a mut self, drained: &'a mut Drained<'_>) -> Pending<'a, Result<()>> {
        Box::pin(async {
            let Self::RemoveChild { parent, child } = &*self else { return Ok(()) };
            // What cannot be done is said before anything is flushed.
            drained.preview(|edit, set| self.edit(edit, set))?;
            drained.flush_child(*parent, child).await
        })
    }

    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
        match self {
            Self::Replace { from, to } => edit.replace(set, *from, *to),
            Self::Lead { parent, child, to } => {
                edit.set_edge(set.owner(*parent)?, edit.named_child(*parent, child)?, *to)
            }
            Self::Repoint { parent, child, to } => edit.repoint(set.owner(*parent)?, child, *to),
            Self::AddChild { parent, child } => edit.add_next_child(set.owner(*parent)?, *child),
            Self::RemoveChild { parent, child } => {
                edit.remove_child(set.owner(*parent)?, edit.named_child(*parent, child)?)
            }
        }
    }
}

impl Drained<'_> {
    /// Makes stable what was written to a child. One that cannot be flushed may be the very reason for taking it away,
    /// and whoever lets a child go has its data elsewhere.
    async fn flush_child(&mut self, parent: NodeId, name: &str) -> Result<()> {
        let Some(child) = self.graph().child(parent, name) else { return Ok(()) };
        let flushed = self.exclusive(parent)?.with(async |node| node.cx().child(child).flush().await).await;
        if let Err(error) = flushed {
            tracing::warn!("flushing the child '{name}' of {} before it is removed: {error}", self.described(parent));
        }
        Ok(())
    }
}

impl Permit {
    /// One more child for a node that has any number of them.
    pub async fn add_child(&mut self, parent: NodeId, child: NodeId) -> Result<()> {
        self.transact(vec![Box::new(Change::AddChild { parent, child })]).await
    }

    /// Takes the child behind the edge `name` from a node that has any number of them. If it was defined inside its
    /// parent it goes; its file and its lock are free when this returns.
    pub async fn remove_child(&mut self, parent: NodeId, name: &str) -> Result<()> {
        let child = name.to_owned().into();
        self.transact(vec![Box::new(Change::RemoveChild { parent, child })]).await
    }

    /// Lets all users of `below` go through `filter`, a node of the graph that leads to `below` already.
    pub async fn insert_filter(&mut self, filter: NodeId, below: NodeId) -> Result<()> {
        self.transact(vec![Box::new(Filtering { filter, inserted_above: Some(below) })]).await
    }

    /// Lets all users of `filter` use the node that it filters. The filter stays in the graph, unused.
    pub async fn remove_filter(&mut self, filter: NodeId) -> Result<()> {
        self.transact(vec![Box::new(Filtering { filter, inserted_above: None })]).await
    }

    /// Lets all that leads to `from` lead to `to`.
    pub async fn replace_node(&mut self, from: NodeId, to: NodeId) -> Result<()> {
        self.transact(vec![Box::new(Change::Replace { from, to })]).await
    }

    /// Makes `overlay`, which has no backing node, stand on `base` and lets all users of `base` use it.
    pub async fn append(&mut self, overlay: NodeId, base: NodeId) -> Result<()> {
        self.transact(Change::append(overlay, base)).await
    }

    /// Lets `overlay` stand on another node, or on none.
    pub async fn set_backing(&mut self, overlay: NodeId, base: Option<NodeId>) -> Result<()> {
        let to = base.map(|base| (base, Role::Cow));
        self.transact(vec![Box::new(Change::Repoint { parent: overlay, child: BACKING.into(), to })]).await
    }
}

/// A filter that comes between a node and its users, or goes from there. What it filters is looked up under the drain.
struct Filtering {
    filter: NodeId,
    /// The node that it has to filter, and whose users go through it. `None`: it goes.
    inserted_above: Option<NodeId>,
}

impl Filtering {
    fn change(&self, graph: &impl Vertices) -> Result<Change> {
        let vertex = graph.vertex(self.filter).ok_or_else(super::edit::no_such_node)?;
        let child = vertex.node().and_then(|node| node.body.filtered());
        let child = child.ok_or_else(|| Error::new(format!("{} is not a filter", vertex.described())))?;
        let below = child.of(&vertex.edges).to;
        match self.inserted_above {
            None => Ok(Change::Replace { from: self.filter, to: below }),
            Some(wanted) if wanted == below => Ok(Change::Replace { from: below, to: self.filter }),
            Some(_) => Err(Error::new(format!("{} is no filter above the node", vertex.described()))),
        }
    }
}

impl Step for Filtering {
    fn drains(&self, graph: &Graph) -> Result<Vec<NodeId>> {
        let change = self.change(&*graph.shape.borrow())?;
        change.drains(graph)
    }

    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
        self.change(edit)?.edit(edit, set)
    }
}

/// An overlay that has no backing node gets one.
struct Standing {
    overlay: NodeId,
    base: NodeId,
    /// It may have been withheld from others, and is no more.
    publishes: bool,
}

impl Step for Standing {
    fn drains(&self, graph: &Graph) -> Result<Vec<NodeId>> {
        self.check(&*graph.shape.borrow())?;
        Ok(vec![self.overlay])
    }

    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
        // Again: an earlier step of the transaction may have used either.
        self.check(edit)?;
        if let Kind::Node(parts) = &mut edit.vertex_mut(self.overlay)?.kind {
            parts.withheld = false;
        }
        edit.add_child(set.owner(self.overlay)?, BACKING, self.base, Role::Cow)
    }
}

impl Standing {
    fn check(&self, graph: &impl Vertices) -> Result<()> {
        check_free_base(graph, self.base)?;
        check_overlay(graph, self.overlay, self.base, self.publishes)
    }
}

/// A node can become the overlay of another one. In QEMU's words, as operators know them.
fn check_overlay(graph: &impl Vertices, overlay: NodeId, base: NodeId, is_own: bool) -> Result<()> {
    let vertex = graph.vertex(overlay).ok_or_else(super::edit::no_such_node)?;
    let NodeParts { body, withheld, .. } = vertex.node().ok_or_else(super::edit::no_such_node)?;
    if !vertex.parents.is_empty() || (*withheld && !is_own) {
        return Err(Error::new("The overlay is already in use"));
    }
    if body.with_children(ChildChange::Comes(BACKING, ChildId::number(vertex.edges.len())))?.is_none() {
        return Err(Error::new("The overlay does not support backing images"));
    }
    if vertex.child_named(BACKING).is_some() {
        return Err(Error::new("The overlay already has a backing image"));
    }
    if overlay == base { Err(Error::new("The overlay is already in use")) } else { Ok(()) }
}

/// Nothing stands on a node already: what users of it changed would be seen there.
fn check_free_base(graph: &impl Vertices, base: NodeId) -> Result<()> {
    let vertex = graph.vertex(base).ok_or_else(super::edit::no_such_node)?;
    let parents = vertex.parents.iter().filter_map(|id| graph.vertex(*id));
    let mut standing =
        parents.filter(|parent| parent.edges.iter().any(|edge| edge.to == base && edge.role == Role::Cow));
    match standing.next() {
        None => Ok(()),
        Some(overlay) => {
            let (name, overlay) = (&vertex.name, &overlay.name);
            Err(Error::new(format!("Node '{name}' is busy: node is used as backing hd of '{overlay}'")))
        }
    }
}

impl Graph {
    /// Fails where something stands on a node already, so that it cannot get an overlay.
    pub fn check_free_base(&self, base: NodeId) -> Result<()> {
        check_free_base(&*self.shape.borrow(), base)
    }
}

/// What QMP calls the edge to what an overlay stands on.
const BACKING: &str = "backing";
