//! What a change does to edges: lead elsewhere, come, go. Only below owners that are proven drained.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::edit::{DrainedSet, GraphEdit, Owner, no_such_node};
use super::id::{ChildId, NodeId};
use super::permission::Role;
use super::shape::{Edge, Kind, MAX_DEPTH, Vertex, Vertices};
use crate::base::{Error, Result};

impl<'d> GraphEdit<'d> {
    /// Lets `child` of a drained owner lead to another node.
    pub fn set_edge(&mut self, owner: Owner<'d>, child: ChildId, to: NodeId) -> Result<()> {
        self.check_descent(owner.id, to)?;
        let old = self.thawed(owner.id, child)?;
        self.vertex_mut(to)?.parents.push(owner.id);
        self.unlink(old, owner.id)?;
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
        self.check_descent(owner.id, to)?;
        self.vertex_mut(to)?.parents.push(owner.id);
        self.vertex_mut(owner.id)?.edges.push(Edge::new(name.into(), to, role));
        self.perms_dirty.insert(to);
        self.name_children(owner)?;
        self.check_depth(owner.id)
    }

    /// Takes a child from a drained owner whose driver lets them go. The children after it move up.
    pub fn remove_child(&mut self, owner: Owner<'d>, child: ChildId) -> Result<()> {
        let gone = self.thawed(owner.id, child)?;
        self.vertex_mut(owner.id)?.edges.remove(child.0 as usize);
        self.unlink(gone, owner.id)?;
        self.name_children(owner)
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

    /// Where an edge leads that nobody wants to stay as it is.
    fn thawed(&self, parent: NodeId, child: ChildId) -> Result<NodeId> {
        let vertex = self.vertex(parent).ok_or_else(no_such_node)?;
        let edge = vertex.edges.get(child.0 as usize).ok_or_else(|| Error::new("There is no such child"))?;
        if edge.frozen.get() > 0 {
            let (from, to) = (vertex.described(), self.described(edge.to));
            return Err(Error::new(format!("Cannot change frozen '{}' link from {from} to {to}", edge.name)));
        }
        Ok(edge.to)
    }

    /// Tells the driver which children it has now.
    fn name_children(&mut self, owner: Owner<'d>) -> Result<()> {
        let vertex = self.vertex_mut(owner.id)?;
        let names: Vec<_> = vertex.edges.iter().map(|edge| edge.name.clone()).collect();
        let Kind::Node(parts) = &mut vertex.kind else { return Err(no_such_node()) };
        let (new, options) = (parts.body.with_children(&names)?, parts.options);
        self.reconfigure(owner, new, options)
    }

    /// An edge from `parent` to `child` may not close a circle.
    fn check_descent(&self, parent: NodeId, child: NodeId) -> Result<()> {
        if self.above([parent]).contains(&child) {
            return Err(Error::new(format!("{} would become its own child", self.described(child))));
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
