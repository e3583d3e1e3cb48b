//! Changes of a node's size. The node is drained with its ancestors, the driver prepares a new configuration, and that is
//! published.

use std::sync::Arc;

use super::bitmaps::NodeBitmap;
use super::blockers::Operation;
use super::control::{Committed, Graph, NodeReport, Permit};
use super::drain::Drained;
use super::driver::{DynDriver, Preallocation};
use super::edit::{DrainedSet, GraphEdit, no_such_node};
use super::id::NodeId;
use super::options::NodeOptions;
use super::permission::{PermSet, Perms};
use super::prepare::Locks;
use super::shape::Kind;
use crate::base::{Error, Result, ResultExt};
use crate::bitmap::Bitmap;

/// A node under a new configuration and new common options, prepared and not published yet.
pub(super) type NewBody = (NodeId, Arc<dyn DynDriver>, NodeOptions);

impl Permit {
    /// Changes a node's size, in bytes. Refused while somebody uses the node, or what it lies on, without bearing it.
    pub async fn resize(&mut self, id: NodeId, size: u64, preallocation: Preallocation) -> Result<()> {
        self.graph().check_operation(id, Operation::Resize)?;
        self.graph().sizes_of(id, size)?;
        let perms = Perms { uses: PermSet::RESIZE, shares: PermSet::ALL };
        let work = async |permit: &mut Self, user| permit.truncate(user, id, size, preallocation).await;
        self.as_user("block_resize", perms, id, work).await
    }

    async fn truncate(&mut self, user: NodeId, id: NodeId, size: u64, preallocation: Preallocation) -> Result<()> {
        loop {
            let targets = self.graph().sizes_of(id, size)?;
            let nodes: Vec<_> = targets.iter().map(|(id, _)| *id).collect();
            let drained = self.drain(&nodes).await?;
            // The plan is checked again: while we waited, the way down may have been led elsewhere, or been shut.
            drained.graph().check_operation(id, Operation::Resize)?;
            if drained.graph().sizes_of(id, size)? == targets {
                let committed = drained.truncate(user, &targets, preallocation).await?;
                committed.close(self).await;
                return Ok(());
            }
        }
    }
}

impl Graph {
    /// Who really changes size when `id` shall have `size`, and to what: filters and raw windows pass it on, a quorum
    /// to all its children.
    fn sizes_of(&self, id: NodeId, size: u64) -> Result<Vec<(NodeId, u64)>> {
        let (mut targets, mut queue) = (Vec::new(), vec![(id, size)]);
        while let Some((id, size)) = queue.pop() {
            let node = self.borrow_body(id).ok_or_else(|| Error::new("There is no such node"))?;
            let below = node.body.passes_sizes(size)?;
            if below.is_empty() {
                targets.push((id, size));
            }
            for (child, size) in below {
                let edge = self.vertex(id, |vertex| vertex.edges.get(child.0 as usize).map(|edge| edge.to));
                queue.push((edge.flatten().ok_or_else(|| Error::new("There is no such child"))?, size));
            }
        }
        Ok(targets)
    }
}

impl Drained<'_> {
    /// Changes the sizes of all targets, or of none.
    async fn truncate(
        mut self,
        user: NodeId,
        targets: &[(NodeId, u64)],
        preallocation: Preallocation,
    ) -> Result<Committed<()>> {
        for report in targets.iter().filter_map(|(id, _)| self.graph().node(*id)) {
            report.bitmaps.iter().try_for_each(|bitmap| bitmap.check_usable())?;
        }
        // Users who would not have another size say so before anything is cut off; and they have to have it for good,
        // without the one who may resize.
        self.preview(|edit, _| {
            edit.suppose_gone(user)?;
            targets.iter().try_for_each(|(id, size)| edit.suppose_size(*id, *size))
        })?;
        for (id, size) in targets {
            self.check_kept(*id, *size).await?;
        }
        let before: Vec<_> = targets.iter().filter_map(|(id, _)| self.graph().node(*id)).collect();
        let mut ready = Vec::new();
        for (id, size) in targets {
            match self.truncated(*id, *size, preallocation).await {
                Ok(new) => ready.push(new),
                Err(error) => {
                    drop(ready);
                    return Err(self.undo_truncate(before, error).await);
                }
            }
        }
        // What they became need not be what was asked for, and may be refused.
        match self.locked_for(&ready).await {
            Ok(locks) => self.publish_all(ready, locks),
            Err(error) => {
                drop(ready);
                Err(self.undo_truncate(before, error).await)
            }
        }
    }

    /// An image that stores bitmaps can store them at the new size as well.
    async fn check_kept(&mut self, id: NodeId, size: u64) -> Result<()> {
        let report = self.graph().node(id).ok_or_else(no_such_node)?;
        let kept = report.bitmaps.iter().filter(|bitmap| bitmap.persistent);
        let kept = kept.map(|bitmap| match bitmap.inconsistent {
            true => Ok(bitmap.clone()),
            false => Ok(NodeBitmap { bits: Arc::new(Bitmap::new(size, bitmap.bits.granularity())?), ..bitmap.clone() }),
        });
        let kept = kept.collect::<Result<Vec<_>>>()?;
        if kept.is_empty() {
            return Ok(());
        }
        let keeping = self.exclusive(id)?.with(async |child| child.keep_bitmaps(&kept).await).await;
        keeping.doing(|| format!("The bitmaps of '{}' cannot have a disk of {size} bytes", report.name))
    }

    /// Publishes what has been prepared for several nodes, with the locks that it needs.
    pub(super) async fn reconfigured(self, ready: Vec<NewBody>) -> Result<Committed<()>> {
        let leaving = self.preview(|edit, set| reconfigure_all(edit, set, &ready))?;
        self.calm(leaving.calmed).await;
        let locks = self.locked_for(&ready).await?;
        self.publish_all(ready, locks)
    }

    /// Nothing is in the way of publishing, as long as the caller does not wait for anything else.
    async fn locked_for(&self, ready: &[NewBody]) -> Result<Locks> {
        self.prepare(|edit, set| reconfigure_all(edit, set, ready)).await
    }

    fn publish_all(self, ready: Vec<NewBody>, locks: Locks) -> Result<Committed<()>> {
        let committed = self.write(|edit, set| {
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

    /// Gives nodes the size back that they had. What was cut off is gone from them, and reads as zeroes.
    async fn undo_truncate(&mut self, before: Vec<NodeReport>, why: Error) -> Error {
        for report in before {
            if let Err(error) = self.truncated(report.id, report.geometry.size, Preallocation::Off).await {
                tracing::error!("{} could not be given its size back: {}", report.name, error.full());
            }
        }
        why
    }
}

impl GraphEdit<'_> {
    /// Lets a root do nothing.
    pub(super) fn suppose_gone(&mut self, root: NodeId) -> Result<()> {
        let vertex = self.vertex_mut(root)?;
        let nodes: Vec<_> = vertex.edges.iter().map(|edge| edge.to).collect();
        vertex.edges.iter_mut().for_each(|edge| edge.perms = Perms::IDLE);
        self.perms_dirty.extend(nodes);
        Ok(())
    }

    /// Lets a node have a size for which there is no configuration yet: to see what its parents say.
    pub(super) fn suppose_size(&mut self, id: NodeId, size: u64) -> Result<()> {
        let vertex = self.vertex_mut(id)?;
        let parents = vertex.parents.clone();
        let Kind::Node(parts) = &mut vertex.kind else { return Err(no_such_node()) };
        parts.geometry.size = size;
        parts.is_supposed = true;
        parts.resize_bitmaps()?;
        self.supposed.insert(id, size);
        self.geometry_dirty.extend(parents);
        Ok(())
    }
}

fn reconfigure_all<'d>(edit: &mut GraphEdit<'d>, set: DrainedSet<'d>, all: &[NewBody]) -> Result<()> {
    all.iter().try_for_each(|(id, body, options)| edit.reconfigure(set.owner(*id)?, body.clone(), *options))
}
