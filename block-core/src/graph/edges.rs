//! What a change does to edges: lead elsewhere, come, go. Only below owners that are proven drained.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::driver::ChildChange;
use super::edit::{DrainedSet, GraphEdit, Owner, no_such_node};
use super::id::{ChildId, NodeId};
use super::permission::Role;
use super::shape::{Edge, MAX_DEPTH, Vertex, Vertices};
use crate::base::{Error, Result};

impl<'d> GraphEdit<'d> {
    /// Lets `child` of a drained owner lead to another node.
    pub fn set_edge(&mut self, owner: Owner<'d>, child: ChildId, to: NodeId) -> Result<()> {
        let Edge { name, to: old, .. } = self.thawed(owner.id, child)?;
        self.check_descent(owner.id, &name, to)?;
        self.catch_up(owner.id)?;
        self.vertex_mut(to)?.parents.push(owner.id);
        self.unlink(old, owner.id)?;
        self.replaced.push((old, to));
        self.vertex_mut(owner.id)?.edges[child.0 as usize].to = to;
        self.perms_dirty.extend([owner.id, to]);
        self.geometry_dirty.insert(owner.id);
        self.seen_differently.insert(owner.id);
        self.check_depth(owner.id)
    }

    /// One more child for a drained owner whose driver takes them as they come. `name` is what QMP calls the edge.
    pub fn add_child(
        &mut self,
        owner: Owner<'d>,
        name: impl Into<Cow<'static, str>>,
        to: NodeId,
        role: Role,
    ) -> Result<()> {
        let name = name.into();
        self.check_descent(owner.id, &name, to)?;
        self.vertex_mut(to)?.parents.push(owner.id);
        let edges = &mut self.vertex_mut(owner.id)?.edges;
        let child = ChildId(u32::try_from(edges.len()).expect("a node has few children"));
        edges.push(Edge::new(name.clone(), to, role));
        self.perms_dirty.insert(to);
        self.change_children(owner, ChildChange::Comes(&name, child))?;
        self.check_depth(owner.id)
    }

    /// One more child for a drained owner that has any number of them: the driver says what it is called.
    pub fn add_next_child(&mut self, owner: Owner<'d>, to: NodeId) -> Result<()> {
        let Some((name, role)) = self.body(owner.id)?.next_child()? else {
            return Err(Error::new(format!("The node {} does not support adding a child", self.name(owner.id))));
        };
        if self.vertex(to).is_some_and(|vertex| !vertex.parents.is_empty()) {
            return Err(Error::new(format!("The node {} already has a parent", self.name(to))));
        }
        self.add_child(owner, name, to, role)
    }

    /// Takes a child from a drained owner whose driver lets them go. The children after it move up.
    pub fn remove_child(&mut self, owner: Owner<'d>, child: ChildId) -> Result<()> {
        let Edge { name, to: gone, .. } = self.thawed(owner.id, child)?;
        self.vertex_mut(owner.id)?.edges.remove(child.0 as usize);
        self.unlink(gone, owner.id)?;
        self.change_children(owner, ChildChange::Goes(&name, child))
    }

    /// Lets the child that QMP calls `name` lead to another node, or to none; it need not be there before.
    pub fn repoint(&mut self, owner: Owner<'d>, name: &str, to: Option<(NodeId, Role)>) -> Result<()> {
        match (self.child_named(owner.id, name), to) {
            (Some(child), Some((to, _))) => self.set_edge(owner, child, to),
            (Some(child), None) => self.remove_child(owner, child),
            (None, Some((to, role))) => self.add_child(owner, name.to_owned(), to, role),
            (None, None) => Ok(()),
        }
    }

    /// Lets all that leads to `from` lead to `to`: but for `to` itself, so that a filter above `from` is inserted, and
    /// for what only refers to `from` by name.
    pub fn replace(&mut self, set: DrainedSet<'d>, from: NodeId, to: NodeId) -> Result<()> {
        let vertex = self.vertex(from).ok_or_else(no_such_node)?;
        let parents: BTreeSet<_> = vertex.parents.iter().copied().filter(|parent| *parent != to).collect();
        for parent in parents {
            for child in self.edges_between(parent, from) {
                self.set_edge(set.owner(parent)?, child, to)?;
            }
        }
        Ok(())
    }

    fn edges_between(&self, parent: NodeId, child: NodeId) -> Vec<ChildId> {
        let edges = self.vertex(parent).map(|vertex| &vertex.edges[..]).unwrap_or_default();
        let numbered = (0..).map(ChildId).zip(edges);
        numbered.filter(|(_, edge)| edge.to == child && edge.role != Role::Reference).map(|(id, _)| id).collect()
    }

    fn child_named(&self, parent: NodeId, name: &str) -> Option<ChildId> {
        self.vertex(parent)?.child_named(name)
    }

    /// The child that QMP calls `name` and that has to be there.
    pub(super) fn named_child(&self, parent: NodeId, name: &str) -> Result<ChildId> {
        let missing = || match self.vertex(parent) {
            Some(_) => Error::new(format!("Node '{}' does not have child '{name}'", self.name(parent))),
            None => Error::new("The user of the node was removed while this command waited"),
        };
        self.child_named(parent, name).ok_or_else(missing)
    }

    /// An edge that nobody wants to stay as it is.
    fn thawed(&self, parent: NodeId, child: ChildId) -> Result<Edge> {
        let vertex = self.vertex(parent).ok_or_else(no_such_node)?;
        let edge = vertex.edges.get(child.0 as usize).ok_or_else(|| Error::new("There is no such child"))?;
        if edge.frozen.get() > 0 {
            let (from, to) = (vertex.described(), self.described(edge.to));
            return Err(Error::new(format!("Cannot change frozen '{}' link from {from} to {to}", edge.name)));
        }
        Ok(edge.clone())
    }

    /// Tells the driver which children it has now.
    fn change_children(&mut self, owner: Owner<'d>, change: ChildChange<'_>) -> Result<()> {
        let options = self.vertex(owner.id).and_then(Vertex::node).ok_or_else(no_such_node)?.options;
        let Some(new) = self.body(owner.id)?.with_children(change)? else {
            let what = match change {
                ChildChange::Comes(..) => "adding",
                ChildChange::Goes(..) => "removing",
            };
            return Err(Error::new(format!("The node {} does not support {what} a child", self.name(owner.id))));
        };
        self.reconfigure(owner, new, options)
    }

    /// An edge from `parent` to `child` may not close a circle.
    fn check_descent(&self, parent: NodeId, edge: &str, child: NodeId) -> Result<()> {
        if self.above([parent]).contains(&child) {
            let (parent, child) = (self.name(parent), self.name(child));
            return Err(Error::new(format!("Making '{child}' a {edge} child of '{parent}' would create a cycle")));
        }
        Ok(())
    }

    fn check_depth(&self, changed: NodeId) -> Result<()> {
        if self.above([changed]).into_iter().any(|id| self.depth(id) > MAX_DEPTH + 1) {
            return Err(Error::new(format!("The graph may not be deeper than {MAX_DEPTH} nodes")));
        }
        Ok(())
    }
}

impl Vertex {
    /// The child that QMP calls `name`.
    pub(super) fn child_named(&self, name: &str) -> Option<ChildId> {
        let number = self.edges.iter().position(|edge| edge.name == name)?;
        Some(ChildId(u32::try_from(number).expect("a node has few children")))
    }
}
