//! Whether the users of each node agree on what is done to it: what a change makes of their permissions, and of those of
//! the nodes below.

use std::collections::BTreeSet;

use super::edit::GraphEdit;
use super::geometry::Geometry;
use super::id::{ChildId, NodeId};
use super::permission::{PermSet, Perms};
use super::shape::{Kind, Vertex, Vertices};
use crate::base::{Error, Result, is_aligned};

impl GraphEdit<'_> {
    /// From the changed vertices down, parents first: what all parents together use and bear, whether they agree, and
    /// what that asks of the children.
    pub(super) fn refresh_permissions(&mut self) -> Result<()> {
        let dirty = std::mem::take(&mut self.perms_dirty);
        let mut changed = dirty.clone();
        for id in self.below(dirty) {
            if !changed.contains(&id) {
                continue;
            }
            if self.vertex(id).is_some_and(|vertex| vertex.node().is_some()) {
                let perms = self.check_users(id)?;
                self.vertex_mut(id)?.perms = perms;
                changed.extend(self.pass_down(id)?);
            }
        }
        Ok(())
    }

    fn check_users(&self, id: NodeId) -> Result<Perms> {
        let users = self.users(id);
        if let Some((user, other, refused)) = conflict(&users) {
            return Err(Error::new(format!(
                "Permission conflict on {}: '{refused}' is used by {} and not shared by {}",
                self.described(id),
                user.described(),
                other.described(),
            )));
        }
        let perms = users.iter().fold(Perms::IDLE, |sum, (_, perms)| sum.and(*perms));
        self.check_read_only(id, perms)?;
        Ok(perms)
    }

    /// Each edge that leads here, with the vertex it starts from.
    fn users(&self, id: NodeId) -> Vec<(&Vertex, Perms)> {
        let parents: BTreeSet<_> =
            self.vertex(id).into_iter().flat_map(|vertex| vertex.parents.iter().copied()).collect();
        let vertices = parents.into_iter().filter_map(|parent| self.vertex(parent));
        vertices
            .flat_map(|vertex| {
                let edges = vertex.edges.iter().filter(|edge| edge.to == id);
                edges.map(move |edge| (vertex, edge.perms))
            })
            .collect()
    }

    fn check_read_only(&self, id: NodeId, perms: Perms) -> Result<()> {
        let options = self.vertex(id).and_then(Vertex::node).map(|node| node.options).unwrap_or_default();
        let changes = perms.uses.without(PermSet::CONSISTENT_READ);
        if changes.is_empty() || (!options.read_only && options.active) {
            return Ok(());
        }
        let state = if options.read_only { "read-only" } else { "inactive" };
        Err(Error::new(format!("Block {} is {state}", self.described(id))))
    }

    /// What the node's children have to allow now; returns those for which that is something new.
    fn pass_down(&mut self, id: NodeId) -> Result<Vec<NodeId>> {
        let vertex = self.vertex_mut(id)?;
        let Kind::Node(parts) = &vertex.kind else { return Ok(Vec::new()) };
        let (body, options, above) = (parts.body.clone(), parts.options, vertex.perms);
        let writable = !options.read_only && options.active;
        let mut changed = Vec::new();
        for (number, edge) in vertex.edges.iter_mut().enumerate() {
            let child = ChildId(u32::try_from(number).expect("a node has few children"));
            let mut perms = body.child_perms(child, edge.role, above, writable);
            if options.force_share {
                perms.shares = PermSet::ALL;
            }
            if !options.active {
                perms = edge.role.of_inactive(perms);
            }
            if perms != edge.perms {
                edge.perms = perms;
                changed.push(edge.to);
            }
        }
        Ok(changed)
    }

    /// Whoever writes to a node whose last block is not complete, would write past its end: only who may resize it does.
    /// Each user of the node is asked for himself, and nobody who does no more than before: others can always leave.
    pub(super) fn check_tails(&self) -> Result<()> {
        for (id, vertex) in self.touched.iter().filter_map(|(id, vertex)| Some((*id, vertex.as_ref()?))) {
            let Some(Geometry { size, limits }) = vertex.node().map(|node| node.geometry) else { continue };
            let unit = limits.request_alignment;
            if is_aligned(size, unit.into()) {
                continue;
            }
            if let Some(user) = vertex.parents.iter().find(|user| self.reaches_past_the_end(**user, id)) {
                return Err(Error::new(format!(
                    "Cannot get 'write' permission without 'resize': {} would write past the end of {}, whose size ({size}) \
                     is not a multiple of its request alignment ({unit})",
                    self.described(*user),
                    vertex.described(),
                )));
            }
        }
        Ok(())
    }

    fn reaches_past_the_end(&self, user: NodeId, node: NodeId) -> bool {
        let edges = |vertex: Option<&Vertex>| {
            let edges = vertex.into_iter().flat_map(|vertex| &vertex.edges).filter(|edge| edge.to == node);
            edges.map(|edge| edge.perms.uses).collect::<Vec<_>>()
        };
        let geometry = |vertex: Option<&Vertex>| Some(vertex?.node()?.geometry);
        let is_as_before = geometry(self.base.vertex(node)) == geometry(self.vertex(node));
        let before = edges(self.base.vertex(user));
        edges(self.vertex(user)).into_iter().any(|uses| {
            let writes = !(uses & (PermSet::WRITE | PermSet::WRITE_UNCHANGED)).is_empty();
            let is_new = !is_as_before || !before.iter().any(|before| before.contains(uses));
            writes && !uses.contains(PermSet::RESIZE) && is_new
        })
    }
}

/// A user who does what another one does not bear. A pass for each permission: a node may have very many users.
fn conflict<'v>(users: &[(&'v Vertex, Perms)]) -> Option<(&'v Vertex, &'v Vertex, PermSet)> {
    PermSet::ALL.bits().find_map(|(_, one)| {
        let who = |is: fn(Perms, PermSet) -> bool| {
            users.iter().enumerate().filter(move |(_, (_, perms))| is(*perms, one)).map(|(number, _)| number).take(2)
        };
        // Nobody has to bear himself: where both are the same user, one of the sides may have a second one.
        let refusing: Vec<_> = who(|perms, one| !perms.shares.contains(one)).collect();
        let mut using = who(|perms, one| perms.uses.contains(one));
        using.find_map(|user| {
            let other = refusing.iter().find(|other| **other != user)?;
            Some((users[user].0, users[*other].0, one))
        })
    })
}
