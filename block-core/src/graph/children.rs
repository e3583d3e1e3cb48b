//! Children that come and go while their parent is in use (QMP: `x-blockdev-change`).

use super::control::Permit;
use super::drain::Drained;
use super::id::{ChildId, NodeId};
use super::shape::Vertex;
use crate::base::Result;

impl Permit {
    /// One more child for `parent`, which is drained meanwhile. Its driver says what the edge is called.
    pub async fn add_child(&mut self, parent: NodeId, child: NodeId) -> Result<()> {
        let drained = self.drain(&[parent]).await?;
        let locks = drained.prepare(|edit, set| edit.add_child(set.owner(parent)?, child)).await?;
        let committed = drained.write(|edit, set| edit.add_child(set.owner(parent)?, child));
        drop(locks);
        committed?.close(self).await;
        Ok(())
    }

    /// Takes the child behind the edge `name` from `parent`. If it was defined inside its parent it goes, with what was
    /// defined inside it; its file and its lock are free when this returns.
    pub async fn remove_child(&mut self, parent: NodeId, name: &str) -> Result<()> {
        let family = self.graph().inline_child(parent, name);
        let of: Vec<_> = family.iter().copied().chain([parent]).collect();
        let mut drained = self.drain(&of).await?;
        // What cannot be done is said before anything is flushed.
        drop(drained.prepare(|edit, set| edit.remove_child(set.owner(parent)?, name)).await?);
        drained.flush_child(parent, name).await?;
        let committed = drained.write(|edit, set| {
            edit.remove_child(set.owner(parent)?, name)?;
            edit.remove_unused(&family)
        })?;
        committed.close(self).await;
        Ok(())
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

impl super::Graph {
    /// The child behind an edge and what goes with it; nothing where it was not defined in place.
    fn inline_child(&self, parent: NodeId, name: &str) -> Vec<NodeId> {
        let to = |child: ChildId| self.vertex(parent, |vertex| child.of(&vertex.edges).to);
        let child = self.child(parent, name).and_then(to);
        let inline = |id: &NodeId| {
            let is_inline = |vertex: &Vertex| vertex.node().is_some_and(|node| !node.explicit);
            self.vertex(*id, is_inline).unwrap_or(false)
        };
        child.filter(inline).map(|id| self.family(id)).unwrap_or_default()
    }
}
