//! Changes of a node's size. The node is drained with its ancestors, the driver prepares a new configuration, and that is
//! published.

use std::rc::Rc;

use super::blockers::Operation;
use super::control::Permit;
use super::driver::Preallocation;
use super::edit::NewRoot;
use super::id::NodeId;
use super::permission::{PermSet, Perms};
use crate::base::{Error, Result};

impl Permit {
    /// Changes a node's size, in bytes. Refused while somebody uses the node, or what it lies on, without bearing it.
    pub async fn resize(&mut self, id: NodeId, size: u64, preallocation: Preallocation) -> Result<()> {
        self.graph().check_operation(id, Operation::Resize)?;
        let target = self.size_of(id, size)?;
        // For as long as it takes, the resize is a user like any other: permissions and file locks follow from that.
        let perms = Perms { uses: PermSet::WRITE | PermSet::RESIZE, shares: PermSet::ALL };
        let user = NewRoot::new("block_resize".into(), perms, id, Rc::new(|_| ()));
        let (user, _) = self.add_root(user).await?;
        let result = self.truncate(target, preallocation).await;
        self.remove_root(user).await?;
        result
    }

    /// Who really changes size when `id` shall have `size`, and to what: filters and raw windows pass it on.
    fn size_of(&self, mut id: NodeId, mut size: u64) -> Result<(NodeId, u64)> {
        loop {
            let node = self.graph().borrow_body(id).ok_or_else(|| Error::new("There is no such node"))?;
            let Some((child, below)) = node.body.passes_size(size)? else { return Ok((id, size)) };
            let edge = self.graph().vertex(id, |vertex| vertex.edges.get(child.0 as usize).map(|edge| edge.to));
            id = edge.flatten().ok_or_else(|| Error::new("There is no such child"))?;
            size = below;
        }
    }

    async fn truncate(&mut self, (id, size): (NodeId, u64), preallocation: Preallocation) -> Result<()> {
        let mut drained = self.drain(&[id]).await?;
        let options = drained.graph().node(id).ok_or_else(|| Error::new("There is no such node"))?.options;
        let new = drained.exclusive(id)?.with(async |child| child.truncate(size, preallocation).await).await?;
        let committed = drained.write(|edit, set| edit.reconfigure(set.owner(id)?, new, options))?;
        committed.close(self).await;
        Ok(())
    }
}
