//! Changes of a node's size. The node is drained with its ancestors, the driver prepares a new configuration, and that is
//! published.

use std::rc::Rc;
use std::sync::Arc;

use super::blockers::Operation;
use super::control::{Committed, Permit};
use super::drain::Drained;
use super::driver::{DynDriver, Preallocation};
use super::edit::{DrainedSet, GraphEdit, NewRoot, no_such_node};
use super::id::NodeId;
use super::options::NodeOptions;
use super::permission::{PermSet, Perms};
use super::shape::Kind;
use crate::base::{Error, Result};

/// A node under a new configuration and new common options, prepared and not published yet.
pub(super) type NewBody = (NodeId, Arc<dyn DynDriver>, NodeOptions);

impl Permit {
    /// Changes a node's size, in bytes. Refused while somebody uses the node, or what it lies on, without bearing it.
    pub async fn resize(&mut self, id: NodeId, size: u64, preallocation: Preallocation) -> Result<()> {
        self.graph().check_operation(id, Operation::Resize)?;
        let targets = self.sizes_of(id, size)?;
        // For as long as it takes, the resize is a user like any other: permissions and file locks follow from that.
        let perms = Perms { uses: PermSet::RESIZE, shares: PermSet::ALL };
        let user = NewRoot::new("block_resize".into(), perms, id, Rc::new(|_| ()));
        let (user, _) = self.add_root(user).await?;
        let result = self.truncate(user, &targets, preallocation).await;
        self.remove_root(user).await?;
        result
    }

    /// Who really changes size when `id` shall have `size`, and to what: filters and raw windows pass it on, a quorum
    /// to all its children.
    fn sizes_of(&self, id: NodeId, size: u64) -> Result<Vec<(NodeId, u64)>> {
        let (mut targets, mut queue) = (Vec::new(), vec![(id, size)]);
        while let Some((id, size)) = queue.pop() {
            let node = self.graph().borrow_body(id).ok_or_else(|| Error::new("There is no such node"))?;
            let below = node.body.passes_sizes(size)?;
            if below.is_empty() {
                targets.push((id, size));
            }
            for (child, size) in below {
                let edge = self.graph().vertex(id, |vertex| vertex.edges.get(child.0 as usize).map(|edge| edge.to));
                queue.push((edge.flatten().ok_or_else(|| Error::new("There is no such child"))?, size));
            }
        }
        Ok(targets)
    }

    async fn truncate(&mut self, user: NodeId, targets: &[(NodeId, u64)], preallocation: Preallocation) -> Result<()> {
        let nodes: Vec<_> = targets.iter().map(|(id, _)| *id).collect();
        let mut drained = self.drain(&nodes).await?;
        // Users who would not have another size say so before anything is cut off; and they have to have it for good,
        // without the one who may resize.
        drained.preview(|edit, _| {
            edit.suppose_gone(user)?;
            targets.iter().try_for_each(|(id, size)| edit.suppose_size(*id, *size))
        })?;
        let mut ready = Vec::new();
        for (id, size) in targets {
            match drained.truncated(*id, *size, preallocation).await {
                Ok(new) => ready.push(new),
                Err(error) => {
                    drained.undo_truncate(&nodes[..ready.len()]).await;
                    return Err(error);
                }
            }
        }
        let committed = drained.write(|edit, set| reconfigure_all(edit, set, &ready))?;
        drop(ready);
        committed.close(self).await;
        Ok(())
    }
}

impl Drained<'_> {
    /// Publishes what has been prepared for several nodes, with the locks that it needs.
    pub(super) async fn reconfigured(self, ready: Vec<NewBody>) -> Result<Committed<()>> {
        let drained = self;
        let locks = drained.prepare(|edit, set| reconfigure_all(edit, set, &ready)).await?;
        let committed = drained.write(|edit, set| {
            let result = reconfigure_all(edit, set, &ready);
            drop(ready);
            result
        });
        drop(locks);
        committed
    }

    /// A node's configuration at another size, which it has already.
    async fn truncated(&mut self, id: NodeId, size: u64, preallocation: Preallocation) -> Result<NewBody> {
        let options = self.graph().node(id).ok_or_else(|| Error::new("There is no such node"))?.options;
        let new = self.exclusive(id)?.with(async |child| child.truncate(size, preallocation).await).await?;
        Ok((id, new, options))
    }

    /// Gives nodes the size back that the graph knows. What was cut off is gone from them, and reads as zeroes.
    async fn undo_truncate(&mut self, nodes: &[NodeId]) {
        for id in nodes {
            let Some(report) = self.graph().node(*id) else { continue };
            if let Err(error) = self.truncated(*id, report.geometry.size, Preallocation::Off).await {
                tracing::error!("{} could not be given its size back: {}", report.name, error.full());
            }
        }
    }
}

impl GraphEdit<'_> {
    /// Lets a root do nothing.
    fn suppose_gone(&mut self, root: NodeId) -> Result<()> {
        let vertex = self.vertex_mut(root)?;
        let nodes: Vec<_> = vertex.edges.iter().map(|edge| edge.to).collect();
        vertex.edges.iter_mut().for_each(|edge| edge.perms = Perms::IDLE);
        self.perms_dirty.extend(nodes);
        Ok(())
    }

    /// Lets a node have a size for which there is no configuration yet: to see what its parents say.
    fn suppose_size(&mut self, id: NodeId, size: u64) -> Result<()> {
        let vertex = self.vertex_mut(id)?;
        let parents = vertex.parents.clone();
        let Kind::Node(parts) = &mut vertex.kind else { return Err(no_such_node()) };
        parts.geometry.size = size;
        parts.resize_bitmaps()?;
        self.geometry_dirty.extend(parents);
        Ok(())
    }
}

fn reconfigure_all<'d>(edit: &mut GraphEdit<'d>, set: DrainedSet<'d>, all: &[NewBody]) -> Result<()> {
    all.iter().try_for_each(|(id, body, options)| edit.reconfigure(set.owner(*id)?, body.clone(), *options))
}
